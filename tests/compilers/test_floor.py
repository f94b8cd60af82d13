"""The oldest onnxruntime that we say takes a graph takes it, and gives the logits of the newest."""

import pytest
from exported_models import RECIPES, assert_alike, rounds_while_it_runs, settings

from compress.runtime.runtimes import INT4_TABLE, NARROW_STATES, ONNXRUNTIME

pytestmark = pytest.mark.compilers


@pytest.fixture(scope="module", params=[ONNXRUNTIME, NARROW_STATES, INT4_TABLE])
def at_the_floor(request, from_environment, run_elsewhere, recipes, variants) -> dict[str, dict]:
    """Logits of all graphs whose minimum is this version."""
    many = {name: one for name, one in (recipes | variants).items() if one.minimum("onnxruntime") == request.param}
    assert many
    python = from_environment("COMPRESS_FLOORS") / request.param / "bin" / "python"
    version, logits = run_elsewhere(python, many, "1")
    assert version.startswith(f"{request.param}.")
    return logits


def test_every_graph_runs_at_its_floor(recipes, variants, at_the_floor):
    for name, logits in at_the_floor.items():
        assert_alike(logits, (recipes | variants)[name].logits, rounds_while_it_runs(name), name)


def test_every_recipe_and_format_has_a_floor(recipes, variants):
    assert {*recipes} == {*RECIPES} and {*variants} == {*settings()}
    assert {one.minimum("onnxruntime") for one in (recipes | variants).values()} == {
        ONNXRUNTIME,
        NARROW_STATES,
        INT4_TABLE,
    }

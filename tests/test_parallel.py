"""The same bytes on any number of threads: what pieces give, and whole runs."""

import hashlib
import threading
from pathlib import Path

import pytest
import torch
import yaml
from jamba_models import make_jamba
from nemotron_h_models import make_nemotron_h

from compress import parallel
from compress.apply import pipeline
from compress.errors import InputError
from compress.model import weight as model
from compress.passes.quantization import cholesky
from compress.recipe.recipe import load_recipe
from compress.recipe.source import resolve
from compress.runtime.inference import HiddenStates

THREADS = (1, 2, 3)
PRUNED = [{"prune_experts": {"keep": 3}}]
CALIBRATED = [
    *PRUNED,
    {
        "quantize": {
            "method": "gptq",
            "weights": "int4-g32",
            "roles": {"lm_head": "int8", "embedding": "int8-tensor"},
            "activations": "static-int8",
            "activation_roles": {"ssm_out": "static-int8"},
            "activation_range": "mse",
            "rotate": ["ssm_out"],
            "equalize": 0.5,
        }
    },
]
TO_NEAREST = [{"quantize": {"weights": "int8-tensor", "roles": {"mlp": "int4-g32"}, "clip": "mse"}}]


NEMOTRON_H = {
    "layers_block_type": "ME*", "hidden_size": 160, "intermediate_size": 224, "mamba_num_heads": 10, "mamba_head_dim": 32,
    "n_groups": 2, "ssm_state_size": 16, "moe_intermediate_size": 224, "moe_shared_expert_intermediate_size": 192,
    "moe_latent_size": 96, "n_routed_experts": 4, "vocab_size": 320,
}  # fmt: skip


@pytest.fixture
def threads():
    """Sets how many threads torch has; as before afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def many_pieces(monkeypatch):
    """Pieces so small that the matrices of a test are cut into several."""
    for name, value in (("PIECE", 1 << 14), ("LEAST_ROWS", 16), ("TILE", 48)):
        monkeypatch.setattr(parallel, name, value)
    monkeypatch.setattr(model, "BLOCK_BYTES", 1 << 14)


@pytest.fixture(scope="module", params=["jamba", "nemotron_h"])
def wide(request, tmp_path_factory) -> Path:
    """A random float32 model whose matrices are wide enough for torch to give every thread a part."""
    if request.param == "nemotron_h":
        return make_nemotron_h(tmp_path_factory.mktemp("wide"), torch.float32, **NEMOTRON_H)
    shape = {"hidden_size": 160, "num_attention_heads": 5, "num_key_value_heads": 1, "intermediate_size": 224}
    moe = {"num_hidden_layers": 2, "num_experts": 4, "expert_layer_period": 2, "mamba_d_state": 16}
    return make_jamba(tmp_path_factory.mktemp("wide"), torch.float32, **shape, **moe, vocab_size=320)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def digests(source: Path, folder: Path, passes: list, patch: pytest.MonkeyPatch) -> list[str]:
    """sha256 of every shard, and before them of all that layers hand on: there the last digits show, in the shards only
    what they made round the other way. With a cache of its own, so that text is sampled anew."""
    folder.mkdir()
    patch.setenv("COMPRESS_CACHE", str(folder / "cache"))
    found, write = [], HiddenStates.write

    def noting(self: HiddenStates, number: int, hidden: torch.Tensor) -> None:
        found.append(hashlib.sha256(hidden.numpy().tobytes()).hexdigest())
        write(self, number, hidden)

    patch.setattr(HiddenStates, "write", noting)
    recipe = {"version": 1, "calibration": {"prompts": ["self"], "samples": 5, "length": 64}, "passes": passes}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    loaded = load_recipe(str(folder / "recipe.yaml"))
    pipeline.apply(pipeline.Job(loaded, resolve(str(source)), folder / "out"))
    patch.setattr(HiddenStates, "write", write)
    shards = sorted((folder / "out" / "checkpoint").glob("*.safetensors"))
    return found + [hashlib.sha256(shard.read_bytes()).hexdigest() for shard in shards]


@pytest.mark.parametrize("passes", [PRUNED, CALIBRATED, TO_NEAREST], ids=["pruned", "calibrated", "to nearest"])
@pytest.mark.parametrize("pieces", ["as they are", "many"])
def test_a_run_writes_the_same_bytes_on_any_number_of_threads(
    request, wide, tmp_path, threads, monkeypatch, passes, pieces
):
    if pieces == "many":
        request.getfixturevalue("many_pieces")
    found = []
    for count in THREADS:
        threads(count)
        found.append(digests(wide, tmp_path / str(count), passes, monkeypatch))
        assert torch.get_num_threads() == count  # as the caller had set it
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("shape", [(3, 50, 96), (7, 96), (0, 96), (200, 96)])
def test_a_product_in_pieces_is_the_product(many_pieces, threads, shape):
    x, weight, bias = normal(*shape), normal(130, 96, seed=1), normal(130, seed=2)
    found = []
    for count in THREADS:
        threads(count)
        with parallel.steady():
            found.append(parallel.linear(x, weight, bias))
    expected = x.double() @ weight.double().T + bias
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=1e-4)
    assert found[0].shape == expected.shape
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("width", [20, 96, 130])
def test_second_moments_and_products_add_up_in_tiles(many_pieces, threads, width):
    threads(2)
    x, y = normal(300, width), normal(300, 50, seed=1)
    moments, cross = torch.zeros(width, width), torch.zeros(width, 50)
    with parallel.steady():
        for rows in x.split(100):
            parallel.add_moments(moments, rows)
        for rows, others in zip(x.split(100), y.split(100), strict=True):
            parallel.add_product(cross, rows, others)
    moments = parallel.mirror(moments)
    torch.testing.assert_close(moments.double(), x.double().T @ x.double(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(cross.double(), x.double().T @ y.double(), rtol=1e-5, atol=1e-4)
    assert torch.equal(moments, moments.T)


@pytest.mark.parametrize("width", [1, 48, 130])
def test_the_factor_of_the_inverse_is_found_in_tiles(many_pieces, width):
    x = normal(400, width).double()
    matrix = x.T @ x
    factor = cholesky.inverse_factor(matrix)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor @ matrix, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-9)
    matrix[width // 2, width // 2] = -1
    assert cholesky.inverse_factor(matrix) is None


def test_pieces_run_side_by_side_on_one_thread_of_torch_each_and_keep_their_order(threads):
    threads(3)
    meet = threading.Barrier(3, timeout=30)  # passes only where three run at once

    def piece(number: int) -> tuple[int, int, bool]:
        meet.wait()
        return number, torch.get_num_threads(), torch.is_inference_mode_enabled()

    with parallel.steady(), torch.inference_mode():
        assert parallel.each(piece, range(3)) == [(n, 1, True) for n in range(3)]
    assert [parallel.each(str, range(3)), torch.get_num_threads()] == [["0", "1", "2"], 3]


def test_what_fails_in_a_piece_is_raised_and_threads_are_as_before(threads):
    threads(2)
    done = []

    def piece(number: int) -> None:
        if number == 2:
            raise InputError("the third")
        done.append(number)

    with pytest.raises(InputError, match="the third"), parallel.steady(), parallel.steady():
        parallel.each(piece, range(10_000))
    assert len(done) < 10_000
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    with parallel.steady():
        assert parallel.each(str, range(2)) == ["0", "1"]


def test_pieces_are_not_cut_again(many_pieces, threads):
    """Else a piece would give other digits where it runs on the caller's thread."""
    threads(2)
    x, weight = normal(64, 96), normal(130, 96, seed=1)
    with parallel.steady():
        inside = parallel.each(lambda _: parallel.each(lambda _: threading.get_ident(), range(4)), range(2))
        whole = parallel.each(lambda _: parallel.linear(x, weight), range(2))[0]
    assert all(len(set(idents)) == 1 for idents in inside)
    assert torch.equal(whole, torch.nn.functional.linear(x, weight))

"""What a check says of states while windows are decoded: their size beside the original's, and what saturates."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from jamba_models import load_reference
from safetensors.torch import load_file, save_file
from state_models import with_states
from torch._subclasses import FakeTensorMode

from compress.apply import exporting
from compress.check import states
from compress.check.judge import check
from compress.checkpoint.reader import Checkpoint
from compress.recipe.check import Check
from compress.runtime.artifacts import open_artifact
from compress.runtime.kept import Kept

STATIC = {"format": "int8", "scale": "static"}
SSM, ATTENTION = (0, 1, 3, 4, 5), (2,)
LENGTHS = (72, 68, 72, 40)  # of windows: ranges 0-63 and 64-255 are looked at after tokens 63 and 70 (66; 38)


@pytest.fixture
def windows(monkeypatch) -> list[torch.Tensor]:
    """Those that checks use here: of any text."""
    generator = torch.Generator().manual_seed(5)
    found = [torch.randint(3, 60, (length,), generator=generator) for length in LENGTHS]
    given = states.PromptSet("given", found)
    monkeypatch.setattr("compress.prompts.load_all", lambda *_, **__: [given])
    return found


def shorten(windows) -> None:
    windows[:] = [window[:24] for window in windows[:3]]


def checked(original: Path, candidate: Path, **settings):
    """The figures of a check of the windows above."""
    settings = Check.model_validate({"prompts": ["self"], "samples": 2, "length": 300, **settings})
    return check(open_artifact(original), {"it": candidate}, settings, seed=0)[0]


def onnx_of(checkpoint: Path, folder: Path) -> Path:
    return exporting.export_checkpoint(checkpoint, "onnx", folder / "onnx") / "model.onnx"


def by_hand(small: Path, windows, positions) -> dict[tuple[int, str, int], float]:
    """Root mean squares of transformers' states after the tokens up to the positions [window, range], by layer and kind."""
    model, found = load_reference(small), {}
    for number in range(max(map(len, positions))):
        values: dict[tuple[int, str], list[np.ndarray]] = {}
        for window, ends in zip(windows, positions, strict=True):
            if number >= len(ends):
                continue
            with torch.no_grad():
                cache = model(window[None, : ends[number] + 1], use_cache=True).past_key_values
            for layer in SSM:
                values.setdefault((layer, "ssm_state"), []).append(cache.layers[layer].recurrent_states[0])
                values.setdefault((layer, "conv_state"), []).append(cache.layers[layer].conv_states[0][..., -3:])
            for layer in ATTENTION:
                values.setdefault((layer, "kv_cache"), []).extend(
                    [cache.layers[layer].keys, cache.layers[layer].values]
                )
        last = max(ends[number] for ends in positions if number < len(ends))
        for key, tensors in values.items():
            flat = np.concatenate([tensor.double().numpy().ravel() for tensor in tensors])
            found[(*key, last)] = math.sqrt(np.mean(flat**2))
    return found


@pytest.mark.parametrize("kind", ["checkpoint", "onnx"])
def test_sizes_of_states_are_those_of_the_model(small, windows, tmp_path, kind):
    candidate = small if kind == "checkpoint" else onnx_of(small, tmp_path)
    rows = checked(small, candidate, states=True).state_health
    expected = by_hand(small, windows, [(63, 70), (63, 66), (63, 70), (38,)])
    assert {(row["layer"], row["kind"], row["position"]) for row in rows} == expected.keys()
    for row in rows:
        rms = expected[row["layer"], row["kind"], row["position"]]
        assert row["rms"] == pytest.approx(rms, rel=1e-3)  # two ways to compute a random model in float32
        assert row["baseline_rms"] == pytest.approx(rms, rel=1e-3)
        assert row["ratio"] == pytest.approx(1, abs=2e-3)


def test_after_a_prompt_states_are_looked_at_where_tokens_were_decoded(small, windows):
    rows = checked(small, small, states=True, prefill=66).state_health
    expected = by_hand(small, windows[:3], [(70,), (66,), (70,)])
    assert {row["position"] for row in rows} == {70}
    for row in rows:
        assert row["baseline_rms"] == pytest.approx(expected[row["layer"], row["kind"], 70], rel=1e-3)
        assert row["ratio"] == pytest.approx(1, abs=1e-4)


def test_states_that_a_graph_makes_twice_as_large_show_in_their_layer(small, windows, tmp_path):
    path = onnx_of(small, tmp_path)
    graph = onnx.load(path, load_external_data=False)
    name = "present.3.recurrent_state"
    for node in graph.graph.node:
        for place, output in enumerate(node.output):
            if output == name:
                node.output[place] = "as_it_was"
    graph.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(2), "two"))
    graph.graph.node.append(onnx.helper.make_node("Mul", ["as_it_was", "two"], [name]))
    path.write_bytes(graph.SerializeToString())
    rows = checked(small, path, states=True).state_health
    worst = {row["layer"] for row in rows if row["kind"] == "ssm_state" and row["ratio"] > 1.9}
    assert 3 in worst
    assert all(row["ratio"] == pytest.approx(1, abs=2e-3) for row in rows if row["layer"] < 3)


# --- saturation


def codes_by_hand(path: Path, ids: np.ndarray) -> dict[tuple[int, str], list[int]]:
    """[entries, entries at +-127] of a graph's int8 states, decoded token by token in onnxruntime."""
    session = ort.InferenceSession(path)
    past = {
        value.name: np.zeros([len(ids), *(size if isinstance(size, int) else 0 for size in value.shape[1:])], np.int8)
        for value in session.get_inputs()
        if value.name.startswith("past")
    }
    outputs = [name.replace("past_key_values", "present") for name in past]
    counts: dict[tuple[int, str], list[int]] = {}
    for token in range(ids.shape[1] - 1):
        mask = np.ones((len(ids), token + 1), np.int64)
        present = session.run(outputs, past | {"input_ids": ids[:, token : token + 1], "attention_mask": mask})
        past = dict(zip(past, present, strict=True))
        for name, value in past.items():
            _, layer, state = name.split(".")
            if state in ("recurrent_state", "conv_state") or token == ids.shape[1] - 2:
                kind = {"recurrent_state": "ssm_state", "conv_state": "conv_state"}.get(state, "kv_cache")
                count = counts.setdefault((int(layer), kind), [0, 0])
                count[0] += value.size
                count[1] += int((np.abs(value.astype(int)) == 127).sum())
    return counts


@pytest.fixture(scope="module")
def saturating(small, tmp_path_factory) -> Path:
    """Static scales of int8 states, those of layer 3 a fifth of what they should be: what a calibration gives that saw none of
    what comes."""
    folder = with_states(small, tmp_path_factory.mktemp("static") / "it", dict.fromkeys(
        ("recurrent_state", "conv_state", "key", "value"), STATIC))  # fmt: skip
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.3.states.recurrent_state.scale"
    save_file(tensors | {name: tensors[name] / 5}, path, metadata={"format": "pt"})
    return folder


def test_entries_at_the_largest_code_are_counted_at_every_token(small, saturating, windows, tmp_path):
    shorten(windows)
    path = onnx_of(saturating, tmp_path)
    rows = checked(small, path).state_saturation
    expected: dict[tuple[int, str], list[int]] = {}
    for window in windows:
        for key, count in codes_by_hand(path, window[None].numpy()).items():
            total = expected.setdefault(key, [0, 0])
            total[0], total[1] = total[0] + count[0], total[1] + count[1]
    assert {(row["layer"], row["kind"]): [row["entries"], row["saturated"]] for row in rows} == expected
    assert all(row["share"] == row["saturated"] / row["entries"] for row in rows)
    assert {(row["format"], row["scale"]) for row in rows} == {("int8", "static")}
    (planted,) = (row for row in rows if (row["layer"], row["kind"]) == (3, "ssm_state"))
    others = [row["share"] for row in rows if row["kind"] == "ssm_state" and row["layer"] != 3]
    assert planted["share"] > 2 * max(others), (planted, others)


def test_a_checkpoint_saturates_as_its_graph_does(small, saturating, windows, tmp_path):
    shorten(windows)
    in_graph, own = (checked(small, it) for it in (onnx_of(saturating, tmp_path), saturating))
    for row, other in zip(own.state_saturation, in_graph.state_saturation, strict=True):
        assert [row[key] for key in ("layer", "kind", "entries")] == [
            other[key] for key in ("layer", "kind", "entries")
        ]
        assert row["saturated"] == pytest.approx(other["saturated"], rel=0.02, abs=5)  # roundings that fall otherwise
    for row, other in zip(own.state_health, in_graph.state_health, strict=True):
        assert row["rms"] == pytest.approx(other["rms"], rel=0.03)  # as above; scales stand in the file of either
    (worst,) = (row["ratio"] for row in in_graph.state_health if (row["layer"], row["kind"]) == (3, "ssm_state"))
    assert worst < 0.9, "what saturates is smaller than it was"


def heard(small, folder, settings, make) -> dict[str, states.SaturationFacts]:
    """What is said of the states of layer 0 once they are as `make` says, by kind."""
    model = Checkpoint(with_states(small, folder, settings, layers=(0,))).model
    layer = model.layer(0)
    stored = {spec.name: make(spec) for spec in layer.states}
    watch = states.Watch(states.Places(0, 1))
    scales = type("Scales", (), {"__call__": lambda _, name: torch.full(layer.states[0].scale_shape, 0.5)})()
    watch.hear(Kept(layer, [0], 5, 9, stored, scales))
    return {row["kind"]: row for row in watch.saturation("it")}


def entries(spec, *first) -> torch.Tensor:
    """Ones, but for the first entries."""
    found = torch.ones(1, *spec.stored_shape).flatten()
    found[: len(first)] = torch.tensor(first)
    return found.view(1, *spec.stored_shape).to(spec.precision.dtype)


@pytest.mark.parametrize("settings", [STATIC, {"format": "fp8-e4m3", "scale": "static"}, {"format": "bf16"}])
def test_states_on_another_device_are_counted_there(small, tmp_path, settings):
    """On a device without numbers, of which torch knows only that tensors of two devices do not mix: a GPU, where there is none."""
    model = Checkpoint(with_states(small, tmp_path / "it", {"recurrent_state": settings}, layers=(0,))).model
    spec = next(spec for spec in model.layer(0).states if spec.kind == "ssm_state")
    with FakeTensorMode():
        counted = states._are_saturated(spec.empty(1, "lazy"), spec)
        assert counted is not None and counted.device.type == "lazy"


def test_sixteen_bits_saturate_at_their_largest_number_and_at_infinity(small, tmp_path):
    settings = {"recurrent_state": {"format": "fp16"}, "conv_state": {"format": "bf16"}}
    most = {"fp16": 65504.0, "bf16": torch.finfo(torch.bfloat16).max}

    def make(spec):
        largest = most[spec.precision.format]
        return entries(spec, largest, -largest, math.inf, -math.inf, math.nan, largest / 2)

    found = heard(small, tmp_path / "it", settings, make)
    assert {kind: (row["format"], row["saturated"]) for kind, row in found.items()} == {
        "ssm_state": ("fp16", 5),
        "conv_state": ("bf16", 5),
    }
    assert found["ssm_state"]["share"] == 5 / found["ssm_state"]["entries"]


@pytest.mark.parametrize(("number_format", "first", "saturated"), [
    ("int4", (0x79, 0x17, 0x91, 0x62), 4),  # nibbles 9 (-7) and 7, 7 and 1, 1 and 9 (-7), 2 and 6
    ("fp8-e4m3", (448.0, -448.0, 416.0), 2), ("int8", (127, -127, 126), 2),
])  # fmt: skip
def test_static_codes_saturate_at_the_largest_of_their_format(small, tmp_path, number_format, first, saturated):
    settings = {"recurrent_state": {"format": number_format, "scale": "static"}}
    row = heard(small, tmp_path / "it", settings, lambda spec: entries(spec, *first))["ssm_state"]
    assert row["saturated"] == saturated
    assert row["entries"] == 7 * 80


def test_with_dynamic_scales_nothing_saturates_and_it_is_said(small, tmp_path):
    settings = {"recurrent_state": {"format": "int8"}}
    row = heard(small, tmp_path / "it", settings, lambda spec: entries(spec, 127, 127))["ssm_state"]
    assert (row["entries"], row["saturated"], row["share"], row["scale"]) == (7 * 80, 0, 0.0, "dynamic")
    assert "0 by construction" in row["note"]


# --- states that are carried in several tensors


CARRIED = {
    "what rounding lost": {"format": "int4", "rounding": "error_feedback", "residual": "int8"},
    "the inputs since": {"format": "int8", "every": 8},
}


@pytest.mark.parametrize("settings", CARRIED.values(), ids=list(CARRIED))
@pytest.mark.parametrize("kind", ["checkpoint", "onnx"])
def test_a_state_in_several_tensors_is_what_the_next_call_begins_with(small, windows, tmp_path, settings, kind):
    """The stored tensor of that name is another 1 % off without its residual, and of an earlier token within a cadence."""
    changed = with_states(small, tmp_path / "it", {"recurrent_state": settings})
    rows = checked(small, changed if kind == "checkpoint" else onnx_of(changed, tmp_path)).state_health
    last = max(row["position"] for row in rows)
    assert last == (63 if settings.get("every") else 70)
    expected = by_hand(small, windows, [(63,), (63,), (63,), (38,)] if last == 70 else [(63,), (63,), (63,), (31,)])
    found = [row for row in rows if row["kind"] == "ssm_state" and row["position"] == 63]
    assert len(found) == len(SSM)
    for row in found:
        assert row["baseline_rms"] == pytest.approx(expected[row["layer"], "ssm_state", 63], rel=1e-3)
    early = [row["ratio"] for row in found if row["layer"] < 2]  # deeper, a random model makes much of little
    assert early == pytest.approx([1] * 2, abs=0.004)


def test_a_cadence_that_no_range_ends_with_is_looked_at_where_it_rounds():
    places = states.Places(prefill=0, every=24)
    assert places.looks(300) == {48: 0, 240: 64, 288: 256}
    assert list(places.calls(300)) == [(0, 48), (48, 240), (240, 288), (288, 300)]
    assert states.Places(prefill=100, every=24).looks(300) == {240: 64, 288: 256}
    assert states.Places(prefill=0, every=4096).looks(300) == {}


# --- when, and in what form


def test_states_are_looked_at_where_they_are_kept_in_formats_of_their_own(small, windows, tmp_path):
    shorten(windows)
    narrow = with_states(small, tmp_path / "narrow", {"recurrent_state": {"format": "bf16"}})
    cases = {(small, None): False, (small, True): True, (narrow, None): True, (narrow, False): False}
    for (candidate, asked), is_there in cases.items():
        found = checked(small, candidate, states=asked)
        assert bool(found.state_health) == is_there, (candidate, asked)
        assert bool(found.state_saturation) == (is_there and candidate == narrow), "float32 holds what there is"


def test_the_baselines_states_are_read_once(small, windows, monkeypatch):
    shorten(windows)
    first = checked(small, small, states=True).state_health
    monkeypatch.setattr(states, "_write", lambda *_: pytest.fail("they are in the cache"))
    assert checked(small, small, states=True).state_health == first


@pytest.mark.parametrize("squares", [math.nan, math.inf])
def test_figures_that_are_not_finite_are_null(squares):
    good, bad, key = states.Size(63, 4.0, 4), states.Size(63, squares, 4), (0, states.StateKind.SSM, 0)
    rows = [*states.health("it", {key: bad}, {key: good}), *states.health("it", {key: good}, {key: bad})]
    rows += states.health("it", {key: good}, {key: replace(good, squares=0.0)})  # nothing is a multiple of 0
    assert [(row["rms"], row["baseline_rms"], row["ratio"]) for row in rows] == [
        (None, 1.0, None),
        (1.0, None, None),
        (1.0, 0.0, None),
    ]
    json.dumps(rows, allow_nan=False)


def test_reports_have_the_figures(compress_cli, small, tmp_path):
    narrow = with_states(small, tmp_path / "narrow", {"recurrent_state": STATIC})
    quick = ("--prompts", "self", "--samples", 2, "--length", 12, "--json", "-")
    document = json.loads(compress_cli("check", small, narrow, *quick).stdout)
    assert {row["position"] for row in document["state_health"]} == {10}
    assert {row["layer"] for row in document["state_saturation"]} == set(SSM)
    without = json.loads(compress_cli("check", small, narrow, "--no-states", *quick).stdout)
    assert without["state_health"] == without["state_saturation"] == []
    forced = json.loads(compress_cli("check", small, small, "--states", *quick).stdout)
    assert len(forced["state_health"]) == 2 * len(SSM) + len(ATTENTION)

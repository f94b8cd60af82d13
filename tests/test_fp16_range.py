"""What fp16 cannot hold: the largest numbers of a model on calibration text, and what becomes of layers that reach too far."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from fp16_graphs import largest, largest_by_layer
from interruptions import stop_after
from jamba_models import TIED, WHOLE_MODEL, load_reference, make_jamba, make_whole_model
from nemotron_h_models import load_reference as load_nemotron_reference
from nemotron_h_models import make_nemotron_h
from onnx_graphs import EXACT, make_session, wired
from refusals import refusal, refusal_of_command
from safetensors.torch import load_file, save_file
from stepping import own_logits

from compress import formats
from compress.apply import ranging
from compress.calibration import ranges
from compress.calibration.listening import Peak
from compress.calibration.ranges import Ranges
from compress.checkpoint.reader import Checkpoint
from compress.formats.activations import Activation
from compress.formats.base import Quantized
from compress.model.hybrid import HybridModel
from compress.model.names import layer_of
from compress.model.weight import PLAIN_DTYPES, Weight
from compress.recipe.calibration import Calibration
from exporters.dialects.tensorrt import TensorRTHalf
from exporters.graph import overflow
from exporters.graph.builder import WeightFile
from exporters.tensorrt import Options, TensorRT

EVERY_EXPERT = {
    "jamba": {"num_experts_per_tok": 3, "spread": 0.7},
    "nemotron_h": {"num_experts_per_tok": 6, "spread": 0.7},
}
MAKE = {"jamba": make_jamba, "nemotron_h": make_nemotron_h}
NEGATIVE = None  # in place of a factor: below 0, so that the activation behind it is small
LOAD = {"jamba": load_reference, "nemotron_h": load_nemotron_reference}


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(5).integers(3, 67, (2, 24)))


def changed(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """A checkpoint with other tensors."""
    path = folder / "model.safetensors"
    tensors = {name: change(name, tensor) for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def scaled(folder: Path, factor: Callable[[str], float]) -> Path:
    """The same, multiplied by a factor for each name."""
    return changed(folder, lambda name, tensor: tensor * factor(name))


def peaks_of(folder: Path, ids: torch.Tensor, scratch: Path) -> dict[str, ranges.Peak]:
    model = Checkpoint(folder, allow_quantized=True).model
    return ranges.measured(model, list(ids), scratch / "states").peaks


LOUD = {  # by family and layer: a tensor, how many times as large its numbers are, and what becomes the largest by that
    "jamba": [("mamba.D", 512, "skip"), ("up_proj", 512, "product"), ("q_proj", 512, "scores"),
              ("conv1d.bias", NEGATIVE, "convolution"), ("dt_proj.bias", 512, "dt_proj"), ("gate_proj", 512, "product")],
    "nemotron_h": [("mixer.D", 512, "scan"), ("up_proj", 16, "squared ReLU"), ("conv1d.bias", NEGATIVE, "convolution"),
                   ("k_proj", 512, "scores"), ("up_proj", 16, "squared ReLU"), ("down_proj", 512, "down_proj"),
                   ("dt_bias", 512, "dt_bias"), ("q_proj", 512, "scores")],
}  # fmt: skip
LEAVING = ("mamba.out_proj.weight", "mixer.out_proj.weight", "down_proj.weight", "o_proj.weight")


def loudly(family: str) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """One kind of number is the largest of its layer, and what the layer gives is small."""

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        layer = layer_of(name)
        if layer is None:
            return tensor
        loud, factor, _ = LOUD[family][layer]
        if loud in name:
            return -512 * tensor.abs() if factor is NEGATIVE else factor * tensor
        return tensor / 128 if name.endswith(LEAVING) else tensor

    return change


@pytest.mark.parametrize("is_loud", [False, True], ids=["as it is", "loud"])
@pytest.mark.parametrize("family", MAKE)
def test_all_that_a_graph_computes_in_fp16_is_heard(family, is_loud, tmp_path, ids):
    """Every expert works on every token, since a graph runs those too that were not chosen, and leaves them out."""
    folder = MAKE[family](tmp_path / "model", **EVERY_EXPERT[family])
    if is_loud:
        changed(folder, loudly(family))
    peaks = peaks_of(folder, ids, tmp_path)
    found = largest_by_layer(Checkpoint(folder).model, ids, tmp_path / "graphs")
    ours = [peaks[f"layer.{index}"].value for index in range(len(found))]
    ours[0], ours[-1] = max(ours[0], peaks["embedding"].value), max(ours[-1], peaks["head"].value)
    np.testing.assert_allclose(ours, found, rtol=0.002)
    if is_loud:
        wheres = [peaks[f"layer.{index}"].where for index in range(len(found))]
        assert [where for where, (*_, kind) in zip(wheres, LOUD[family], strict=True) if kind not in where] == []


@pytest.mark.parametrize("family", MAKE)
def test_the_largest_numbers_are_those_of_transformers(family, tmp_path, ids):
    """Hidden states after every layer, and what every matrix gives that is a module of its own there."""
    folder = MAKE[family](tmp_path / "model", spread=0.7)
    scaled(folder, lambda name: 5e3 if name.endswith(("out_proj.weight", "o_proj.weight")) else 1)
    peaks, reference, heard = peaks_of(folder, ids, tmp_path), LOAD[family](folder), {}

    def hear(name: str):
        return lambda module, given, output: heard.update({name: float(output.abs().max())})

    for name, module in reference.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(hear(name))
    with torch.inference_mode():
        states = reference(ids, output_hidden_states=True).hidden_states
    layers = len(states) - 1
    assert layers == Checkpoint(folder).model.config.num_hidden_layers
    for index in range(layers):
        inside = [value for name, value in heard.items() if f"layers.{index}." in name]
        entering, leaving = (float(states[i].abs().max()) for i in (index, index + 1))
        peak = peaks[f"layer.{index}"]
        assert peak.value >= 0.999 * max([entering, *inside])
        if peak.where == ranges.ENTERING:
            assert peak.value == pytest.approx(entering, rel=1e-4)
        if peak.where.startswith("the sum after") and index + 1 < layers:  # the last of them is normalised
            assert peak.value == pytest.approx(leaving, rel=1e-4)
        if peak.where.startswith("the output of"):
            assert peak.value == pytest.approx(max(inside), rel=1e-4)
    assert sum(peak.where.startswith(("the sum after", "the output of")) for peak in peaks.values()) > layers / 2


# ---- what becomes of a layer that reaches too far


WIDE_EXPERT = 2  # of layer 1: within it numbers reach far beyond fp16, and what it gives is as before
PATH = "layers.1.feed_forward.experts.2."


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny) -> Path:
    return make_whole_model(tmp_path_factory.mktemp("whole"), tiny, **WHOLE_MODEL)


@pytest.fixture(scope="module")
def reaching(tmp_path_factory, whole) -> Path:
    folder = tmp_path_factory.mktemp("reaching") / "model"
    shutil.copytree(whole, folder)
    factors = {"up": 2.0**16, "down": 2.0**-16}
    return scaled(folder, lambda name: factors.get(name.split(".")[-2][:-5], 1) if PATH in name else 1)


def exported(folder: Path, to: Path, windows: list[torch.Tensor], **options) -> dict:
    """The graph is in `to`; returns what build.json has of the range of fp16."""
    checkpoint = Checkpoint(folder, allow_quantized=True)
    exporter = TensorRT(Options(precision="fp16", build="never", **options))
    exporter = exporter.fitted(checkpoint, ranges.measured(checkpoint.model, windows, to.parent / "states"))
    to.mkdir()
    exporter.export(checkpoint, to, lambda _: None)
    return json.loads((to / "build.json").read_text())["overflow"]


@pytest.fixture(scope="module")
def windows() -> list[torch.Tensor]:
    return list(torch.from_numpy(np.random.default_rng(6).integers(3, 2048, (4, 64))))


def logits_of(folder: Path, windows: list[torch.Tensor]) -> np.ndarray:
    ids = torch.stack(windows)
    session = make_session(folder / "model.onnx", EXACT)
    given = {value.name: np.zeros(shape_of(value, len(ids)), TYPES[value.type]) for value in session.get_inputs()}
    given |= {"input_ids": ids.numpy(), "attention_mask": np.ones(ids.shape, np.int64)}
    return session.run(["logits"], given)[0]


TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


def shape_of(value, batch: int) -> list[int]:
    return [batch, *(size if isinstance(size, int) else 0 for size in value.shape[1:])]


def test_a_layer_that_reaches_too_far_is_refused_by_name(reaching, tmp_path, windows):
    message = refusal(lambda: exported(reaching, tmp_path / "out", windows))
    assert "layer 1 reaches " in message and f"{PATH}up_proj.weight" in message
    assert "16,376 (65504 / 4)" in message and "on_overflow: bf16" in message and "precision: bf16" in message


def test_a_layer_that_is_kept_in_float32_gives_what_it_ought_to(reaching, whole, tmp_path, windows):
    facts = exported(reaching, tmp_path / "kept", windows, on_overflow="fp32")
    kept = {unit["unit"]: unit["type"] for unit in facts["units"]}
    assert kept == {
        "embedding": "fp16",
        **{f"layer.{i}": "fp32" if i == 1 else "fp16" for i in range(4)},
        "head": "fp16",
    }
    assert facts["units"][2]["largest"] > 65504
    expected = own_logits(Checkpoint(reaching).model, torch.stack(windows), [64]).numpy()
    actual = logits_of(tmp_path / "kept", windows)
    assert np.median(np.abs(actual - expected).max(-1)) < 2**-6 * np.abs(expected).max()
    plain = wired(Checkpoint(reaching).model, tmp_path / "plain", dialect=TensorRTHalf)
    ids = torch.stack(windows).numpy()
    assert largest(tmp_path / "kept" / "model.onnx", ids) < 65504 / 4 < largest(plain, ids)


@pytest.mark.parametrize("wide", ["bf16", "fp32"])
def test_what_is_left_too_large_for_fp16_stays_wide_up_to_the_head(whole, tmp_path, windows, wide):
    """The hidden states that a layer enters count too; with a tied head the embedding is of its type."""
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    scaled(folder, lambda name: 2.0**16 if "layers.2.feed_forward.down" in name else 1)
    facts = exported(folder, tmp_path / "out", windows, on_overflow=wide)
    assert [unit["type"] for unit in facts["units"]] == ["fp16"] * 3 + [wide] * 3
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    casts = [node for node in graph.node if node.op_type == "Cast" and node.attribute[0].i == KINDS[wide]]
    assert casts
    if wide == "fp32":
        expected = own_logits(Checkpoint(folder).model, torch.stack(windows), [64]).numpy()
        actual = logits_of(tmp_path / "out", windows)
        assert np.median(np.abs(actual - expected).max(-1)) < 2**-6 * np.abs(expected).max()


KINDS = {"bf16": onnx.TensorProto.BFLOAT16, "fp32": onnx.TensorProto.FLOAT}


@pytest.mark.parametrize(("where", "kept"), [("embedding", True), ("head", True), ("layer.1", False)])
def test_a_tied_matrix_is_in_one_type(tmp_path, tiny, where, kept):
    folder = make_whole_model(tmp_path / "model", tiny, **TIED)
    checkpoint = Checkpoint(folder)
    small = {unit.name: Peak(1.0, "somewhere") for unit in checkpoint.model.units}
    found = overflow.decided(checkpoint.model, Ranges(small | {where: Peak(1e5, "there")}, 8), "fp32")
    assert found.types.keys() == ({"embedding", "head"} if kept else {where})
    wired(checkpoint.model, tmp_path / "graph", dialect=TensorRTHalf, types=found.types)
    message = refusal(
        lambda: overflow.decided(checkpoint.model, Ranges(small | {where: Peak(1e5, "there")}, 8), "refuse")
    )
    assert f"{where.replace('layer.', 'layer ')} reaches 100,000 in there" in message and "more)" not in message


@pytest.mark.parametrize(("value", "fits"), [(65504 / 4, True), (np.nextafter(np.float32(65504 / 4), 1e9), False)])
def test_the_limit_is_a_quarter_of_what_fp16_holds(small, value, fits):
    model = Checkpoint(small).model
    peaks = {unit.name: Peak(1.0, "somewhere") for unit in model.units} | {"layer.3": Peak(float(value), "there")}
    assert overflow.unfit(model, Ranges(peaks, 8)).keys() == (set() if fits else {"layer.3"})


# ---- weights and scales


def with_weight(model: HybridModel, unit: str, name: str, weight: Callable[[Weight], Weight]) -> HybridModel:
    changed = model.unit(unit).replaced(weight(model.unit(unit).weights[name]))
    return replace(model, units=tuple(changed if each.name == unit else each for each in model.units))


def holding(tensor: torch.Tensor, number_format: str, **changes) -> Callable[[Weight], Weight]:
    """A weight with other numbers."""
    known = None if number_format in PLAIN_DTYPES else formats.get(number_format).quantize(tensor)

    def load(rows: slice | None = None):
        if known is None:
            return tensor[slice(None) if rows is None else rows].to(PLAIN_DTYPES[number_format])
        rows = slice(0, len(tensor)) if rows is None else rows
        scales = formats.get(number_format).scales_of(known.scales, rows)
        return Quantized(known.values[rows], scales, number_format)

    return lambda weight: replace(weight, format=number_format, load=load, **changes)


OUT = "model.layers.0.mamba.out_proj.weight"  # [40, 80]
NUMBERS = torch.randn(40, 80, generator=torch.Generator().manual_seed(1))
OF_ONE_ROW = NUMBERS * torch.where(torch.arange(40) == 3, 1e-9, 1.0)[:, None]
WEIGHTS = {
    "beyond the end": (NUMBERS * 1e5, "bf16", {}, "holds "),
    "beyond the end, quantized": (NUMBERS * 1e5, "int8", {}, "holds "),
    "all but zero": (NUMBERS * 1e-8, "fp32", {}, "numbers fp16 cannot hold"),
    "scales below the least": (NUMBERS * 1e-8, "int8", {}, "scales fp16 cannot hold"),
    "a scale below the least": (NUMBERS * 1e-8, "int8-tensor", {}, "scales fp16 cannot hold"),
    "scales that lose digits": (NUMBERS * 2e-5, "fp8-e4m3", {}, "scales fp16 cannot hold"),
    "scales of groups": (NUMBERS * 1e-7, "int4-g16", {}, "scales fp16 cannot hold"),
    "a scale of inputs that is too small": (NUMBERS, "int8", {"activation": Activation("static-int8", lambda: 1e-9)}, "scale"),
    "a scale of inputs that is too large": (NUMBERS, "int8", {"activation": Activation("static-int8", lambda: 7e4)}, "scale"),
    "small scales": (NUMBERS * 2e-3, "int8", {}, None),
    "a row that is all but zero": (OF_ONE_ROW, "int8", {}, None),
    "zeros": (NUMBERS * 0, "int8", {}, None),
    "zeros that are not quantized": (NUMBERS * 0, "bf16", {}, None),
    "a scale of inputs": (NUMBERS, "int8", {"activation": Activation("static-int8", lambda: 0.01)}, None),
}  # fmt: skip


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_fp16_cannot_hold_are_named(small, case):
    tensor, number_format, changes, said = WEIGHTS[case]
    model = with_weight(Checkpoint(small).model, "layer.0", OUT, holding(tensor, number_format, **changes))
    peaks = Ranges({unit.name: Peak(1.0, "somewhere") for unit in model.units}, 8)
    found = overflow.unfit(model, peaks)
    assert found.keys() == (set() if said is None else {"layer.0"})
    if said is not None:
        assert f"'{OUT}'" in found["layer.0"] and said in found["layer.0"]
        message = refusal(lambda: overflow.decided(model, peaks, "refuse"))
        assert "layer 0 " in message and OUT in message
        assert overflow.decided(model, peaks, "bf16").types == {"layer.0": ir.DataType.BFLOAT16}


@pytest.mark.parametrize("name", ["mamba.A_log", "feed_forward.router.weight"])
def test_what_stays_float32_may_hold_anything(small, name):
    layer = 1 if "router" in name else 0
    model, name = Checkpoint(small).model, f"model.layers.{layer}.{name}"
    shape = model.unit(f"layer.{layer}").weights[name].shape
    model = with_weight(model, f"layer.{layer}", name, holding(torch.full(shape, 1e6), "fp32"))
    assert overflow.unfit(model, Ranges({unit.name: Peak(1.0, "") for unit in model.units}, 8)) == {}


def test_a_model_that_overflows_float32_is_refused_by_layer(tmp_path, ids):
    folder = make_jamba(tmp_path / "model", dtype=torch.float32)
    scaled(folder, lambda name: 1e38 if "layers.2.feed_forward.gate" in name else 1)
    message = refusal(lambda: peaks_of(folder, ids, tmp_path))
    assert message.startswith("layer 2: ") and "NaN or infinity" in message


# ---- commands


RECIPE = """version: 1
calibration: {prompts: [prose], samples: 2, length: 32}
export:
  - tensorrt: {precision: fp16, build: never}
"""


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE)
    return path


def test_apply_reads_calibration_text_for_an_export_alone(compress_cli, recipe, whole, tmp_path):
    dry = compress_cli("apply", recipe, "-m", whole, "-o", tmp_path / "out", "--dry-run")
    assert "calibrate prose: up to 2 windows of 32 tokens" in dry.stdout
    result = compress_cli("apply", recipe, "-m", whole, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["calibration"]["tokens"] == 64
    assert not (tmp_path / "out" / "calibration").exists()
    without = compress_cli("apply", recipe, "-m", whole, "--dry-run", "--set", "export.0.tensorrt.precision=bf16")
    assert "calibrate" not in without.stdout


def test_apply_ends_with_one_sentence_where_fp16_does_not_hold_and_keeps_the_layer_when_asked_to(
    compress_cli, recipe, reaching, tmp_path
):
    out = tmp_path / "out"
    message = refusal_of_command(compress_cli("apply", recipe, "-m", reaching, "-o", out))
    assert "layer 1 reaches" in message
    assert not out.exists()
    go_on = ("--to", "tensorrt", "-o", tmp_path / "graph", "--set", "build=never", "--set", "precision=bf16")
    assert compress_cli("export", tmp_path / "out.partial" / "checkpoint", *go_on).exit_code == 0
    wide = ("--set", "export.0.tensorrt.on_overflow=fp32")
    assert compress_cli("apply", recipe, "-m", reaching, "-o", out, "--overwrite", *wide).exit_code == 0
    (graph,) = [a for a in json.loads((out / "report.json").read_text())["artifacts"] if a["kind"] == "tensorrt"]
    assert any("in layer 1, of 16,376" in note and "in fp32 instead: layer 1" in note for note in graph["notes"])


def test_what_was_measured_survives_an_interruption(compress_cli, recipe, reaching, tmp_path, monkeypatch):
    arguments = ("apply", recipe, "-m", reaching, "-o", tmp_path / "out", "--set", "export.0.tensorrt.on_overflow=bf16")
    whole = compress_cli(*arguments[:-3], tmp_path / "whole", *arguments[-2:])
    assert whole.exit_code == 0
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, WeightFile, "close", 0)
        assert compress_cli(*arguments).exit_code == 130
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranges, "measured", None)
        assert compress_cli(*arguments, "--resume").exit_code == 0
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "out" / "tensorrt" / name).read_bytes() == (
            tmp_path / "whole" / "tensorrt" / name
        ).read_bytes()


def test_export_reads_the_text_that_apply_would(compress_cli, reaching, tmp_path, monkeypatch):
    monkeypatch.setattr(ranging, "Calibration", lambda: Calibration(samples=2, length=32))
    options = ("--set", "precision=fp16", "--set", "build=never", "--set")
    arguments = ("export", reaching, "--to", "tensorrt", "-o", tmp_path / "out", *options)
    assert "layer 1 reaches" in refusal_of_command(compress_cli(*arguments, "on_overflow=refuse"))
    assert "did you mean 'fp32'?" in refusal_of_command(compress_cli(*arguments, "on_overflow=fp33"))
    assert not (tmp_path / "out").exists()
    assert compress_cli(*arguments, "on_overflow=fp32").exit_code == 0


def test_without_a_tokenizer_there_is_no_text_to_measure_on(compress_cli, recipe, small, tmp_path):
    refused = ("export", small, "--to", "tensorrt", "-o", tmp_path / "export", "--set", "build=never", "--set")
    for result in (
        compress_cli(*refused, "precision=fp16"),
        compress_cli("apply", recipe, "-m", small, "-o", tmp_path / "out"),
        compress_cli("apply", recipe, "-m", small, "-o", tmp_path / "out", "--dry-run"),
    ):
        message = refusal_of_command(result)
        assert "no tokenizer files" in message and "precision: bf16 needs none" in message
    assert [path.name for path in tmp_path.iterdir()] == [recipe.name]
    assert compress_cli(*refused, "precision=bf16").exit_code == 0
    own = ("--set", "calibration.prompts=[self]", "--set", "export.0.tensorrt.on_overflow=fp32")
    assert compress_cli("apply", recipe, "-m", small, "-o", tmp_path / "out", *own).exit_code == 0


@pytest.mark.parametrize("folder", ["tiny", "nemotron"])
def test_both_reference_models_fit(request, folder, tmp_path):
    checkpoint = Checkpoint(request.getfixturevalue(folder))
    windows = list(torch.from_numpy(np.random.default_rng(7).integers(3, 2048, (2, 64))))
    measured = ranges.measured(checkpoint.model, windows, tmp_path / "states")
    assert overflow.unfit(checkpoint.model, measured) == {}
    assert Ranges.from_json(measured.to_json()) == measured

"""`compress sensitivity`: its figures against transformers, its search for the worst tensors, its outputs, its refusals."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from jamba_models import load_reference, make_jamba
from pages import Page, assert_needs_nothing_else
from refusals import refusal_of_command as refusal
from safetensors.torch import load_file, save_file

from compress import formats, prompts
from compress.check import baseline
from compress.checkpoint.reader import Checkpoint
from compress.disk import cache
from compress.model.block import Layer
from compress.passes.quantize import Options
from compress.prompts import PromptSet
from compress.recipe.check import Check
from compress.runtime.artifacts import CheckpointArtifact
from compress.runtime.inference import Head
from compress.studies.sensitivity import cells, original, worst
from compress.studies.sensitivity.measure import Measure

DONE, INTERRUPTED = 0, 130
NAMESPACES = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names, which nothing fetches
# 4 layers: a mamba one with an MLP, one with experts, attention, mamba. K is 40, but 64 of down_proj and 80 of ssm_out:
# int4-g32 fits only the 64, int4-g16 stands in for it at 80, int8 at 40
SHAPE = {"num_hidden_layers": 4, "intermediate_size": 64, "spread": 1.2}
CHECK = Check(prompts=("self",), samples=3, length=24)
TRIED = ("int8", "int4-g32")
RECIPE = """version: 1
passes:
  - quantize:
      weights: int8
      roles: {experts: int4-g32, ssm_out: int4-g32}
      overrides: [{role: mlp, layers: [3], projections: [down_proj], weights: int4-g32}]
check: {prompts: [self], samples: 3, length: 24}
"""
PATTERNS = {
    "embedding": r"embed_tokens\.weight",
    "attention_qkv": r"[qkv]_proj\.weight",
    "attention_out": r"o_proj\.weight",
    "ssm_in": r"in_proj\.weight",
    "ssm_out": r"out_proj\.weight",
    "experts": r"experts\.\d+\.(gate|up|down)_proj\.weight",
    "lm_head": r"lm_head\.weight",
}
# mean KL from float32 logits, summed in another order than transformers does
NOISE = {"abs": 1e-7, "rel": 1e-4}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_jamba(tmp_path_factory.mktemp("model"), **SHAPE)


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    return make_jamba(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True, **SHAPE)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "mine.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def outputs(compress_cli, model, recipe, tmp_path_factory) -> Path:
    """The folder of one run's s.json and s.html, both formats tried everywhere."""
    folder = tmp_path_factory.mktemp("outputs")
    arguments = ("sensitivity", recipe, "-m", model, "--json", folder / "s.json", "--html", folder / "s.html")
    result = compress_cli(*arguments)
    assert result.exit_code == DONE, result.output
    (folder / "said").write_text(result.stdout)
    return folder


@pytest.fixture(scope="module")
def found(outputs) -> dict:
    return json.loads((outputs / "s.json").read_text())


# --- the figures


def windows_of(folder: Path) -> list[torch.Tensor]:
    artifact = CheckpointArtifact(Checkpoint(folder))
    return prompts.load_all(artifact, artifact.sha256(), CHECK, purpose="check", seed=0)[0].windows


def rounded(weight: torch.Tensor, name: str) -> torch.Tensor:
    """float32 [N, K] rounded to a format and back."""
    if name == "int8":
        scale = weight.abs().amax(1, keepdim=True) / 127
        return torch.round(weight / scale) * scale
    return formats.get(name).dequantize(formats.get(name).quantize(weight))


def log_probs(folder: Path, windows: list[torch.Tensor]) -> torch.Tensor:
    """transformers' log-probabilities of all scored positions, float64 [n, V]."""
    reference = load_reference(folder)
    with torch.inference_mode():
        logits = [reference(window[None]).logits[0, :-1].double() for window in windows]
    return torch.log_softmax(torch.cat(logits), -1)


def divergence(folder: Path, windows: list[torch.Tensor], altered: dict[str, str], tmp_path: Path) -> float:
    """Mean KL of transformers' model with some tensors (name -> format) rounded, against the model as it is."""
    copy = Path(shutil.copytree(folder, tmp_path / "altered", dirs_exist_ok=True))
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name: rounded(tensors[name].float(), format_name) for name, format_name in altered.items()}
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    log_p, log_q = log_probs(folder, windows), log_probs(copy, windows)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def cell_of(found: dict, unit: str, role: str, format_name: str) -> dict:
    (cell,) = (c for c in found["cells"] if (c["unit"], c["role"], c["format"]) == (unit, role, format_name))
    return cell


def tensors_of(folder: Path, unit: str, role: str) -> list[str]:
    prefix = f"layers.{unit.removeprefix('layer.')}." if unit.startswith("layer.") else ""
    names = load_file(folder / "model.safetensors")
    return [name for name in names if prefix in name and re.search(rf"(^|\.){PATTERNS[role]}$", name)]


def stored_as(folder: Path, name: str, asked: str) -> str:
    """What stands in for int4-g32 where 32 does not divide K."""
    inputs = load_file(folder / "model.safetensors")[name].shape[1]
    return asked if asked == "int8" else {40: "int8", 64: "int4-g32", 80: "int4-g16"}[inputs]


@pytest.mark.parametrize(
    ("unit", "role", "format_name"),
    [
        ("embedding", "embedding", "int8"),
        ("layer.0", "ssm_in", "int8"),
        ("layer.1", "experts", "int8"),
        ("layer.1", "experts", "int4-g32"),
        ("layer.2", "attention_qkv", "int8"),
        ("layer.3", "ssm_out", "int4-g32"),
        ("head", "lm_head", "int8"),
    ],
)
def test_a_cell_costs_what_transformers_loses_with_those_tensors_rounded(
    model, found, tmp_path, unit, role, format_name
):
    altered = {name: stored_as(model, name, format_name) for name in tensors_of(model, unit, role)}
    assert altered
    expected = divergence(model, windows_of(model), altered, tmp_path)
    assert expected > 50 * NOISE["abs"], "the example must not be a trivial one"
    assert cell_of(found, unit, role, format_name)["kl_divergence_mean"] == pytest.approx(expected, **NOISE)


def test_a_tied_embedding_is_altered_where_it_is_looked_up_and_where_it_is_the_head(
    compress_cli, tied, recipe, tmp_path
):
    result = compress_cli("sensitivity", recipe, "-m", tied, "--format", "int8", "--json", "-")
    assert result.exit_code == DONE, result.output
    found = json.loads(result.stdout)
    assert "lm_head" not in {cell["role"] for cell in found["cells"]}
    expected = divergence(tied, windows_of(tied), {"model.embed_tokens.weight": "int8"}, tmp_path)
    measured = cell_of(found, "embedding", "embedding", "int8")["kl_divergence_mean"]
    assert measured == pytest.approx(expected, **NOISE)


class Bench:
    """The small model opened, two prompt sets of unequal size, and a way to measure cells of it."""

    def __init__(self, folder: Path, scratch: Path):
        self.model = Checkpoint(folder).model
        generator = torch.Generator().manual_seed(3)
        lengths = (14, 14, 9, 260)  # logits come in pieces of 256
        windows = [torch.randint(3, 67, (length,), generator=generator) for length in lengths]
        self.sets = [PromptSet("first", windows[:3]), PromptSet("second", windows[3:])]
        self.windows = windows
        self.originals = [
            original.Original(self.model, one, f"bench {folder}", scratch / one.name, "cpu") for one in self.sets
        ]
        self.measure = Measure(self.model, self.originals, "cpu")


@pytest.fixture
def bench(model, tmp_path) -> Bench:
    return Bench(model, tmp_path / "scratch")


def test_every_position_of_all_prompts_counts_the_same(bench, model, tmp_path):
    (cell,) = (
        c
        for c in cells.of_formats(bench.model, Options(), ("int8",), "cpu")
        if (c.unit.name, c.role) == ("layer.2", "attention_out")
    )
    altered = dict.fromkeys(tensors_of(model, "layer.2", "attention_out"), "int8")
    expected = divergence(model, bench.windows, altered, tmp_path)
    assert bench.measure.all([cell], "one") == pytest.approx([expected], **NOISE)


def test_every_position_but_the_last_is_computed_once(bench):
    pieces = original.logits(bench.originals[1].entering[-1], Head(bench.model, "cpu"), "cpu")
    assert [start + i for _, start, rows in pieces for i in range(len(rows))] == list(range(259))


def test_the_recipe_s_clip_decides_the_scales(bench):
    def head(options: Options):
        return cells.of_formats(bench.model, options, ("int4-g16",), "cpu")[-1].weights[0].dense()

    plain, searched = head(Options(clip="none")), head(Options(clip="mse"))
    weight = bench.model.unit("head").weights["lm_head.weight"].dense()
    assert ((searched - weight) ** 2).sum() < ((plain - weight) ** 2).sum()
    assert torch.equal(head(Options(method="gptq")), searched)
    assert torch.equal(head(Options(method="rtn")), plain)


def test_what_has_a_fallback_says_what_was_really_stored(found):
    assert cell_of(found, "layer.1", "experts", "int4-g32")["stored"] == "int4-g32+int8"
    assert cell_of(found, "layer.3", "ssm_out", "int4-g32")["stored"] == "int4-g16"
    same = [cell_of(found, "layer.0", "ssm_in", name) for name in TRIED]
    assert [cell["stored"] for cell in same] == ["int8", "int8"]
    assert same[0]["kl_divergence_mean"] == same[1]["kl_divergence_mean"]


def test_the_original_is_computed_once_and_a_cell_only_from_its_own_layer_on(model, tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    calls, real = [], Layer.run

    def counted(layer, *arguments):
        calls.append(layer.index)
        return real(layer, *arguments)

    monkeypatch.setattr(Layer, "run", counted)
    for name in ("cold", "warm"):
        calls.clear()
        bench = Bench(model, tmp_path / name)
        blocks = sum(len(one.work) for one in bench.originals)
        assert sorted(calls) == sorted(list(range(4)) * blocks), f"the {name} cache"
    calls.clear()
    tried = cells.of_formats(bench.model, Options(), ("int8",), "cpu")
    bench.measure.all(tried, "all")
    starts = [0 if cell.unit.name == "embedding" else 4 if cell.layer is None else cell.layer for cell in tried]
    assert sorted(calls) == sorted(blocks * [index for start in starts for index in range(start, 4)])
    bench.measure.all(tried, "again")
    assert len(calls) == blocks * sum(4 - start for start in starts), "what is known is not measured again"


def test_the_log_probabilities_are_those_a_check_computes_and_finds_again(model, bench, tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    candidate = CheckpointArtifact(Checkpoint(model)).candidate()
    theirs = baseline.compute(candidate, "theirs", bench.sets[0])
    ours = original.Original(bench.model, bench.sets[0], "ours", tmp_path / "states", "cpu")
    assert torch.equal(ours.log_probs(1, 2, 9), theirs.log_probs(1, 2, 9))
    monkeypatch.setattr(baseline, "_write", None)  # it must be found, not computed
    assert torch.equal(baseline.compute(candidate, "ours", bench.sets[0]).log_probs(2, 0, 8), ours.log_probs(2, 0, 8))


# --- the worst tensors


def test_the_worst_tensors_are_those_of_an_exhaustive_measurement(bench):
    options = Options(weights="int8", roles={"experts": "int4-g32", "ssm_out": "int4-g32", "lm_head": "none"})
    stored = cells.of_recipe(bench.model, options, "cpu")
    single = [tensor for cell in stored for tensor in cell.tensors()]
    values = bench.measure.all(single, "exhaustive")
    expected = sorted(zip(values, (one.weights[0].name for one in single), strict=True), reverse=True)[: worst.COUNT]
    fresh = Measure(bench.model, bench.originals, "cpu")
    tensors = worst.find(stored, fresh)
    assert [(t["kl_divergence_mean"], t["name"]) for t in tensors] == expected
    assert "lm_head.weight" not in {tensor["name"] for tensor in tensors}
    assert len(fresh._known) < len(stored) + len(single), "it must do with less than all"


class KnownCosts:
    """Stands in for Measure: the cost of a cell is given by its tensors' names."""

    def __init__(self, costs: dict[frozenset, float]):
        self._costs, self.asked = costs, []

    def all(self, tried, what):
        self.asked += [cell.key for cell in tried]
        return [self._costs[cell.key] for cell in tried]


def test_the_search_stops_at_the_first_cell_below_the_last_tensor_kept(bench):
    four = [c for c in cells.of_recipe(bench.model, Options(), "cpu") if len(c.weights) == 3][:4]
    costs = {cell.key: cost for cell, cost in zip(four, (9.0, 4.0, 5.0, 3.0), strict=True)}
    for cell, first in zip(four, (8.0, 0.4, 4.5, 2.9), strict=True):
        costs |= {one.key: first - 0.1 * i for i, one in enumerate(cell.tensors())}
    measure = KnownCosts(costs)
    tensors = worst.find(four, measure, count=5)
    assert [tensor["kl_divergence_mean"] for tensor in tensors] == pytest.approx([8, 7.9, 7.8, 4.5, 4.4])
    taken = [four[0], four[2]]  # 9 and 5; the next, 4, is below the fifth tensor, 4.4
    assert measure.asked[4:] == [one.key for cell in taken for one in cell.tensors()]


def test_overrides_decide_the_format_of_a_worst_tensor(found, model):
    by_name = {tensor["name"]: tensor for tensor in found["worst_tensors"]}
    assert len(by_name) == worst.COUNT
    costs = [tensor["kl_divergence_mean"] for tensor in found["worst_tensors"]]
    assert costs == sorted(costs, reverse=True)
    assert by_name["model.layers.3.feed_forward.down_proj.weight"]["format"] == "int4-g32"
    assert by_name["model.layers.3.feed_forward.down_proj.weight"]["parameters"] == 40 * 64


# --- JSON, table and page


def test_the_json_has_every_layer_role_and_format(found, model):
    assert found["schema"] == 1
    assert found["model"]["parameters"] == Checkpoint(model).model.parameters
    assert found["prompts"] == [{"name": "self", "windows": 3, "tokens": 72}]
    mamba = ("ssm_in", "ssm_x_proj", "ssm_dt_proj", "ssm_out")
    layers = [(*mamba, "mlp"), (*mamba, "experts"), ("attention_qkv", "attention_out", "mlp"), (*mamba, "mlp")]
    expected = [(None, "embedding", "embedding"), (None, "head", "lm_head")]
    expected += [(i, f"layer.{i}", role) for i, roles in enumerate(layers) for role in roles]
    listed = [(cell["layer"], cell["unit"], cell["role"], cell["format"]) for cell in found["cells"]]
    assert sorted(listed, key=str) == sorted(((*one, name) for one in expected for name in TRIED), key=str)


def test_a_cell_s_parameters_and_bytes_are_those_of_its_matrices(found):
    head = cell_of(found, "head", "lm_head", "int8")
    # a byte each, a float32 scale per row, the shape as two int64
    assert (head["parameters"], head["bytes"]) == (67 * 40, 67 * 40 + 4 * 67 + 16)
    experts = cell_of(found, "layer.1", "experts", "int8")
    assert experts["parameters"] == 3 * 3 * 40 * 64


def test_json_on_stdout_is_nothing_but_json(compress_cli, model, recipe):
    result = compress_cli("sensitivity", recipe, "-m", model, "--format", "int8", "--json", "-")
    assert result.exit_code == DONE, result.output
    assert {cell["format"] for cell in json.loads(result.stdout)["cells"]} == {"int8"}
    assert "ssm_x_proj" in result.stderr


def test_the_table_sums_over_layers_and_names_what_stands_in(outputs, found):
    said = (outputs / "said").read_text()
    values = [c["kl_divergence_mean"] for c in found["cells"] if (c["role"], c["format"]) == ("ssm_in", "int8")]
    line = next(line for line in said.splitlines() if "ssm_in" in line)
    assert len(values) == 3
    assert f"{sum(values):.3g} ({(0, 1, 3)[values.index(max(values))]})" in line
    assert re.search(r"int4-g32 does not divide the inputs of .*\bssm_out: measured as int4-g16", said)
    assert found["worst_tensors"][-1]["name"] in said


def test_the_page_needs_nothing_else_and_names_everything(outputs, found):
    text = (outputs / "s.html").read_text()
    page = Page(text)
    assert_needs_nothing_else(page, text)
    assert set(re.findall(r"https?://[^\s\"'<>]+", text)) <= NAMESPACES
    for key in ("role", "format", "unit", "kind"):
        assert {cell[key] for cell in found["cells"]} <= set(page.texts)
    maps = page.rows_of("map")
    assert len(maps) == len({cell["format"] for cell in found["cells"]})
    assert all(len(rows[0]) == len({cell["role"] for cell in found["cells"]}) for rows in maps), (
        "a column for each role"
    )
    assert {tensor["name"] for tensor in found["worst_tensors"]} <= set(page.texts)


def test_the_page_shows_the_figure_of_every_cell(outputs, found):
    texts = Page((outputs / "s.html").read_text()).texts
    shown = [text.rstrip("*") for text in texts if re.fullmatch(r"\d\.\de-?\d+\*?|<1e-7\*?", text)]
    assert len(shown) == len(found["cells"])
    values = sorted(cell["kl_divergence_mean"] for cell in found["cells"])
    assert values[0] > 1e-7, "the example must not reach the floor"
    assert sorted(map(float, shown)) == pytest.approx(values, rel=0.05)  # two digits


# --- refusals


@pytest.fixture
def sensitivity(compress_cli, model, recipe, tmp_path, monkeypatch):
    """The command in an empty folder, with work that must not begin."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(original, "Original", None)
    return lambda *arguments, recipe=recipe, model=model: compress_cli("sensitivity", recipe, "-m", model, *arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--format", "int4-g23"), "did you mean 'int4-g32'?"),
        (("--format", "none"), "--format none"),
        (("--json", "missing/s.json"), "missing/s.json"),
        (("--html", "."), "--html ."),
        (("--html", "-"), "--html -"),
        (("--samples", "0"), "samples"),
        (("--length", "1"), "length"),
        (("--device", "tpu"), "device"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_options_are_refused_before_the_work(sensitivity, tmp_path, arguments, said):
    assert said in refusal(sensitivity(*arguments))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("passes", "said"),
    [
        ("[]", "no quantize pass"),
        ("[quantize: {}, quantize: {weights: int4-g32}]", "2 quantize passes"),
        ("[quantize: {weights: none}]", "--format"),
        ("[quantize: {roles: {lm_heat: int8}}]", "did you mean 'lm_head'?"),
        ("[quantize: {overrides: [{role: mlp, layers: [99], weights: int8}]}]", "covers no matrix"),
    ],
)
def test_a_recipe_without_a_usable_quantize_pass_is_refused(sensitivity, tmp_path, passes, said):
    (tmp_path / "bad.yaml").write_text(f"version: 1\npasses: {passes}\ncheck: {{prompts: [self]}}\n")
    assert said in refusal(sensitivity(recipe="bad.yaml"))


def test_a_recipe_without_a_model_asks_for_one(compress_cli, recipe):
    assert "-m" in refusal(compress_cli("sensitivity", recipe))


def test_text_prompts_need_a_tokenizer(sensitivity):
    assert "tokenizer" in refusal(sensitivity(recipe="tiny-int8"))


def test_a_disk_too_small_for_the_hidden_states_is_noticed_before_the_work(sensitivity, monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    assert "hidden states" in refusal(sensitivity())


def test_ctrl_c_leaves_nothing(compress_cli, model, recipe, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(Measure, "_divergence", interrupted)
    outputs = ("--json", tmp_path / "s.json", "--html", tmp_path / "s.html")
    refusal(compress_cli("sensitivity", recipe, "-m", model, *outputs), INTERRUPTED)
    assert not list(tmp_path.iterdir())
    assert not list(cache.folder("scratch").iterdir())

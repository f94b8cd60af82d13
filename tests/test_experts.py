"""`compress experts`: its figures against the experts of transformers' model, its table, page and JSON, its refusals."""

import json
import re
import shutil
from itertools import combinations
from pathlib import Path

import pytest
import torch
from jamba_models import load_reference, make_jamba
from nemotron_h_models import make_nemotron_h
from pages import Page, assert_needs_nothing_else
from refusals import refusal_of_command as refusal
from safetensors.torch import load_file, save_file

from compress import prompts
from compress.checkpoint.reader import Checkpoint
from compress.disk import cache
from compress.recipe.calibration import Calibration
from compress.runtime.artifacts import CheckpointArtifact
from compress.studies.experts import facts, survey, table

DONE = 0
EXPERTS, TOP_K, MOE = 5, 2, (1, 4)  # layers 1 and 4 have experts
DEAD = 3  # of layer 4: no token goes to it
SETTINGS = Calibration(prompts=("self",), samples=3, length=151)
ASKED = ("--prompts", "self", "--samples", 3, "--length", 151)
# float32 summed in another order than transformers does, through six layers
NOISE = {"rel": 2e-3, "abs": 1e-7}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Five experts of awkward shapes; in layer 4 two others always have larger logits than number 3, which is 0."""
    folder = make_jamba(tmp_path_factory.mktemp("model"), num_experts=EXPERTS, spread=1.2)
    tensors = load_file(folder / "model.safetensors")
    router = tensors["model.layers.4.feed_forward.router.weight"]
    router[DEAD] = 0
    router[1], router[4] = -router[0], -router[2]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def outputs(compress_cli, model, tmp_path_factory) -> Path:
    """The folder of one run's e.json, e.html and table."""
    folder = tmp_path_factory.mktemp("outputs")
    result = compress_cli("experts", model, *ASKED, "--json", folder / "e.json", "--html", folder / "e.html")
    assert result.exit_code == DONE, result.output
    (folder / "said").write_text(result.stdout)
    return folder


@pytest.fixture(scope="module")
def found(outputs) -> dict:
    return json.loads((outputs / "e.json").read_text())


# --- the figures, against every expert run on every token by hand


class Reference:
    """What transformers' model feeds the experts of a layer, and what each of them gives for it, float64."""

    def __init__(self, block, windows: list[tuple[torch.Tensor, torch.Tensor]]):
        x, leaving = (torch.cat(part).double() for part in zip(*windows, strict=True))
        gate_up, down = (w.detach().double() for w in (block.experts.gate_up_proj, block.experts.down_proj))
        self.shares = torch.softmax(x @ block.router.weight.detach().double().T, -1)  # [T, E]
        self.logits = x @ block.router.weight.detach().double().T
        gate, up = (torch.einsum("th,enh->ten", x, part) for part in gate_up.tensor_split(2, 1))
        self.outputs = torch.einsum("ten,ehn->teh", gate / (1 + (-gate).exp()) * up, down)  # [T, E, H]
        self.gates = self.top_k(self.shares)
        self.importance = 1 / leaving.square().sum(-1)
        positions = [(w, t) for w, (rows, _) in enumerate(windows) for t in range(len(rows))]
        self.withheld = torch.tensor([(t // 64 + w) % 4 == 3 for w, t in positions])

    @staticmethod
    def top_k(shares: torch.Tensor) -> torch.Tensor:
        return torch.where(shares >= shares.sort(descending=True).values[:, TOP_K - 1, None], shares, 0)

    def given(self, kept: tuple[int, ...], router: str) -> torch.Tensor:
        """[T, H]: the layer's experts with only some of them left."""
        shares = self.shares[:, kept] if router == "keep_rows" else torch.softmax(self.logits[:, kept], -1)
        return torch.einsum("te,teh->th", self.top_k(shares), self.outputs[:, kept])

    def loss(self, kept: tuple[int, ...], router: str) -> float:
        whole = torch.einsum("te,teh->th", self.gates, self.outputs)[self.withheld]
        left, weight = self.given(kept, router)[self.withheld], self.importance[self.withheld, None]
        factor = (weight * whole * left).sum() / (weight * left * left).sum() if router == "rescale" else 1
        return float((weight * (whole - factor * left).square()).sum(1).mean())


@pytest.fixture(scope="module")
def reference(model) -> dict[int, Reference]:
    artifact = CheckpointArtifact(Checkpoint(model))
    windows = prompts.load_all(artifact, artifact.sha256(), SETTINGS, purpose="calibration", seed=0)[0].windows
    hugging_face, seen, left = load_reference(model), {i: [] for i in MOE}, {i: [] for i in MOE}
    for index in MOE:
        layer = hugging_face.model.layers[index]
        layer.feed_forward.register_forward_hook(lambda _, given, __, i=index: seen[i].append(given[0][0]))
        layer.register_forward_hook(lambda _, __, result, i=index: left[i].append(result[0]))
    with torch.inference_mode():
        for window in windows:
            hugging_face(window[None])
        return {
            i: Reference(hugging_face.model.layers[i].feed_forward, list(zip(seen[i], left[i], strict=True)))
            for i in MOE
        }


def both(found: dict, reference: dict[int, Reference]):
    assert [layer["layer"] for layer in found["layers"]] == list(MOE)
    return [(layer, reference[layer["layer"]]) for layer in found["layers"]]


def test_the_load_is_that_of_transformers_router(found, reference):
    assert found["tokens"] == 3 * 151
    for layer, expected in both(found, reference):
        assert (layer["experts"], layer["top_k"]) == (EXPERTS, TOP_K)
        assert layer["tokens"] == (expected.gates > 0).sum(0).tolist()
        assert layer["share"] == pytest.approx([count / 453 for count in layer["tokens"]])
        assert layer["dead"] == ([DEAD] if layer["layer"] == 4 else [])


def test_the_scores_are_taken_from_the_tokens_that_are_not_withheld(found, reference):
    for layer, expected in both(found, reference):
        gates, norms = expected.gates[~expected.withheld], expected.outputs[~expected.withheld].norm(dim=-1)
        routed = (gates > 0).double()
        count = routed.sum(0)
        by_hand = {
            "frequency": count / len(gates),
            "mean_gate": gates.sum(0) / len(gates),
            "ean": (norms * routed).sum(0),
            "reap": (gates * norms).sum(0) / count.clamp_min(1),
        }
        assert set(layer["scores"]) == set(by_hand)
        for name, values in by_hand.items():
            assert layer["scores"][name] == pytest.approx(values.tolist(), **NOISE), name


def test_similarity_is_the_cosine_of_the_outputs_on_withheld_tokens(found, reference):
    for layer, expected in both(found, reference):
        flat = expected.outputs * expected.importance.sqrt()[:, None, None]
        flat = flat[expected.withheld].transpose(0, 1).flatten(1)
        cosines = torch.nn.functional.cosine_similarity(flat[:, None], flat[None], dim=-1)
        assert torch.tensor(layer["similarity"]).sub(cosines).abs().max() < 1e-4


@pytest.mark.parametrize("router", ["slice", "rescale", "keep_rows"])
def test_a_predicted_loss_is_what_the_layer_loses_with_those_experts_alone(found, reference, router):
    for layer, expected in both(found, reference):
        assert [entry["kept"] for entry in layer["predicted"]] == [4, 3, 2]
        for entry in layer["predicted"]:
            kept = tuple(entry["experts"])
            assert len(kept) == entry["kept"]
            assert entry["loss"][router] == pytest.approx(expected.loss(kept, router), **NOISE)


def test_the_experts_that_stay_are_the_best_set_under_rescale(found, reference):
    for layer, expected in both(found, reference):
        for entry in layer["predicted"]:
            least = min(expected.loss(kept, "rescale") for kept in combinations(range(EXPERTS), entry["kept"]))
            assert entry["loss"]["rescale"] == pytest.approx(least, **NOISE)


def test_an_expert_that_no_token_goes_to_costs_nothing_where_its_share_is_left_empty(found):
    (entry,) = (entry for entry in found["layers"][1]["predicted"] if entry["kept"] == 4)
    assert DEAD not in entry["experts"]
    assert entry["loss"]["keep_rows"] == pytest.approx(0, abs=1e-12)


def test_the_total_adds_the_layers_up(found):
    assert [entry["kept"] for entry in found["total"]] == [4, 3, 2]
    for place, entry in enumerate(found["total"]):
        for router, value in entry["loss"].items():
            assert value == pytest.approx(sum(l["predicted"][place]["loss"][router] for l in found["layers"]))  # noqa: E741


# --- JSON, table and page


def test_the_json_says_what_was_measured(found, model):
    assert found["schema"] == 1
    assert found["model"]["name"] == model.name
    assert found["model"]["parameters"] == Checkpoint(model).model.parameters
    assert found["prompts"] == [{"name": "self", "windows": 3, "tokens": 453}]


def test_json_on_stdout_is_nothing_but_json_and_the_same_seed_gives_the_same_bytes(
    compress_cli, model, outputs, tmp_path
):
    result = compress_cli("experts", model, *ASKED, "--json", "-", "--html", tmp_path / "again.html")
    assert result.exit_code == DONE, result.output
    assert result.stdout == (outputs / "e.json").read_text()
    assert "most used" in result.stderr
    assert (tmp_path / "again.html").read_bytes() == (outputs / "e.html").read_bytes()


def test_another_seed_gives_other_windows(compress_cli, model, found):
    result = compress_cli("experts", model, *ASKED, "--json", "-", "--seed", 7)
    assert json.loads(result.stdout)["layers"][0]["scores"] != found["layers"][0]["scores"]


def test_a_row_of_the_table_has_load_likeness_and_losses(outputs, found):
    said = (outputs / "said").read_text()
    for layer in found["layers"]:
        row = next(line for line in said.splitlines() if re.match(rf"│ {layer['layer']} ", line))
        least, most = min(layer["tokens"]), max(layer["tokens"])
        share = "0 %" if least == 0 else f"{100 * least / 453:.1f} %"
        assert f" {layer['tokens'].index(least)}: {share} " in row
        assert f" {layer['tokens'].index(most)}: {100 * most / 453:.1f} % " in row
        pairs = {layer["similarity"][a][b]: f" {a} and {b}: " for a, b in combinations(range(EXPERTS), 2)}
        assert f"{pairs[max(pairs)]}{max(pairs):.2f} " in row
        cells = [cell.strip() for cell in row.split("│")]
        assert cells[4] == str(len(layer["dead"]))
        assert cells[6:9] == [f"{entry['loss']['rescale']:.3g}" for entry in layer["predicted"]]


def test_the_table_ends_with_the_total_and_says_what_is_rough(outputs, found):
    said = (outputs / "said").read_text()
    row = next(line for line in said.splitlines() if line.startswith("│ total"))
    assert [cell.strip() for cell in row.split("│")][6:9] == [f"{e['loss']['rescale']:.3g}" for e in found["total"]]
    rough = sum(count < 256 for layer in found["layers"] for count in layer["tokens"])
    assert rough > 1
    assert f"{rough} experts saw fewer than 256 tokens: figures about them are rough" in said
    assert "|change|^2 / |h|^2" in said


def test_many_numbers_of_experts_are_thinned_out():
    counts = list(range(63, 1, -1))
    shown = table.shown(counts)
    assert (shown[0], shown[-1], len(shown)) == (63, 2, table.COLUMNS)
    assert shown == sorted(set(shown), reverse=True)
    assert table.shown([4, 3, 2]) == [4, 3, 2]


@pytest.fixture(scope="module")
def page(outputs) -> Page:
    return Page((outputs / "e.html").read_text())


def test_the_page_needs_nothing_else(outputs, page):
    text = (outputs / "e.html").read_text()
    assert text.startswith("<!DOCTYPE html>")
    assert len(page.rows_of("map")) == 3, "load, and how alike the experts of each layer are"
    assert_needs_nothing_else(page, text)
    assert {a[1:] for a in page.addresses if a.startswith("#")} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(page.ids)
    assert len(set(page.ids)) == len(page.ids)


def test_the_plots_say_in_text_what_their_colours_mean(page, found):
    for text in (
        "layer 1",
        "layer 4",
        "total",
        "dead",
        "% of all tokens, by layer and expert",
        "experts kept in each layer",
    ):
        assert text in page.texts, text
    for layer in found["layers"]:
        shown = [facts.percent(share).removesuffix(" %") for share in layer["share"] if share]
        cosines = [f"{layer['similarity'][a][b]:.2f}".replace("-0.00", "0.00") for a, b in combinations(range(5), 2)]
        assert set(shown + cosines) <= set(page.texts)


def test_the_page_s_tables_have_every_loss_and_score(page, found):
    total, *tables = page.rows_of("table")
    losses, scores = tables[:2], tables[2:]
    assert [row[0] for row in total[1:]] == ["4", "3", "2"]
    for layer, loss_rows, score_rows in zip(found["layers"], losses, scores, strict=True):
        for entry, row in zip(layer["predicted"], loss_rows[1:], strict=True):
            figures = [f"{entry['loss'][router]:.3g}" for router in loss_rows[0][1:4]]
            assert row == [str(entry["kept"]), *figures, ", ".join(map(str, entry["experts"]))]
        names = score_rows[0][3:7]
        assert set(names) == set(layer["scores"])
        for expert, row in enumerate(score_rows[1:]):
            assert row[3:7] == [f"{layer['scores'][name][expert]:.3g}" for name in names]
            assert ("dead" in row[1]) == (expert in layer["dead"])


def test_text_prompts_work_on_the_shipped_model(compress_cli, tiny):
    result = compress_cli("experts", tiny, "--samples", 4, "--length", 64, "--json", "-")
    assert result.exit_code == DONE, result.output
    found = json.loads(result.stdout)
    assert [layer["layer"] for layer in found["layers"]] == [1, 3, 5, 7]
    assert found["prompts"] == [{"name": "prose", "windows": 4, "tokens": 256}]
    assert all(sum(layer["tokens"]) == 512 for layer in found["layers"])
    numbers = re.findall(r"NaN|Infinity", result.stdout)
    assert not numbers


@pytest.mark.parametrize(
    "make",
    [lambda folder: make_jamba(folder, num_experts=2, num_hidden_layers=2, spread=1.2),
     lambda folder: make_nemotron_h(folder, layers_block_type="ME", n_group=3, topk_group=2)],
    ids=["two experts", "experts in groups"],
)  # fmt: skip
def test_where_no_expert_can_be_removed_the_rest_is_still_shown(compress_cli, tmp_path, make):
    arguments = ("--prompts", "self", "--samples", 4, "--length", 16, "--html", tmp_path / "e.html")
    result = compress_cli("experts", make(tmp_path / "model"), *arguments, "--json", tmp_path / "e.json")
    assert result.exit_code == DONE, result.output
    assert "no expert can be removed" in result.stdout
    found = json.loads((tmp_path / "e.json").read_text())
    assert (found["total"], found["layers"][0]["predicted"]) == ([], [])
    assert "No expert can be removed" in (tmp_path / "e.html").read_text()


# --- refusals


@pytest.fixture
def experts(compress_cli, model, tmp_path, monkeypatch):
    """The command in an empty folder, with work that must not begin."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(survey, "walk", None)
    return lambda *arguments, model=model: compress_cli("experts", model, *arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--prompts", "heldout"), "prompts: 'heldout' is kept for checks"),
        (("--prompts", "self", "--prompts", "self"), "listed twice"),
        (("--prompts", "pros"), "did you mean 'prose'?"),
        (("--prompts", "prose"), "tokenizer"),
        (("--json", "missing/e.json"), "--json missing/e.json"),
        (("--html", "."), "--html ."),
        (("--html", "-"), "--html -"),
        (("--samples", "0"), "samples"),
        (("--length", "1"), "length"),
        (("--device", "tpu"), "device"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_options_are_refused_before_the_work(experts, tmp_path, arguments, said):
    assert said in refusal(experts(*arguments))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def unread(monkeypatch):
    """No weight may be read, not even for its digest."""
    monkeypatch.setattr(Checkpoint, "weights_sha256", None)


def changed(model: Path, folder: Path, **values) -> Path:
    copy = Path(shutil.copytree(model, folder))
    config = json.loads((copy / "config.json").read_text()) | values
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def test_a_dense_model_has_nothing_to_survey(experts, unread, tmp_path):
    dense = make_jamba(tmp_path / "dense", num_experts=1, num_experts_per_tok=1, num_hidden_layers=2)
    said = refusal(experts("--prompts", "self", model=dense))
    assert said == f"compress: {dense}: the model has no experts\n"


def test_a_quantized_checkpoint_is_refused(experts, unread, model, tmp_path):
    quantized = changed(model, tmp_path / "q", quantization_config={"quant_method": "compressed-tensors"})
    assert "already quantized" in refusal(experts("--prompts", "self", model=quantized))


def test_a_model_pruned_to_layers_that_differ_is_refused(experts, unread, model, tmp_path):
    pruned = changed(model, tmp_path / "p", compress={"router_rows": EXPERTS})
    assert "pruned before" in refusal(experts("--prompts", "self", model=pruned))


def test_a_model_that_is_not_there_is_refused(experts):
    assert "no such folder" in refusal(experts(model="nowhere"))


def test_a_disk_too_small_for_the_hidden_states_is_noticed_before_the_work(experts, monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    assert "hidden states" in refusal(experts(*ASKED))


def test_too_few_tokens_to_withhold_any_are_refused_and_leave_nothing(compress_cli, model, tmp_path):
    arguments = ("--prompts", "self", "--samples", 1, "--length", 10, "--json", tmp_path / "e.json")
    assert "too few" in refusal(compress_cli("experts", model, *arguments))
    assert not list(tmp_path.iterdir())
    assert not list(cache.folder("scratch").iterdir())


def test_outputs_that_overflow_are_refused_though_no_token_is_routed_to_them(compress_cli, model, tmp_path):
    loud = Path(shutil.copytree(model, tmp_path / "loud"))
    tensors = load_file(loud / "model.safetensors")
    tensors[f"model.layers.4.feed_forward.experts.{DEAD}.down_proj.weight"].fill_(1e38)
    save_file(tensors, loud / "model.safetensors", metadata={"format": "pt"})
    said = refusal(compress_cli("experts", loud, *ASKED))
    assert "layer 4" in said
    assert "NaN" in said
    assert not list(cache.folder("scratch").iterdir())

"""`auto` of `state_precision`: which formats a search chooses, that it measured what a decode then shows, and what it refuses."""

import hashlib
import itertools
import json
import math
import random
from pathlib import Path

import pytest
import torch
from interruptions import stop_after
from jamba_models import make_jamba
from refusals import refusal, refusal_of_command
from state_models import with_states

from compress.apply import pipeline, settling
from compress.check.state_costs import StateCosts
from compress.checkpoint.reader import Checkpoint
from compress.passes import Cost
from compress.passes.state_precision import Options
from compress.passes.states import greedy, search
from compress.passes.states.greedy import Choice
from compress.recipe.recipe import load_recipe
from compress.recipe.source import resolve
from compress.runtime.inference import Decoder

CALIBRATION = "{prompts: [self], samples: 4, length: 12}"
SSM, ATTENTION = (0, 1, 3), (2,)  # of the model: d_inner 80, d_state 7, one KV head of 8
KV_BYTES = {"bf16": 2 * 2 * 8, "int8": 2 * (8 + 2), "int4": 2 * (4 + 2)}  # a token
SSM_BYTES = {"fp32": 4 * 7 * 80, "bf16": 2 * 7 * 80, "int8": 9 * 80, "int4": 6 * 80}
CONV_BYTES = len(SSM) * 2 * 3 * 80
BEGUN = len(SSM) * SSM_BYTES["fp32"] + CONV_BYTES + 4096 * KV_BYTES["bf16"]
LEAST = len(SSM) * SSM_BYTES["int4"] + CONV_BYTES + 4096 * KV_BYTES["int4"]
CALM = {"dtype": torch.float32, "spread": 0.7, "num_hidden_layers": 4}
LOOSE = "{auto: {budget: 100, metric: kl_divergence_mean}}"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Calmer than `small`, so that losses of single states add up, and of fewer layers."""
    return make_jamba(tmp_path_factory.mktemp("model") / "calm", **CALM)


@pytest.fixture
def run(tmp_path, model):
    """Applies passes; `run(*blocks)` returns the output folder."""

    def applied(*blocks: str, model: Path = model, name: str = "out", calibration: str = CALIBRATION, **job) -> Path:
        loaded = recipe(tmp_path, *blocks, calibration=calibration)
        pipeline.apply(pipeline.Job(loaded, resolve(str(model)), tmp_path / name, **job))
        return tmp_path / name

    return applied


def recipe(folder: Path, *blocks: str, calibration: str = CALIBRATION):
    """Of passes such as "quantize: {...}"; a bare mapping is a state_precision."""
    steps = [block if not block.startswith("{") else f"state_precision: {block}" for block in blocks]
    path = folder / "recipe.yaml"
    lines = ["version: 1", f"calibration: {calibration}", "passes:", *(f"  - {step}" for step in steps)]
    path.write_text("\n".join(lines) + "\n")
    return load_recipe(str(path))


def states(out: Path) -> dict[tuple[int, str], dict]:
    kept = json.loads((out / "checkpoint" / "config.json").read_text())["compress"]["states"]
    return {(entry["layer"], entry["state"]): entry for entry in kept}


def found(out: Path, number: int = 0) -> dict:
    """What the search says in report.json."""
    return json.loads((out / "report.json").read_text())["passes"][number]["details"]["search"]


def digests(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (out / "checkpoint").iterdir()}


# which formats


def _tables():
    """Random ones of up to four places, in which a smaller choice may also be the cheaper one."""
    for seed in range(60):
        draw = random.Random(seed)
        yield {
            (layer, "ssm_state"): [
                Choice(1000, 0.0),
                *(Choice(draw.randrange(1, 1000), draw.choice([1, 10]) * draw.random()) for _ in range(draw.randrange(4))),
            ]
            for layer in range(draw.randrange(1, 5))
        }  # fmt: skip


TABLES = list(_tables())


def every_map(table) -> list[tuple[int, float]]:
    """Bytes and loss of every combination."""
    maps = itertools.product(*table.values())
    return [(sum(choice.bytes for choice in of), sum(choice.loss for choice in of)) for of in maps]


def test_after_every_move_no_map_is_smaller_for_that_loss_nor_cheaper_at_that_size():
    """All moves are taken: those that only fill what is left of a budget are no such steps."""
    for table in TABLES:
        moves, maps = greedy.within_loss(table, math.inf), every_map(table)
        for taken in range(len(moves) + 1):
            size, loss = greedy.size(table, moves[:taken]), greedy.lost(moves[:taken])
            assert size == min(other for other, cost in maps if cost <= loss + 1e-12)
            assert loss == pytest.approx(min(cost for other, cost in maps if other <= size))
        assert size == min(other for other, _ in maps)


def test_a_budget_is_never_exceeded_and_nothing_that_fits_is_left():
    for table, share in itertools.product(TABLES, (0.0, 0.2, 0.5, 0.9)):
        most = share * max(loss for _, loss in every_map(table))
        moves = greedy.within_loss(table, most)
        assert greedy.lost(moves) <= most
        assert all(greedy.lost(moves) + move.loss > most for move in greedy.possible(table, moves))
        prices = [move.price for move in moves]
        assert prices == sorted(prices), "what is undone first is the costliest per byte"


def test_bytes_that_can_be_met_are_and_at_no_move_that_could_be_spared():
    cases = [(table, size) for table in TABLES for size, _ in every_map(table)]
    for table, most in cases:
        moves = greedy.within_bytes(table, most)
        assert greedy.size(table, moves) <= most
        at = {place: table[place][number] for place, number in greedy.chosen(table, moves).items()}
        for place, now in at.items():
            spare = most - greedy.size(table, moves)
            assert not [other for other in table[place] if other.loss < now.loss and other.bytes - now.bytes <= spare]


class Pretended:
    """A `Finished` whose measurements are made up: every narrowed state costs as much as its bits fall short of 16, and
    together they cost `more` times the sum."""

    def __init__(self, model: Path, more: float = 1.0):
        self.model = self.unrounded = Checkpoint(model).model
        self._more, self.joint = more, []

    def alone(self, tried):
        return [Cost(self._loss(model), None) for _, model in tried]

    def together(self, tried):
        self.joint.append(tried)
        return Cost(self._more * self._loss(tried), None)

    @staticmethod
    def _loss(model) -> float:
        bits = {"fp32": 16, "bf16": 16, "int8": 8, "int4": 4}
        return sum(16 - bits[state.format] for state in model.config.compress.states) / 1000


def chosen(finished: Pretended, **auto) -> tuple[Options, search.Search]:
    options, note = search.settled(Options(auto=auto), finished, seed=0)
    return options, search.Search.model_validate(note["search"])


def test_what_misses_as_a_whole_loses_its_costliest_moves_until_it_holds(model):
    honest, liar = Pretended(model), Pretended(model, more=2.0)
    _, whole = chosen(honest, budget=0.060, metric="kl_divergence_mean")
    options, less = chosen(liar, budget=0.060, metric="kl_divergence_mean")
    assert len(honest.joint) == 2 and whole.decoded == 2, "as it began, and as chosen"
    assert len(liar.joint) > 2
    assert less.confirmed.kl_divergence_mean <= 0.060 < less.predicted * 2 + 0.024
    assert whole.bytes_found < less.bytes_found < less.bytes_begun
    assert options.kv_cache.format == "int4", "a cache saves most bytes for its loss"


def test_the_commonest_format_of_a_kind_speaks_for_it_and_others_are_overrides(model):
    options, _ = chosen(Pretended(model), bytes=LEAST + SSM_BYTES["int8"] - SSM_BYTES["int4"])
    assert options.auto is None and options.ssm_state.format == "int4" and options.conv_state.format == "bf16"
    (override,) = options.overrides
    assert (override.kind, override.format, len(override.layers)) == ("ssm_state", "int8", 1)


# what it measures


def decoded(folder: Path, windows: list[torch.Tensor]) -> torch.Tensor:
    """Log-probabilities of every position but the last, token by token."""
    stepper, ids = Decoder(Checkpoint(folder).model, len(windows)), torch.stack(windows)
    steps = [stepper.step(ids[:, t : t + 1]) for t in range(ids.shape[1] - 1)]
    return torch.stack(steps, 1).log_softmax(-1)


def divergence(folder: Path, original: Path, windows: list[torch.Tensor]) -> float:
    ours, theirs = decoded(folder, windows), decoded(original, windows)
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


def windows_of(model: Path, folder: Path) -> list[torch.Tensor]:
    job = pipeline.Job(recipe(folder, LOOSE), resolve(str(model)), folder / "never")
    planned = pipeline.prepare(job)
    return pipeline._calibration_windows(job, planned, pipeline.Outcome(planned.opened.weights_sha256()))


def test_the_losses_are_those_that_decoding_the_calibration_tokens_shows(run, model, tmp_path):
    out = run(LOOSE)
    windows, search = windows_of(model, tmp_path), found(out)
    assert search["confirmed"]["kl_divergence_mean"] == pytest.approx(
        divergence(out / "checkpoint", model, windows), rel=1e-3
    )
    tried = {(row["layer"], row["kept_as"]["format"]): row for row in search["tried"]}
    assert len(tried) == len(search["tried"]) == 3 * len(SSM) + 2
    for layer, name, format in ((0, "recurrent_state", "int4"), (3, "recurrent_state", "int8"), (2, "key", "int4")):
        kept = states(out)[layer, name] | {"format": format}
        settings = {key: value for key, value in kept.items() if key not in ("layer", "state")}
        both = {name: settings} | ({"value": settings} if name == "key" else {})
        folder = with_states(model, tmp_path / f"{layer}-{format}", both, layers=(layer,))
        row = tried[layer, format]["cost"]["kl_divergence_mean"]
        assert row == pytest.approx(divergence(folder, model, windows), rel=1e-2, abs=2e-7), (layer, format)


def test_a_loose_budget_narrows_everything_and_the_report_says_what_it_saves(run):
    out = run(LOOSE)
    kept, search = states(out), found(out)
    assert {kept[i, "recurrent_state"]["format"] for i in SSM} == {"int4"} == {kept[2, "key"]["format"]}
    assert {kept[i, "recurrent_state"]["rounding"] for i in SSM} == {"stochastic"}
    assert {kept[i, "conv_state"]["format"] for i in SSM} == {"bf16"}
    assert (search["bytes_begun"], search["bytes_found"]) == (BEGUN, LEAST)
    cache = next(row for row in search["tried"] if row["kind"] == "kv_cache" and row["chosen"])
    assert cache["bytes_saved"] == 4096 * (KV_BYTES["bf16"] - KV_BYTES["int4"])
    memory = json.loads((out / "report.json").read_text())["state_memory"]["candidate"]
    assert memory["total"]["at"]["4096"] == LEAST
    said = (out / "report.md").read_text()
    assert "Searched for kl_divergence_mean 100" in said and "kv_cache of layer 2: int8" in said and "**int4" in said


def test_a_budget_between_is_held_and_leaves_some_states_wider(run, model, tmp_path):
    loose = found(run(LOOSE, name="loose"))
    budget = 0.3 * loose["confirmed"]["kl_divergence_mean"]
    out = run(f"{{auto: {{budget: {budget}, metric: kl_divergence_mean}}}}")
    search = found(out)
    assert search["confirmed"]["kl_divergence_mean"] <= budget
    assert LEAST < search["bytes_found"] < BEGUN
    assert divergence(out / "checkpoint", model, windows_of(model, tmp_path)) <= 1.001 * budget


def test_drift_is_that_of_tokens_257_and_later_of_the_text(model, tmp_path):
    windows = list(torch.randint(3, 67, (3, 260), generator=torch.Generator().manual_seed(0)))
    folder = with_states(model, tmp_path / "rounded", {name: {"format": "int4"} for name in ("key", "value")})
    plain, rounded = Checkpoint(model).model, Checkpoint(folder).model
    costs = StateCosts(rounded, plain, windows, tmp_path / "states", "cpu", Notes()).together(rounded)
    ours, theirs = decoded(folder, windows), decoded(model, windows)
    late = [side[:, 256:].gather(2, torch.stack(windows)[:, 257:, None]).mean() for side in (ours, theirs)]
    assert costs.decode_drift_ratio == pytest.approx(float((late[1] - late[0]).exp()), abs=1e-6)
    assert costs.kl_divergence_mean == pytest.approx(float((theirs.exp() * (theirs - ours)).sum(-1).mean()), rel=1e-3)
    short = StateCosts(rounded, plain, [windows[0][:257]], tmp_path / "short", "cpu", Notes()).together(rounded)
    assert short.decode_drift_ratio is None


def test_a_budget_of_drift_is_held_by_windows_that_are_long_enough(run):
    long = "{prompts: [self], samples: 1, length: 258}"
    search = found(run("{auto: {budget: 1.5}, ssm_state: fp16}", calibration=long))
    assert search["confirmed"]["decode_drift_ratio"] <= 1.5 and search["goal"]["budget"] == 1.5
    assert search["predicted"] >= 1 and search["bytes_found"] < search["bytes_begun"]


class Notes(dict):
    """A journal in memory."""

    put = dict.update


# what becomes of it


def test_the_resolved_recipe_gives_the_same_checkpoint_without_a_search(run, monkeypatch, model, tmp_path):
    block = "{auto: {bytes: 36000, context: 1000}, overrides: [{kind: ssm_state, layers: [0], format: fp16}]}"
    out = run(block, seed=3)
    assert states(out)[0, "recurrent_state"]["format"] == "fp16"
    resolved = load_recipe(str(out / "recipe.resolved.yaml"))
    assert "auto" not in (out / "recipe.resolved.yaml").read_text()
    monkeypatch.setattr(settling, "StateCosts", None)
    pipeline.apply(pipeline.Job(resolved, resolve(str(model)), tmp_path / "again", seed=3))
    assert digests(tmp_path / "again") == digests(out)
    assert (tmp_path / "again" / "recipe.resolved.yaml").read_bytes() == (out / "recipe.resolved.yaml").read_bytes()


@pytest.mark.parametrize("after", [0, 3])
def test_what_was_measured_before_an_interruption_is_not_measured_again(run, monkeypatch, after):
    whole = digests(run(LOOSE, name="whole"))
    layers = count_of_measured_layers(monkeypatch)
    with monkeypatch.context() as patch:
        stop_after(patch, StateCosts, "_measure_layer", after)
        with pytest.raises(KeyboardInterrupt):
            run(LOOSE, name="broken")
    before = len(layers)
    assert digests(run(LOOSE, name="broken", resume=True)) == whole
    assert len(layers) - before == len(SSM + ATTENTION) - after


def count_of_measured_layers(monkeypatch) -> list[int]:
    real, layers = StateCosts._measure_layer, []

    def counted(self, index, models, advance):
        real(self, index, models, advance)
        layers.append(index)

    monkeypatch.setattr(StateCosts, "_measure_layer", counted)
    return layers


def test_any_number_of_threads_gives_the_same_bytes(run):
    one = digests(run(LOOSE, name="one"))
    costs = found(run(LOOSE, name="same"))
    torch.set_num_threads(3)
    try:
        out = run(LOOSE, name="three")
    finally:
        torch.set_num_threads(1)
    assert digests(out) == one and found(out) == costs


def test_what_is_named_stays_and_the_search_decides_the_rest(run):
    out = run("{kv_cache: fp8-e4m3, conv_state: {format: int8, scale: static}, auto: {budget: 100, metric: kl_divergence_mean},"
              "overrides: [{kind: ssm_state, layers: [1], format: fp16}]}")  # fmt: skip
    kept, search = states(out), found(out)
    assert {kept[2, name]["format"] for name in ("key", "value")} == {"fp8-e4m3"}
    assert {(kept[i, "conv_state"]["format"], kept[i, "conv_state"]["scale"]) for i in SSM} == {("int8", "static")}
    assert {i: kept[i, "recurrent_state"]["format"] for i in SSM} == {0: "int4", 1: "fp16", 3: "int4"}
    assert {(row["layer"], row["kind"]) for row in search["tried"]} == {(i, "ssm_state") for i in (0, 3)}
    static = {name for name in Checkpoint(out / "checkpoint").model.unit("layer.0").weights if "states." in name}
    assert static == {"model.layers.0.states.conv_state.scale"}


def test_static_scales_of_an_earlier_pass_are_left_as_they_are(run):
    out = run("{conv_state: {format: int8, scale: static}, ssm_state: int8}", LOOSE)
    kept = states(out)
    assert {kept[i, "conv_state"]["scale"] for i in SSM} == {"static"}
    assert {kept[i, "recurrent_state"]["format"] for i in SSM} == {"int4"}, "the last pass has the last word"


QUANTIZE, BUDGET = "quantize: {method: gptq}", "prune_experts: {budget: 0.25}"


@pytest.mark.parametrize("blocks", [(BUDGET, LOOSE, QUANTIZE), (QUANTIZE, LOOSE), (LOOSE, "quantize: {}")])
def test_it_takes_the_model_as_all_passes_left_it(run, tmp_path, blocks):
    whole = make_jamba(tmp_path / "model", **CALM, num_experts=4, num_experts_per_tok=1)
    out = run(*blocks, model=whole)
    search = found(out, blocks.index(LOOSE))
    left = Checkpoint(out / "checkpoint", allow_quantized=True).model
    plain = Checkpoint(with_states(out / "checkpoint", tmp_path / "plain", {}), allow_quantized=True).model
    loaded = load_recipe(str(tmp_path / "recipe.yaml"))
    job = pipeline.Job(loaded, resolve(str(whole)), tmp_path / "never")
    planned = pipeline.prepare(job)
    ids = torch.stack(pipeline._calibration_windows(job, planned, pipeline.Outcome(planned.opened.weights_sha256())))
    steppers = Decoder(left, len(ids)), Decoder(plain, len(ids))
    steps = [[stepper.step(ids[:, t : t + 1]) for stepper in steppers] for t in range(ids.shape[1] - 1)]
    ours, theirs = (torch.stack(side, 1).log_softmax(-1) for side in zip(*steps, strict=True))
    expected = float((theirs.exp() * (theirs - ours)).sum(-1).mean())
    assert search["confirmed"]["kl_divergence_mean"] == pytest.approx(expected, rel=1e-3)


def test_bytes_are_met_at_the_context_asked_for(run):
    most = LEAST + 1000
    out = run(f"{{auto: {{bytes: {most}}}}}")
    search = found(out)
    assert LEAST <= search["bytes_found"] <= most
    assert search["confirmed"]["kl_divergence_mean"] > 0
    short = 100 * KV_BYTES["int8"] + len(SSM) * SSM_BYTES["int4"] + CONV_BYTES
    assert found(run(f"{{auto: {{bytes: {short}, context: 100}}}}", name="short"))["bytes_found"] <= short


def test_bytes_that_are_met_as_it_begins_narrow_nothing_and_say_so(run, monkeypatch):
    monkeypatch.setattr(StateCosts, "together", None)
    out = run(f"{{auto: {{bytes: {BEGUN}}}}}")
    formats = {name: entry["format"] for (_, name), entry in states(out).items()}
    assert formats == {"recurrent_state": "fp32", "conv_state": "bf16", "key": "bf16", "value": "bf16"}
    assert "nothing is narrowed" in (out / "report.md").read_text()


# what is refused


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ("{auto: {}}", ("auto", "one of budget", "bytes")),
        ("{auto: {budget: 1.01, bytes: 1000}}", ("one of budget", "bytes")),
        ("{auto: {budget: 0.99}}", ("budget", "decode_drift_ratio below 1")),
        ("{auto: {budget: -0.1, metric: kl_divergence_mean}}", ("budget", "greater than or equal to 0")),
        ("{auto: {budget: .nan}}", ("budget",)),
        ("{auto: {budget: true}}", ("budget", "expected a number")),
        ("{auto: {budget: 1.01, metric: perplexity}}", ("'perplexity' is not known", "decode_drift_ratio")),
        ("{auto: {bytes: 1000, metric: kl_divergence_mean}}", ("metric", "bytes are counted")),
        ("{auto: {bytes: 0}}", ("bytes", "greater than or equal to 1")),
        ("{auto: {bytes: 1000, context: 0}}", ("context", "greater than or equal to 1")),
        ("{auto: {bytes: 1000, context: 99999999999999999999}}", ("context", "less than or equal to 1073741824")),
        ("{auto: {bytes: 1000, contexts: 3}}", ("unknown key 'contexts'", "'context'")),
        ("{auto: 1.01}", ("auto", "expected a mapping")),
        ("{ssm_state: int8, conv_state: bf16, kv_cache: int8, auto: {budget: 1.01}}", ("auto", "nothing to decide")),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_with_its_line(tmp_path, block, words):
    said = refusal(lambda: recipe(tmp_path, block))
    assert "recipe.yaml:4: " in said and all(word in said for word in words), said


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (f"{{auto: {{bytes: {LEAST - 1}}}}}", (f"bytes is {LEAST - 1:,}", f"give {LEAST} or more", "4,096 tokens")),
        ("{auto: {bytes: 1, context: 1}}", ("1 tokens", f"give {LEAST - 4095 * KV_BYTES['int4']} or more")),
        (f"{{kv_cache: int8, auto: {{bytes: {LEAST}}}}}", (f"give {LEAST + 4096 * 8} or more",)),
        ("{ssm_state: fp16, kv_cache: bf16, auto: {budget: 1, metric: kl_divergence_mean}}", ("nothing is left to narrow",)),
        ("{auto: {budget: 1.01}}", ("passes.0.state_precision", "258 tokens", "calibration.length is 12")),
        ("{auto: {budget: 1.01}, overrides: [{kind: ssm_state, layers: [2], format: bf16}]}", ("layer 2", "no ssm_state")),
    ],
)  # fmt: skip
def test_what_arithmetic_tells_is_refused_before_any_work(compress_cli, tmp_path, model, block, words):
    recipe(tmp_path, block)
    for flag in ([], ["--dry-run"]):
        result = compress_cli("apply", tmp_path / "recipe.yaml", "-m", model, "-o", tmp_path / "out", *flag)
        said = refusal_of_command(result)
        assert "state_precision" in said and all(word in said for word in words), said
    assert not (tmp_path / "out.partial").exists()


def test_the_bytes_that_a_refusal_names_are_met(run):
    assert found(run(f"{{auto: {{bytes: {LEAST}}}}}"))["bytes_found"] == LEAST


@pytest.mark.parametrize("budget", ["0", "1e-12"])
def test_a_budget_under_which_nothing_can_be_narrowed_names_one_that_would_do(run, tmp_path, budget):
    said = refusal(lambda: run(f"{{auto: {{budget: {budget}, metric: kl_divergence_mean}}}}"))
    assert said.startswith(
        f"state_precision.auto: no state can be narrowed within a kl_divergence_mean of {float(budget):g}"
    )
    would_do = said.rpartition("give a budget of ")[2].removesuffix(" or more")
    assert 0 < float(would_do) < 0.01
    assert not (tmp_path / "out.partial").exists() and not (tmp_path / "out").exists()
    search = found(run(f"{{auto: {{budget: {would_do}, metric: kl_divergence_mean}}}}"))
    assert search["bytes_found"] < BEGUN and search["confirmed"]["kl_divergence_mean"] <= float(would_do)


def test_the_plan_says_that_states_are_chosen_by_search_and_with_what(compress_cli, tmp_path, model):
    recipe(tmp_path, "{auto: {budget: 0.001, metric: kl_divergence_mean}}")
    said = compress_cli("apply", tmp_path / "recipe.yaml", "-m", model, "-o", tmp_path / "out", "--dry-run").stdout
    assert "states    chosen by search" in said and "kl_divergence_mean within 0.001" in said
    assert f"between {LEAST:,} and {BEGUN:,} bytes" in said
    assert "calibrate self: up to 4 windows of 12 tokens" in said
    assert not (tmp_path / "out.partial").exists()

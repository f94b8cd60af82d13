"""`state_precision`: what a recipe says of states, what config.json keeps of it, and what a decode then makes of it."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from interruptions import stop_after
from jamba_models import load_reference, make_jamba
from refusals import refusal, refusal_of_command
from safetensors import safe_open

import compress
from compress.apply import pipeline, sweep
from compress.checkpoint.reader import Checkpoint, open_config
from compress.recipe.recipe import load_recipe
from compress.recipe.source import resolve
from compress.runtime.inference import Decoder
from compress.studies.inspection import inspect

BLOCK = "{ssm_state: {format: int8, rounding: stochastic}, conv_state: bf16, kv_cache: int8}"
STATIC = "{ssm_state: {format: int8, scale: static}, conv_state: {format: int8, scale: static}, kv_cache: {format: int8, scale: static}}"
CALIBRATION = "calibration: {prompts: [self], samples: 4, length: 24}\n"
SSM, ATTENTION = (0, 1, 3, 4, 5), (2,)  # of the small model: d_inner 80, d_state 7, one KV head of 8


@pytest.fixture
def run(tmp_path, small):
    """Applies passes to the small model; `run(*blocks)` returns the output folder."""

    def applied(*blocks: str, model: Path = small, name: str = "out", seed: int = 0, **job) -> Path:
        loaded = recipe(tmp_path, *blocks)
        pipeline.apply(pipeline.Job(loaded, resolve(str(model)), tmp_path / name, seed=seed, **job))
        return tmp_path / name

    return applied


def recipe(folder: Path, *blocks: str):
    """Of passes such as "state_precision: {...}"; a bare mapping is a state_precision."""
    steps = [block if not block.startswith("{") else f"state_precision: {block}" for block in blocks]
    path = folder / "recipe.yaml"
    path.write_text("version: 1\n" + CALIBRATION + "passes:\n" + "".join(f"  - {step}\n" for step in steps))
    return load_recipe(str(path))


def section(out: Path) -> dict:
    return json.loads((out / "checkpoint" / "config.json").read_text())["compress"]


def tensors(out: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in (out / "checkpoint").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    return found


def digests(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (out / "checkpoint").iterdir()}


# what is kept


def test_config_json_says_how_every_state_is_kept(run):
    states = {(entry["layer"], entry["state"]): entry for entry in section(run(BLOCK))["states"]}
    names = [(i, name) for i in SSM for name in ("conv_state", "recurrent_state")]
    assert set(states) == {*names, *((i, name) for i in ATTENTION for name in ("key", "value"))}
    recurrent = [states[i, "recurrent_state"] for i in SSM]
    assert {(e["format"], e["rounding"], e["scale"]) for e in recurrent} == {("int8", "stochastic", "dynamic")}
    assert len({e["seed"] for e in recurrent}) == len(SSM), "every state has a dither of its own"
    assert {states[i, "conv_state"]["format"] for i in SSM} == {"bf16"}
    assert {states[i, name]["format"] for i in ATTENTION for name in ("key", "value")} == {"int8"}


def test_seeds_come_from_the_runs_seed_or_the_recipes(run):
    def seeds(out):
        return [entry["seed"] for entry in section(out)["states"] if entry["state"] == "recurrent_state"]

    own = "{ssm_state: {format: int8, rounding: stochastic, seed: 1}}"
    given = [seeds(run(BLOCK, name="a")), seeds(run(BLOCK, name="b", seed=1)), seeds(run(own, name="c", seed=5))]
    assert given[0] != given[1] and given[1] == given[2]


def test_what_is_not_named_stays_as_it_is(run, small):
    assert {entry["state"] for entry in section(run("{conv_state: fp16}"))["states"]} == {"conv_state"}


def test_the_first_override_that_covers_a_layer_wins(run):
    out = run("{ssm_state: bf16, overrides: [{kind: ssm_state, layers: [0, 3], format: fp16},"
              "{kind: ssm_state, layers: [3, 4], format: int8}, {kind: kv_cache, layers: every, format: int4}]}")  # fmt: skip
    formats = {(entry["layer"], entry["state"]): entry["format"] for entry in section(out)["states"]}
    assert {i: formats[i, "recurrent_state"] for i in SSM} == {0: "fp16", 1: "bf16", 3: "fp16", 4: "int8", 5: "bf16"}
    assert formats[2, "key"] == formats[2, "value"] == "int4"


def test_weights_stay_as_they_came_and_a_second_pass_has_the_last_word(run, small):
    out = run(BLOCK, "{ssm_state: bf16}")
    source = {w.name: w.dense() for w in Checkpoint(small).model.weights}
    assert all(torch.equal(tensor.float(), source[name]) for name, tensor in tensors(out).items())
    formats = {entry["state"]: entry["format"] for entry in section(out)["states"]}
    assert formats == {"recurrent_state": "bf16", "conv_state": "bf16", "key": "int8", "value": "int8"}


# static scales


def largest_by_hand(small: Path, out: Path) -> torch.Tensor:
    """Per channel of layer 0, the largest magnitude of the recurrent state of transformers' own decode of the windows."""
    reference, most = load_reference(small), torch.zeros(80)
    for window in calibration_windows(small, out):
        cache = None
        with torch.inference_mode():
            for token in window:
                cache = reference(token.view(1, 1), past_key_values=cache).past_key_values
                most = torch.maximum(most, cache.layers[0].recurrent_states[0][0].abs().amax(-1))
    return most


def calibration_windows(small: Path, out: Path) -> list[torch.Tensor]:
    job = pipeline.Job(recipe(out.parent, STATIC), resolve(str(small)), out.parent / "never")
    planned = pipeline.prepare(job)
    return pipeline._calibration_windows(job, planned, pipeline.Outcome(planned.opened.weights_sha256()))


def test_static_scales_are_those_that_decoding_the_calibration_tokens_reaches(run, small):
    out = run(STATIC)
    scale = tensors(out)["model.layers.0.states.recurrent_state.scale"]
    assert scale.shape == (1, 80) and scale.dtype == torch.float32
    torch.testing.assert_close(scale[0], largest_by_hand(small, out) / 127, rtol=1e-4, atol=0)


def test_static_scales_of_a_cache_are_per_channel(run):
    found = tensors(run(STATIC))
    assert found["model.layers.2.states.key.scale"].shape == (1, 1, 8)
    assert found["model.layers.0.states.conv_state.scale"].shape == (80, 1)


QUANTIZE, PRUNE, BUDGET = "quantize: {method: gptq}", "prune_experts: {keep: 2}", "prune_experts: {budget: 0.25}"


@pytest.mark.parametrize(
    "blocks", [(STATIC, PRUNE, QUANTIZE), (PRUNE, STATIC, QUANTIZE), (QUANTIZE, STATIC), (BUDGET, STATIC), (BUDGET, BLOCK),
               (BLOCK, "quantize: {}"), ("quantize: {}", BLOCK)]
)  # fmt: skip
def test_it_stands_anywhere_among_other_passes(run, tmp_path, blocks):
    if BUDGET in blocks or PRUNE in blocks:
        model = make_jamba(tmp_path / "model", num_experts=4, num_experts_per_tok=1)
        out = run(*blocks, model=model)
    else:
        out = run(*blocks)
    opened = Checkpoint(out / "checkpoint", allow_quantized=True).model
    assert len(opened.config.compress.states) == 2 * len(SSM + ATTENTION)
    assert [entry["name"] for entry in section(out)["passes"]] == [
        step.name for step in recipe(tmp_path, *blocks).recipe.passes
    ]
    assert torch.isfinite(Decoder(opened).step(torch.tensor([[3, 4]]))).all()
    compress.load(out)


def test_a_run_that_was_interrupted_ends_in_the_same_bytes(run, monkeypatch):
    whole = digests(run(STATIC, QUANTIZE, name="whole"))
    with monkeypatch.context() as patch:
        stop_after(patch, sweep.ShardWriter, "publish", 3)
        with pytest.raises(KeyboardInterrupt):
            run(STATIC, QUANTIZE, name="broken")
    assert digests(run(STATIC, QUANTIZE, name="broken", resume=True)) == whole


def test_any_number_of_threads_gives_the_same_bytes(run):
    one = digests(run(STATIC, name="one"))
    torch.set_num_threads(3)
    try:
        assert digests(run(STATIC, name="three")) == one
    finally:
        torch.set_num_threads(1)


# what a sequence takes


def test_the_report_has_a_row_for_each_layer_and_kind(run):
    out = run(BLOCK)
    report = json.loads((out / "report.json").read_text())
    rows = {(row["layer"], row["kind"]): row for row in report["states"]}
    assert len(report["states"]) == len(rows) == 2 * len(SSM) + len(ATTENTION)
    row = rows[0, "ssm_state"]
    assert (row["format"], row["rounding"], row["every"]) == ("int8", "stochastic", 1)
    assert row["bytes_per_sequence"] == (7 + 2) * 80  # two more entries a channel hold the scale
    assert rows[0, "conv_state"]["bytes_per_sequence"] == 2 * 3 * 80
    assert rows[2, "kv_cache"]["bytes_per_token"] == 2 * (8 + 2)
    assert rows[2, "kv_cache"]["bytes_per_sequence"] == 4096 * 2 * (8 + 2)
    memory = report["state_memory"]
    assert memory["candidate"]["ssm_state"]["bytes_per_sequence"] == 5 * 9 * 80
    assert memory["baseline"]["total"]["at"]["4096"] == 5 * (4 * 7 * 80 + 2 * 3 * 80) + 4096 * 2 * 2 * 8
    assert "<summary>States of a sequence</summary>" in (out / "report.md").read_text()


def test_config_json_and_the_report_have_feedback_and_cadence(run):
    out = run(
        "{ssm_state: {format: int4, rounding: error_feedback, every: 4, axis: d_inner, block: 16}, conv_state: bf16}"
    )
    entries = {entry["state"]: entry for entry in section(out)["states"] if entry["layer"] == 0}
    words = ("format", "rounding", "residual", "every", "axis", "block")
    assert [entries["recurrent_state"].get(word) for word in words] == [
        "int4",
        "error_feedback",
        "int8",
        4,
        "d_inner",
        16,
    ]
    assert {"residual", "axis"} & entries["conv_state"].keys() == set() and entries["conv_state"]["every"] == 1
    report, bytes_each = (
        json.loads((out / "report.json").read_text()),
        7 * (40 + 10) + 7 * (80 + 10) + 2 * 3 * (2 * 80 + 7),
    )
    row = next(row for row in report["states"] if row["kind"] == "ssm_state")
    assert (row["rounding"], row["every"], row["residual"]) == ("error_feedback", 4, "int8")
    assert row["bytes_per_sequence"] == bytes_each
    assert report["state_memory"]["candidate"]["ssm_state"]["bytes_per_sequence"] == 5 * bytes_each
    assert "int4 + int8 every 4 tokens" in (out / "report.md").read_text()


def test_static_scales_stay_what_they_are_with_feedback_cadence_and_the_other_axis(run, small):
    out = run("{ssm_state: {format: int8, scale: static, rounding: error_feedback, every: 3, axis: d_inner}}")
    found = tensors(out)["model.layers.0.states.recurrent_state.scale"]
    assert found.shape == (7, 1)
    plain = tensors(run("{ssm_state: {format: int8, scale: static, axis: d_inner}}", name="plain"))
    assert torch.equal(found, plain["model.layers.0.states.recurrent_state.scale"])
    assert torch.isfinite(Decoder(Checkpoint(out / "checkpoint").model).step(torch.tensor([[3, 4]]))).all()


def test_inspect_counts_states_as_they_are_kept(run, small):
    facts, came = inspect(str(run(STATIC))), inspect(str(small))
    assert facts["ssm_state_bytes"] == 5 * 7 * 80 and facts["conv_state_bytes"] == 5 * 3 * 80
    assert facts["kv_bytes_per_token"] == 2 * 8
    assert facts["state_memory"]["total"]["at"]["32768"] == 5 * 10 * 80 + 32768 * 16
    assert facts["parameters"] == came["parameters"], "scales are no parameters"


# what loads it


def steps(logits, ids: torch.Tensor) -> torch.Tensor:
    """The last logits after a prompt, then token by token: [B, calls, V]."""
    pieces = [ids[:, :9], *ids[:, 9:].split(1, 1)]
    with torch.inference_mode():
        return torch.stack([logits(piece) for piece in pieces], 1)


def cached(model):
    held = {"cache": None}

    def step(piece):
        output = model(piece, past_key_values=held["cache"])
        held["cache"] = output.past_key_values
        return output.logits[:, -1]

    return step


@pytest.mark.parametrize("block", [BLOCK, STATIC, "{ssm_state: fp8-e4m3, conv_state: fp16, kv_cache: int4}"])
def test_compress_load_rounds_as_our_own_forward_does_and_stock_transformers_does_not(run, tmp_path, block):
    model = make_jamba(tmp_path / "model", torch.float32, spread=0.7)
    out = run(block, model=model)
    ids = torch.randint(3, 67, (2, 24), generator=torch.Generator().manual_seed(0))
    ours = steps(Decoder(Checkpoint(out / "checkpoint").model, 2).step, ids)
    loaded, stock = (steps(cached(m), ids) for m in (compress.load(out), load_reference(out / "checkpoint")))
    assert (loaded - ours).abs().mean() < 0.1 * (stock - ours).abs().mean()
    assert torch.equal(stock, steps(cached(load_reference(model)), ids))


def test_padding_in_front_changes_nothing_of_a_loaded_models_rounding(run, tmp_path):
    out = run(BLOCK, model=make_jamba(tmp_path / "model", torch.float32, spread=0.7))
    model = compress.load(out)
    ids = torch.randint(3, 67, (1, 20), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    plain = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)
    mask = (torch.arange(24) >= 4).long()[None]
    shifted = model.generate(
        padded, attention_mask=mask, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0
    )
    assert torch.equal(plain[:, 20:], shifted[:, 24:])


def test_runtimes_say_that_stock_transformers_does_not_round_states(run):
    rows = json.loads((run(BLOCK) / "report.json").read_text())["runtimes"]
    stock = next(row for row in rows if row["name"] == "transformers")
    assert stock["loads"] and "states" in stock["why"]


# what is refused


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ("{}", ("names no state", "ssm_state")),
        ("{ssm_state: int9}", ("'int9' is not known", "int8")),
        ("{ssm_states: int8}", ("unknown key 'ssm_states'", "'ssm_state'")),
        ("{ssm_state: {format: fp32, rounding: stochastic}}", ("fp32 is not rounded", "stochastic", "narrower")),
        ("{ssm_state: {format: bf16, scale: static}}", ("bf16 has no scales",)),
        ("{ssm_state: {format: fp16, block: 4}}", ("fp16 has no scales",)),
        ("{ssm_state: {format: int8, block: 0}}", ("block", "greater than or equal to 1")),
        ("{ssm_state: {format: int8, block: yes}}", ("block",)),
        ("{ssm_state: {rounding: stochastic}}", ("missing key", "format")),
        ("{ssm_state: {format: int8, every: 0}}", ("every", "greater than or equal to 1")),
        ("{ssm_state: {format: int8, every: 2.5}}", ("every", "integer")),
        ("{ssm_state: {format: int8, every: 5000}}", ("every", "4096")),
        ("{ssm_state: {format: fp32, every: 4}}", ("fp32 is not rounded", "every: 4", "narrower")),
        ("{ssm_state: {format: fp32, rounding: error_feedback}}", ("fp32 loses nothing", "narrower")),
        ("{ssm_state: {format: int8, residual: int8}}", ("residual", "rounding: error_feedback")),
        ("{ssm_state: {format: int8, rounding: error_feedback, residual: fp32}}", ("residual", "'fp32' is not known")),
        ("{ssm_state: {format: bf16, axis: d_inner}}", ("bf16 has no scales, so axis",)),
        ("{ssm_state: {format: int8, axis: d_conv}}", ("'d_conv' is not known", "d_inner")),
        ("{ssm_state: {format: int8, rounding: error_fedback}}", ("'error_fedback' is not known", "error_feedback")),
        (
            "{overrides: [{kind: ssm_state, layers: [0], format: int8, every: 0}]}",
            ("every", "greater than or equal to 1"),
        ),
        ("{overrides: [{kind: ssm_state, layers: [], format: int8}]}", ("layers", "names no layer", "[0, 2]")),
        ("{overrides: [{kind: ssm_state, layers: all, format: int8}]}", ("layers", "every", "'all'")),
        ("{overrides: [{kind: ssm, format: int8}]}", ("'ssm' is not known", "ssm_state")),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_with_its_line(tmp_path, block, words):
    said = refusal(lambda: recipe(tmp_path, block))
    assert "recipe.yaml:4: " in said and all(word in said for word in words), said


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ("{ssm_state: {format: int8, block: 8}}", ("ssm_state", "block is 8", "7 entries")),
        ("{ssm_state: {format: int8, block: 81, axis: d_inner}}", ("ssm_state", "block is 81", "80 entries")),
        ("{ssm_state: {format: bf16, block: 8, rounding: error_feedback}}", ("ssm_state", "block is 8", "7 entries")),
        ("{kv_cache: {format: int8, every: 4}}", ("kv_cache", "every: 4", "ssm_state only")),
        ("{conv_state: {format: bf16, every: 2}}", ("conv_state", "every: 2", "ssm_state only")),
        ("{kv_cache: {format: int8, rounding: error_feedback}}", ("kv_cache", "error_feedback", "ssm_state only")),
        ("{conv_state: {format: bf16, rounding: error_feedback, residual: fp16}}", ("conv_state", "ssm_state only")),
        ("{kv_cache: {format: int8, axis: d_state}}", ("kv_cache", "axis", "ssm_state only")),
        ("{overrides: [{kind: kv_cache, layers: every, format: int8, every: 3}]}", ("overrides.0", "every: 3")),
        ("{kv_cache: {format: int4, block: 9}}", ("kv_cache", "block is 9", "8 entries")),
        ("{conv_state: int8}", ("conv_state", "scale: static")),
        ("{overrides: [{kind: ssm_state, layers: [0, 6], format: int8}]}", ("overrides.0", "layer 6", "0 to 5")),
        ("{overrides: [{kind: ssm_state, layers: [-1], format: int8}]}", ("overrides.0", "layer -1", "0 to 5")),
        ("{overrides: [{kind: ssm_state, layers: [1, 2], format: int8}]}", ("layer 2", "no ssm_state", "0, 1, 3, 4, 5")),
        ("{overrides: [{kind: conv_state, layers: [1], format: fp8-e4m3}]}", ("overrides.0", "scale: static", "layer 1")),
    ],
)  # fmt: skip
def test_what_this_models_states_cannot_be_is_refused_before_any_work(compress_cli, tmp_path, small, block, words):
    recipe(tmp_path, block)
    result = compress_cli("apply", tmp_path / "recipe.yaml", "-m", small, "-o", tmp_path / "out", "--dry-run")
    said = refusal_of_command(result)
    assert "state_precision" in said and all(word in said for word in words), said


def test_kinds_that_a_model_does_not_have_are_noted_and_alone_refused(compress_cli, tmp_path):
    model = make_jamba(tmp_path / "model", attn_layer_period=1, attn_layer_offset=0)
    arguments = ("apply", tmp_path / "recipe.yaml", "-m", model, "-o", tmp_path / "out", "--dry-run")
    recipe(tmp_path, BLOCK)
    assert "'ssm_state' is named, but this model keeps no such state" in compress_cli(*arguments).stdout
    recipe(tmp_path, "{ssm_state: int8}")
    assert "no state of the kinds that are named" in refusal_of_command(compress_cli(*arguments))
    recipe(tmp_path, "{kv_cache: int8, overrides: [{kind: ssm_state, format: int8}]}")
    assert "covers nothing" in refusal_of_command(compress_cli(*arguments))


def test_static_scales_are_found_once(run, tmp_path, small):
    said = refusal(lambda: run(STATIC, "{ssm_state: bf16}"))
    assert "static scales already" in said and "layer 0" in said


ENTRY = {"layer": 0, "state": "recurrent_state", "format": "int8"}


@pytest.mark.parametrize(
    ("states", "words"),
    [
        ([ENTRY | {"layer": 6}], ("compress.states.0", "layer 6", "6")),
        ([ENTRY | {"layer": 10**30}], ("compress.states.0",)),
        ([ENTRY | {"layer": -1}], ("compress.states.0.layer",)),
        ([ENTRY | {"layer": True}], ("compress.states.0.layer",)),
        ([ENTRY | {"state": "key"}], ("layer 0 has no state 'key'", "recurrent_state")),
        ([ENTRY, ENTRY], ("compress.states.1", "twice")),
        ([ENTRY | {"format": "int3"}], ("compress.states.0.format",)),
        ([ENTRY | {"block": 0}], ("compress.states.0.block",)),
        ([ENTRY | {"block": 10**18}], ("compress.states.0", "7 entries")),
        ([ENTRY | {"seed": 1 << 16}], ("compress.states.0.seed",)),
        ([ENTRY | {"format": "fp32", "rounding": "stochastic"}], ("compress.states.0", "fp32 is not rounded")),
        ([ENTRY | {"state": "conv_state"}], ("compress.states.0", "static")),
        ([ENTRY | {"every": 0}], ("compress.states.0.every", "greater than or equal to 1")),
        ([ENTRY | {"every": 10**18}], ("compress.states.0.every", "4096")),
        ([ENTRY | {"state": "conv_state", "format": "bf16", "every": 2}], ("compress.states.0", "ssm_state only")),
        ([ENTRY | {"layer": 2, "state": "key", "rounding": "error_feedback"}], ("compress.states.0", "ssm_state only")),
        ([ENTRY | {"layer": 2, "state": "key", "axis": "d_state"}], ("compress.states.0", "axis", "ssm_state only")),
        ([ENTRY | {"residual": "int8"}], ("compress.states.0", "rounding: error_feedback")),
        ([ENTRY | {"rounding": "error_feedback", "residual": "fp32"}], ("compress.states.0.residual", "int8")),
        ([ENTRY | {"axis": "d_conv"}], ("compress.states.0.axis", "d_inner")),
        ([ENTRY | {"axis": "d_inner", "block": 81}], ("compress.states.0", "80 entries")),
        ({}, ("compress.states",)),
    ],
)
def test_a_config_json_that_keeps_states_otherwise_is_refused(tmp_path, small, states, words):
    values = json.loads((small / "config.json").read_text()) | {"compress": {"states": states}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    said = refusal(lambda: open_config(tmp_path))
    assert "config.json" in said and all(word in said for word in words), said


def test_a_scale_that_is_missing_or_too_much_is_refused(tmp_path, small, run):
    out = run(STATIC)
    path = out / "checkpoint" / "config.json"
    values = json.loads(path.read_text())
    values["compress"]["states"] = values["compress"]["states"][1:]
    path.write_text(json.dumps(values))
    assert "states.conv_state.scale" in refusal(lambda: Checkpoint(out / "checkpoint"))

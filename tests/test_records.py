"""`compress.passes` in config.json: with the original at hand it says what each tensor ought to be. The changes are replayed here
in plain arithmetic on the original's tensors, and the result is compared with what is stored."""

import base64
import json
import re
import zlib
from itertools import product

import pytest
import torch
from jamba_models import TIED, make_jamba, make_whole_model
from pruning_oracle import EXPERTS, MOE_LAYERS, apply, assert_same_tensors, make_source, tensors_in
from refusals import refusal
from transformers import AutoModelForCausalLM

import compress
from compress.apply import pipeline
from compress.checkpoint.reader import Checkpoint
from compress.model.tensor_names import in_short
from compress.recipe.recipe import load_recipe
from compress.recipe.source import resolve

CALIBRATION = "calibration: {prompts: [self], samples: 6, length: 64}\n"
GPTQ = {"quantize": {"method": "gptq", "weights": "int8", "clip": "none"}}


def named(patterns) -> list[str]:
    """Names that were written in short, by the description in the docs alone."""
    found = []
    for pattern in patterns:
        parts = re.split(r"\[([\d,-]+)\]", pattern)
        numbers = [
            [str(n) for run in part.split(",") for n in range(int(run.split("-")[0]), int(run.split("-")[-1]) + 1)]
            for part in parts[1::2]
        ]
        for chosen in product(*numbers):
            found.append("".join(text + number for text, number in zip(parts[::2], (*chosen, ""), strict=True)))
    return found


def factors_of(text: str) -> torch.Tensor:
    exponents = torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(text))), dtype=torch.int8)
    return torch.exp2(exponents.double())


def replayed(changes: list[dict], tensors: dict) -> tuple[dict, set[str]]:
    """What the original's tensors become, and the names of those that do not follow from it."""
    tensors, unknown = dict(tensors), set()
    for change in changes:
        kind = change["kind"]
        if kind == "kept":
            came = {name: tensors.pop(name) for name in list(tensors) if name.startswith(change["stem"])}
            for new, old in enumerate(change["sources"]):
                start = f"{change['stem']}{old}."
                renamed = {
                    f"{change['stem']}{new}.{n.removeprefix(start)}": t for n, t in came.items() if n.startswith(start)
                }
                tensors |= renamed
                unknown |= set(renamed) if any(group[0] == old for group in change.get("merged", ())) else set()
        elif kind == "rows":
            tensors |= {name: tensors[name][change["rows"]] for name in named(change["tensors"])}
        elif kind == "scaled":
            for name in named(change["tensors"]):
                tensors[name] = (tensors[name].float() * change["factor"]).to(tensors[name].dtype)
        elif kind == "folded":
            factors, source = factors_of(change["exponents"]), tensors[change["source"]]
            shape = (-1, *[1] * (source.dim() - 1))
            tensors[change["source"]] = (source.double() / factors.view(shape)).to(source.dtype)
            for name in named(change["targets"]):
                tensors[name] = (tensors[name].double() * factors).to(tensors[name].dtype)
        elif kind == "recomputed":
            unknown |= set(named(change["tensors"]))
    return tensors, unknown


def records_of(folder) -> list[dict]:
    return json.loads((folder / "config.json").read_text())["compress"]["passes"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("source"))


PRUNINGS = {
    "defaults": {"keep": 3},
    "rescaled": {"keep": 3, "recovery": "none"},
    "rows stay": {"keep": 3, "router": "keep_rows", "recovery": "none"},
    "merged": {"keep": 3, "method": "merge", "router": "slice", "recovery": "none"},
    "a budget": {"budget": 0.4, "router": "slice", "recovery": "none"},
}


@pytest.fixture(scope="module", params=PRUNINGS)
def pruned(request, source, tmp_path_factory):
    return apply(source, tmp_path_factory.mktemp("pruned"), PRUNINGS[request.param])


def test_a_pruned_model_is_its_original_with_the_recorded_changes(source, pruned):
    (record,) = records_of(pruned.checkpoint)
    assert record["name"] == "prune_experts"
    expected, unknown = replayed(record["changes"], tensors_in(source))
    stored = pruned.stored
    assert unknown < stored.keys() == expected.keys()
    assert_same_tensors({name: stored[name] for name in stored.keys() - unknown},
                        {name: expected[name] for name in stored.keys() - unknown})  # fmt: skip
    assert all(not torch.equal(stored[name], expected[name]) for name in unknown)


def test_what_was_corrected_or_merged_is_recorded(source, tmp_path):
    corrected = apply(source, tmp_path / "corrected", {"keep": 3})
    _, unknown = replayed(records_of(corrected.checkpoint)[0]["changes"], tensors_in(source))
    assert unknown == {
        f"model.layers.{layer}.feed_forward.experts.{corrected.kept[layer].index(expert)}.down_proj.weight"
        for layer, entry in corrected.layers.items()
        for expert in entry["recovered"]
    }
    merged = apply(source, tmp_path / "merged", {"keep": 3, "method": "merge"})
    groups = [change["merged"] for change in records_of(merged.checkpoint)[0]["changes"] if change["kind"] == "kept"]
    assert len(groups) == len(MOE_LAYERS)
    for layer, found in zip(MOE_LAYERS, groups, strict=True):
        others = [expert for _, *others in found for expert in others]
        assert sorted(others) == sorted(set(range(EXPERTS)) - set(merged.kept[layer]))


def test_an_equalized_model_is_its_original_with_the_recorded_factors(source, tmp_path):
    done = apply(source, tmp_path, {"quantize": {"weights": "none", "equalize": 0.5}})
    (record,) = records_of(done.checkpoint)
    expected, unknown = replayed(record["changes"], tensors_in(source))
    changed = [name for name, tensor in tensors_in(source).items() if not torch.equal(tensor, expected[name])]
    assert {change["kind"] for change in record["changes"]} == {"folded"}
    assert len(changed) > 20 and any("layernorm" in name for name in changed)
    assert not unknown
    assert_same_tensors(done.stored, expected)


def test_how_each_matrix_was_rounded_is_recorded(source, tmp_path):
    nearest = apply(source, tmp_path / "nearest", {"quantize": {"weights": "int8"}})
    done = apply(source, tmp_path / "gptq", GPTQ)
    rounded = {c["method"]: named(c["tensors"]) for c in records_of(done.checkpoint)[0]["changes"]}
    packed = {name.removesuffix("_packed") for name in done.stored if name.endswith("_packed")}
    assert sorted(rounded["gptq"] + rounded["nearest"]) == sorted(packed)
    assert rounded["nearest"] == ["model.embed_tokens.weight"]
    same = {n for n in packed if torch.equal(done.stored[n + "_packed"], nearest.stored[n + "_packed"])}
    assert same == set(rounded["nearest"])
    (change,) = records_of(nearest.checkpoint)[0]["changes"]
    assert (change["method"], sorted(named(change["tensors"]))) == ("nearest", sorted(packed))


def test_what_an_override_leaves_alone_is_not_recorded(source, tmp_path):
    override = {"role": "experts", "layers": [4], "projections": ["up_proj"], "weights": "none"}
    done = apply(source, tmp_path, {"quantize": {"weights": "int8", "overrides": [override]}})
    (change,) = records_of(done.checkpoint)[0]["changes"]
    left = {f"model.layers.4.feed_forward.experts.{expert}.up_proj.weight" for expert in range(EXPERTS)}
    assert left & set(named(change["tensors"])) == set()
    assert left <= done.stored.keys()


def test_rotations_are_those_of_the_quantization_section(source, tmp_path):
    options = {"weights": "int8", "activations": "dynamic-int8", "rotate": ["experts", "ssm_in"]}
    done = apply(source, tmp_path, {"quantize": options})
    groups = done.config["quantization_config"]["transform_config"]["config_groups"].values()
    expected = {group["head_dim"]: sorted(f"{t}.weight" for t in group["apply"][0]["targets"]) for group in groups}
    found = {c["block"]: sorted(named(c["tensors"])) for c in records_of(done.checkpoint)[0]["changes"] if "block" in c}
    assert found == expected
    assert found


def test_where_embeddings_are_tied_the_output_matrix_is_the_embedding(tiny, tmp_path):
    model = make_whole_model(tmp_path / "tied", tiny, **TIED)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"version: 1\n{CALIBRATION}passes: [quantize: {{method: gptq, roles: {{lm_head: int8}}}}]\n")
    pipeline.apply(pipeline.Job(load_recipe(str(recipe)), resolve(str(model)), tmp_path / "out"))
    (rounded,) = records_of(tmp_path / "out" / "checkpoint")[0]["changes"]
    assert rounded["method"] == "gptq"
    assert "model.embed_tokens.weight" in rounded["tensors"]
    assert not [name for name in named(rounded["tensors"]) if "lm_head" in name]


def test_records_of_several_passes_and_runs_stand_in_order(source, tmp_path):
    both = apply(source, tmp_path / "both", {"keep": 3, "recovery": "none"}, {"quantize": {"weights": "int8"}})
    assert [record["name"] for record in records_of(both.checkpoint)] == ["prune_experts", "quantize"]
    (change,) = records_of(both.checkpoint)[1]["changes"]
    assert not [name for name in named(change["tensors"]) if re.search(r"experts\.[34]\.", name)], "as numbered after"
    first = apply(source, tmp_path / "first", {"keep": 4, "recovery": "none"})
    second = apply(first.checkpoint, tmp_path / "second", {"keep": 3, "recovery": "none"})
    third = apply(second.checkpoint, tmp_path / "third", {"quantize": {"weights": "none", "equalize": 0.3}})
    records = records_of(third.checkpoint)
    assert [record["name"] for record in records] == ["prune_experts", "prune_experts", "quantize"]
    assert records[:1] == records_of(first.checkpoint)
    expected, unknown = replayed([change for record in records for change in record["changes"]], tensors_in(source))
    assert not unknown
    assert_same_tensors(third.stored, expected)


def test_a_model_with_records_is_read_as_any_other(source, tmp_path):
    done = apply(source, tmp_path, {"keep": 3})
    ours = compress.load(done.checkpoint)
    stock = AutoModelForCausalLM.from_pretrained(done.checkpoint, dtype=torch.float32)
    for name, tensor in stock.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name


def test_no_pass_no_record(source, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("version: 1\n")
    pipeline.apply(pipeline.Job(load_recipe(str(recipe)), resolve(str(source)), tmp_path / "out"))
    assert (tmp_path / "out" / "checkpoint" / "config.json").read_text() == (
        source / "config.json"
    ).read_text().rstrip() + "\n"


NAMES = {
    "one": ["a.weight"],
    "a run": [f"layers.{n}.x" for n in range(12)],
    "gaps": [f"layers.{n}.x" for n in (0, 1, 2, 5, 9, 10)],
    "two numbers": [f"layers.{n}.experts.{e}.{p}" for n in (1, 3) for e in range(8) for p in ("up", "down")],
    "no box": ["layers.0.experts.1.up", "layers.1.experts.0.up", "layers.1.experts.1.up"],
    "leading zeros": ["layers.007.x", "layers.7.x", "layers.8.x"],
    "a number last": ["norm.0", "norm.1", "norm"],
}


@pytest.mark.parametrize("name", NAMES)
def test_names_in_short_are_the_same_names(name):
    short = in_short(NAMES[name])
    assert sorted(named(short)) == sorted(NAMES[name])
    assert len(short) <= len(NAMES[name])
    assert in_short([]) == ()


def test_a_large_model_is_named_in_a_few_lines():
    names = [
        f"layers.{n}.mixer.experts.{e}.{p}.weight" for n in range(1, 52, 2) for e in range(128) for p in ("up", "down")
    ]
    assert sum(map(len, in_short(names))) < 1000


def bomb(size: int, end: int | None = None) -> str:
    return base64.b64encode(zlib.compress(bytes(size))[:end]).decode()


ROWS = {"kind": "rows", "tensors": ["a"], "rows": [0]}
FOLD = {"kind": "folded", "source": "a", "targets": ["b"], "exponents": bomb(4)}
HOSTILE = {
    "not a list": (3, "compress.passes"),
    "no name": ([{"changes": []}], "name"),
    "an unknown key": ([{"name": "x", "said": 1}], "said"),
    "an unknown kind": ([{"name": "x", "changes": [{"kind": "exploded"}]}], "exploded"),
    "no kind": ([{"name": "x", "changes": [{}]}], "kind"),
    "names that never end": ([{"name": "x", "changes": [ROWS | {"tensors": ["a.[0-999999].[0-999999]"]}]}], "more tensors"),
    "names of many lines": ([{"name": "x", "changes": [ROWS | {"tensors": ["a.[0-999999]"] * 9}]}], "more tensors"),
    "a range from high to low": ([{"name": "x", "changes": [ROWS | {"tensors": ["a.[3-1]"]}]}], "a.[3-1]"),
    "half a range": ([{"name": "x", "changes": [ROWS | {"tensors": ["a.[3"]}]}], "a.[3"),
    "a row twice": ([{"name": "x", "changes": [ROWS | {"rows": [1, 1]}]}], "twice"),
    "a negative row": ([{"name": "x", "changes": [ROWS | {"rows": [-1]}]}], "rows"),
    "a truth value": ([{"name": "x", "changes": [ROWS | {"rows": [True]}]}], "rows"),
    "a factor of nothing": ([{"name": "x", "changes": [{"kind": "scaled", "tensors": ["a"], "factor": 0.0}]}], "factor"),
    "text for a factor": ([{"name": "x", "changes": [{"kind": "scaled", "tensors": ["a"], "factor": "2"}]}], "factor"),
    "a merger of one": ([{"name": "x", "changes": [{"kind": "kept", "stem": "e.", "sources": [0], "merged": [[0]]}]}], "merged"),
    "exponents that are no base64": ([{"name": "x", "changes": [FOLD | {"exponents": "§"}]}], "base64"),
    "exponents that are not compressed": ([{"name": "x", "changes": [FOLD | {"exponents": "AAAA"}]}], "zlib"),
    "exponents that fill memory": ([{"name": "x", "changes": [FOLD | {"exponents": bomb(1 << 25)}]}], "exponents"),
    "half of the exponents": ([{"name": "x", "changes": [FOLD | {"exponents": bomb(9999, -5)}]}], "exponents"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_records_that_nobody_wrote_are_refused_in_a_sentence(tmp_path, name):
    folder = make_jamba(tmp_path, num_hidden_layers=2)
    section, said = HOSTILE[name]
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"compress": {"passes": section}}))
    message = refusal(lambda: Checkpoint(folder))
    assert message.startswith(f"{folder / 'config.json'}: compress.passes")
    assert said in message
    assert len(message) < 1000

"""Our own forward of Nemotron-H, and what `compress.load` makes of it, against transformers' NemotronHForCausalLM in float32,
its floor under time steps taken away (tests/nemotron_h_models.py says why)."""

import json
from pathlib import Path

import pytest
import torch
from forwards import (
    Case,
    Run,
    assert_agrees,
    assert_real_tokens_agree,
    assert_states_agree,
    in_pieces,
    left_padded,
    make_case,
    run_of,
    tokens,
)  # fmt: skip
from nemotron_h_models import VARIANTS, load_reference, make_nemotron_h
from refusals import refusal
from safetensors.torch import load_file, save_file

import compress
from compress.checkpoint.reader import Checkpoint
from compress.prompts.windows import encode
from compress.recipe import resources
from compress.recipe.source import load_tokenizer
from compress.runtime.inference import Decoder, stream

LENGTH, BATCH = 70, 3  # more than a chunk of 64 tokens of our scan, and 5 of the 16 of theirs, the last one not full
LENGTHS = [70, 50, 9]  # of rows that are padded


def case_of(folder: Path) -> Case:
    return make_case(folder, tokens(67, LENGTH, BATCH), load_reference)


@pytest.fixture(scope="module", params=VARIANTS)
def case(request, tmp_path_factory) -> Case:
    return case_of(make_nemotron_h(tmp_path_factory.mktemp("variant"), **VARIANTS[request.param]))


@pytest.fixture(scope="module")
def plain_case(tmp_path_factory) -> Case:
    return case_of(make_nemotron_h(tmp_path_factory.mktemp("plain")))


@pytest.fixture(scope="module")
def trained_case(nemotron) -> Case:
    """The trained model on 530 tokens of a held-out passage."""
    passage = json.loads((resources.folder("calibration_data") / "heldout.jsonl").read_text().splitlines()[0])
    ids = encode(load_tokenizer(nemotron), passage["text"] * 4)[:530]
    return make_case(nemotron, torch.tensor([ids]), load_reference)


# our forward


def test_whole_sequences_give_the_logits_and_states_of_transformers(case):
    run = run_of(case)
    assert_agrees(run(case.ids), case.logits)
    assert_states_agree(run.states, case.states)


def test_token_by_token_from_nothing_gives_the_logits_and_states_of_transformers(case):
    run = run_of(case)
    assert_agrees(in_pieces(run, case.ids, 1), case.logits)
    assert_states_agree(run.states, case.states)


def test_prefill_in_pieces_and_decode_give_the_logits_and_states_of_transformers_in_one_go(case):
    run = run_of(case)
    assert_agrees(in_pieces(run, case.ids, [2, 30, 1, 33, 1, 1, 1, 1]), case.logits)
    assert_states_agree(run.states, case.states)


def test_left_padded_rows_give_what_each_gives_alone(case):
    padded, mask = left_padded(case.ids, LENGTHS)
    assert_real_tokens_agree(run_of(case)(padded, mask), LENGTHS, case.logits)


def test_left_padded_rows_decode_on_as_each_does_alone(case):
    """Padding wider than the first piece, then real tokens, then single tokens, the mask growing along."""
    padded, mask = left_padded(case.ids, LENGTHS)
    run, start, pieces = run_of(case), 0, []
    for size in (20, 46, 1, 1, 1, 1):
        pieces.append(run(padded[:, start : start + size], mask[:, : start + size]))
        start += size
    assert_real_tokens_agree(torch.cat(pieces, 1), LENGTHS, case.logits)


def test_left_padded_batches_agree_with_transformers_own_padding(plain_case):
    padded, mask = left_padded(plain_case.ids, LENGTHS)
    with torch.inference_mode():
        expected = load_reference(plain_case.folder)(padded, attention_mask=mask).logits
    ours = run_of(plain_case)(padded, mask)
    for row, length in enumerate(LENGTHS):
        assert_agrees(ours[row, -length:], expected[row, -length:])


def test_the_trained_model_gives_the_logits_and_states_of_transformers(trained_case):
    run = run_of(trained_case)
    assert_agrees(run(trained_case.ids), trained_case.logits)
    assert_states_agree(run.states, trained_case.states)


def test_the_trained_model_in_pieces_and_token_by_token_gives_the_logits_of_transformers(trained_case):
    run = run_of(trained_case)
    assert_agrees(in_pieces(run, trained_case.ids, [256, 200, 54, *[1] * 20]), trained_case.logits)
    assert_states_agree(run.states, trained_case.states)


@pytest.mark.parametrize("decode", [False, True])
def test_windows_that_are_streamed_each_give_their_own_logits(plain_case, tmp_path, decode):
    windows = [plain_case.ids[i % BATCH, :length] for i, length in enumerate((70, 33, 33, 1))]
    head, seen = run_of(plain_case).head, []
    for block, hidden in stream(plain_case.model, windows, tmp_path, decode=decode):
        for window, states in zip(block, hidden, strict=True):
            assert_agrees(head(states), plain_case.logits[window % BATCH, : len(windows[window])])
            seen.append(window)
    assert sorted(seen) == [0, 1, 2, 3]


def test_a_decoder_gives_the_last_logits_of_every_step(trained_case):
    decoder = Decoder(trained_case.model)
    assert_agrees(decoder.step(trained_case.ids[:, :500]), trained_case.logits[:, 499])
    for t in range(500, 504):
        assert_agrees(decoder.step(trained_case.ids[:, t : t + 1]), trained_case.logits[:, t])


# how files spell it


def renamed(source: Path, folder: Path, change) -> Path:
    """A copy of the checkpoint whose tensors went through `change`."""
    folder.mkdir()
    save_file(change(load_file(source / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return folder


def as_model(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace("backbone.", "model."): tensor for name, tensor in tensors.items()}


def stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The experts of every layer as transformers has them in memory."""
    found = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for stem in {name.split("experts.")[0] + "experts." for name in tensors if ".experts." in name}:
        for part in ("up_proj", "down_proj"):
            found[stem + part] = torch.stack([tensors[f"{stem}{e}.{part}.weight"] for e in range(6)])
    return found


SPELLINGS = {
    "model.": as_model,
    "stacked experts": stacked,
    "both": lambda tensors: stacked(as_model(tensors)),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_checkpoints_spelt_as_newer_ones_are_the_same_model(plain_case, tmp_path, spelling):
    folder = renamed(plain_case.folder, tmp_path / "spelt", SPELLINGS[spelling])
    found, expected = Checkpoint(folder).model, plain_case.model
    assert [weight.name for weight in found.weights] == [weight.name for weight in expected.weights]
    for ours, theirs in zip(found.weights, expected.weights, strict=True):
        assert torch.equal(ours.dense(), theirs.dense())
        assert torch.equal(ours.dense(slice(1, 3)), theirs.dense(slice(1, 3)))
    assert_agrees(Run(found, BATCH)(plain_case.ids), plain_case.logits)
    assert torch.equal(
        load_reference(folder)(plain_case.ids).logits, load_reference(plain_case.folder)(plain_case.ids).logits
    )


def half_as_model(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | as_model({name: tensors.pop(name) for name in list(tensors) if "layers.0." in name})


def one_expert_twice(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = "backbone.layers.1.mixer.experts.0.up_proj.weight"
    return stacked(tensors) | {name: tensors[name].clone()}


def one_expert_too_few(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = "backbone.layers.1.mixer.experts.up_proj"
    tensors = stacked(tensors)
    return tensors | {name: tensors[name][:5].contiguous()}


def fewer_router_rows(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = "model.layers.1.mixer.gate.weight"
    tensors = as_model(tensors)
    return tensors | {name: tensors[name][:4].contiguous()}


def shorter_correction(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = "backbone.layers.1.mixer.gate.e_score_correction_bias"
    return tensors | {name: tensors[name][:4].contiguous()}


REFUSED = {
    "two spellings": (half_as_model, ["'backbone.'", "'model.'"]),
    "an expert twice": (one_expert_twice, ["experts.0.up_proj.weight'", "experts.up_proj'", "also"]),
    "a stack of too few": (one_expert_too_few, ["experts.5.up_proj.weight' is missing"]),
    "a router with fewer rows than experts": (
        fewer_router_rows,
        ["'model.layers.1.mixer.gate.weight' has shape [4, 40]", "config.json implies [6, 40]"],
    ),
    "a shorter correction": (shorter_correction, ["e_score_correction_bias' has shape [4]", "implies [6]"]),
    "a tensor of nothing known": (
        lambda tensors: tensors | {"backbone.layers.0.mixer.gate_proj.weight": torch.zeros(2, 2)},
        ["unexpected tensor 'backbone.layers.0.mixer.gate_proj.weight'"],
    ),
}


@pytest.mark.parametrize("case_name", REFUSED)
def test_tensors_that_do_not_fit_are_refused_in_one_sentence(plain_case, tmp_path, case_name):
    change, parts = REFUSED[case_name]
    message = refusal(lambda: Checkpoint(renamed(plain_case.folder, tmp_path / "bad", change)))
    for part in parts:
        assert part in message


# compress.load


def test_what_is_loaded_gives_our_logits(case):
    with torch.inference_mode():
        logits = compress.load(case.folder)(case.ids, use_cache=False).logits
    assert_agrees(logits, run_of(case)(case.ids))


def test_what_is_loaded_decodes_as_it_reads(trained_case):
    """Without a floor under time steps the two ways agree."""
    model, ids = compress.load(trained_case.folder), trained_case.ids[:, :40]
    assert model.config.time_step_min == 0
    with torch.inference_mode():
        past = model(ids[:, :30], use_cache=True).past_key_values
        steps = [model(ids[:, t : t + 1], past_key_values=past, use_cache=True).logits for t in range(30, 40)]
    assert_agrees(torch.cat(steps, 1), trained_case.logits[:, 30:40])


def test_what_decides_decays_stays_exact_in_a_model_of_half_precision(tmp_path):
    folder = make_nemotron_h(tmp_path, dtype=torch.float32)
    stored, model = load_file(folder / "model.safetensors"), compress.load(folder, dtype=torch.bfloat16)
    names = ("mixer.A_log", "mixer.D", "mixer.dt_bias", "mixer.gate.e_score_correction_bias")
    for layer, name in ((0, names[0]), (0, names[1]), (0, names[2]), (1, names[3])):
        tensor = model.model.get_submodule(f"layers.{layer}").state_dict()[name]
        assert torch.equal(tensor, stored[f"backbone.layers.{layer}.{name}"])
    assert model.model.layers[0].mixer.in_proj.weight.dtype == torch.bfloat16
    model.generation_config.eos_token_id = None
    assert model.generate(tokens(67, 9, 2), max_new_tokens=4, do_sample=False).shape == (2, 13)


def test_what_is_loaded_is_saved_as_a_checkpoint_that_is_read_again(plain_case, tmp_path):
    compress.load(plain_case.folder).save_pretrained(tmp_path / "saved")
    assert_agrees(Run(Checkpoint(tmp_path / "saved").model, BATCH)(plain_case.ids), plain_case.logits)


def all_equal(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Routers that cannot tell experts apart."""
    gates = {name: torch.zeros_like(tensor) for name, tensor in tensors.items() if ".mixer.gate." in name}
    return tensors | gates


@pytest.mark.parametrize("changes", [{}, {"n_group": 3, "topk_group": 2, "num_experts_per_tok": 3}], ids=["", "groups"])
def test_of_equal_experts_the_lower_number_is_chosen_by_us_and_by_what_is_loaded(tmp_path, changes):
    folder = renamed(make_nemotron_h(tmp_path / "source", **changes), tmp_path / "equal", all_equal)
    model, ids = compress.load(folder), tokens(67, 9, 1)
    chosen = []
    model.model.layers[1].mixer.gate.register_forward_hook(lambda *arguments: chosen.append(arguments[2][2]))
    with torch.inference_mode():
        logits = model(ids, use_cache=False).logits
    assert_agrees(logits, Run(Checkpoint(folder).model, 1)(ids))
    top_k = changes.get("num_experts_per_tok", 2)
    assert chosen[0].sort().values.tolist() == [list(range(top_k))] * 9

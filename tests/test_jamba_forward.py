"""Our own forward of Jamba against transformers' JambaForCausalLM in float32, and the runners built on it."""

import functools
import json
from pathlib import Path
from types import SimpleNamespace

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
from jamba_models import load_reference, make_jamba

from compress.checkpoint.reader import Checkpoint
from compress.errors import InputError
from compress.model import weight as model_module
from compress.prompts.windows import encode
from compress.recipe import resources
from compress.recipe.source import load_tokenizer
from compress.runtime import inference, memory
from compress.runtime.inference import Decoder, Head, LayerWeights, sample, stream

# Standard deviation of random weights times sqrt(inputs). At 0.7 transformers in float32 is 1e-6 to 3e-5 away from itself
# in float64, so that the requirement tests us and not the noise; at models.py's 1.5 that noise alone is 5e-4.
SPREAD = 0.7
LENGTH, BATCH = 70, 2  # 70 tokens are 8 chunks of the scan, the last one not full

VARIANTS = {
    "awkward": {},  # one KV head, dt_rank 10, expert period 3: see models.py
    "as many key-value heads as query heads": {"num_key_value_heads": 5},
    "two groups of query heads": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "head size apart from hidden size": {"head_dim": 12},
    "attention in the first layer": {"attn_layer_offset": 0},
    "attention in every other layer": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "attention in every layer": {"attn_layer_period": 1, "attn_layer_offset": 0},
    "no attention": {"attn_layer_period": 8, "attn_layer_offset": 7},
    "no experts": {"num_experts": 1},
    "experts in every layer": {"expert_layer_period": 1, "expert_layer_offset": 0},
    "one expert a token": {"num_experts_per_tok": 1},
    "every expert for every token": {"num_experts_per_tok": 3},
    "tied embeddings": {"tie_word_embeddings": True},
    "projection biases": {"mamba_proj_bias": True},
    "convolution without bias": {"mamba_conv_bias": False},
    "convolution of width 2": {"mamba_d_conv": 2},
    "two states": {"mamba_d_state": 2},
    "threefold expansion": {"mamba_expand": 3},
    "automatic dt_rank": {"mamba_dt_rank": "auto"},
    "large epsilon in the norms": {"rms_norm_eps": 0.1},
}


def case_of(folder: Path) -> Case:
    return make_case(folder, tokens(67, LENGTH, BATCH), load_reference)


def small_jamba(folder: Path, **changes) -> Path:
    return make_jamba(folder, spread=SPREAD, **changes)


@pytest.fixture(scope="module", params=VARIANTS)
def case(request, tmp_path_factory) -> Case:
    return case_of(small_jamba(tmp_path_factory.mktemp("variant"), **VARIANTS[request.param]))


@pytest.fixture(scope="module")
def plain_case(tmp_path_factory) -> Case:
    return case_of(small_jamba(tmp_path_factory.mktemp("plain")))


@pytest.fixture(scope="module")
def reference_case(tiny) -> Case:
    """The shipped model on 530 tokens of a held-out passage."""
    passage = json.loads((resources.folder("calibration_data") / "heldout.jsonl").read_text().splitlines()[0])
    ids = encode(load_tokenizer(tiny), passage["text"] * 4)[:530]
    assert len(ids) == 530
    return make_case(tiny, torch.tensor([ids]), load_reference)


# against transformers


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
    padded, mask = left_padded(case.ids, [50, 9])
    assert_real_tokens_agree(run_of(case)(padded, mask), [50, 9], case.logits)


def test_left_padded_rows_decode_on_as_each_does_alone(case):
    """Padding wider than the first piece, then real tokens, then single tokens, the mask growing along."""
    padded, mask = left_padded(case.ids, [50, 9])
    run, start, pieces = run_of(case), 0, []
    for size in (20, 26, 1, 1, 1, 1):
        pieces.append(run(padded[:, start : start + size], mask[:, : start + size]))
        start += size
    assert_real_tokens_agree(torch.cat(pieces, 1), [50, 9], case.logits)


def recurrent_states(run: Run) -> list[torch.Tensor]:
    return [state["recurrent_state"] for state in run.states if "recurrent_state" in state]


def test_left_padding_leaves_the_empty_states_empty(plain_case):
    run = run_of(plain_case)
    run(plain_case.ids[:, :9], torch.zeros(BATCH, 9))
    states = [state for state in run.states if "recurrent_state" in state]
    assert len(states) == 5
    assert not any(tensor.any() for state in states for tensor in state.values())


def test_padding_leaves_a_recurrent_state_as_it_was(plain_case):
    run, mask = run_of(plain_case), torch.ones(BATCH, 20)
    run(plain_case.ids[:, :15], mask[:, :15])
    before = recurrent_states(run)
    mask[:, 15:] = 0
    run(plain_case.ids[:, 15:20], mask)
    assert all(torch.equal(a, b) for a, b in zip(before, recurrent_states(run), strict=True))


def test_left_padded_batches_agree_with_transformers_own_padding(plain_case):
    padded, mask = left_padded(plain_case.ids, [50, 9])
    with torch.inference_mode():
        expected = load_reference(plain_case.folder)(padded, attention_mask=mask).logits
    ours = run_of(plain_case)(padded, mask)
    assert_agrees(ours[0], expected[0])
    assert_agrees(ours[1, -9:], expected[1, -9:])


def test_the_reference_model_gives_the_logits_and_states_of_transformers(reference_case):
    run = run_of(reference_case)
    assert_agrees(run(reference_case.ids), reference_case.logits)
    assert_states_agree(run.states, reference_case.states)


def test_the_reference_model_in_pieces_and_token_by_token_gives_the_logits_of_transformers(reference_case):
    run = run_of(reference_case)
    logits = in_pieces(run, reference_case.ids, [256, 200, 54, *[1] * 20])
    assert_agrees(logits, reference_case.logits)
    assert_states_agree(run.states, reference_case.states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_checkpoints_of_other_types_are_computed_as_they_are_stored(tmp_path, dtype):
    case = case_of(small_jamba(tmp_path, dtype=dtype))
    assert_agrees(run_of(case)(case.ids), case.logits)


@pytest.mark.parametrize(
    ("key", "value", "made_with"),
    [("num_key_value_heads", None, {"num_key_value_heads": 5}), ("mamba_dt_rank", "auto", {"mamba_dt_rank": 3})],
)
def test_values_that_config_json_leaves_open_are_derived_from_the_others(tmp_path, key, value, made_with):
    """transformers writes what it derived; files of older versions and of people hold null and 'auto'."""
    case = case_of(small_jamba(tmp_path, **made_with))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config[key] == made_with[key]
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    assert_agrees(Run(Checkpoint(tmp_path).model, BATCH)(case.ids), case.logits)


# stream: many windows, layer by layer


def windows_of(ids: torch.Tensor, lengths: list[int]) -> list[torch.Tensor]:
    """Beginnings of the rows, in turn: transformers' logits of a row hold for each."""
    return [ids[i % len(ids), :length] for i, length in enumerate(lengths)]


UNEQUAL = [70, 70, 33, 70, 1, 33, 33]


def assert_stream_agrees(case: Case, scratch: Path, **options):
    head, seen = Head(case.model, "cpu"), []
    for block, hidden in stream(case.model, windows_of(case.ids, UNEQUAL), scratch, **options):
        for window, states in zip(block, hidden, strict=True):
            assert_agrees(head(states), case.logits[window % BATCH, : UNEQUAL[window]])
            seen.append(window)
    assert sorted(seen) == list(range(len(UNEQUAL)))
    assert not list(scratch.iterdir()), "hidden states are left on disk"


@pytest.mark.parametrize("decode", [False, True])
def test_stream_gives_every_window_its_own_logits(plain_case, tmp_path, decode):
    assert_stream_agrees(plain_case, tmp_path, decode=decode)


@pytest.mark.parametrize("decode", [False, True])
def test_stream_in_small_blocks_gives_the_same(plain_case, tmp_path, monkeypatch, decode):
    """Blocks of one window, rows of the embedding and of the head in several pieces."""
    monkeypatch.setattr(inference, "BLOCK_TOKENS", 16)
    monkeypatch.setattr(inference, "DECODE_TOKENS", 16)
    monkeypatch.setattr(inference, "EMBEDDING_ROWS", 16)
    monkeypatch.setattr(model_module, "BLOCK_BYTES", 4 * 40 * 10)
    assert_stream_agrees(plain_case, tmp_path, decode=decode)


@pytest.mark.parametrize("decode", [False, True])
def test_stream_that_reads_weights_again_gives_the_same(plain_case, tmp_path, monkeypatch, decode):
    monkeypatch.setattr(inference, "kept_bytes", lambda device: 0)
    assert_stream_agrees(plain_case, tmp_path, decode=decode)


@pytest.mark.parametrize(("free", "kept"), [(0, 0), (8 << 30, 2 << 30)])
def test_of_a_layer_a_quarter_of_free_memory_is_kept(monkeypatch, free, kept):
    monkeypatch.setattr(memory, "available", lambda: free)
    assert inference.kept_bytes("cpu") == kept
    assert inference.kept_bytes("cuda") == 512 << 20, "memory of the host says nothing of it"


def test_stream_reports_every_token_of_every_layer(plain_case, tmp_path):
    done = []
    for _ in stream(plain_case.model, windows_of(plain_case.ids, UNEQUAL), tmp_path, advance=done.append):
        pass
    assert sum(done) == sum(UNEQUAL) * plain_case.model.config.num_hidden_layers


@pytest.mark.parametrize("decode", [False, True])
def test_stream_gives_the_reference_models_logits(reference_case, tmp_path, decode):
    ids = reference_case.ids[0, : 64 if decode else 530]
    [(block, hidden)] = stream(reference_case.model, [ids], tmp_path, decode=decode)
    assert block == [0]
    assert_agrees(Head(reference_case.model, "cpu")(hidden[0]), reference_case.logits[0, : len(ids)])


# weights kept and read again


def counting_unit(reads: list[str], sizes: dict[str, int]) -> SimpleNamespace:
    def dense(name: str) -> torch.Tensor:
        reads.append(name)
        return torch.zeros(sizes[name])

    return SimpleNamespace(weights={"p." + n: SimpleNamespace(dense=functools.partial(dense, n)) for n in sizes})


@pytest.mark.parametrize(("budget", "expected"), [(0, "abab"), (40, "abb"), (60, "ab")])
def test_layer_weights_are_kept_only_as_far_as_the_budget_goes(budget, expected):
    """a takes 40 bytes of float32 and b takes 20."""
    reads: list[str] = []
    weights = LayerWeights(counting_unit(reads, {"a": 10, "b": 5}), "p.", "cpu", budget)
    for name in "abab":
        assert len(weights(name)) == {"a": 10, "b": 5}[name]
    assert "".join(reads) == expected


# Decoder


def no_free_memory(monkeypatch):
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=0))


@pytest.mark.parametrize("enough_memory", [True, False])
def test_decoder_gives_the_last_logits_of_every_step(plain_case, monkeypatch, enough_memory):
    if not enough_memory:
        no_free_memory(monkeypatch)
    decoder, seen = Decoder(plain_case.model, batch=BATCH), 0
    for size in (31, 1, 1, 5, 1):
        logits = decoder.step(plain_case.ids[:, seen : seen + size])
        seen += size
        assert_agrees(logits, plain_case.logits[:, seen - 1])


def test_decoders_do_not_share_their_states(plain_case):
    first, second = (Decoder(plain_case.model, batch=BATCH) for _ in range(2))
    first.step(plain_case.ids[:, :40])
    assert_agrees(second.step(plain_case.ids[:, :3]), plain_case.logits[:, 2])


def test_decoder_gives_the_reference_models_logits(reference_case):
    decoder = Decoder(reference_case.model)
    assert_agrees(decoder.step(reference_case.ids[:, :500]), reference_case.logits[:, 499])
    for t in range(500, 510):
        assert_agrees(decoder.step(reference_case.ids[:, t : t + 1]), reference_case.logits[:, t])


# sample


def test_sampling_at_temperature_zero_takes_the_most_likely_token():
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, -1.0, 4.0]])
    assert sample(logits, 0, torch.Generator()).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [1e-37, 1e-40, 1e-320])
def test_sampling_at_any_small_temperature_takes_the_most_likely_token(temperature):
    """Whatever float32 makes of logits over such a number."""
    logits = torch.tensor([[0.0, 2.0, 1.0], [500.0, -1.0, 4.0]])
    assert sample(logits, temperature, torch.Generator()).tolist() == [1, 0]


def test_sampling_repeats_with_its_seed_and_follows_the_probabilities():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = (2.0 * probabilities.log()).expand(20_000, -1)  # temperature 2 undoes the factor
    drawn = [sample(logits, 2.0, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*drawn)
    shares = torch.bincount(drawn[0], minlength=4) / 20_000
    # the standard deviation of a share is at most sqrt(0.25 / 20000) = 0.0035; five of them
    assert (shares - probabilities).abs().max() < 0.018


# config.json


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"hidden_size": 41}, "hidden_size"),
        ({"attn_layer_offset": 4}, "attn_layer_offset"),
        ({"expert_layer_offset": 3}, "expert_layer_offset"),
        ({"num_experts_per_tok": 4}, "num_experts_per_tok"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"mamba_dt_rank": "wide"}, "mamba_dt_rank"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ],
)
def test_a_configuration_that_cannot_be_computed_is_refused_by_its_key(small, tmp_path, changes, named):
    config = json.loads((small / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(InputError, match=named):
        Checkpoint(tmp_path)

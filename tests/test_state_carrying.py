"""States carried in several tensors: error feedback and cadence, against loops over tokens that keep everything in the open."""

import json
import math

import numpy as np
import pytest
import torch
from jamba_models import make_jamba
from nemotron_h_models import make_nemotron_h
from state_models import with_states
from stepping import OwnSteps

import compress
from compress.checkpoint.reader import Checkpoint
from compress.runtime.eager import Eager
from compress.runtime.inference import Head, embed, layer_weights
from compress.studies.inspection import inspect

ODD = {"mamba_d_state": 5, "hidden_size": 35, "mamba_d_conv": 3, "num_hidden_layers": 4}
SOURCES = {
    "jamba": lambda folder: make_jamba(folder, torch.float32, spread=0.7, **ODD),
    "nemotron_h": lambda folder: make_nemotron_h(folder, torch.float32, layers_block_type="M*EM"),
}  # d_state 5 in both; d_inner 70, and 9 heads of 7


@pytest.fixture(scope="module", params=SOURCES)
def source(request, tmp_path_factory):
    return SOURCES[request.param](tmp_path_factory.mktemp(request.param) / "source")


# the loop


def rounded(
    value: np.ndarray, number_format: str, axis: int, block: int | None, dither: np.ndarray | float
) -> np.ndarray:
    """float32 [..., N, P] -> what its stored form stands for: docs/state-precision.md in numpy."""
    if number_format in ("fp16", "bf16"):
        return (
            torch.from_numpy(value).to({"fp16": torch.float16, "bf16": torch.bfloat16}[number_format]).float().numpy()
        )
    most, size = {"int8": 127, "int4": 7}[number_format], value.shape[axis]
    ends = range(block or size, size, block or size)
    scale = np.concatenate(
        [np.broadcast_to(_scale(part, most, axis), part.shape) for part in np.split(value, ends, axis)], axis
    )
    whole = np.rint(value / scale) if dither is None else np.floor(value / scale + dither)
    return (np.clip(whole, -most, most) * scale).astype(np.float32)


def _scale(part, most, axis):
    least = np.clip(np.abs(part).max(axis, keepdims=True) / most, 2.0**-44, 2.0**19)
    return np.float32(2) ** (np.rint((np.log2(least) + 44) * 1024) / 1024 - 44).astype(np.float32)


def dithers(shape, position: int, seed: int) -> np.ndarray:
    places = np.arange(math.prod(shape)).reshape(shape)
    return (((40503 * position + 30011 * places + seed) % 65536 + 0.5) / 65536).astype(np.float32)


class Memory:
    """One row's recurrent state in a layer: what is stored of it, and the tokens since."""

    def __init__(self, settings, shape):
        self.settings, self.position, self.roundings = settings, 0, 0
        self.stored, self.lost = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self.tokens: list[list[np.ndarray]] = []

    def begin(self, advance) -> np.ndarray:
        state = self.stored + self.lost
        for token in self.tokens:
            state = advance(state, *token)
        return state

    def end(self, state: np.ndarray, read: list[list[np.ndarray]]) -> None:
        self.position += len(read)
        if len(read) == 1 and self.position % self.settings.get("every", 1):
            self.tokens.append([np.clip(part, -65504, 65504).astype(np.float16).astype(np.float32) for part in read[0]])
            return
        axis, block = -1 if self.settings.get("axis") == "d_inner" else -2, self.settings.get("block")
        is_dithered = self.settings.get("rounding") == "stochastic"
        dither = dithers(state.shape, self.position, self.settings.get("seed", 0)) if is_dithered else None
        self.stored = rounded(state, self.settings["format"], axis, block, dither)
        if self.settings.get("rounding") == "error_feedback":
            self.lost = rounded(state - self.stored, self.settings.get("residual", "int8"), axis, block, None)
        self.tokens, self.roundings = [], self.roundings + 1


class Loops(Eager):
    """Scans of one row without padding, token by token; a state is a `Memory`."""

    def selective_scan(self, x, dt, b, c, state, a_log, d, earlier=None):
        a = -np.exp(self.weights(a_log).T.numpy())  # [N, D]

        def advance(h, x, dt, b):
            return np.exp(dt * a) * h + dt * x * b[:, None]

        return self._scan(x, dt, b, c, state, advance, lambda c, h: c @ h, self.weights(d))

    def ssd(self, x, dt, b, c, state, a_log, d, earlier=None):
        a, skip = -np.exp(self.weights(a_log).numpy()), self.weights(d)
        heads, n, p = state.stored.shape

        def by_head(matrix):  # [groups * N] -> [heads, N]
            return np.repeat(matrix.reshape(-1, n), heads * n // matrix.size, 0)

        def advance(h, x, dt, b):
            fed = by_head(b)[:, :, None] * x.reshape(heads, 1, p)
            return np.exp(dt * a)[:, None, None] * h + dt[:, None, None] * fed

        def read(c, h):
            return np.einsum("hn,hnp->hp", by_head(c), h).ravel()

        return self._scan(x, dt, b, c, state, advance, read, skip.repeat_interleave(p))

    @staticmethod
    def _scan(x, dt, b, c, memory, advance, read, skip):
        state, outputs = memory.begin(advance), []
        tokens = [[part[0, t].numpy() for part in (x, dt, b)] for t in range(x.shape[1])]
        for token, row in zip(tokens, c[0].numpy(), strict=True):
            state = advance(state, *token).astype(np.float32)
            outputs.append(torch.from_numpy(read(row, state)))
        memory.end(state, tokens)
        return torch.stack(outputs)[None] + skip * x, memory


class LoopSteps:
    """One row: `step(ids [1, S])` -> logits."""

    def __init__(self, model, kept):
        self.model, self.head = model, Head(model, "cpu")
        self.weights = [layer_weights(model, layer.index, "cpu") for layer in model.layers]
        settings = {entry["layer"]: entry for entry in kept}
        self.states = [
            {spec.name: self._empty(layer, spec, settings) for spec in layer.states} for layer in model.layers
        ]

    @staticmethod
    def _empty(layer, spec, settings):
        if spec.name == "recurrent_state":
            return Memory(settings[layer.index], spec.shape)
        return torch.zeros(1, *(0 if axis == spec.grows else size for axis, size in enumerate(spec.shape)))

    @torch.inference_mode()
    def step(self, ids):
        hidden = embed(self.model, ids)
        for layer, weights in zip(self.model.layers, self.weights, strict=True):
            state = dict(self.states[layer.index])
            for residual in layer.residuals:
                hidden, new = residual.run(Loops(weights), hidden, state)
                self.states[layer.index] |= new
        return self.head(hidden)


SETTINGS = {
    "int8 + int8": {"format": "int8", "rounding": "error_feedback"},
    "int4 + fp16": {"format": "int4", "rounding": "error_feedback", "residual": "fp16"},
    "bf16 + int4 in blocks": {"format": "bf16", "rounding": "error_feedback", "residual": "int4", "block": 2},
    "int4, every 3": {"format": "int4", "every": 3},
    "int4 stochastic, every 4": {"format": "int4", "rounding": "stochastic", "every": 4, "seed": 9},
    "bf16, every 7": {"format": "bf16", "every": 7},
    "int4 + int4, every 2": {"format": "int4", "rounding": "error_feedback", "residual": "int4", "every": 2},
    "int8 along d_inner": {"format": "int8", "axis": "d_inner"},
    "int4 along d_inner in blocks": {"format": "int4", "axis": "d_inner", "block": 3, "rounding": "stochastic"},
    "int4 + int8 along d_inner, every 3": {
        "format": "int4",
        "rounding": "error_feedback",
        "axis": "d_inner",
        "every": 3,
    },
}
PADDING, LENGTH = (0, 5, 2), 31
CALLS = (13, *range(14, 27), 28, 29, 31)  # where they end: a prompt, tokens one by one, pieces of two


def rows_of(vocabulary: int):
    """Three rows behind different padding; ids and mask."""
    ids = torch.randint(3, vocabulary, (3, LENGTH), generator=torch.Generator().manual_seed(5))
    mask = torch.stack([(torch.arange(LENGTH) >= count).long() for count in PADDING])
    return ids, mask


def kept_in(source, folder, settings):
    changed = with_states(source, folder / "kept", {"recurrent_state": settings})
    return Checkpoint(changed).model, json.loads((changed / "config.json").read_text())["compress"]["states"]


@pytest.mark.parametrize("name", SETTINGS)
def test_our_forward_keeps_what_a_loop_over_tokens_keeps(source, tmp_path, name):
    """Rows of a batch, behind padding, as each alone."""
    model, kept = kept_in(source, tmp_path, SETTINGS[name])
    ids, mask = rows_of(67)
    ours = OwnSteps(model)
    loops = [LoopSteps(model, kept) for _ in PADDING]
    for start, end in zip((0, *CALLS), CALLS, strict=False):
        actual = ours.step(ids[:, start:end], mask[:, :end])[:, -1]
        for row, (loop, padding) in enumerate(zip(loops, PADDING, strict=True)):
            expected = loop.step(ids[row : row + 1, max(start, padding) : end])[0, -1]
            assert (actual[row] - expected).abs().max() < 2e-3
            assert_carries(model, ours.states, loop.states, row)
    assert loops[0].states[0]["recurrent_state"].roundings < len(CALLS) or "every" not in SETTINGS[name]


def assert_carries(model, ours, loop, row: int) -> None:
    """The three parts of a row's recurrent states; float32 in another order may tip a rounding of a few entries."""
    for layer in model.layers:
        for spec in (spec for spec in layer.states if spec.kind == "ssm_state"):
            memory, parts = loop[layer.index][spec.name], {n: s[row : row + 1] for n, s in ours[layer.index].items()}
            same = close_to(memory.stored, spec.restored(parts[spec.name])[0], 1e-3)
            assert same.mean() >= 0.98
            if spec.residual is not None:
                lost = spec.residual.restored(parts["recurrent_residual"])[0]
                assert close_to(memory.lost, lost, 0.15)[same].mean() >= 0.95
            if spec.recent is not None:
                assert close_to(in_slots(memory, spec), parts["recurrent_inputs"][0].float(), 1e-3).all()


def close_to(expected: np.ndarray, actual: torch.Tensor, share: float) -> np.ndarray:
    return np.abs(expected - actual.numpy()) <= share * np.abs(expected).max()


def in_slots(memory: Memory, spec) -> np.ndarray:
    """The tokens since the last rounding, each at its place among those between two multiples of `every`."""
    slots, first = np.zeros(spec.recent.shape, np.float32), memory.position - len(memory.tokens)
    for place, token in enumerate(memory.tokens, first):
        slots[place % spec.precision.every] = np.concatenate(token)
    return slots


# what a cadence and feedback are for


class FewerBits(Eager):
    """Our forward whose scans see x, dt and b in 16 bits once their token is past: what a cadence alone does to a state."""

    def selective_scan(self, x, dt, b, c, state, a_log, d, earlier=None):
        y, _ = super().selective_scan(x, dt, b, c, state, a_log, d)
        return y, super().selective_scan(x.half().float(), dt.half().float(), b.half().float(), c, state, a_log, d)[1]

    def ssd(self, x, dt, b, c, state, a_log, d, earlier=None):
        y, _ = super().ssd(x, dt, b, c, state, a_log, d)
        return y, super().ssd(x.half().float(), dt.half().float(), b.half().float(), c, state, a_log, d)[1]


@pytest.mark.parametrize("number_format", ["int4", "fp8-e4m3"])
def test_before_the_first_token_that_is_due_a_state_is_that_of_its_inputs_in_16_bits(
    source, tmp_path, monkeypatch, number_format
):
    model, _ = kept_in(source, tmp_path, {"format": number_format, "every": 12})
    plain, ids = Checkpoint(source).model, torch.randint(3, 67, (2, 12), generator=torch.Generator().manual_seed(2))
    ours, exact = OwnSteps(model), OwnSteps(plain)
    with monkeypatch.context() as patch:
        patch.setattr("stepping.Eager", FewerBits)
        for t in range(11):
            expected = exact.step(ids[:, t : t + 1])
            with patch.context() as inner:
                inner.setattr("stepping.Eager", Eager)
                actual = ours.step(ids[:, t : t + 1])
            torch.testing.assert_close(actual, expected, rtol=0, atol=2e-4)
    recurrent = [state["recurrent_state"] for state in ours.states if "recurrent_state" in state]
    assert all(not state.view(torch.uint8).any() for state in recurrent), "nothing was rounded yet"
    ours.step(ids[:, 11:])
    first = ours.states[0]
    assert first["recurrent_state"].view(torch.uint8).any() and not first["recurrent_inputs"].any()


@pytest.mark.parametrize("name", ["int4 stochastic, every 4", "int4 + int8 along d_inner, every 3"])
def test_a_row_that_reads_no_token_keeps_all_its_parts_bit_for_bit(source, tmp_path, name):
    model, _ = kept_in(source, tmp_path, SETTINGS[name])
    ids, mask = rows_of(67)
    for padded in range(1, 6):
        steps = OwnSteps(model)
        mask[1, 13:] = 1
        mask[1, 13 + padded - 1] = 0
        for start, end in zip((0, *range(13, 19)), range(13, 20), strict=False):
            before = [{n: s.clone() for n, s in states.items()} for states in steps.states]
            steps.step(ids[:, start:end], mask[:, :end])
            if end == 13 + padded:
                pairs = [
                    (b[n], s[n])
                    for b, s in zip(before, steps.states, strict=True)
                    for n in b
                    if n.startswith("recurrent")
                ]
                assert pairs and all(torch.equal(b[1].view(torch.uint8), a[1].view(torch.uint8)) for b, a in pairs)
                assert not all(torch.equal(b[0].view(torch.uint8), a[0].view(torch.uint8)) for b, a in pairs)


def test_one_token_behind_padding_is_a_call_of_one_token(source, tmp_path):
    model, _ = kept_in(source, tmp_path, {"format": "int8", "every": 3})
    alone, padded, ids = OwnSteps(model), OwnSteps(model), torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    for start, end in ((0, 3), (3, 4)):
        padded.step(ids[:, start:end], mask[:, :end])
        alone.step(ids[1:, max(start, 2) : end])
    for one, other in zip(alone.states, padded.states, strict=True):
        for name in (name for name in one if name.startswith("recurrent")):
            torch.testing.assert_close(one[name].float(), other[name][1:].float(), rtol=1e-3, atol=1e-4)


def test_inputs_beyond_16_bits_become_the_largest(source, tmp_path):
    model, _ = kept_in(source, tmp_path, {"format": "int8", "every": 4})
    layer = model.layers[0]
    ops, width = Eager(layer_weights(model, 0, "cpu"), total=2), layer.states[1].inputs
    value = torch.full((1, 1, width), 1e6)
    value[..., 1::2] = -1e6
    kept = ops.inputs_out(value, torch.zeros(1, 3, width, dtype=torch.float16), torch.zeros(1, 1, 35), 4)
    assert kept[0, 1, :2].tolist() == [65504, -65504] and not kept[0, [0, 2]].any()


def decayed_error(source, folder, settings) -> float:
    """Of logits of 40 tokens decoded one by one."""
    model, _ = kept_in(source, folder, settings)
    ids = torch.randint(3, 67, (2, 40), generator=torch.Generator().manual_seed(0))
    ours, exact = OwnSteps(model), OwnSteps(Checkpoint(source).model)
    return max(float((ours.step(piece) - exact.step(piece)).abs().mean()) for piece in ids.split(1, 1))


def test_feedback_makes_up_for_most_of_what_rounding_loses(source, tmp_path):
    nearest, fed_back = (
        decayed_error(source, tmp_path / rounding, {"format": "int4", "rounding": rounding})
        for rounding in ("nearest", "error_feedback")
    )
    assert fed_back < 0.05 * nearest


# bytes


@pytest.mark.parametrize(
    ("settings", "a_layer"),
    [
        ({"format": "int8", "rounding": "error_feedback"}, 2 * (5 + 2) * 70),
        ({"format": "int4", "rounding": "error_feedback", "residual": "fp16"}, (3 + 2) * 70 + 2 * 5 * 70),
        ({"format": "fp8-e4m3", "every": 8}, (5 + 4) * 70 + 2 * 7 * (2 * 70 + 5)),
        ({"format": "int8", "axis": "d_inner", "block": 32}, 5 * (70 + 2 * 3)),
        ({"format": "bf16", "rounding": "error_feedback", "residual": "int4", "every": 2}, 2 * 5 * 70 + (3 + 2) * 70 + 2 * 145),
    ],
)  # fmt: skip
def test_all_parts_count_in_the_bytes_of_a_sequence(tmp_path, settings, a_layer):
    changed = with_states(SOURCES["jamba"](tmp_path / "source"), tmp_path / "kept", {"recurrent_state": settings})
    facts = inspect(str(changed))
    assert facts["ssm_state_bytes"] == 3 * a_layer
    assert facts["state_memory"]["ssm_state"]["bytes_per_sequence"] == 3 * a_layer


def test_of_mamba2_too(tmp_path):
    settings = {"format": "int8", "rounding": "error_feedback", "axis": "d_inner", "block": 4, "every": 6}
    changed = with_states(SOURCES["nemotron_h"](tmp_path / "source"), tmp_path / "kept", {"recurrent_state": settings})
    layers = sum(
        state["state"] == "recurrent_state"
        for state in json.loads((changed / "config.json").read_text())["compress"]["states"]
    )
    assert inspect(str(changed))["ssm_state_bytes"] == layers * (2 * 9 * 5 * (7 + 4) + 2 * 5 * (63 + 9 + 15))


# compress.load


def cached(model):
    held = {"cache": None}

    def step(piece):
        output = model(piece, past_key_values=held["cache"])
        held["cache"] = output.past_key_values
        return output.logits

    return step


LOADED = {
    "jamba": SOURCES["jamba"],
    "nemotron_h": lambda folder: make_nemotron_h(folder, torch.float32, layers_block_type="M-*M", time_step_min=1e-9),
}  # which transformers computes as we do


@pytest.mark.parametrize("family", LOADED)
@pytest.mark.parametrize(
    "name", ["int4 + fp16", "int4, every 3", "int4 stochastic, every 4", "int4 along d_inner in blocks"]
)
def test_compress_load_rounds_when_our_own_forward_does(tmp_path, family, name):
    source = LOADED[family](tmp_path / "source")
    changed = with_states(source, tmp_path / "kept", {"recurrent_state": SETTINGS[name]})
    ids = torch.randint(3, 67, (2, 26), generator=torch.Generator().manual_seed(0))
    pieces = [ids[:, :9], *ids[:, 9:].split(1, 1)]
    with torch.inference_mode():
        sides = OwnSteps(Checkpoint(changed).model).step, cached(compress.load(changed)), cached(compress.load(source))
        ours, loaded, stock = (torch.cat([side(piece) for piece in pieces], 1) for side in sides)
    assert (loaded - ours).abs().mean() < 0.1 * (stock - ours).abs().mean() + 1e-6

"""The plain functions of `compress/arithmetic/` and of routing against loops written out in numpy, in float64."""

import numpy as np
import pytest
import torch

from compress.arithmetic import selective_scan as scans
from compress.arithmetic.attention import attention
from compress.arithmetic.convolution import causal_conv
from compress.arithmetic.mixture import mixture
from compress.arithmetic.norm import rms_norm
from compress.model.blocks.mlp import Mlp
from compress.model.routing import Router
from compress.runtime.eager import Eager

# Where a tolerance is relative it is relative to the largest expected magnitude. float32 rounds at 2^-24 = 6e-8, and
# every function here adds up a few dozen such roundings at most, or, in the scan, lets decays below 1 forget them.
RELATIVE = 2e-6
# With hardly any decay the scan sums all 513 inputs: 513 roundings, growing like their root in either order of summing.
RELATIVE_LONG_SUM = 1e-5

LENGTHS = (1, 2, 7, 64, 97, 513)


def assert_close(actual: torch.Tensor, expected: np.ndarray, relative: float = RELATIVE):
    assert actual.dtype == torch.float32
    assert actual.shape == expected.shape
    error = np.abs(actual.double().numpy() - expected).max(initial=0.0)
    assert error <= relative * np.abs(expected).max(initial=1e-30), f"error {error:.3g}"


def normal(generator: np.random.Generator, *shape: int) -> np.ndarray:
    """float32 values held as float64, so that both sides compute on the same numbers."""
    return generator.standard_normal(shape).astype(np.float32).astype(np.float64)


def as_torch(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(array.astype(np.float32)) for array in arrays]


# selective_scan


def scan_problem(length: int, batch: int = 2, channels: int = 5, states: int = 3, seed: int = 0) -> dict:
    """x, dt, a, b, c, d and a start state that is not zero. Time steps span 1e-3 to 1, decays differ by channel."""
    g = np.random.default_rng(seed)
    return {
        "x": normal(g, batch, length, channels),
        "dt": np.exp(g.uniform(np.log(1e-3), 0, (batch, length, channels))).astype(np.float32).astype(np.float64),
        "a": -g.uniform(0.1, 8, (states, channels)).astype(np.float32).astype(np.float64),
        "b": normal(g, batch, length, states),
        "c": normal(g, batch, length, states),
        "d": normal(g, channels),
        "h": normal(g, batch, states, channels),
    }


def scan_loop(x, dt, a, b, c, d, h):
    """The recurrence as the paper writes it, one token, one state and one channel at a time."""
    y, h = np.zeros_like(x), h.copy()
    for n in range(x.shape[0]):
        for t in range(x.shape[1]):
            for i in range(a.shape[0]):
                h[n, i] = np.exp(dt[n, t] * a[i]) * h[n, i] + dt[n, t] * b[n, t, i] * x[n, t]
                y[n, t] += c[n, t, i] * h[n, i]
            y[n, t] += d * x[n, t]
    return y, h


def run_scan(problem: dict) -> tuple[torch.Tensor, torch.Tensor]:
    return scans.selective_scan(*as_torch(*problem.values()))


def assert_scan_matches_loop(problem: dict, relative: float = RELATIVE):
    y, h = run_scan(problem)
    expected_y, expected_h = scan_loop(**problem)
    assert_close(y, expected_y, relative)
    assert_close(h, expected_h, relative)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", LENGTHS)
def test_selective_scan_is_the_recurrence(length, batch):
    assert_scan_matches_loop(scan_problem(length, batch))


@pytest.mark.parametrize(("channels", "states"), [(1, 1), (1, 16), (7, 1), (33, 7)])
def test_selective_scan_takes_any_number_of_channels_and_states(channels, states):
    assert_scan_matches_loop(scan_problem(97, channels=channels, states=states))


def test_selective_scan_decays_every_state_of_every_channel_at_its_own_rate():
    problem = scan_problem(7) | {"x": np.zeros((2, 7, 5))}
    expected = problem["h"] * np.exp(problem["dt"].sum(1)[:, None] * problem["a"])
    assert_close(run_scan(problem)[1], expected)


@pytest.mark.parametrize("dt", [1e3, 1e30])
def test_selective_scan_forgets_everything_where_the_time_step_is_very_large(dt):
    problem = scan_problem(64) | {"dt": np.full((2, 64, 5), np.float64(np.float32(dt)))}
    assert_scan_matches_loop(problem)
    # nothing is left of the start: exp(-0.1 * 1e3) = 4e-44 is below float32's smallest normal number
    last = problem["dt"][:, -1] * problem["x"][:, -1]
    assert_close(run_scan(problem)[1], problem["b"][:, -1, :, None] * last[:, None])


@pytest.mark.parametrize("dt", [1e-8, 1e-30])
def test_selective_scan_hardly_moves_where_the_time_step_is_very_small(dt):
    problem = scan_problem(513) | {"dt": np.full((2, 513, 5), np.float64(np.float32(dt)))}
    assert_scan_matches_loop(problem, RELATIVE_LONG_SUM)


def test_selective_scan_stays_exact_where_very_large_and_very_small_time_steps_alternate():
    """Forms that divide by a product of decays overflow or lose everything here."""
    problem = scan_problem(513)
    steps = np.random.default_rng(1).choice([1e-8, 1e-2, 1.0, 1e2, 1e6], (2, 513, 5))
    assert_scan_matches_loop(problem | {"dt": steps.astype(np.float32).astype(np.float64)}, RELATIVE_LONG_SUM)


@pytest.mark.parametrize("length", LENGTHS)
def test_selective_scan_passes_the_state_through_where_the_time_step_is_zero(length):
    problem = scan_problem(length) | {"dt": np.zeros((2, length, 5))}
    y, h = run_scan(problem)
    assert np.array_equal(h.numpy(), problem["h"])  # decay is exactly 1, input exactly 0
    assert_close(y, scan_loop(**problem)[0])


def test_selective_scan_ignores_tokens_whose_time_step_is_zero():
    problem = scan_problem(97)
    problem["dt"][:, 10:60] = 0
    kept = np.r_[0:10, 60:97]
    shorter = {k: v[:, kept] if k in ("x", "dt", "b", "c") else v for k, v in problem.items()}
    y, h = run_scan(problem)
    expected_y, expected_h = scan_loop(**shorter)
    assert_close(y[:, kept], expected_y)
    assert_close(h, expected_h)


@pytest.mark.parametrize("elements", [1, 100, 1000])
def test_selective_scan_in_blocks_of_channels_gives_the_same(monkeypatch, elements):
    """1 element leaves one channel to a block, 100 and 1000 leave a last block that is smaller than the others."""
    problem = scan_problem(97, channels=33)
    whole = run_scan(problem)
    monkeypatch.setattr(scans, "SCAN_BLOCK_ELEMENTS", elements)
    blocked = run_scan(problem)
    for a, b in zip(whole, blocked, strict=True):
        assert_close(b, a.double().numpy())
    assert_scan_matches_loop(problem)


def test_selective_scan_works_on_blocks_no_larger_than_the_stated_bound(monkeypatch):
    seen = []
    original = scans._scan_block

    def watched(x, dt, a, *rest):
        seen.append(x.shape[2])
        return original(x, dt, a, *rest)

    monkeypatch.setattr(scans, "_scan_block", watched)
    monkeypatch.setattr(scans, "SCAN_BLOCK_ELEMENTS", 2 * 10 * 3 * 8)  # batch * chunks of 97 * states * 8 channels
    run_scan(scan_problem(97, channels=33))
    assert seen == [8, 8, 8, 8, 1]


@pytest.mark.parametrize("cuts", [(1,), (64,), (512,), (1, 2, 3, 100, 400)])
def test_selective_scan_continued_from_its_state_equals_one_go(cuts):
    problem = scan_problem(513)
    expected_y, expected_h = scan_loop(**problem)
    x, dt, a, b, c, d, h = as_torch(*problem.values())
    pieces = []
    for start, end in zip((0, *cuts), (*cuts, 513), strict=True):
        piece = slice(start, end)
        y, h = scans.selective_scan(x[:, piece], dt[:, piece], a, b[:, piece], c[:, piece], d, h)
        pieces.append(y)
    assert_close(torch.cat(pieces, 1), expected_y)
    assert_close(h, expected_h)


def test_selective_scan_does_not_change_its_inputs():
    tensors = as_torch(*scan_problem(64).values())
    copies = [tensor.clone() for tensor in tensors]
    scans.selective_scan(*tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))


# causal_conv


def conv_loop(x, state, weight, bias):
    """Token t sees itself and the width - 1 inputs before it, those of the state first."""
    width, channels = weight.shape[2], x.shape[2]
    seen = np.concatenate([state.transpose(0, 2, 1), x], 1)
    y = np.zeros_like(x)
    for t in range(x.shape[1]):
        for k in range(width):
            y[:, t] += seen[:, t + k] * weight[:, 0, k]
    return y + (np.zeros(channels) if bias is None else bias), seen[:, len(seen[0]) - width + 1 :].transpose(0, 2, 1)


def conv_problem(length: int, width: int, with_bias: bool, channels: int = 5, batch: int = 2):
    g = np.random.default_rng(0)
    return (
        normal(g, batch, length, channels),
        normal(g, batch, channels, width - 1),
        normal(g, channels, 1, width),
        normal(g, channels) if with_bias else None,
    )


def run_conv(x, state, weight, bias):
    tensors = as_torch(x, state, weight)
    return causal_conv(*tensors, None if bias is None else as_torch(bias)[0])


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 64])
def test_causal_conv_sees_the_state_and_nothing_ahead(length, width, with_bias):
    problem = conv_problem(length, width, with_bias)
    y, state = run_conv(*problem)
    expected_y, expected_state = conv_loop(*problem)
    assert_close(y, expected_y)
    assert np.array_equal(state.numpy(), expected_state)  # a copy of inputs, no arithmetic


@pytest.mark.parametrize("cuts", [(1,), (1, 2, 3), (5, 6)])
def test_causal_conv_continued_from_its_state_equals_one_go(cuts):
    x, state, weight, bias = conv_problem(9, 4, True)
    expected_y, expected_state = conv_loop(x, state, weight, bias)
    pieces = []
    for start, end in zip((0, *cuts), (*cuts, 9), strict=True):
        y, new = run_conv(x[:, start:end], state, weight, bias)
        state = new.double().numpy()
        pieces.append(y)
    assert_close(torch.cat(pieces, 1), expected_y)
    assert np.array_equal(state, expected_state)


# attention


def attention_loop(query, key, value, mask=None):
    """Head by head, token by token; a query whose tokens are all masked looks at itself alone."""
    batch, heads, length, size = query.shape
    groups, total = key.shape[1], key.shape[2]
    result = np.zeros_like(query)
    for n, h, s in np.ndindex(batch, heads, length):
        g, here = h // (heads // groups), total - length + s
        seen = [t for t in range(here + 1) if t == here or mask is None or mask[n, t]]
        scores = np.array([query[n, h, s] @ key[n, g, t] for t in seen]) / np.sqrt(size)
        weights = np.exp(scores - scores.max())
        result[n, h, s] = (weights / weights.sum()) @ np.array([value[n, g, t] for t in seen])
    return result


def attention_problem(length: int, total: int, heads: int = 6, groups: int = 2, batch: int = 2, size: int = 4):
    g = np.random.default_rng(0)
    return (
        normal(g, batch, heads, length, size),
        normal(g, batch, groups, total, size),
        normal(g, batch, groups, total, size),
    )


def left_padded(lengths: list[int], total: int) -> np.ndarray:
    return np.array([[0] * (total - n) + [1] * n for n in lengths])


@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (5, 1), (3, 3), (1, 1)])
@pytest.mark.parametrize(("length", "total"), [(1, 1), (17, 17), (1, 17), (5, 17)])
def test_attention_is_causal_and_shares_key_value_heads(heads, groups, length, total):
    problem = attention_problem(length, total, heads, groups)
    assert_close(attention(*as_torch(*problem), None), attention_loop(*problem))


@pytest.mark.parametrize(("length", "total"), [(17, 17), (1, 17), (5, 17)])
def test_attention_with_a_mask_of_ones_equals_attention_without(length, total):
    problem = attention_problem(length, total)
    mask = torch.ones(2, total, dtype=torch.int64)
    assert_close(attention(*as_torch(*problem), mask), attention_loop(*problem))


@pytest.mark.parametrize(("length", "total"), [(17, 17), (1, 17), (5, 17)])
def test_attention_does_not_look_at_left_padding(length, total):
    problem, mask = attention_problem(length, total), left_padded([total, 6], total)
    assert_close(attention(*as_torch(*problem), torch.from_numpy(mask)), attention_loop(*problem, mask))


def test_attention_output_of_padded_rows_is_finite():
    """A NaN there would spread through later layers: 0 * NaN is NaN."""
    problem, mask = attention_problem(17, 17), left_padded([1, 0], 17)
    assert attention(*as_torch(*problem), torch.from_numpy(mask)).isfinite().all()


def test_attention_of_real_tokens_does_not_depend_on_what_lies_in_the_padding():
    query, key, value = attention_problem(17, 17)
    mask = torch.from_numpy(left_padded([6, 6], 17))
    before = attention(*as_torch(query, key, value), mask)
    key[:, :, :11], value[:, :, :11] = 100, -100
    after = attention(*as_torch(query, key, value), mask)
    assert torch.equal(before[:, :, 11:], after[:, :, 11:])


@pytest.mark.parametrize("padded", [False, True])
def test_attention_in_pieces_equals_one_go(padded):
    query, key, value = problem = attention_problem(17, 17)
    mask = left_padded([17, 9], 17) if padded else None
    pieces = []
    for start, end in ((0, 3), (3, 4), (4, 12), (12, 17)):
        part = query[:, :, start:end], key[:, :, :end], value[:, :, :end]
        pieces.append(attention(*as_torch(*part), torch.from_numpy(mask[:, :end]) if padded else None))
    assert_close(torch.cat(pieces, 2), attention_loop(*problem, mask))


# gates


def gates_loop(logits, top_k, experts):
    """Token by token: softmax over all rows, the largest top_k of the first `experts` as they are."""
    rows = logits.reshape(-1, logits.shape[-1])
    result = np.zeros((len(rows), experts))
    for n, row in enumerate(rows):
        shares = np.exp(row - row.max())
        shares /= shares.sum()
        for e in np.argsort(-shares[:experts], kind="stable")[:top_k]:
            result[n, e] = shares[e]
    return result.reshape(*logits.shape[:-1], experts)


def gates_of(logits: torch.Tensor, top_k: int, experts: int) -> torch.Tensor:
    return Router("router", logits.shape[-1], top_k).gates(logits, experts)


TOKENS = [(1, 1), (1, 7), (3, 1), (3, 13), (11,)]  # batch and length, or tokens in a row


@pytest.mark.parametrize(("rows", "experts", "top_k"), [
    (5, 5, 1), (5, 5, 2), (5, 5, 5),  # every row is an expert's
    (8, 5, 2), (8, 5, 5), (8, 2, 2), (7, 6, 1), (13, 3, 1),  # rows of removed experts after them
])  # fmt: skip
@pytest.mark.parametrize("tokens", TOKENS)
def test_gates_are_the_top_k_experts_shares_of_all_rows(tokens, rows, experts, top_k):
    logits = 3 * normal(np.random.default_rng(0), *tokens, rows)
    gates = gates_of(*as_torch(logits), top_k, experts)
    assert_close(gates, gates_loop(logits, top_k, experts))
    assert torch.equal((gates > 0).sum(-1), torch.full(tokens, top_k))


def test_gates_are_not_renormalised():
    """Five equal experts, two chosen: each has 1/5, not 1/2; with three rows more, 1/8."""
    for rows, share in ((5, 1 / 5), (8, 1 / 8)):
        gates = gates_of(torch.zeros(1, 3, rows), 2, 5)
        assert_close(gates.sort(-1).values, np.broadcast_to([0, 0, 0, share, share], (1, 3, 5)))


def test_gates_never_go_to_a_removed_expert_and_shrink_beside_it():
    """The removed expert has nearly everything; the best two of the others share what is left as before."""
    logits = np.array([[[1.0, 3.0, 2.0, 9.0]]])
    expected = np.array([[[0.0, np.exp(3.0), np.exp(2.0)]]]) / np.exp(logits).sum()
    assert_close(gates_of(*as_torch(logits), 2, 3), expected)


@pytest.mark.parametrize("rows", [5, 8])
def test_gates_of_very_large_logits_are_finite(rows):
    logits = 1e4 * normal(np.random.default_rng(0), 2, 9, rows)
    assert_close(gates_of(*as_torch(logits), 2, 5), gates_loop(logits, 2, 5))


# moe


def moe_loop(x, gates, expert):
    """Token by token, expert by expert."""
    rows, gates = x.reshape(-1, x.shape[-1]), gates.reshape(-1, gates.shape[-1])
    result = np.zeros_like(rows)
    for n, e in np.ndindex(gates.shape):
        if gates[n, e]:
            result[n] += gates[n, e] * expert(e, rows[n])
    return result.reshape(x.shape)


def moe_problem(tokens=(2, 9), top_k: int = 2, hidden: int = 6, experts: int = 5):
    """x, gates and the experts' matrices; top_k experts of every token have a gate."""
    g = np.random.default_rng(0)
    ranks = g.random((*tokens, experts)).argsort(-1)
    gates = np.where(ranks < top_k, g.uniform(0.1, 1, ranks.shape), 0).astype(np.float32).astype(np.float64)
    return normal(g, *tokens, hidden), gates, normal(g, experts, hidden, hidden)


def run_moe(x, gates, matrices, only=None):
    """The result, and how many rows each expert was called with."""
    calls: dict[int, int] = {}
    weights = torch.from_numpy(matrices.astype(np.float32))

    def expert(e: int, rows: torch.Tensor):
        assert e not in calls, "an expert's weights are asked for once"
        calls[e] = len(rows)
        return rows @ weights[e].T

    return mixture(*as_torch(x, gates), expert, only), calls


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("tokens", TOKENS)
def test_moe_weighs_the_experts_by_their_gates(tokens, top_k):
    x, gates, matrices = moe_problem(tokens, top_k)
    result, calls = run_moe(x, gates, matrices)
    assert_close(result, moe_loop(x, gates, lambda e, row: matrices[e] @ row))
    assert sum(calls.values()) == top_k * int(np.prod(tokens))


def test_moe_calls_only_experts_that_have_tokens():
    x, _, matrices = moe_problem((2, 3))
    gates = np.broadcast_to([0, 0.5, 0, 0.25, 0], (2, 3, 5))
    result, calls = run_moe(x, gates, matrices)
    assert calls == {1: 6, 3: 6}
    assert_close(result, moe_loop(x, gates, lambda e, row: matrices[e] @ row))


@pytest.mark.parametrize("only", [set(), {3}, {4, 0}, {1, 2}])
def test_moe_of_some_experts_leaves_the_others_out(only):
    """Expert 2 has no token: it is not called, named or not."""
    x, gates, matrices = moe_problem()
    gates[..., 2] = 0
    result, calls = run_moe(x, gates, matrices, only)
    kept = gates * [e in only for e in range(5)]
    assert calls == {e: int((kept[..., e] > 0).sum()) for e in sorted(only - {2})}
    assert_close(result, moe_loop(x, kept, lambda e, row: matrices[e] @ row))


# rms_norm, swiglu


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_rms_norm_divides_by_the_root_of_the_mean_square(eps):
    g = np.random.default_rng(0)
    x, weight = normal(g, 2, 3, 10), normal(g, 10)
    x[0, 0] *= 1e-3  # there eps matters
    expected = np.empty_like(x)
    for n, s in np.ndindex(2, 3):
        expected[n, s] = x[n, s] / np.sqrt(sum(v * v for v in x[n, s]) / 10 + eps) * weight
    assert_close(rms_norm(*as_torch(x, weight), eps), expected)


def test_rms_norm_of_zeros_is_zero():
    assert torch.equal(rms_norm(torch.zeros(1, 4), torch.ones(4), 1e-6), torch.zeros(1, 4))


def test_swiglu_gates_with_silu_of_the_gate_matrix():
    g = np.random.default_rng(0)
    x, gate, up, down = normal(g, 2, 3, 4), normal(g, 7, 4), normal(g, 7, 4), normal(g, 4, 7)
    expected = np.empty_like(x)
    for n, s in np.ndindex(2, 3):
        pre = gate @ x[n, s]
        expected[n, s] = down @ (pre / (1 + np.exp(-pre)) * (up @ x[n, s]))
    x, *matrices = as_torch(x, gate, up, down)
    names = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
    assert_close(Mlp("", 4, 7, gated=True).give(Eager(Matrices(zip(names, matrices, strict=True))), x), expected)


class Matrices(dict):
    """Weights by name, multiplied as they are."""

    __call__ = dict.__getitem__

    def linear(self, name: str, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return torch.nn.functional.linear(x, self[name], bias)

"""Mamba-2's arithmetic against loops written out in numpy, in float64."""

import numpy as np
import pytest
import torch

from compress import parallel
from compress.arithmetic import ssd
from compress.arithmetic.norm import rms_norm
from compress.runtime.eager import Eager

RELATIVE = 2e-6  # to the largest expected magnitude: a few dozen roundings of float32
CHUNK = ssd.CHUNK
LENGTHS = (0, 1, 2, 7, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 151)
SHAPES = [(6, 2, 5, 3), (1, 1, 1, 1), (7, 7, 3, 5), (9, 3, 1, 7), (12, 4, 8, 1)]  # heads, groups, width, states


def normal(g: np.random.Generator, *shape: int) -> np.ndarray:
    return g.standard_normal(shape).astype(np.float32)


def problem(batch: int, length: int, shape: tuple[int, int, int, int] = SHAPES[0], seed: int = 0) -> list[np.ndarray]:
    """x, dt, a, b, c, d and a start that is not zero. Time steps span 1e-3 to 1, decays differ by head."""
    (heads, groups, width, states), g = shape, np.random.default_rng(seed)
    dt = np.exp(g.uniform(np.log(1e-3), 0, (batch, length, heads))).astype(np.float32)
    a = -g.uniform(0.1, 16, heads).astype(np.float32)
    x, b, c = (normal(g, batch, length, *two) for two in ((heads, width), (groups, states), (groups, states)))
    return [x, dt, a, b, c, normal(g, heads), normal(g, batch, heads, states, width)]


def loop(x, dt, a, b, c, d, state) -> tuple[np.ndarray, np.ndarray]:
    """The recurrence as the paper writes it, one token and one head at a time."""
    x, dt, a, b, c, d, state = (array.astype(np.float64) for array in (x, dt, a, b, c, d, state))
    y, share = np.zeros_like(x), x.shape[2] // b.shape[2]
    for n, t, h in np.ndindex(x.shape[:3]):
        fed = dt[n, t, h] * np.outer(b[n, t, h // share], x[n, t, h])
        state[n, h] = np.exp(dt[n, t, h] * a[h]) * state[n, h] + fed
        y[n, t, h] = c[n, t, h // share] @ state[n, h] + d[h] * x[n, t, h]
    return y, state


def scan(arrays: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    return ssd.ssd_scan(*(torch.from_numpy(array) for array in arrays))


def assert_close(actual: torch.Tensor, expected: np.ndarray):
    assert actual.dtype == torch.float32 and actual.shape == expected.shape
    error = np.abs(actual.double().numpy() - expected).max(initial=0.0)
    assert error <= RELATIVE * np.abs(expected).max(initial=1e-30), f"error {error:.3g}"


def assert_is_the_recurrence(arrays: list[np.ndarray]):
    before = [array.copy() for array in arrays]
    for actual, expected in zip(scan(arrays), loop(*arrays), strict=True):
        assert_close(actual, expected)
    assert all(np.array_equal(array, copy) for array, copy in zip(arrays, before, strict=True))  # nothing given changes


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", LENGTHS)
def test_the_scan_is_the_recurrence(batch, length):
    assert_is_the_recurrence(problem(batch, length))


@pytest.mark.parametrize("length", [1, 97])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("elements", [1, 1 << 15, 1 << 18])
def test_it_is_in_any_shape_and_cut_into_any_pieces(monkeypatch, shape, length, elements):
    monkeypatch.setattr(ssd, "PIECE_ELEMENTS", elements)
    assert_is_the_recurrence(problem(3, length, shape))


@pytest.mark.parametrize(("batch", "groups", "heads"), [(1, 1, 1), (3, 2, 3), (2, 5, 4)])
@pytest.mark.parametrize("most", [1, 2, 3, 7, 12, 1000])
def test_pieces_hold_every_head_once_and_no_more_than_asked(batch, groups, heads, most):
    seen = np.zeros((batch, groups, heads), int)
    for piece in ssd._pieces(batch, groups, heads, most):
        seen[piece] += 1
        assert seen[piece].size <= most
    assert (seen == 1).all()


def test_a_small_step_after_huge_ones_keeps_its_decay():
    """The sum of dt a over the tokens before is so large that float32 no longer holds a small step beside it."""
    arrays = problem(1, CHUNK)
    arrays[1][:, :5] = 60.0
    arrays[1][:, 5:] = 1e-3
    assert_is_the_recurrence(arrays)


@pytest.mark.parametrize("length", [1, 2 * CHUNK + 3])
def test_steps_that_forget_everything_and_steps_of_nothing_stay_finite(length):
    arrays = problem(2, length)
    arrays[1][0], arrays[1][1, ::2] = 1e30, 0.0
    y, state = scan(arrays)
    assert torch.isfinite(y).all() and torch.isfinite(state).all()


@pytest.mark.parametrize("padding", [1, CHUNK - 3, CHUNK, 2 * CHUNK + 1])
def test_padding_leaves_the_state_as_it_was(padding):
    """Padding has dt 0: bit for bit where there is nothing else, and before or after tokens."""
    arrays = problem(2, padding)
    arrays[1][:] = 0.0
    assert np.array_equal(scan(arrays)[1].numpy(), arrays[6])
    tokens = problem(2, 20, seed=1)
    joined = [np.concatenate(pair, axis=1) for pair in zip(arrays[:5], tokens[:5], strict=True) if pair[0].ndim > 1]
    joined.insert(2, tokens[2])
    y, state = scan([*joined, *tokens[5:]])
    expected_y, expected_state = loop(*tokens)
    assert_close(y[:, padding:], expected_y)
    assert_close(state, expected_state)


@pytest.mark.parametrize("cuts", [[1], [1, 2, 3], [CHUNK], [CHUNK - 1, CHUNK], list(range(1, 90))])
def test_the_state_goes_on_from_call_to_call(cuts):
    x, dt, a, b, c, d, state = problem(2, 90)
    expected_y, expected_state = loop(x, dt, a, b, c, d, state)
    pieces = []
    for part in zip(*(np.split(array, cuts, axis=1) for array in (x, dt, b, c)), strict=True):
        y, new = scan([part[0], part[1], a, part[2], part[3], d, state])
        pieces.append(y)
        state = new.numpy()
    assert_close(torch.cat(pieces, 1), expected_y)
    assert_close(torch.from_numpy(state), expected_state)


@pytest.mark.parametrize("length", [1, 200])
def test_the_same_bytes_on_any_number_of_threads(monkeypatch, length):
    monkeypatch.setattr(ssd, "PIECE_ELEMENTS", 1 << 15)
    assert len(ssd._pieces(5, 3, 8, ssd.PIECE_ELEMENTS // (32 * 64))) > 1  # there is something to share
    arrays, found, before = problem(5, length, (24, 3, 32, 64)), [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with parallel.steady():
                found.append(scan(arrays))
    finally:
        torch.set_num_threads(before)
    for y, state in found[1:]:
        assert torch.equal(y, found[0][0]) and torch.equal(state, found[0][1])


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_the_norm_is_one_of_each_group(groups):
    g = np.random.default_rng(0)
    x, weight = normal(g, 3, 5, 42), normal(g, 42)
    expected = np.empty(x.shape)
    for part in np.split(np.arange(42), groups):
        values = x[..., part].astype(np.float64)
        expected[..., part] = values / np.sqrt((values**2).mean(-1, keepdims=True) + 1e-3) * weight[part]
    assert_close(rms_norm(*map(torch.from_numpy, (x, weight)), 1e-3, groups), expected)


def test_the_squared_relu():
    assert Eager(None).squared_relu(torch.tensor([-2.0, 0.0, 0.5, 3.0])).tolist() == [0.0, 0.0, 0.25, 9.0]

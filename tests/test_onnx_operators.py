"""Single operators of the portable dialect beside our own, above all those that the shipped families' models leave out."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from onnx_graphs import run_graph

from compress.model.roles import Role
from compress.model.routing import Router
from compress.model.weight import Weight
from compress.runtime.eager import Eager
from exporters.dialects.base import Tokens
from exporters.dialects.portable import Portable
from exporters.dialects.tensorrt import TensorRTSingle

HIDDEN, EXPERTS, WIDTH = 16, 8, 12
SAME = 2e-6  # float32 sums in another order, of numbers of about one


class Own:
    """Weights by name, for our own operators."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self._tensors = tensors

    def __call__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def linear(self, name: str, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return F.linear(x, self._tensors[name], bias)


def as_weight(name: str, tensor: torch.Tensor) -> Weight:
    return Weight(name, Role.MLP, tuple(tensor.shape), "fp32", lambda rows=None: tensor)


def both(
    folder, tensors, inputs: dict[str, np.ndarray], build, width: int, dialect=Portable
) -> tuple[np.ndarray, np.ndarray]:
    """What `build(ops, *inputs)` gives in a graph, and with torch; `mask` goes to the operators alone."""
    names = [name for name in inputs if name != "mask"]

    def in_graph(graph, *values):
        given = dict(zip(inputs, values, strict=True))
        weights = {name: as_weight(name, tensor) for name, tensor in tensors.items()}
        ops = dialect(graph, Tokens(given[names[0]], given.get("mask"))).of(weights)
        return build(ops, *(given[name] for name in names))

    actual = run_graph(folder, inputs, width, in_graph, graph=dialect.new_graph)
    torched = {name: torch.from_numpy(x) for name, x in inputs.items()}
    own = build(Eager(Own(tensors), torched.get("mask")), *(torched[name] for name in names))
    return actual, own.numpy()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# routers

ROUTERS = {
    "softmax": {},
    "softmax over the chosen": {"renormalized": True},
    "softmax with a bias": {"bias": "bias"},
    "rows of removed experts": {"rows": EXPERTS + 3},
    "rows of removed experts and a bias": {"rows": EXPERTS + 3, "bias": "bias"},
    "sigmoid": {"score": "sigmoid"},
    "sigmoid with a bias": {"score": "sigmoid", "bias": "bias"},
    "sigmoid in groups": {"score": "sigmoid", "groups": 4, "groups_used": 2},
    "one group of two": {"score": "sigmoid", "groups": 2, "groups_used": 1, "bias": "bias"},
    "all of it": {
        "score": "sigmoid",
        "bias": "bias",
        "groups": 4,
        "groups_used": 2,
        "renormalized": True,
        "scale": 2.5,
    },
}


def mixture(router: Router):
    def build(ops, x, rows):
        rows = ops.linear("enter", rows)
        return ops.mixture(x, rows, router, EXPERTS, lambda e, part: ops.linear(f"expert {e}", part))

    return build


@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("changes", ROUTERS.values(), ids=list(ROUTERS))
def test_a_mixture_is_routed_as_its_description_says(tmp_path, changes, top_k, ties):
    """Experts see another space than the router does. Where scores tie, the lower number is taken on both sides: all but
    the first rows of the router are one, and so are the entries of the bias."""
    router = Router("router", **{"rows": EXPERTS, "top_k": top_k, **changes})
    weight, bias = normal(router.rows, HIDDEN, seed=1), normal(EXPERTS, seed=2)
    if ties:
        weight[2:], bias[1:] = weight[2], bias[1]
    tensors = {"router": weight, "bias": bias, "enter": normal(WIDTH, HIDDEN, seed=3) / HIDDEN}
    tensors |= {f"expert {e}": normal(WIDTH, WIDTH, seed=10 + e) / WIDTH for e in range(EXPERTS)}
    x = normal(3, 40, HIDDEN).numpy()
    actual, expected = both(tmp_path, tensors, {"x": x, "rows": x + 1}, mixture(router), WIDTH)
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(actual, expected, rtol=0, atol=SAME)


# norms, activations


ELEMENTWISE = {
    "norm": lambda ops, x: ops.rms_norm(x, "w", 1e-5),
    "norm in groups": lambda ops, x: ops.rms_norm(x, "w", 1e-5, groups=4),
    "squared relu": lambda ops, x: ops.squared_relu(x),
    "silu": lambda ops, x: ops.silu(x),
    "softplus": lambda ops, x: ops.softplus(x),
    "scale": lambda ops, x: ops.scale(x, 0.3),
    "a weight added": lambda ops, x: ops.add_weight(x, "w"),
    "parts of unequal size": lambda ops, x: ops.split(x, (3, HIDDEN, 13))[1],
    "parts of equal size": lambda ops, x: ops.split(x, (HIDDEN, HIDDEN))[1],
}


@pytest.mark.parametrize("build", ELEMENTWISE.values(), ids=list(ELEMENTWISE))
def test_operators_without_matrices_are_our_own(tmp_path, build):
    x = 3 * normal(2, 5, 2 * HIDDEN).numpy()
    width = build(Eager(Own({"w": torch.ones(2 * HIDDEN)})), torch.from_numpy(x)).shape[-1]
    actual, expected = both(tmp_path, {"w": normal(2 * HIDDEN, seed=1)}, {"x": x}, build, width)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=SAME * 4)


# Mamba-2


@pytest.mark.parametrize("dialect", [Portable, TensorRTSingle])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("length", [1, 5, 70])
def test_mamba_2_goes_on_from_a_state_and_leaves_it_as_it_was_at_padding(tmp_path, groups, padding, length, dialect):
    heads, size, states, padding = 4, 3, 5, min(padding, length)
    state = normal(2, heads, states, size, seed=7)
    widths = (heads * size, heads, groups * states, groups * states)
    inputs = {"x": normal(2, length, sum(widths), seed=1).numpy(), "mask": np.ones((2, length), np.int64)}
    inputs["mask"][0, :padding] = 0

    def build(ops, x):
        """The last tokens' y and the state after them, side by side."""
        x, dt, b, c = ops.split(x, widths)
        kept = state if isinstance(ops, Eager) else constant(ops, state)
        y, after = ops.ssd(x, ops.softplus(dt), b, c, kept, "a_log", "d")
        if isinstance(ops, Eager):
            return torch.cat([y.flatten(), after.flatten()])[None, None]
        parts = (ops.graph.reshape(value, -1) for value in (y, after))
        return ops.graph.reshape(ops.graph.op("Concat", *parts, axis=0), 1, 1, -1)

    tensors = {"a_log": normal(heads, seed=2), "d": normal(heads, seed=3)}
    outputs = 2 * length * heads * size
    actual, expected = both(tmp_path, tensors, inputs, build, outputs + state.numel(), dialect)
    real = np.repeat(inputs["mask"].flatten() == 1, heads * size)
    np.testing.assert_allclose(actual[0, 0, :outputs][real], expected[0, 0, :outputs][real], rtol=0, atol=2e-5)
    np.testing.assert_allclose(actual[0, 0, outputs:], expected[0, 0, outputs:], rtol=0, atol=2e-5)


# rotary positions


@pytest.mark.parametrize(("past", "new"), [(0, 9), (6, 1), (6, 3)])
@pytest.mark.parametrize("padding", [0, 2])
def test_rotary_positions_count_real_tokens(tmp_path, past, new, padding):
    queries, keys, size = 4, 2, 8
    mask = np.ones((2, past + new), np.int64)
    mask[0, :padding] = 0
    inputs = {
        "query": normal(2, new, queries * size, seed=1).numpy(),
        "key": normal(2, new, keys * size, seed=2).numpy(),
        "value": normal(2, new, keys * size, seed=3).numpy(),
        "mask": mask,
    }
    before = [normal(2, keys, past, size, seed=seed) for seed in (4, 5)]

    def build(ops, query, key, value):
        past_key, past_value = before if isinstance(ops, Eager) else (constant(ops, tensor) for tensor in before)
        return ops.attention(query, key, value, past_key, past_value, 1e4)[0]

    actual, expected = both(tmp_path, {}, inputs, build, queries * size)
    real = mask[:, past:] == 1
    np.testing.assert_allclose(actual[real], expected[real], rtol=0, atol=SAME * 4)


def constant(ops, tensor: torch.Tensor):
    return ops.graph.constant(tensor.numpy(), np.float32)

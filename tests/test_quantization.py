"""How values are chosen: scales by search, GPTQ, rounded activations and equalisation, against brute force in numpy, worked
examples, and the compressed-tensors library."""

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize

from compress import formats
from compress.formats.activations import NAMES, Activation, static_scale
from compress.passes.quantization import equalization, gptq, scales

FORMATS = tuple(formats.FILES)
DIAGONAL_DAMPING = 0.01  # gptq's default


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs_of(name: str) -> int:
    """A K that the format's groups divide, more than one block of GPTQ's columns."""
    return 3 * (formats.get(name).columns or 59) if "g" in name else 177


def correlated(tokens: int, inputs: int, seed: int = 0) -> torch.Tensor:
    """Inputs that a third as many causes explain, of very different magnitudes, with a little noise."""
    causes = normal(tokens, max(1, inputs // 3), seed=seed) @ normal(max(1, inputs // 3), inputs, seed=seed + 1)
    return (causes + 0.3 * normal(tokens, inputs, seed=seed + 2)) * torch.logspace(-1, 1, inputs)


def hessian_of(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / len(x)


def gptq_of(weight: torch.Tensor, hessian: torch.Tensor, number_format, found: torch.Tensor, **options):
    """GPTQ of one matrix with the scales that were found."""
    return gptq.quantize(weight, gptq.factor(hessian, **options), number_format, found)


def output_error(x: torch.Tensor, weight: torch.Tensor, number_format, quantized) -> float:
    """|| X W' - X W'q ||^2, in float64."""
    return float((x.double() @ (weight - number_format.dequantize(quantized)).double().T).square().sum())


# ---- scales by search


def losses(weight: torch.Tensor, scale: torch.Tensor, number_format, moments=None) -> np.ndarray:
    """Error of every block that shares a scale, in float64, weighted by the inputs' mean squares."""
    restored = number_format.dequantize(number_format.quantize(weight, scale)).double()
    error = (restored - weight.double()).square().numpy()
    error = error if moments is None else error * moments.double().numpy()
    rows, columns = number_format.rows or weight.shape[0], number_format.columns or weight.shape[1]
    return np.array([
        [error[i : i + rows, j : j + columns].sum() for j in range(0, weight.shape[1], columns)]
        for i in range(0, weight.shape[0], rows)
    ])  # fmt: skip


def uneven_moments(inputs: int) -> torch.Tensor:
    return torch.logspace(-4, 4, inputs)[torch.randperm(inputs, generator=torch.Generator().manual_seed(9))]


WEIGHTS = {
    "normal": lambda k: normal(11, k),
    "one row": lambda k: normal(1, k),
    "heavy tails": lambda k: normal(11, k) ** 5,
    "an outlier of ten thousand times": lambda k: normal(5, k) * (1 + 9999 * (torch.arange(k) == 3)),
    "all equal": lambda k: torch.full((5, k), 0.3),
    "very small": lambda k: normal(5, k) * 1e-25,
    "very large": lambda k: normal(5, k) * 1e25,
    "rows of zeros": lambda k: normal(7, k) * (torch.arange(7) % 3 > 0)[:, None],
}


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_search_never_does_worse_than_scales_that_reach_the_largest_magnitude(name, kind, weighted):
    number_format, weight = formats.get(name), WEIGHTS[kind](inputs_of(name))
    moments = uneven_moments(weight.shape[1]) if weighted else None
    absmax, found = number_format.absmax_scales(weight), scales.search(weight, number_format, moments)
    assert torch.equal(found > 0, absmax > 0) and found.shape == absmax.shape
    usable = [torch.where(s > 0, s, 1.0) for s in (found, absmax)]
    searched, reached = (losses(weight, s, number_format, moments) for s in usable)
    # the absmax scale itself is among the candidates but for its last bit, which moves w' by 2^-24 of itself
    slack = 2.0**-44 * weight.double().square().sum().item() * (1 if moments is None else float(moments.max()))
    assert np.all(searched <= reached * (1 + 1e-4) + slack)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_search_finds_what_trying_all_candidates_in_numpy_finds(name, weighted):
    number_format, weight = formats.get(name), normal(13, inputs_of(name), seed=2)
    moments = uneven_moments(weight.shape[1]) if weighted else None
    absmax = number_format.absmax_scales(weight)
    candidates = [absmax * factor for factor in (np.arange(16, 36) / 32).tolist()]
    tried = np.stack([losses(weight, scale, number_format, moments) for scale in candidates])
    found = losses(weight, scales.search(weight, number_format, moments), number_format, moments)
    np.testing.assert_allclose(found, tried.min(0), rtol=1e-4)  # sums of float32 squares
    if name.startswith("int4"):
        assert (tried.argmin(0) != 16).any()  # 16 is absmax itself: the search has something to find


@pytest.mark.parametrize("name", ["int4-g16", "int8-g16", "int8", "fp8-e4m3"])
def test_weights_that_lie_on_the_grid_are_found_to(name):
    number_format = formats.get(name)
    drawn = torch.randint(-7, 8, (9, 48), generator=torch.Generator().manual_seed(1)).float()
    drawn[:, ::16] = -8.0
    found = scales.search(drawn * 0.25, number_format)
    # int8 and fp8 put the largest magnitude at the end of the grid: -8 .. 7 are then steps of 15.875 and of 56
    bound = {"int4-g16": 0, "int8-g16": 0.25 * 8 / 254, "int8": 0.25 * 8 / 254, "fp8-e4m3": 0.25 * 8 / 16}[name]
    back = number_format.dequantize(number_format.quantize(drawn * 0.25, found))
    assert (back - drawn * 0.25).abs().max() <= 35 / 32 * bound  # as far as candidates reach beyond absmax


@pytest.mark.parametrize("name", ["int8", "int4-g16", "fp8-e4m3-b128"])
def test_a_search_in_blocks_of_rows_gives_what_the_whole_gives(name, monkeypatch):
    number_format, weight = formats.get(name), normal(259, 48)
    whole = scales.search(weight, number_format)
    monkeypatch.setattr(scales, "ROW_BLOCK_ELEMENTS", 1000)
    assert torch.equal(scales.search(weight, number_format), whole)


def test_inputs_without_any_magnitude_do_not_halve_the_scale_of_their_weights():
    """Calibration that never reaches a group says nothing about it: its weights must not be clipped to a half."""
    number_format, weight, moments = formats.get("int4-g16"), normal(3, 32), torch.ones(32)
    moments[16:] = 0
    found = scales.search(weight, number_format, moments)
    reached = number_format.absmax_scales(weight)
    assert (found[:, 1] >= 0.7 * reached[:, 1]).all()


# ---- GPTQ, worked out by hand


def steps_of(weight: list[float], hessian: list[list[float]], **options) -> list[int]:
    """The integers GPTQ chooses for one row with scale 1."""
    number_format = formats.get("int8")
    found = gptq_of(torch.tensor([weight]), torch.tensor(hessian), number_format, torch.ones(1, 1), **options)
    return found.values[0].tolist()


def test_the_second_of_two_equal_inputs_absorbs_the_rounding_error_of_the_first():
    """H = [[1, 1], [1, 1]], damped by 1 % of its mean diagonal to 1.01 on it.

    w1 = 10.4 rounds to 10, which lacks 0.4. The best w2 for what is missing is 20.25 + 0.4 H12 / H22 = 20.25 + 0.4 / 1.01
    = 20.646, which rounds to 21: the sum is 31 where 30.65 was meant; rounding each by itself gives 10 + 20 = 30.
    """
    assert steps_of([10.4, 20.25], [[1.0, 1.0], [1.0, 1.0]], act_order=False) == [10, 21]


def test_damping_holds_the_compensation_back():
    """The same with H damped by 100 %: 20.25 + 0.4 / 2 = 20.45, which rounds to 20."""
    assert steps_of([10.4, 20.25], [[1.0, 1.0], [1.0, 1.0]], act_order=False, damping=1.0) == [10, 20]


def test_inputs_that_are_unrelated_are_rounded_to_nearest():
    assert steps_of([10.4, 20.25, -3.5], [[1.0, 0, 0], [0, 7.0, 0], [0, 0, 3.0]]) == [10, 20, -4]


def test_opposite_inputs_move_the_second_weight_the_other_way():
    """x2 = -x1: w2 becomes 20.25 - 0.396 = 19.854; the difference is 10 - 20 where -9.85 was meant."""
    assert steps_of([10.4, 19.75], [[1.0, -1.0], [-1.0, 1.0]], act_order=False) == [10, 19]


def test_with_act_order_the_larger_input_is_rounded_first_and_columns_keep_their_places():
    """x2 = 2 x1: H = [[1, 2], [2, 4]], damped by 0.025. w2 = 20.3 rounds to 20, which lacks 0.3:
    w1 = 10.4 + 0.3 * 2 / 1.025 = 10.985 rounds to 11, and 11 + 2 * 20 = 51 is exactly what was meant.
    In the columns' own order w1 rounds to 10, w2 = 20.3 + 0.4 * 2 / 4.025 = 20.499 to 20: 50 instead of 51."""
    hessian = [[1.0, 2.0], [2.0, 4.0]]
    assert steps_of([10.4, 20.3], hessian, act_order=True) == [11, 20]
    assert steps_of([10.4, 20.3], hessian, act_order=False) == [10, 20]


# ---- GPTQ, in general


def reference_gptq(
    weight: np.ndarray, hessian: np.ndarray, scale: np.ndarray, order: np.ndarray, nearest
) -> np.ndarray:
    """Column by column without Cholesky factors: after each rounding the rest is the least-squares solution, in float64."""
    damped = hessian + DIAGONAL_DAMPING * np.diag(hessian).mean() * np.eye(len(hessian))
    remaining, values = weight.astype(np.float64).copy(), np.empty(weight.shape)
    for place, j in enumerate(order):
        values[:, j] = nearest(remaining[:, j] / scale[:, j])
        missing, rest = remaining[:, j] - values[:, j] * scale[:, j], order[place + 1 :]
        if len(rest):
            remaining[:, rest] += np.outer(missing, np.linalg.solve(damped[np.ix_(rest, rest)], damped[rest, j]))
    return values


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("name", ["int8", "int4-g32"])
def test_gptq_is_repeated_least_squares(name, act_order):
    number_format, inputs = formats.get(name), 160  # more than one block of columns
    weight, x = normal(17, inputs), correlated(400, inputs)
    hessian = hessian_of(x)
    quantized = gptq_of(weight, hessian, number_format, number_format.quantize(weight).scales, act_order=act_order)
    diagonal = hessian.diagonal().numpy()
    order = np.argsort(-diagonal, kind="stable") if act_order else np.arange(inputs)
    expanded = number_format.expand(quantized.scales, weight.shape).expand(weight.shape).double().numpy()
    least, most = (-127, 127) if name == "int8" else (-8, 7)
    expected = reference_gptq(
        weight.numpy(), hessian.double().numpy(), expanded, order, lambda x: np.clip(np.rint(x), least, most)
    )
    # float32 sums may tip a value that lies in the middle, and with it some of its row
    assert (quantized.values.numpy() != expected).mean() < 0.02


def with_a_silent_input(tokens: int, inputs: int) -> torch.Tensor:
    x = correlated(tokens, inputs)
    x[:, 3] = 0
    return x


def with_duplicates(tokens: int, inputs: int) -> torch.Tensor:
    x = correlated(tokens, inputs)
    x[:, 1::2] = x[:, 0 : 2 * (inputs // 2) : 2]
    return x


INPUTS = {
    "many tokens": lambda k: correlated(3 * k, k),
    "fewer tokens than inputs": lambda k: correlated(max(2, k // 4), k),
    "one token": lambda k: correlated(1, k),
    "an input that is always zero": lambda k: with_a_silent_input(2 * k, k),
    "pairs of equal inputs": lambda k: with_duplicates(2 * k, k),
    "one input a thousand times the others": lambda k: correlated(2 * k, k) * (1 + 999 * (torch.arange(k) == 7)),
}


@pytest.mark.parametrize("act_order", [True, False], ids=["act_order", "in order"])
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", FORMATS)
def test_gptq_beats_rounding_to_nearest_on_the_layers_output(name, kind, act_order):
    number_format, inputs = formats.get(name), inputs_of(name)
    weight, x = normal(23, inputs), INPUTS[kind](inputs)
    nearest = number_format.quantize(weight)
    found = gptq_of(weight, hessian_of(x), number_format, nearest.scales, act_order=act_order)
    assert torch.equal(found.scales, nearest.scales) and found.format == name
    assert found.values.dtype == nearest.values.dtype
    compensated, rounded = (output_error(x, weight, number_format, q) for q in (found, nearest))
    assert compensated < 0.9 * rounded


@pytest.mark.parametrize("kind", ["all equal", "an outlier of ten thousand times", "one row", "rows of zeros"])
@pytest.mark.parametrize("name", FORMATS)
def test_gptq_is_not_worse_than_rounding_for_unusual_weights(name, kind):
    number_format, inputs = formats.get(name), inputs_of(name)
    weight, x = WEIGHTS[kind](inputs), correlated(2 * inputs, inputs)
    nearest = number_format.quantize(weight)
    found = gptq_of(weight, hessian_of(x), number_format, nearest.scales)
    assert torch.isfinite(number_format.dequantize(found)).all()
    assert output_error(x, weight, number_format, found) <= output_error(x, weight, number_format, nearest)


@pytest.mark.parametrize("name", FORMATS)
def test_weights_of_an_input_that_is_always_zero_are_rounded_to_nearest(name):
    number_format, inputs = formats.get(name), inputs_of(name)
    weight, x = normal(9, inputs), with_a_silent_input(2 * inputs, inputs)
    nearest = number_format.quantize(weight)
    found = gptq_of(weight, hessian_of(x), number_format, nearest.scales)
    assert torch.equal(found.values[:, 3].float(), nearest.values[:, 3].float())
    others = [j for j in range(inputs) if j != 3]
    if number_format.columns is None:  # without the column the rest comes out the same
        without = gptq_of(weight[:, others], hessian_of(x[:, others]), number_format, nearest.scales)
        # damping follows the mean of the diagonal, which a zero lowers a little
        assert (found.values[:, others].float() != without.values.float()).float().mean() < 0.1


@pytest.mark.parametrize("name", FORMATS)
def test_without_any_input_gptq_is_rounding_to_nearest(name):
    number_format, weight = formats.get(name), normal(9, inputs_of(name))
    nearest = number_format.quantize(weight)
    found = gptq_of(weight, torch.zeros(weight.shape[1], weight.shape[1]), number_format, nearest.scales)
    assert torch.equal(found.values.float(), nearest.values.float())


@pytest.mark.parametrize("act_order", [True, False])
def test_the_multiple_of_the_hessian_does_not_matter(act_order):
    number_format, weight, x = formats.get("int4-g16"), normal(9, 48), correlated(200, 48)
    given = number_format.quantize(weight).scales
    found = [
        gptq_of(weight, hessian_of(x) * factor, number_format, given, act_order=act_order).values
        for factor in (1.0, 2.0**20, 2.0**-40)
    ]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_act_order_on_permuted_columns_gives_the_permuted_values():
    """Columns are taken by falling magnitude, wherever they stand; each keeps its own scale and place."""
    number_format, weight, x = formats.get("int8"), normal(11, 150), correlated(400, 150)
    given = number_format.quantize(weight).scales
    shuffled = torch.randperm(150, generator=torch.Generator().manual_seed(5))
    found = gptq_of(weight, hessian_of(x), number_format, given).values
    permuted = gptq_of(weight[:, shuffled], hessian_of(x[:, shuffled]), number_format, given).values
    # sums are taken in another order, which may tip a value that lies in the middle, and with it some of its row
    assert (permuted != found[:, shuffled]).float().mean() < 0.02


def test_act_order_uses_the_scale_of_each_columns_own_group():
    """Unrelated inputs are rounded to nearest, in whatever order they are taken."""
    number_format, weight = formats.get("int4-g16"), normal(5, 48) * torch.logspace(-2, 2, 48)
    hessian = torch.diag(torch.logspace(1, -1, 48)[torch.randperm(48, generator=torch.Generator().manual_seed(2))])
    nearest = number_format.quantize(weight)
    assert torch.equal(gptq_of(weight, hessian, number_format, nearest.scales).values, nearest.values)


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_weights_and_inputs_of_unusual_size_are_compensated_the_same(size):
    number_format, weight, x = formats.get("int8"), normal(9, 37), correlated(100, 37)
    given = number_format.quantize(weight).scales
    plain = gptq_of(weight, hessian_of(x), number_format, given).values
    sized = gptq_of(weight * size, hessian_of(x), number_format, given * size).values
    assert (plain != sized).float().mean() < 0.02  # products with a size that is no power of two round differently
    sized = gptq_of(weight, hessian_of(x * size), number_format, given).values
    assert (plain != sized).float().mean() < 0.02


def test_a_hessian_that_rounding_made_slightly_indefinite_is_damped_until_it_can_be_factored():
    x = correlated(3, 40)
    hessian = hessian_of(x) - 0.02 * hessian_of(x).diagonal().mean() * torch.eye(40)  # eigenvalues below zero
    number_format, weight = formats.get("int8"), normal(5, 40)
    nearest = number_format.quantize(weight)
    found, damped = (gptq_of(weight, hessian, number_format, nearest.scales, damping=d) for d in (0.01, 0.1))
    assert torch.equal(found.values, damped.values)
    assert output_error(x, weight, number_format, found) < output_error(x, weight, number_format, nearest)


def test_gptq_leaves_weight_and_hessian_as_they_were():
    number_format, weight, hessian = formats.get("int8"), normal(5, 37), hessian_of(correlated(50, 37))
    before = weight.clone(), hessian.clone()
    gptq_of(weight, hessian, number_format, number_format.quantize(weight).scales)
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])


# ---- activations


def tokens(seed: int = 0) -> torch.Tensor:
    """[2, 5, 37] with a token of zeros, one with an outlier, one very small and one very large."""
    x = normal(2, 5, 37, seed=seed)
    x[0, 1] = 0
    x[0, 2, 30] = 1e4
    x[1, 0] *= 1e-30
    x[1, 1] *= 1e30
    return x


def rounded_by_numpy(scaled: np.ndarray, is_fp8: bool) -> np.ndarray:
    if not is_fp8:
        return np.clip(np.rint(scaled), -128, 127).astype(np.float32)
    return torch.from_numpy(np.clip(scaled, -448, 448)).to(torch.float8_e4m3fn).float().numpy()


@pytest.mark.parametrize("name", ["dynamic-int8", "dynamic-fp8"])
def test_dynamic_activations_have_a_scale_per_token_that_its_largest_magnitude_decides(name):
    x, is_fp8 = tokens(), name.endswith("fp8")
    scale = np.abs(x.numpy()).max(-1, keepdims=True) / np.float32(448 if is_fp8 else 127)
    scale[scale == 0] = 1
    expected = rounded_by_numpy(x.numpy() / scale, is_fp8) * scale
    assert np.array_equal(Activation(name).fake_quantize(x).numpy(), expected)


@pytest.mark.parametrize("scale", [0.03125, 0.0123, 3.0])
@pytest.mark.parametrize("name", ["static-int8", "static-fp8"])
def test_static_activations_use_the_given_scale_and_saturate(name, scale):
    x, is_fp8 = tokens(seed=1), name.endswith("fp8")
    found = Activation(name, lambda: scale).fake_quantize(x).numpy()
    expected = rounded_by_numpy(x.numpy() / np.float32(scale), is_fp8) * np.float32(scale)
    assert np.array_equal(found, expected)
    most = 448 if is_fp8 else 127
    assert found.max() == np.float32(most) * np.float32(scale) and np.isfinite(found).all()


def test_ties_between_activations_go_to_the_even_value_and_the_ends_are_minus_128_and_127():
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 1e9, -127.5, -128.5, -1e9]])
    found = Activation("static-int8", lambda: 1.0).fake_quantize(x)
    assert found.tolist() == [[0, 2, 2, 0, -2, 126, 127, 127, -128, -128, -128]]


def test_ties_between_fp8_activations_go_to_the_even_mantissa_and_the_ends_are_448():
    x = torch.tensor([[17.0, 19.0, 1.0625, 1.1875, 464.0, 480.0, 1e9, -1e9, 2.0**-10, 3 * 2.0**-10]])
    found = Activation("static-fp8", lambda: 1.0).fake_quantize(x)
    assert found.tolist() == [[16, 20, 1.0, 1.25, 448, 448, 448, -448, 0, 2.0**-8]]


@pytest.mark.parametrize("name", ["dynamic-int8", "dynamic-fp8"])
def test_a_token_of_zeros_stays_zeros_and_does_not_become_nan(name):
    x = tokens()
    assert Activation(name).fake_quantize(x)[0, 1].tolist() == [0.0] * 37
    denormal = Activation(name).fake_quantize(torch.full((1, 3), 1e-42))
    assert torch.isfinite(denormal).all()


@pytest.mark.parametrize("name", ["dynamic-int8", "dynamic-fp8"])
def test_a_token_is_rounded_the_same_whatever_stands_beside_it(name):
    x = tokens()
    whole = Activation(name).fake_quantize(x)
    assert torch.equal(Activation(name).fake_quantize(x[0, 3:4]), whole[0, 3:4])


@pytest.mark.parametrize("name", NAMES)
def test_the_library_accepts_the_scheme_and_rounds_to_the_same_values(name):
    activation = Activation(name, (lambda: 0.0371) if name.startswith("static") else None)
    arguments = QuantizationArgs.model_validate(activation.scheme())
    assert arguments.num_bits == 8 and arguments.symmetric is True
    assert arguments.type == ("float" if name.endswith("fp8") else "int")
    assert arguments.strategy == ("tensor" if activation.is_static else "token")
    assert bool(arguments.dynamic) != activation.is_static
    x = tokens()
    most = 448 if activation.is_fp8 else 127
    scale = torch.tensor([0.0371]) if activation.is_static else x.abs().amax(-1, keepdim=True) / most
    scale = torch.where(scale > 0, scale, 1.0)
    theirs = fake_quantize(x, scale, torch.zeros_like(scale), arguments)
    assert torch.equal(activation.fake_quantize(x), theirs)


# ---- static ranges


def magnitudes(count: int = 4001) -> torch.Tensor:
    sample = normal(count).abs()
    sample[7] = 40.0
    return sample


@pytest.mark.parametrize(("is_fp8", "most"), [(False, 127), (True, 448)])
def test_a_minmax_range_reaches_the_largest_input_of_all_sampled_or_not(is_fp8, most):
    assert static_scale(magnitudes(), 55.0, is_fp8, "minmax") == pytest.approx(55 / most, rel=1e-7)


@pytest.mark.parametrize("percentile", [0.9, 0.999, 0.9999, 1.0])
@pytest.mark.parametrize(("is_fp8", "most"), [(False, 127), (True, 448)])
def test_a_percentile_range_is_numpys_quantile_of_the_magnitudes(is_fp8, most, percentile):
    sample = magnitudes()
    expected = np.quantile(sample.double().numpy(), percentile) / most
    # the rank is a float32 in torch, and the two largest magnitudes lie far apart
    assert static_scale(sample, 40.0, is_fp8, "percentile", percentile) == pytest.approx(expected, rel=1e-3)


def test_a_percentile_of_inputs_that_are_mostly_zero_falls_back_on_the_largest():
    sample = torch.zeros(1000)
    sample[0] = 3.0
    assert static_scale(sample, 3.0, False, "percentile", 0.9) == pytest.approx(3 / 127)


def test_a_percentile_of_as_many_magnitudes_as_a_wide_matrix_leaves_is_found():
    """4096 rows of 4100 inputs are more elements than `torch.quantile` takes."""
    sample = torch.linspace(0, 1, 4096 * 4100)
    assert static_scale(sample, 1.0, False, "percentile", 0.5) == pytest.approx(0.5 / 127, rel=1e-3)


@pytest.mark.parametrize("is_fp8", [False, True])
def test_an_mse_range_has_the_least_error_of_all_candidates_and_clips_a_lone_outlier(is_fp8):
    sample, most = magnitudes(200_000), 448 if is_fp8 else 127
    tried = {}
    for power in range(60):
        scale = np.float32(40.0 * 0.93**power / most)
        rounded = rounded_by_numpy(sample.numpy() / scale, is_fp8).astype(np.float64) * np.float64(scale)
        tried[power] = np.square(rounded - sample.double().numpy()).mean()
    found = static_scale(sample, 40.0, is_fp8, "mse")
    power = round(np.log(found * most / 40.0) / np.log(0.93))
    assert found == pytest.approx(40.0 * 0.93**power / most, rel=1e-6)
    assert tried[power] == pytest.approx(min(tried.values()), rel=1e-4)
    assert is_fp8 or found < 0.7 * 40.0 / most  # fp8 loses little to a wide range


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("is_fp8", [False, True])
def test_inputs_that_were_all_zero_or_nearly_have_a_positive_scale(is_fp8, method):
    assert static_scale(torch.zeros(9), 0.0, is_fp8, method) == 1.0
    least = static_scale(torch.full((9,), 1e-44), 1e-44, is_fp8, method)
    assert least > 0 and np.float32(least) > 0


# ---- equalisation


def test_factors_are_the_powers_of_two_nearest_to_the_balance_of_inputs_and_weights():
    """s = max|x|^a / max|w|^(1 - a), divided by the geometric mean of all, here by numpy in float64."""
    inputs, columns = normal(101).abs() * 10 ** normal(101, seed=1), normal(101, seed=2).abs()
    for strength in (0.0, 0.3, 0.5, 1.0):
        found = equalization.factors(inputs, columns, strength)
        raw = inputs.double().numpy() ** strength / columns.double().numpy() ** (1 - strength)
        exact = np.clip(np.log2(raw / np.exp(np.log(raw).mean())), -8, 8)
        away_from_a_tie = np.abs(exact - np.floor(exact) - 0.5) > 1e-4
        assert away_from_a_tie.all()
        assert np.array_equal(found.numpy(), 2 ** np.rint(exact))


def test_a_channel_that_carries_more_is_divided_and_one_with_larger_weights_too_little_to_matter_is_not():
    found = equalization.factors(torch.tensor([64.0, 1.0, 1.0, 1.0]), torch.ones(4), 0.5)
    assert found.tolist() == [4.0, 0.5, 0.5, 0.5]  # 8 and 1, 1, 1 over their geometric mean 8^(1/4) = 1.68
    found = equalization.factors(torch.ones(4), torch.tensor([64.0, 1.0, 1.0, 1.0]), 0.5)
    assert found.tolist() == [0.25, 2.0, 2.0, 2.0]


def test_factors_are_powers_of_two_within_bounds_and_one_where_nothing_is_known():
    inputs = torch.tensor([1e20, 1e-20, 0.0, 3.0, 5.0, 1e-38])
    columns = torch.tensor([1e-5, 1e5, 1.0, 0.0, 0.7, 1e-38])
    found = equalization.factors(inputs, columns, 0.5)
    assert found[0] == 256 and found[1] == 1 / 256
    assert found[2] == 1 and found[3] == 1
    mantissa, _ = torch.frexp(found)
    assert (mantissa == 0.5).all()
    assert equalization.factors(torch.zeros(3), torch.ones(3), 0.5).tolist() == [1.0, 1.0, 1.0]

"""The int8 format: one scale per row, round to nearest even, checked by hand and against numpy in float64."""

import numpy as np
import pytest
import torch

from compress import formats
from compress.formats.base import Quantized

INT8 = formats.get("int8")
TINY = torch.finfo(torch.float32).tiny  # the smallest normal number

# w / scale is rounded to float32 before it is rounded to an integer. It is below 128, where float32 is exact to 2^-18;
# a value may thus lie that much (in units of the scale) beyond the middle between two integers.
HALF = 0.5 + 2.0**-18


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def with_outliers() -> torch.Tensor:
    """Ordinary rows with one value 10,000 times the others'."""
    weight = normal(8, 100)
    weight[:, 17] *= 1e4
    return weight


def constant_rows() -> torch.Tensor:
    return torch.tensor([[3.7], [-3.7], [1e-20], [1e20]]).expand(4, 13).clone()


def with_zero_row() -> torch.Tensor:
    weight = normal(5, 12)
    weight[2] = 0
    return weight


def sparse() -> torch.Tensor:
    return normal(9, 31) * (normal(9, 31, seed=1) > 1)


MATRICES = {
    "normal": lambda: normal(64, 160),
    "one element": lambda: normal(1, 1),
    "one row": lambda: normal(1, 37),
    "one column": lambda: normal(29, 1),
    "two columns": lambda: normal(7, 2),
    "three columns": lambda: normal(7, 3),
    "odd sides": lambda: normal(67, 35),
    "wide": lambda: normal(3, 1025),
    "outliers": with_outliers,
    "constant rows": constant_rows,
    "a row of zeros": with_zero_row,
    "mostly zeros": sparse,
    "very large": lambda: normal(6, 10) * 1e37,
    "very small": lambda: normal(6, 10) * 1e-34,
    "rows of every magnitude": lambda: normal(60, 20) * torch.logspace(-30, 30, 60)[:, None],
    "bfloat16 values": lambda: normal(16, 40).to(torch.bfloat16).float(),
}


def reference(weight: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Values and scales by numpy in float32: absmax / 127, round half to even, clip."""
    array = weight.numpy()
    scales = np.abs(array).max(axis=1, keepdims=True) / np.float32(127)
    scales[scales == 0] = 1
    return np.clip(np.rint(array / scales), -127, 127).astype(np.int8), scales


def test_a_matrix_worked_out_by_hand():
    weight = torch.tensor([
        [127.0, -127.0, 63.5, -63.5, 0.5, 1.5, 2.5, 0.0],  # scale 1: ties go to the even neighbour
        [254.0, 2.0, 1.0, 3.0, -1.0, -3.0, -5.0, 100.0],  # scale 2
        [-31.75, 0.25, 0.3, 0.125, 0.375, 31.75, 0.0, 1.0],  # scale 1/4, greatest magnitude negative
    ])  # fmt: skip
    quantized = INT8.quantize(weight)
    assert quantized.scales.tolist() == [[1.0], [2.0], [0.25]]
    assert quantized.values.tolist() == [
        [127, -127, 64, -64, 0, 2, 2, 0],
        [127, 1, 0, 2, 0, -2, -2, 50],
        [-127, 1, 1, 0, 2, 127, 0, 4],
    ]
    assert INT8.dequantize(quantized)[1].tolist() == [254.0, 2.0, 0.0, 4.0, 0.0, -4.0, -4.0, 100.0]


@pytest.mark.parametrize("name", MATRICES)
def test_values_and_scales_are_those_of_numpy_bit_for_bit(name):
    weight = MATRICES[name]()
    quantized, (values, scales) = INT8.quantize(weight), reference(weight)
    assert np.array_equal(quantized.scales.numpy(), scales)
    assert np.array_equal(quantized.values.numpy(), values)
    assert np.array_equal(INT8.dequantize(quantized).numpy(), values.astype(np.float32) * scales)


@pytest.mark.parametrize("name", MATRICES)
def test_no_element_is_further_off_than_half_a_scale(name):
    weight = MATRICES[name]()
    quantized = INT8.quantize(weight)
    exact = quantized.values.double() * quantized.scales.double()  # float64 holds the products exactly
    error = ((weight.double() - exact).abs() / quantized.scales.double()).max().item()
    assert error <= HALF


@pytest.mark.parametrize("name", MATRICES)
def test_the_greatest_magnitude_of_a_row_gets_the_greatest_integer_and_minus_128_is_not_used(name):
    weight = MATRICES[name]()
    greatest = INT8.quantize(weight).values.to(torch.int16).abs().amax(dim=1)
    assert torch.equal(greatest, torch.where(weight.abs().amax(dim=1) > 0, 127, 0).to(torch.int16))


def test_a_row_of_zeros_comes_back_as_zeros_with_a_usable_scale():
    quantized = INT8.quantize(with_zero_row())
    assert quantized.scales[2].item() == 1
    assert INT8.dequantize(quantized)[2].tolist() == [0.0] * 12


def test_a_constant_row_comes_back_as_a_constant():
    restored = INT8.dequantize(INT8.quantize(constant_rows()))
    assert all(len(set(row)) == 1 for row in restored.tolist())
    # 127 * (x / 127) in float32: two roundings of half a unit in the last place, 2^-24 each
    torch.testing.assert_close(restored, constant_rows(), rtol=2.0**-23, atol=0)


def test_an_outlier_survives_and_costs_its_row_but_no_other():
    weight = with_outliers()
    weight[0] = normal(1, 100, seed=3)
    restored = INT8.dequantize(INT8.quantize(weight))
    torch.testing.assert_close(restored[:, 17][1:], weight[:, 17][1:], rtol=2.0**-23, atol=0)  # as for constant rows
    ordinary = [column for column in range(100) if column != 17]
    assert restored[1][ordinary].abs().max() == 0  # all others are below half of the scale, outlier / 127
    alone = INT8.dequantize(INT8.quantize(weight[:1]))
    assert torch.equal(restored[:1], alone)


@pytest.mark.parametrize("magnitude", [2.0**-149, 1e-40, TINY, 100 * TINY])
def test_rows_whose_scale_would_underflow_count_as_zeros(magnitude):
    weight = torch.tensor([[magnitude, -magnitude, 0.0], [1.0, 2.0, 3.0]])
    quantized = INT8.quantize(weight)
    assert torch.isfinite(quantized.scales).all() and (quantized.scales > 0).all()
    assert INT8.dequantize(quantized)[0].tolist() == [0.0, 0.0, 0.0]
    assert quantized.values[1].tolist() == [42, 85, 127]  # 127/3 = 42.3, 254/3 = 84.7


def test_the_smallest_row_that_is_not_taken_for_zeros_keeps_its_values():
    weight = torch.tensor([[128 * TINY, -64 * TINY]])
    assert INT8.quantize(weight).values.tolist() == [[127, -64]]  # 63.5 goes to the even neighbour


@pytest.mark.parametrize("columns", [1, 2, 3, 4, 5, 7, 8, 35, 160])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_unpacking_gives_back_what_was_packed(rows, columns):
    values = torch.arange(rows * columns).remainder(255).sub(127).to(torch.int8).view(rows, columns)
    quantized = Quantized(values, torch.rand(rows, 1) + 0.5, "int8")
    parts = INT8.pack(quantized, (rows, columns))
    assert {n: (p.dtype, tuple(p.shape)) for n, p in parts.items()} == {
        n: p[:2] for n, p in INT8.layout((rows, columns)).items()
    }
    restored = INT8.unpack(parts, (rows, columns))
    assert torch.equal(restored.values, values) and torch.equal(restored.scales, quantized.scales)


def test_packed_words_hold_four_values_lowest_byte_first_each_offset_by_128():
    values = torch.tensor([[-127, 0, 1, 127, 5]], dtype=torch.int8)
    packed = INT8.pack(Quantized(values, torch.ones(1, 1), "int8"), (1, 5))["weight_packed"]
    words = [word % 2**32 for word in packed[0].tolist()]
    assert words == [0xFF818001, 0x00000085]  # bytes 1, 128, 129, 255, then 133 and padding


def test_quantizing_leaves_its_input_as_it_was():
    weight = with_outliers()
    before = weight.clone()
    INT8.quantize(weight)
    assert torch.equal(weight, before)

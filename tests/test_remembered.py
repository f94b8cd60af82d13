"""Numbers that a model remembers, rounded with a dither in formats that are no whole numbers."""

import pytest
import torch

from compress.formats import remembered
from compress.formats.remembered import Precision

MANTISSA = {"fp8-e4m3": 3, "fp16": 10, "bf16": 7}
POSITIONS = 1 << 12


def stored(value: torch.Tensor, number_format: str) -> torch.Tensor:
    """value [N] at many positions, as stored with a scale of 1: [positions, N]."""
    precision = Precision(number_format, "stochastic", "static", seed=11)
    position = torch.arange(1, POSITIONS + 1).view(-1, 1)
    scales = None if precision.is_plain else torch.ones(1)
    return remembered.encode(value.expand(POSITIONS, -1), precision, position, scales).float()


@pytest.mark.parametrize("number_format", MANTISSA)
def test_a_dither_chooses_a_neighbour_and_is_right_in_the_mean(number_format):
    value = torch.randn(64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 2, 64)
    step = torch.exp2(torch.floor(torch.log2(value.abs())) - MANTISSA[number_format])
    found = stored(value, number_format)
    down = torch.floor(value / step) * step
    assert ((found == down) | (found == down + step)).all()
    assert ((found.double().mean(0) - value) / step).abs().max() < 0.01


@pytest.mark.parametrize("number_format", MANTISSA)
def test_what_the_format_has_stays_at_every_position(number_format):
    dtype = remembered.STORED[number_format]
    value = (torch.randn(64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 64)).to(dtype).float()
    value = torch.cat(
        [value, torch.tensor([0.0, 1.0, -1.0, 2.0, -256.0, torch.finfo(dtype).max, torch.finfo(dtype).min])]
    )
    assert torch.equal(stored(value, number_format), value.expand(POSITIONS, -1))


def test_beyond_its_range_fp8_saturates_with_a_dither_too():
    assert stored(torch.tensor([1e6, -1e6, 460.0]), "fp8-e4m3").unique().tolist() == [-448.0, 448.0]

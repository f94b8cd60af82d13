"""Activations in eight bits: the input of a matrix is rounded just before the product.

    dynamic   one scale per token, from that token: s = max_k |x_k| / largest
    static    one scale per matrix, fixed by calibration

Rounding is to nearest, ties to even; values beyond the range saturate (-128 .. 127, or +-448), as ONNX QuantizeLinear and
compressed-tensors do it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from compress.formats import fp8
from compress.formats.base import Scheme

NAMES = ("dynamic-int8", "static-int8", "dynamic-fp8", "static-fp8")
INT8_MOST = 127.0


@dataclass(frozen=True)
class Activation:
    """How the input of one matrix is rounded; a static one has a `scale`, read (or computed) when it is asked for."""

    format: str
    scale: Callable[[], float] | None = None

    @property
    def is_static(self) -> bool:
        return self.format.startswith("static")

    @property
    def is_fp8(self) -> bool:
        return self.format.endswith("fp8")

    def fake_quantize(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> the values an 8-bit kernel would see, as float32."""
        scale = token_scales(x, self.is_fp8) if self.scale is None else self.scale()
        return round_to_grid(x / scale, self.is_fp8) * scale

    def scheme(self) -> Scheme:
        """The compressed-tensors `input_activations` arguments that describe it."""
        kind: Scheme = {"num_bits": 8, "type": "float" if self.is_fp8 else "int", "symmetric": True}
        return kind | {"strategy": "tensor" if self.is_static else "token", "dynamic": not self.is_static}


def largest(is_fp8: bool) -> float:
    return fp8.LARGEST if is_fp8 else INT8_MOST


def round_to_grid(scaled: torch.Tensor, is_fp8: bool) -> torch.Tensor:
    if is_fp8:
        return fp8.saturated(scaled).to(torch.float32)
    return torch.round(scaled).clamp_(-INT8_MOST - 1, INT8_MOST)


def token_scales(x: torch.Tensor, is_fp8: bool) -> torch.Tensor:
    """[..., 1]; 1 for a token of zeros."""
    scales = x.abs().amax(-1, keepdim=True) / largest(is_fp8)
    return torch.where(scales > torch.finfo(torch.float32).tiny, scales, 1.0)


def static_scale(sample: torch.Tensor, absmax: float, is_fp8: bool, method: str, percentile: float = 0.9999) -> float:
    """One scale from calibration. `sample`: magnitudes of inputs; `absmax`: the largest of all of them.

    `minmax` reaches absmax; `percentile` the given quantile of the magnitudes (Quamba, arXiv 2410.13229, clips the input
    of the scan so); `mse` takes the range of least mean squared rounding error over the sample.
    """
    if absmax <= 0:
        return 1.0
    if method == "percentile":
        reach = float(np.quantile(sample.cpu().numpy(), percentile)) or absmax
    elif method == "mse":
        reach = _least_error(sample, absmax, is_fp8)
    else:
        reach = absmax
    return max(reach / largest(is_fp8), float(torch.finfo(torch.float32).tiny))


def _least_error(sample: torch.Tensor, absmax: float, is_fp8: bool) -> float:
    def error(reach: float) -> float:
        scale = reach / largest(is_fp8)
        return float((round_to_grid(sample / scale, is_fp8) * scale - sample).square().mean())

    return min((absmax * 0.93**i for i in range(60)), key=error)

"""Round to nearest, lazily: a weight that quantizes itself when it is loaded, in blocks of rows."""

import threading
from collections.abc import Callable
from dataclasses import replace

import torch

from compress import formats, parallel
from compress.errors import InputError
from compress.formats import hadamard
from compress.formats.activations import Activation
from compress.formats.base import NumberFormat, Quantized
from compress.model.weight import PLAIN_DTYPES, Weight, is_finite
from compress.passes.quantization import scales
from compress.passes.quantize import Options

LEAST_ROTATION = 8
ScaleSearch = Callable[[torch.Tensor], torch.Tensor]


def lazily(weight: Weight, options: Options, device: str) -> Weight:
    """The weight in the format the options of `quantize` give it; as it came where they leave it alone."""
    asked = options.format_for(weight)
    if asked == formats.AS_IT_CAME or len(weight.shape) != 2:  # biases of a projection stay as they came
        return weight
    if weight.is_quantized:
        raise InputError(
            f"tensor '{weight.name}' is quantized by an earlier pass already; leave its role out here: roles: {{{weight.role}: none}}"
        )
    if asked in PLAIN_DTYPES:
        return as_plain(weight, asked)
    number_format = formats.get(formats.fitting(asked, weight.shape))
    activation = options.activation_of(weight.role)
    rotation = rotation_of(weight) if weight.role in options.rotate else None
    rounded = to_nearest(weight, number_format, clips=options.clip == "mse", device=device, rotation=rotation)
    return replace(rounded, activation=None if activation == formats.AS_IT_CAME else Activation(activation))


def to_nearest(
    weight: Weight, number_format: NumberFormat, *, clips: bool, device: str = "cpu", rotation: int | None = None
) -> Weight:
    """The weight in a format with scales: those of least error, or (where nothing `clips`) those that reach its largest
    magnitudes."""
    rounded = _Rounded(weight, number_format, search_for(number_format, clips), device, rotation)
    return replace(weight.with_load(number_format.name, rounded.load), rotation=rotation)


def as_plain(weight: Weight, format_name: str) -> Weight:
    """The weight in a plain format."""

    def load(rows: slice | None = None) -> torch.Tensor:
        return cast(weight, rows, format_name)

    return weight.with_load(format_name, load)


def rotation_of(weight: Weight) -> int | None:
    """The block in which its input can be rotated; None where that would rotate nothing to speak of."""
    size = hadamard.block_size(weight.shape[1])
    return size if size >= LEAST_ROTATION else None


def cast(weight: Weight, rows: slice | None, format_name: str) -> torch.Tensor:
    """Rows of a weight in a plain format; a value beyond its range is an error, not an infinity."""
    tensor = weight.dense(rows).to(PLAIN_DTYPES[format_name])
    if not is_finite(tensor):
        raise InputError(f"tensor '{weight.name}': holds values beyond the range of {format_name}; use bf16 or fp32")
    return tensor


def search_for(number_format: NumberFormat, clips: bool, moments: torch.Tensor | None = None) -> ScaleSearch:
    """Scales of a block of rows: of least error (weighted by the inputs' second moments), or just reaching its largest."""
    return (lambda block: scales.search(block, number_format, moments)) if clips else number_format.absmax_scales


def stored_basis(weight: Weight, rotation: int | None, device: str, rows: slice | None = None) -> torch.Tensor:
    """The float32 matrix that is to be rounded: rotated where it is stored rotated."""
    dense = weight.dense(rows).to(device)
    return hadamard.rotate(dense, rotation) if rotation else dense


class _Rounded:
    """Quantizes a weight on load. Where scales depend on the whole matrix they are found first, in a pass of their own."""

    def __init__(self, weight: Weight, number_format: NumberFormat, search: ScaleSearch, device: str,
                 rotation: int | None):  # fmt: skip
        self._weight, self._format, self._search, self._device = weight, number_format, search, device
        self._rotation = rotation
        self._scales: torch.Tensor | None = None
        self._left: set[int] = set()  # where the blocks begin that are still to be rounded with them
        self._lock = threading.Lock()

    def load(self, rows: slice | None = None) -> Quantized:
        blocks = list(self._weight.with_load(self._format.name, self.load).row_blocks())
        rows = rows or slice(0, self._weight.shape[0])
        if self._format.rows_are_independent or blocks == [rows]:
            dense = self._dense(rows)
            return self._format.quantize(dense, self._format.join_scales([self._search(dense)]))
        found = self._format.scales_of(self._whole_scales(blocks, rows), rows)
        return self._format.quantize(self._dense(rows), found)

    def _whole_scales(self, blocks: list[slice], rows: slice) -> torch.Tensor:
        """Those of all rows. They are dropped with the last block: a model's worth of scales must not stay in memory."""
        with self._lock:
            if self._scales is None:
                found = parallel.each(lambda block: self._search(self._dense(block)), blocks)
                self._scales, self._left = self._format.join_scales(found), {block.start for block in blocks}
            scales = self._scales
            self._left -= {start for start in self._left if rows.start <= start < rows.stop}
            if not self._left:
                self._scales = None
            return scales

    def _dense(self, rows: slice | None) -> torch.Tensor:
        return stored_basis(self._weight, self._rotation, self._device, rows)

"""int4, symmetric, -8 .. 7, one scale for `g` consecutive inputs of a row.

An absmax scale maps the largest magnitude to 7.5: it saturates at +7 by half a step, for a finer step everywhere else.
Scales are stored in bfloat16, and in a byte where the target allows (see `base.narrow`).
"""

import torch

from compress.formats.integers import IntegerFormat

FORMATS = {
    f"int4-g{size}": IntegerFormat(f"int4-g{size}", 1, size, torch.bfloat16, bits=4, least=-8)
    for size in (16, 32, 64, 128)
}

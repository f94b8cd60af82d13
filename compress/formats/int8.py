"""int8, symmetric, -127 .. 127.

    int8         one float32 scale per output channel (row)
    int8-tensor  one float32 scale
    int8-g32     one scale for 32 consecutive inputs of a row, stored in 16 bits or less (int8-g16 where 32 do not divide K)

Round to nearest, ties to even: the worst error of an element is scale / 2. A row of zeros has scale 1 and values 0.
"""

import torch

from compress.formats.integers import IntegerFormat

FORMATS = {
    "int8": IntegerFormat("int8", 1, None),
    "int8-tensor": IntegerFormat("int8-tensor", None, None),
    "int8-g32": IntegerFormat("int8-g32", 1, 32, torch.bfloat16),
    "int8-g16": IntegerFormat("int8-g16", 1, 16, torch.bfloat16),
}

"""compress: make hybrid SSM-Transformer-MoE language models small, and check what ships.

The rooms, from the ground up. None imports one that stands after it:

    errors  parallel  arithmetic  strict  terminal  disk  output_folder  formats  model  checkpoint  recipe
    runtime  prompts  calibration  passes  check  report  apply  studies

A room says in its first line what is in it. `plugins` is the one door upwards: by the names that users type it loads
passes and exporters, of which nothing else here knows.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # they take seconds to import
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel

__version__ = "0.1.0"


def load(path: "str | Path", dtype: "torch.dtype | None" = None) -> "PreTrainedModel":
    """The transformers model of a checkpoint folder, or of an output folder of `apply`, with dequantized weights.

    Every checkpoint this tool writes loads, whatever its number formats; so does an original one. Weights only: where
    inputs of matrices are stored as quantized too, they stay in floating point here. `dtype` is that of the parameters,
    float32 where none is given. Raises `compress.errors.InputError` for what is no such folder, or a damaged one.

        model = compress.load("out/tiny-int8")
        model.generate(input_ids, max_new_tokens=20)
    """
    from compress.runtime import loading  # brings torch and transformers

    return loading.load(path, dtype)

"""A walk over a model as it came: every layer with what reaches it. For what must be known before anything is changed."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from compress.calibration.inputs import LayerInputs
from compress.model.hybrid import HybridModel
from compress.model.weight import Unit, Weight
from compress.runtime.inference import HiddenStates, embed_windows


@torch.inference_mode()
def walk(model: HybridModel, windows: list[torch.Tensor], folder: Path, device: str,
         advance: Callable[[int], None] = lambda layers: None) -> Iterator[tuple[Unit, LayerInputs]]:  # fmt: skip
    """Yields the layers in order; `folder` holds hidden states meanwhile. `advance` hears of layers."""
    blank = HiddenStates(folder, windows, model.config.hidden_size)
    entering, following = blank.at(folder / "entering"), blank.at(folder / "following")
    embed_windows(model, windows, entering)
    for index in range(model.config.num_hidden_layers):
        unit = model.unit(f"layer.{index}")
        inputs = LayerInputs(model, index, entering, folder / "layer", _unwritten, device)
        yield unit, inputs
        inputs.leave(unit, following)
        entering, following = following, entering
        advance(1)
    shutil.rmtree(folder)


def _unwritten(weight: Weight) -> Weight:
    """Nothing is written on a walk."""
    return weight

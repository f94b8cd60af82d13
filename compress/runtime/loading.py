"""`compress.load`: a checkpoint as a transformers model, dequantized.

transformers itself loads only some of the checkpoints written here (docs/checkpoints.md has the table). This reads them
with our own reader and fills transformers' parameters one block of rows at a time, so only one copy of the model is held.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from compress.checkpoint.reader import Checkpoint, find_checkpoint
from compress.errors import InputError, WorkError, first_line
from compress.model.architecture import Place
from compress.model.hybrid import HybridModel
from compress.model.roles import Role
from compress.model.weight import Weight, is_finite
from compress.output_folder import integrity
from compress.runtime import rounding_cache

GENERATION = "generation_config.json"


def load(path: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model in eval mode; see `compress.load`."""
    folder = find_checkpoint(Path(path))
    integrity.verify(folder)
    checkpoint = Checkpoint(folder, allow_quantized=True)
    model = _empty_model(checkpoint, dtype or torch.float32)
    _fill(model, checkpoint)
    if (folder / GENERATION).is_file():
        model.generation_config = _generation_config(folder)
    rounding_cache.round_states(model, checkpoint.model)
    model.eval()
    return model


def _empty_model(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """transformers' model of config.json with memory for its parameters, and nothing in it yet."""
    config, ours = _config(checkpoint.folder), checkpoint.model
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
        ours.architecture.fit_transformers(model)
    model.to_empty(device="cpu")
    model.tie_weights()  # parameters that were shared have become two
    return model


def _config(folder: Path) -> PreTrainedConfig:
    """Without `quantization_config`: the model that is built is a plain one."""
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many types for values it does not like
        raise InputError(f"{folder / 'config.json'}: transformers cannot read it ({first_line(error)})") from None
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _generation_config(folder: Path) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # as above
        raise InputError(f"{folder / GENERATION}: transformers cannot read it ({first_line(error)})") from None


@torch.no_grad()
def _fill(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Copies every tensor to its place. What is left empty, or has no place, is an error: it would be silent otherwise."""
    targets = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    missing = {name: target.numel() for name, target in targets.items()}
    for weight, place in _placed(checkpoint.model):
        if place.parameter not in targets:
            raise WorkError(f"tensor '{weight.name}': transformers' model has no parameter '{place.parameter}'")
        _copy(weight, targets[place.parameter][place.index], place.parameter)
        missing[place.parameter] -= weight.parameters
    for name, elements in missing.items():
        if elements:
            raise WorkError(f"transformers' parameter '{name}' was not filled from {checkpoint.folder}")


def _placed(model: HybridModel) -> Iterator[tuple[Weight, Place]]:
    """Every tensor and its place; no two have the same. What travels along has none: transformers leaves it out too. Nor have
    scales of states, which the cache takes."""
    taken: dict[str, str] = {}
    for weight in model.weights:
        if weight.role in (Role.MTP, Role.STATE_SCALE):
            continue
        place = model.architecture.transformers_place(weight.name)
        other = taken.setdefault(str(place), weight.name)
        if other != weight.name:
            raise WorkError(f"tensors '{other}' and '{weight.name}' have the same place, '{place.parameter}'")
        yield weight, place


def _copy(weight: Weight, target: torch.Tensor, parameter: str) -> None:
    if tuple(target.shape) != weight.shape:
        raise WorkError(
            f"tensor '{weight.name}' is {list(weight.shape)}, its place in transformers' '{parameter}' {list(target.shape)}"
        )
    for rows in weight.row_blocks():
        target[rows].copy_(weight.dense(rows))
        if not is_finite(target[rows]):
            raise InputError(
                f"tensor '{weight.name}': holds values beyond the range of {target.dtype}; use another dtype"
            )

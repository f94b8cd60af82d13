"""What config.json says of the type of the weights, after passes that stored matrices in another one."""

from collections.abc import Iterable
from functools import reduce

import torch

from compress.checkpoint.reader import CONFIG_DTYPES
from compress.model.hybrid import HybridModel
from compress.model.roles import QUANTIZABLE
from compress.model.weight import PLAIN_DTYPES, Weight
from compress.strict.json_text import JsonObject

KEYS = ("dtype", "torch_dtype")  # transformers reads either; the second is the older name


def restated(config: JsonObject, before: HybridModel, after: HybridModel) -> JsonObject:
    """config.json as it is to be written. Its type is that of the matrices, where a pass cast any: the narrowest that
    holds them all, and what it named before where others are quantized, since that is what they are widened to."""
    matrices = [weight for weight in after.weights if _is_matrix(weight)]
    if not _cast(before, matrices):
        return config
    plain = [PLAIN_DTYPES[weight.format] for weight in matrices if not weight.is_quantized]
    kinds = plain + (_named(config) if len(plain) < len(matrices) else [])
    name = str(reduce(torch.promote_types, kinds)).removeprefix("torch.")
    return config | dict.fromkeys([key for key in KEYS if key in config] or KEYS[:1], name)


def changes(before: HybridModel, after: HybridModel) -> list[str]:
    """A sentence for the report, where loading in the type that config.json names now would round other tensors."""
    config = restated(before.config_json, before, after)
    if config is before.config_json:
        return []
    dtype = _named(config)[0]
    plain = [PLAIN_DTYPES[weight.format] for weight in after.weights if not weight.is_quantized]
    wider = [stored for stored in plain if torch.promote_types(stored, dtype) != dtype]
    said = f"config.json's dtype is {str(dtype).removeprefix('torch.')}, the type of the matrices."
    if not wider:
        return [said]
    return [f"{said} {len(wider)} tensors are stored in a wider one: a loader that follows config.json rounds them."]


def _is_matrix(weight: Weight) -> bool:
    return len(weight.shape) == 2 and weight.role in QUANTIZABLE


def _cast(before: HybridModel, matrices: Iterable[Weight]) -> bool:
    came = {weight.name: weight.format for weight in before.weights}
    return any(not weight.is_quantized and weight.format != came[weight.name] for weight in matrices)


def _named(config: JsonObject) -> list[torch.dtype]:
    """Types that config.json names and that are known here."""
    return [CONFIG_DTYPES[name] for key in KEYS if isinstance(name := config.get(key), str) and name in CONFIG_DTYPES]

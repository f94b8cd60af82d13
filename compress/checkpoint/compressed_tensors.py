"""`quantization_config` in the form of the compressed-tensors library, written and read back.

A quantized matrix `X.weight` is stored as `X.weight_packed`, `X.weight_scale` and `X.weight_shape`. The section stays
within what stock transformers loads: one group, `pack-quantized`. docs/checkpoints.md says what was run with what.
"""

from collections.abc import Iterable
from pathlib import Path

from compress import formats
from compress.errors import InputError
from compress.model import Weight

SCHEME_KEYS = ("num_bits", "type", "symmetric", "strategy", "group_size")
PACKED = ".weight_packed"


def quantization_config(weights: Iterable[Weight]) -> dict | None:
    """The section of config.json for these weights, or None where nothing is quantized."""
    weights = list(weights)
    used = sorted({weight.format for weight in weights if weight.is_quantized})
    if not used:
        return None
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "dequantize": True,  # a plain from_pretrained then loads it, packed embedding included
        "config_groups": {f"group_{i}": _group(name) for i, name in enumerate(used)},
        "ignore": sorted(w.name.removesuffix(".weight") for w in weights if not w.is_quantized and len(w.shape) == 2),
        "kv_cache_scheme": None,
    }


def _group(format_name: str) -> dict:
    return {
        "targets": ["Linear", "Embedding"],
        "format": "pack-quantized",
        "weights": formats.get(format_name).scheme(),
        "input_activations": None,
        "output_activations": None,
    }


def formats_of(config: dict, folder: Path, stored_names: set[str]) -> dict[str, str]:
    """The number format of every quantized weight, by its logical name, from config.json and the stored names."""
    section, source = config["quantization_config"], folder / "config.json"
    if not isinstance(section, dict) or section.get("quant_method") != "compressed-tensors":
        raise InputError(f"{source}: quantization_config is not of compressed-tensors, the one form that is read here")
    groups = section.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise InputError(f"{source}: quantization_config must have exactly one config group")
    format_name = _format_of(next(iter(groups.values())), source)
    return {name.removesuffix(PACKED) + ".weight": format_name for name in stored_names if name.endswith(PACKED)}


def _format_of(group, source: Path) -> str:
    scheme = group.get("weights") if isinstance(group, dict) else None
    if scheme and group.get("input_activations"):
        raise InputError(f"{source}: quantization_config quantizes activations, which is not read here")
    for name in formats.FILES:
        ours = formats.get(name).scheme()
        if isinstance(scheme, dict) and all(scheme.get(key) == ours.get(key) for key in SCHEME_KEYS):
            return name
    raise InputError(f"{source}: quantization_config describes a number format that is not known here: {scheme}")

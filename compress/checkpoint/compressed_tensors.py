"""`quantization_config` in the form of the compressed-tensors library, written and read back.

A quantized matrix `X.weight` has its scales in `X.weight_scale`; its values are packed (`X.weight_packed` and
`X.weight_shape`: `pack-quantized`) or stored as `X.weight` (`int-quantized` beside int8 activations, `float-quantized`
for fp8); static activations add `X.input_scale`. A checkpoint with one scheme has one config group; in others the groups
single out the experts, which is what stock transformers tells apart. docs/checkpoints.md says what was run with what.
"""

import re
from collections.abc import Collection, Iterable
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from compress import formats
from compress.errors import InputError
from compress.formats import activations
from compress.formats.activations import Activation
from compress.model.roles import Role
from compress.model.weight import Weight
from compress.strict.json_text import Json, JsonObject

SCHEME_KEYS = ("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic")
ACTIVATION_KEYS = ("num_bits", "type", "symmetric", "strategy", "dynamic")
MARKS = (".weight_scale", ".weight_packed")  # either tells a quantized matrix: the one that is missing is then named
CLASSES = ("Linear", "Embedding")
EXPERTS = r"re:.*\.experts\.\d+\..*"
NO_EXPERT = r"re:(?!)\.experts\."  # speaks of experts, as transformers sees it, and matches no module
MIXED = "mixed-precision"
ROTATED = "-rotated"


class Scheme(NamedTuple):
    """How a matrix is quantized: the number format of its values and of its inputs, the block of a rotation of both."""

    format: str
    activation: str | None
    rotation: int | None = None

    @staticmethod
    def of(weight: Weight) -> "Scheme":
        return Scheme(weight.format, weight.activation.format if weight.activation else None, weight.rotation)


def quantization_config(weights: Iterable[Weight]) -> JsonObject | None:
    """The section of config.json for these weights, or None where nothing is quantized."""
    weights = list(weights)
    quantized = [weight for weight in weights if weight.is_quantized]
    if not quantized:
        return None
    groups = [_group(scheme, targets) for scheme, targets in _grouped(quantized)]
    stored = {group["format"] for group in groups}
    groups = [*_for_plain_experts(weights), *groups]
    return {
        "quant_method": "compressed-tensors",
        "format": next(iter(stored)) if len(stored) == 1 else MIXED,
        "quantization_status": "compressed",
        "dequantize": True,  # a plain from_pretrained then loads it, packed embedding included
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": sorted(w.name.removesuffix(".weight") for w in weights if _is_dense_matrix(w)),
        "kv_cache_scheme": None,
        **_transforms(quantized),
    }


def _is_dense_matrix(weight: Weight) -> bool:
    return not weight.is_quantized and len(weight.shape) == 2 and weight.role != Role.STATE_SCALE


def _grouped(quantized: list[Weight]) -> list[tuple[Scheme, list[str]]]:
    """Every scheme with its targets, as stock transformers reads them: all experts by the first group whose pattern
    speaks of experts, all else by the first other group. With one scheme for each it loads.

    With more it must stop, not misread: an int4 matrix taken for int8 has too few columns, an int8 one taken for int4
    passes unnoticed. So the widest come first.
    """
    experts = _by_scheme(weight for weight in quantized if weight.role == Role.EXPERTS)
    others = _by_scheme(weight for weight in quantized if weight.role != Role.EXPERTS)
    if len(experts | others) == 1:
        return _targeted(experts | others, list(CLASSES))
    found = [*_targeted(others, list(CLASSES)), *_targeted(experts, [EXPERTS])]
    return sorted(found, key=lambda item: -_bits(item[0]))


def _bits(scheme: Scheme) -> int:
    bits = formats.get(scheme.format).scheme()["num_bits"]
    assert isinstance(bits, int)
    return bits


def _for_plain_experts(weights: list[Weight]) -> list[JsonObject]:
    """A group of no module, for transformers where experts are not quantized. Among integers it looks for packed values in all
    experts and leaves those random that have none, with no more than a warning. Of fp8 experts it passes on what has no
    scales; at a format it does not know it stops.
    """
    experts = [weight for weight in weights if weight.role == Role.EXPERTS]
    formats_of = {weight.format for weight in experts if weight.is_quantized}
    asks_for_packed = any(map(is_integer, formats_of or {weight.format for weight in weights}))
    if all(weight.is_quantized for weight in experts) or not asks_for_packed:
        return []
    group = _group(Scheme("fp8-e4m3", None), [NO_EXPERT])
    return [group | {"format": "partly-quantized"} if formats_of else group]


def is_integer(format_name: str) -> bool:
    return format_name.startswith("int")


def _by_scheme(weights: Iterable[Weight]) -> dict[Scheme, list[str]]:
    modules: dict[Scheme, list[str]] = {}
    for weight in weights:
        modules.setdefault(Scheme.of(weight), []).append(weight.name.removesuffix(".weight"))
    return modules


def _targeted(modules: dict[Scheme, list[str]], only: list[str]) -> list[tuple[Scheme, list[str]]]:
    """Schemes by name with the modules they are for; `only` says it in short where there is one."""
    ordered = sorted(modules, key=lambda scheme: (scheme.format, scheme.activation or "", scheme.rotation or 0))
    return [(scheme, only if len(modules) == 1 else sorted(modules[scheme])) for scheme in ordered]


def _transforms(weights: Iterable[Weight]) -> JsonObject:
    """compressed-tensors' `transform_config` for matrices that are stored rotated, by the rotation's block."""
    rotated: dict[int, list[str]] = {}
    for weight in weights:
        if weight.rotation:
            rotated.setdefault(weight.rotation, []).append(weight.name.removesuffix(".weight"))
    groups: JsonObject = {
        f"rotation_{size}": {
            "type": "hadamard",
            "head_dim": size,
            "apply": [
                {"targets": sorted(names), "location": "input"},
                {"targets": sorted(names), "location": "weight_input", "inverse": True},
            ],
        }
        for size, names in sorted(rotated.items())
    }
    return {"transform_config": {"config_groups": groups}} if groups else {}


def _group(scheme: Scheme, targets: Iterable[str]) -> JsonObject:
    return {
        "targets": list(targets),
        # transformers passes over `transform_config`: a name it does not know stops it, where it would load rotated weights
        "format": _storage(scheme) + (ROTATED if scheme.rotation else ""),
        "weights": formats.get(scheme.format).scheme(),
        "input_activations": Activation(scheme.activation).scheme() if scheme.activation else None,
        "output_activations": None,
    }


def _storage(scheme: Scheme) -> str:
    described = formats.get(scheme.format).scheme()
    if described["type"] == "float":
        return "float-quantized"
    return "int-quantized" if scheme.activation and _bits(scheme) == 8 else "pack-quantized"


def schemes_of(config: JsonObject, folder: Path, stored_names: Collection[str]) -> dict[str, Scheme]:
    """The scheme of every quantized weight, by its logical name, from config.json and the stored names."""
    section, source = config["quantization_config"], folder / "config.json"
    if not isinstance(section, dict) or section.get("quant_method") != "compressed-tensors":
        raise InputError(f"{source}: quantization_config is not of compressed-tensors, the one form that is read here")
    groups = section.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise InputError(f"{source}: quantization_config must have config groups")
    read = [(_targets(group, source), _scheme_of(group, source)) for group in groups.values()]
    modules = sorted({name.removesuffix(mark) for name in stored_names for mark in MARKS if name.endswith(mark)})
    rotations = _rotations_of(section.get("transform_config"), source)
    targets = _Targets(read, source)
    schemes = {module: targets.scheme_for(module) for module in modules}
    schemes = {module: s._replace(rotation=rotations.get(module)) for module, s in schemes.items()}
    _refuse_half_described_rotations(groups, schemes, source)
    return {f"{module}.weight": scheme for module, scheme in schemes.items()}


def _refuse_half_described_rotations(groups: JsonObject, schemes: dict[str, Scheme], source: Path) -> None:
    """The format of a group and `transform_config` must agree on whether there are rotated matrices."""
    marked = any(isinstance(g, dict) and str(g.get("format", "")).endswith(ROTATED) for g in groups.values())
    if marked != any(scheme.rotation for scheme in schemes.values()):
        raise InputError(
            f"{source}: quantization_config has matrices stored rotated, or a transform_config, but not both"
        )


def _rotations_of(section: Json, source: Path) -> dict[str, int]:
    """Block of the rotation by module; refuses transforms of any other kind."""
    if section is None:
        return {}
    groups = section.get("config_groups") if isinstance(section, dict) else None
    rotations: dict[str, int] = {}
    for rotated in map(_rotated, groups.values()) if isinstance(groups, dict) else [None]:
        if rotated is None:
            raise InputError(f"{source}: transform_config describes a transform that is not known here")
        rotations |= rotated
    return rotations


def _rotated(group: Json) -> dict[str, int] | None:
    """Its modules with the block of their rotation; None where it is no rotation of ours."""
    match group:
        case {"type": "hadamard", "head_dim": int(size), "apply": [{"targets": list(targets)}, *_]}:
            names = [target for target in targets if isinstance(target, str)]
            whole = len(names) == len(targets) and size > 0 and size & (size - 1) == 0
            return dict.fromkeys(names, size) if whole else None
    return None


def _targets(group: Json, source: Path) -> list[str]:
    targets = group.get("targets") if isinstance(group, dict) else None
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise InputError(f"{source}: every config group of quantization_config must list its targets")
    return [str(target) for target in targets]


class _Targets:
    """Which scheme a module has. Targets may be as many as there are modules: names are looked up, not searched."""

    def __init__(self, groups: list[tuple[list[str], Scheme]], source: Path):
        self._source = source
        self._named = {target: scheme for targets, scheme in reversed(groups) for target in targets}
        self._patterns = [
            (target.removeprefix("re:"), scheme)
            for targets, scheme in groups
            for target in targets
            if target.startswith("re:")
        ]
        self._of_class = [scheme for targets, scheme in groups if not set(targets).isdisjoint(CLASSES)]

    def scheme_for(self, module: str) -> Scheme:
        """Of the group that names the module, else whose pattern matches it, else that is for all modules of its class; of
        several the first."""
        if module in self._named:
            return self._named[module]
        matching = (scheme for pattern, scheme in self._patterns if _matches(pattern, module, self._source))
        found = next(chain(matching, self._of_class), None)
        if found is None:
            raise InputError(
                f"{self._source}: no config group of quantization_config is for '{module}', which is stored quantized"
            )
        return found


def _matches(pattern: str, module: str, source: Path) -> bool:
    try:
        return re.match(pattern, module) is not None
    except re.error as error:
        raise InputError(f"{source}: the target 're:{pattern}' is not a regular expression ({error})") from None


def _scheme_of(group: JsonObject, source: Path) -> Scheme:
    return Scheme(_format_of(group.get("weights"), source), _activation_of(group.get("input_activations"), source))


def _format_of(scheme: Json, source: Path) -> str:
    for name in formats.FILES:
        if isinstance(scheme, dict) and _agrees(scheme, formats.get(name).scheme(), SCHEME_KEYS):
            return name
    raise InputError(f"{source}: quantization_config describes a number format that is not known here: {scheme}")


def _activation_of(scheme: Json, source: Path) -> str | None:
    if scheme is None:
        return None
    for name in activations.NAMES:
        if isinstance(scheme, dict) and _agrees(scheme, Activation(name).scheme(), ACTIVATION_KEYS):
            return name
    raise InputError(f"{source}: quantization_config describes activations that are not known here: {scheme}")


def _agrees(scheme: JsonObject, ours: JsonObject, keys: Iterable[str]) -> bool:
    """Equal where ours says something; a key it leaves out must be absent or null."""
    return all(scheme.get(key, False if key == "dynamic" else None) == ours.get(key) for key in keys)

"""A `quantize` block as it applies to one model.

Recipes name roles for any supported model. Where embeddings are tied there is no matrix of the role `lm_head`: the word
means the embedding then, which is the output matrix too. What is named and a model does not have is left out. Both are
said, in sentences for the plan and the report.
"""

from collections.abc import Callable, Mapping

from compress import formats
from compress.model.hybrid import HybridModel
from compress.model.roles import Role
from compress.model.weight import Weight
from compress.passes.quantization import rounding
from compress.passes.quantize import Options, Override

KEYS = ("roles", "overrides", "activation_roles", "rotate")  # of the block: those that name roles


def fit(options: Options, model: HybridModel) -> tuple[Options, tuple[str, ...]]:
    """The options for this model, and what is different from what they say."""
    weights, said = list(model.weights), []
    present = {weight.role for weight in weights}
    if Role.LM_HEAD not in present:
        table = model.embedding
        said += _on_tied(options)
        options = _tied(options, table, model.architecture.LM_HEAD)
    said += [
        f"'{role}' is named in {', '.join(keys)}, but this model has no tensors of that role"
        for role, keys in _named(options).items()
        if role not in present
    ]
    options = _kept(options, lambda role: role in present)
    return options, (*said, *_unrotated(options, weights))


def _named(options: Options) -> dict[Role, list[str]]:
    """The roles that the block names, each with the keys that do."""
    found: dict[Role, list[str]] = {}
    for key in KEYS:
        for entry in getattr(options, key):
            keys = found.setdefault(_role(entry), [])
            keys += [] if key in keys else [key]
    return found


def _role(entry: Role | Override) -> Role:
    return entry.role if isinstance(entry, Override) else entry


def _on_tied(options: Options) -> list[str]:
    named = _named(options)
    if Role.LM_HEAD not in named:
        return []
    said = "embeddings are tied: 'lm_head' means the embedding, which is the output matrix too"
    return [said + (", and wins over 'embedding'" if Role.EMBEDDING in named else "")]


def _tied(options: Options, table: Weight, head: str) -> Options:
    """What the block says of `lm_head` goes for the embedding, and its inputs are rounded as those of an output matrix."""
    mine = [override for override in options.overrides if override.role == Role.LM_HEAD]
    if mine or Role.LM_HEAD in options.roles:  # also over what narrows the embedding down
        options = _kept(options, lambda role: role != Role.EMBEDDING, keys=("overrides",))
    moved = options.model_copy(
        update={
            "roles": _moved(options.roles),
            "activation_roles": _moved(options.activation_roles),
            "overrides": tuple(_renamed(override, table, head) for override in options.overrides),
            "rotate": tuple(dict.fromkeys(Role.EMBEDDING if role == Role.LM_HEAD else role for role in options.rotate)),
        }
    )
    rounds = options.activations != formats.AS_IT_CAME and moved.format_for(table) in formats.FILES
    by_default = {Role.EMBEDDING: options.activations} if rounds else {}
    return moved.model_copy(update={"activation_roles": by_default | moved.activation_roles})


def _moved(by_role: Mapping[Role, str]) -> dict[Role, str]:
    rest: dict[Role, str] = {role: name for role, name in by_role.items() if role != Role.LM_HEAD}
    return rest | ({Role.EMBEDDING: by_role[Role.LM_HEAD]} if Role.LM_HEAD in by_role else {})


def _renamed(override: Override, table: Weight, head: str) -> Override:
    """An override of the output matrix as one of the embedding, where its projection has another name."""
    if override.role != Role.LM_HEAD:
        return override
    ours, theirs = (name.removesuffix(".weight").rpartition(".")[2] for name in (table.name, head))
    projections = tuple(ours if name == theirs else name for name in override.projections)
    return override.model_copy(update={"role": Role.EMBEDDING, "projections": projections})


def _kept(options: Options, wanted: Callable[[Role], bool], keys: tuple[str, ...] = KEYS) -> Options:
    """The block without what it says of roles that are not wanted."""

    def cut(entries: dict[Role, str] | tuple[Role | Override, ...]) -> dict[Role, str] | tuple[Role | Override, ...]:
        if isinstance(entries, dict):
            return {role: name for role, name in entries.items() if wanted(role)}
        return tuple(entry for entry in entries if wanted(_role(entry)))

    return options.model_copy(update={key: cut(getattr(options, key)) for key in keys})


def _unrotated(options: Options, weights: list[Weight]) -> list[str]:
    """What `rotate` names and no power of two divides, by role and width."""
    counts: dict[tuple[Role, int], int] = {}
    for weight in weights:
        if weight.role in options.rotate and len(weight.shape) == 2 and rounding.rotation_of(weight) is None:
            counts[weight.role, weight.shape[1]] = counts.get((weight.role, weight.shape[1]), 0) + 1
    return [
        f"{count} tensors of '{role}' are not rotated: no power of two from {rounding.LEAST_ROTATION} on divides their {width} inputs"
        for (role, width), count in counts.items()
    ]

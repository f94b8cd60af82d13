"""`leave_out`: drops tensors that travel with a model and that nothing here runs, such as layers that guess further tokens."""

from dataclasses import replace

from pydantic import Field, field_validator

from compress.model.roles import Role
from compress.strict.models import Strict

TRAVELLING = frozenset({Role.MTP})  # roles that no forward needs


class Options(Strict):
    roles: tuple[Role, ...] = Field(default=(Role.MTP,), min_length=1)

    @field_validator("roles")
    @classmethod
    def _nothing_that_runs(cls, roles: tuple[Role, ...]) -> tuple[Role, ...]:
        for role in roles:
            if role not in TRAVELLING:
                raise ValueError(f"'{role}' is part of what a model computes; expected: {', '.join(TRAVELLING)}")
        return roles

    def idle(self) -> set[str]:
        return set()


def fitted(options: Options, model) -> tuple[Options, tuple[str, ...]]:
    """What will be left out, or that there is nothing."""
    dropped = [weight for weight in model.weights if weight.role in options.roles]
    if not dropped:
        return options, (f"this model has no tensors of {_named(options)}",)
    parameters = sum(weight.parameters for weight in dropped)
    return options, (f"{len(dropped)} tensors of {_named(options)} are left out, {parameters:,} parameters",)


def _named(options: Options) -> str:
    return ", ".join(f"'{role}'" for role in options.roles)


def requires(options: Options, model) -> None:
    """Any model will do."""


def restructure(options: Options, model, found: dict | None):
    """The model without them, and config.json says so."""
    units = tuple(apply(options, unit, None) for unit in model.units)
    if all(a is b for a, b in zip(units, model.units, strict=True)):
        return model
    values = model.config_json | model.architecture.WITHOUT_TRAVELLERS
    architecture = type(model.architecture).parse(values, "config.json after leave_out")
    return replace(model, architecture=architecture, units=units, config_json=values)


def apply(options: Options, unit, context):
    """The unit without those tensors; the same unit where it has none."""
    kept = {name: weight for name, weight in unit.weights.items() if weight.role not in options.roles}
    return unit if len(kept) == len(unit.weights) else replace(unit, weights=kept)


def details(options: Options, units, notes: list[dict]) -> dict:
    """The notes say it all."""
    return {"roles": list(options.roles)}

"""`leave_out`: drops tensors that travel with a model and that nothing here runs, such as layers that guess further tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Self

from pydantic import Field, field_validator

from compress.model.roles import Role
from compress.passes import Details, Note, Pass, PassContext
from compress.strict.models import Strict

if TYPE_CHECKING:
    from compress.model.hybrid import HybridModel
    from compress.model.records import Change
    from compress.model.weight import Unit

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


class LeaveOut(Pass[Options]):
    def fitted(self, model: HybridModel) -> tuple[Self, tuple[str, ...]]:
        """What will be left out, or that there is nothing."""
        dropped = [weight for weight in model.weights if weight.role in self.options.roles]
        named = ", ".join(f"'{role}'" for role in self.options.roles)
        if not dropped:
            return self, (f"this model has no tensors of {named}",)
        parameters = sum(weight.parameters for weight in dropped)
        return self, (f"{len(dropped)} tensors of {named} are left out, {parameters:,} parameters",)

    def apply(self, unit: Unit, context: PassContext) -> Unit:
        """The unit without those tensors; the same unit where it has none."""
        kept = {name: weight for name, weight in unit.weights.items() if weight.role not in self.options.roles}
        return unit if len(kept) == len(unit.weights) else replace(unit, weights=kept)

    def restructure(self, model: HybridModel, context: PassContext) -> HybridModel:
        """The model without them, and config.json says so."""
        units = tuple(self.apply(unit, context) for unit in model.units)
        if all(a is b for a, b in zip(units, model.units, strict=True)):
            return model
        values = model.config_json | model.architecture.WITHOUT_TRAVELLERS
        architecture = type(model.architecture).parse(values, "config.json after leave_out")
        return replace(model, architecture=architecture, units=units, config_json=values)

    def records(self, before: HybridModel, after: HybridModel, notes: Sequence[Note]) -> Sequence[Change]:
        """What stays is as it came."""
        return ()

    def details(self, units: Sequence[Unit], notes: Sequence[Note]) -> Details:
        """The notes say it all."""
        return {"roles": [str(role) for role in self.options.roles]}

"""Base of every options model: unknown keys are errors, values are frozen, NaN and infinity are no numbers."""

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

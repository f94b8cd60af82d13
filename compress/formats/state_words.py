"""Words for how a state is stored, without torch: recipes and config.json are validated with these."""

from typing import Literal, Protocol

Kind = Literal["ssm_state", "conv_state", "kv_cache"]
Format = Literal["fp32", "bf16", "fp16", "fp8-e4m3", "int8", "int4"]
Residual = Literal["bf16", "fp16", "fp8-e4m3", "int8", "int4"]
Rounding = Literal["nearest", "stochastic", "error_feedback"]
Scale = Literal["dynamic", "static"]
Axis = Literal["d_state", "d_inner"]

WITHOUT_SCALES = ("fp32", "bf16", "fp16")
SEEDS = 1 << 16  # the period of the dither: seeds are below it
MOST_EVERY = 4096  # tokens between two roundings
RESIDUAL: Residual = "int8"  # where feedback is asked for and nothing else is said


class Settings(Protocol):
    """What a recipe, or config.json, says of a state."""

    @property
    def format(self) -> Format: ...
    @property
    def rounding(self) -> Rounding: ...
    @property
    def residual(self) -> Residual | None: ...
    @property
    def every(self) -> int: ...
    @property
    def scale(self) -> Scale: ...
    @property
    def axis(self) -> Axis | None: ...
    @property
    def block(self) -> int | None: ...


def residual_of(said: Settings) -> Residual | None:
    """The format of what rounding loses, where that is kept."""
    return (said.residual or RESIDUAL) if said.rounding == "error_feedback" else None


def why_unfit(said: Settings) -> str | None:
    """What keeps any state from being stored so, or None."""
    if said.residual is not None and said.rounding != "error_feedback":
        return "residual is the format of what rounding loses; it needs rounding: error_feedback"
    if said.format == "fp32":
        return _why_unfit_unrounded(said)
    return _why_unfit_without_scales(said) if said.format in WITHOUT_SCALES else None


def _why_unfit_unrounded(said: Settings) -> str | None:
    if said.rounding == "error_feedback":
        return "fp32 loses nothing that error_feedback could keep; expected a narrower format"
    if said.rounding == "stochastic":
        return "fp32 is not rounded, so rounding: stochastic says nothing; expected a narrower format"
    if said.every > 1:
        return f"fp32 is not rounded, so every: {said.every} says nothing; expected a narrower format"
    return _why_unfit_without_scales(said)


def _why_unfit_without_scales(said: Settings) -> str | None:
    if said.scale == "static":
        return f"{said.format} has no scales that could be static"
    if residual_of(said) not in (None, *WITHOUT_SCALES):
        return None  # the residual has some
    if said.axis is not None:
        return f"{said.format} has no scales, so axis says nothing"
    return f"{said.format} has no scales, so block says nothing" if said.block is not None else None


def why_not_of_kind(said: Settings, kind: str) -> str | None:
    """What keeps states of a kind other than `ssm_state` from being stored so, or None."""
    if kind == "ssm_state":
        return None
    if said.rounding == "error_feedback":
        return f"rounding: error_feedback is for ssm_state only, expected nearest or stochastic for a {kind}"
    if said.every > 1:
        return f"every: {said.every} is for ssm_state only; a {kind} is rounded at every call"
    return None if said.axis is None else f"axis is for ssm_state only; scales of a {kind} have one axis"

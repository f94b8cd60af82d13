"""Words for how a state is stored, without torch: recipes and config.json are validated with these."""

from typing import Literal

Kind = Literal["ssm_state", "conv_state", "kv_cache"]
Format = Literal["fp32", "bf16", "fp16", "fp8-e4m3", "int8", "int4"]
Rounding = Literal["nearest", "stochastic"]
Scale = Literal["dynamic", "static"]

WITHOUT_SCALES = ("fp32", "bf16", "fp16")
WITH_DITHER = ("int8", "int4")  # formats that stochastic rounding is defined for
SEEDS = 1 << 16  # the period of the dither: seeds are below it


def why_unfit(format: Format, rounding: Rounding, scale: Scale, block: int | None) -> str | None:
    """What keeps any state from being stored so, or None."""
    if rounding == "stochastic" and format not in WITH_DITHER:
        return f"{format} is rounded to nearest only; stochastic rounding goes with {' and '.join(WITH_DITHER)}"
    if format in WITHOUT_SCALES and scale == "static":
        return f"{format} has no scales that could be static"
    if format in WITHOUT_SCALES and block is not None:
        return f"{format} has no scales, so block says nothing"
    return None

"""The words for states in recipes and in config.json. Importing this is cheap."""

from typing import Literal

Format = Literal["fp32", "bf16", "fp16", "fp8-e4m3", "int8", "int4"]
Rounding = Literal["nearest", "stochastic"]
Scale = Literal["dynamic", "static"]

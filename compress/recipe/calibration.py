"""The recipe's `calibration` block. No model code here: recipes import this."""

from pydantic import Field, field_validator

from compress.strict.models import Strict, WholeNumber


class Calibration(Strict):
    """`samples` windows of `length` tokens are the most taken from each prompt set."""

    prompts: tuple[str, ...] = Field(default=("prose",), min_length=1)
    samples: WholeNumber = Field(default=64, ge=1, le=1_000_000)
    length: WholeNumber = Field(default=512, ge=2, le=1_048_576)

    @field_validator("prompts")
    @classmethod
    def _no_check_prompts(cls, prompts: tuple[str, ...]) -> tuple[str, ...]:
        if "heldout" in prompts:
            raise ValueError("'heldout' is kept for checks; calibration uses prose, self, recall or a file")
        if len(set(prompts)) != len(prompts):
            raise ValueError("a prompt set is listed twice")
        return prompts

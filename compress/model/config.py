"""What every family's configuration has, and how config.json becomes one."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compress.errors import InputError
from compress.model.expert_counts import SECTION
from compress.model.records import Compressed

MAX_COUNT = 10_000  # of layers and of experts: far beyond any model, keeps a corrupt config from being enumerated
MAX_EXPERTS_IN_ALL = 50_000
MAX_SIZE = 1 << 31


def size(default: int | None, most: int = MAX_SIZE, least: int = 1) -> Any:
    """A field that holds a size."""
    return Field(default, ge=least, le=most)


class Config(BaseModel):
    """The keys that shared code reads. A family adds those that decide its shapes and arithmetic."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, strict=True)

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_experts_per_tok: int
    rms_norm_eps: float
    tie_word_embeddings: bool = False
    max_position_embeddings: int
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    compress: Compressed = Compressed()  # what passes left that other keys cannot say

    @classmethod
    def parse(cls, values: dict[str, Any], source: str) -> Self:
        """Validates config.json; raises InputError naming the file and the key."""
        try:
            return cls.model_validate(cls.adapted(values))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            inside = None if first["loc"][:1] == (SECTION,) else 1  # of other keys pydantic adds what it tried
            key = ".".join(str(part) for part in first["loc"][:inside])
            message = first["msg"].removeprefix("Value error, ")
            given = f" (it is {first['input']!r:.80})" if key else ""
            raise InputError(f"{source}: {key + ': ' if key else ''}{message}{given}") from None

    @classmethod
    def adapted(cls, values: dict[str, Any]) -> dict[str, Any]:
        """config.json in the names and values of the class, where a family knows several."""
        return values

    @property
    def total_experts(self) -> int:
        """Experts of a layer that has them, the most where layers differ."""
        raise NotImplementedError(type(self).__name__)

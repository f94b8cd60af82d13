"""What every family's configuration has, and how config.json becomes one."""

from typing import Annotated, Self, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from compress.errors import InputError
from compress.model.expert_counts import SECTION
from compress.model.records import Compressed
from compress.model.routing import GROUP_SCORES
from compress.strict.json_text import JsonObject

MAX_COUNT = 10_000  # of layers and of experts: far beyond any model, keeps a corrupt config from being enumerated
MAX_EXPERTS_IN_ALL = 50_000
MAX_SIZE = 1 << 31


Size = Annotated[int, Field(ge=1, le=MAX_SIZE)]
SizeOrNone = Annotated[int, Field(ge=0, le=MAX_SIZE)]  # 0: there is none
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
CountOrNone = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Width = Annotated[int, Field(ge=2, le=MAX_SIZE)]  # of a convolution
Positive = Annotated[float, Field(gt=0)]
T = TypeVar("T")


def named(default: T, *names: str) -> T:
    """A field with several names in config.json, of which the first that is there counts."""
    return Field(default, validation_alias=AliasChoices(*names))


class Config(BaseModel):
    """The keys that shared code reads. A family adds those that decide its shapes and arithmetic."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, strict=True)

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_experts_per_tok: int = 1
    rms_norm_eps: float
    tie_word_embeddings: bool = False
    max_position_embeddings: int
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    compress: Compressed = Compressed()  # what passes left that other keys cannot say

    @classmethod
    def parse(cls, values: JsonObject, source: str) -> Self:
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
    def adapted(cls, values: JsonObject) -> JsonObject:
        """config.json in the values of the class. transformers reads null as one KV head per query head."""
        if values.get("num_key_value_heads", 0) is None:
            heads = cls.model_fields["num_attention_heads"].default
            return values | {"num_key_value_heads": values.get("num_attention_heads", heads)}
        return values

    @property
    def total_experts(self) -> int:
        """Experts of a layer that has them, the most where layers differ; 1 in a family without experts."""
        return 1

    def refuse_rest(self, many: str, few: str) -> None:
        """Raises ValueError where one number is no multiple of another."""
        if getattr(self, many) % getattr(self, few):
            raise ValueError(f"{many} {getattr(self, many)} is not divisible by {few} {getattr(self, few)}")

    @staticmethod
    def refuse_too_many_experts(layers: int, experts: int) -> None:
        """Raises ValueError before a corrupt number of experts is enumerated."""
        if layers * experts > MAX_EXPERTS_IN_ALL:
            raise ValueError(f"{layers} layers of {experts} experts are more than any model has")


def refuse_unroutable(experts: int, key: str, top_k: int, groups: int, used: int) -> None:
    """Raises ValueError where a token cannot choose `top_k` of so many experts, which `key` gives, from the best `used` of
    `groups` equal groups. Keys of these are those of DeepSeek-V3 (arXiv 2412.19437), which others took over."""
    if experts % groups:
        raise ValueError(f"{key} {experts} is not divisible by n_group {groups}")
    if experts // groups < GROUP_SCORES:
        raise ValueError(f"{key} {experts} in n_group {groups} leaves a group fewer than {GROUP_SCORES} experts")
    if used > groups:
        raise ValueError(f"topk_group {used} exceeds n_group {groups}")
    if top_k > experts:
        raise ValueError(f"num_experts_per_tok {top_k} exceeds {key} {experts}")
    if top_k > (held := experts // groups * used):
        raise ValueError(
            f"num_experts_per_tok {top_k} exceeds the {held} experts that topk_group {used} of n_group {groups} hold"
        )

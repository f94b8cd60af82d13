"""What is asked of a tokenizer. transformers' are of many classes, none of which says all of it."""

from collections.abc import Mapping
from typing import Protocol


class Tokenizer(Protocol):
    bos_token: str | None
    bos_token_id: int | None
    eos_token_id: int | None
    chat_template: str | dict[str, str] | None
    all_special_tokens: list[str]
    model_max_length: int

    def __call__(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> Mapping[str, list[int]]:
        """The ids are under `input_ids`."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool = False) -> str: ...

    def get_vocab(self) -> dict[str, int]: ...

    def apply_chat_template(self, conversation: object, *, tokenize: bool, **options: object) -> str:
        """The text that the tokenizer's template makes of a chat, where `tokenize` is false."""

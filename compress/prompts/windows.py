"""Passages to windows: shuffled with the seed, each begun with BOS, joined into one stream, cut to length."""

import numpy as np
import torch

from compress.errors import InputError


def join_and_cut(tokenizer, texts: list[str], samples: int, length: int, seed: int) -> list[torch.Tensor]:
    """At most `samples` windows of `length` tokens; a shorter rest is kept as a last, shorter window."""
    order = np.random.default_rng(seed).permutation(len(texts))
    stream: list[int] = []
    for i in order:
        if len(stream) >= samples * length:
            break
        stream += encode(tokenizer, texts[i])
    windows = [torch.tensor(stream[start : start + length]) for start in range(0, len(stream), length)]
    return [window for window in windows[:samples] if len(window) > 1]


def encode(tokenizer, text: str) -> list[int]:
    """BOS (where the tokenizer has one) and the text's tokens."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids if tokenizer.bos_token_id is None else [tokenizer.bos_token_id, *ids]


def refuse_foreign_tokens(largest: int, vocab_size: int) -> None:
    """A tokenizer can know more tokens than the model: such a text cannot be embedded."""
    if largest >= vocab_size:
        raise InputError(f"the tokenizer gives token {largest}, but the model's vocabulary has {vocab_size} tokens")

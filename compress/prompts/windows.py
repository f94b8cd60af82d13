"""Passages to windows: shuffled with the seed, each begun with BOS, joined into one stream, cut to length."""

import numpy as np
import torch

from compress.errors import InputError
from compress.model.config import Config
from compress.recipe.tokenizer import Tokenizer

CHARACTERS = 8  # of a text that are looked at for each token that is needed of it, at first
MARGIN = 4096  # characters beyond those: how tokens are cut depends on what follows, but not from so far away


def join_and_cut(tokenizer: Tokenizer, texts: list[str], samples: int, length: int, seed: int) -> list[torch.Tensor]:
    """At most `samples` windows of `length` tokens; a shorter rest is kept as a last, shorter window."""
    order = np.random.default_rng(seed).permutation(len(texts))
    stream: list[int] = []
    for i in order:
        if len(stream) >= samples * length:
            break
        stream += encode_start(tokenizer, texts[i], samples * length - len(stream))
    windows = [torch.tensor(stream[start : start + length]) for start in range(0, len(stream), length)]
    return [window for window in windows[:samples] if len(window) > 1]


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The text's tokens, begun with BOS where the tokenizer has one and the text does not write it itself."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    return ids if bos is None or ids[:1] == [bos] or _writes_bos(tokenizer, text) else [bos, *ids]


def _writes_bos(tokenizer: Tokenizer, text: str) -> bool:
    """Chat templates may break the line before it."""
    written = getattr(tokenizer, "bos_token", None)
    return isinstance(written, str) and bool(written) and text[:MARGIN].lstrip().startswith(written)


def encode_start(tokenizer: Tokenizer, text: str, count: int) -> list[int]:
    """At least the first `count` tokens of `encode` (all where it has fewer), without tokenizing all of a long text.

    The tokens of a beginning are those of the whole but near the cut. A beginning is long enough when a longer one agrees.
    """
    size = CHARACTERS * count + MARGIN
    ids = encode(tokenizer, text[:size])
    while size < len(text):
        size *= 2
        longer = encode(tokenizer, text[:size])
        if ids[:count] == longer[:count] and len(ids) > count:
            return ids[:count]
        ids = longer
    return ids


def too_long(tokens: int, config: Config) -> str | None:
    """What to say of a window or prompt that is longer than the model was made for; None where it is not."""
    most = getattr(config, "max_position_embeddings", None)
    if most is None or tokens <= most:
        return None
    return (
        f"{tokens:,} tokens are more than the model was made for "
        f"({most:,}, max_position_embeddings): what it says beyond them means little"
    )


def refuse_foreign_tokens(largest: int, vocab_size: int) -> None:
    """A tokenizer can know more tokens than the model: such a text cannot be embedded."""
    if largest >= vocab_size:
        raise InputError(f"the tokenizer gives token {largest}, but the model's vocabulary has {vocab_size} tokens")

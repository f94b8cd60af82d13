"""Recall tasks: facts are stated early and asked for after filler, so that a damaged state or cache shows.

The form is the one the reference model was trained on (its card): `\\n\\nThe secret word of NAME is WORD.\\n\\n`, where
NAME and WORD are single tokens that begin with a space: a capital and at least three letters, lower case and at least
four. Other models read it as ordinary English.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from compress.errors import InputError
from compress.prompts.questions import Asked, Question, bucket_of
from compress.recipe.tokenizer import Tokenizer

MOST_FACTS = 8
SPACES = ("\u2581", "\u0120")  # how SentencePiece and byte-level BPE write a leading space


@dataclass(frozen=True)
class RecallTask:
    """`prompt` ends just before the answer; `answer` is the token that names the asked-for word. `distance` is how many tokens
    of filler stand between the facts and the question."""

    prompt: list[int]
    answer: int
    distance: int


def windows(tokenizer: Tokenizer, filler: list[str], samples: int, length: int, seed: int) -> Asked:
    """`samples` tasks of `length` tokens each, answered at the end."""
    found = tasks(tokenizer, filler, samples, length - 1, seed)
    questions = tuple(Question(i, length - 1, bucket_of(task.distance)) for i, task in enumerate(found))
    return Asked([torch.tensor([*task.prompt, task.answer]) for task in found], questions)


def at_distances(tokenizer: Tokenizer, filler: list[str], distances: Sequence[int], trials: int, seed: int) -> Asked:
    """For each distance windows with at least `trials` questions: up to eight facts, so many tokens of filler, and each fact
    asked for in turn, in another order, with its answer. The questions already answered stand between, too."""
    rng = np.random.default_rng(seed)
    names, words = _names_and_words(tokenizer)
    prose = [token for text in filler for token in _ids(tokenizer, text + "\n\n")]
    count = min(MOST_FACTS, len(names), len(words), trials)
    found: list[torch.Tensor] = []
    questions: list[Question] = []
    for distance in distances:
        for _ in range(-(-trials // count)):
            pairs = _pairs(rng, names, words, count)
            window, answers = _asking_all(tokenizer, rng, pairs, _stretch(rng, prose, distance))
            questions += [Question(len(found), answer, (distance, distance)) for answer in answers]
            found.append(torch.tensor(window))
    return Asked(found, tuple(questions))


def most_tokens(distances: Sequence[int], trials: int) -> int:
    """About what `at_distances` takes, for a plan: a fact and its question are some 13 tokens each."""
    windows, count = -(-trials // MOST_FACTS), min(MOST_FACTS, trials)
    return windows * sum(distance + 32 * count for distance in distances)


def _asking_all(
    tokenizer: Tokenizer, rng: np.random.Generator, pairs: list[tuple[str, str]], middle: list[int]
) -> tuple[list[int], list[int]]:
    """A window of facts, filler and a question for each, and where in it the answers are."""
    ids = [*_bos(tokenizer), *(token for pair in pairs for token in _ids(tokenizer, _fact(*pair))), *middle]
    answers = []
    for i in rng.permutation(len(pairs)):
        asked = len(_ids(tokenizer, _question(pairs[i][0])))
        answers.append(len(ids) + asked)
        ids += _ids(tokenizer, _fact(*pairs[i]))
    return ids[: answers[-1] + 1], answers


def tasks(tokenizer: Tokenizer, filler: list[str], samples: int, length: int, seed: int) -> list[RecallTask]:
    """Seeded tasks whose prompts have `length` tokens; as many facts, up to eight, as leave half of it to filler."""
    rng = np.random.default_rng(seed)
    names, words = _names_and_words(tokenizer)
    prose = [token for text in filler for token in _ids(tokenizer, text + "\n\n")]
    return [_task(tokenizer, rng, names, words, prose, length) for _ in range(samples)]


def _task(
    tokenizer: Tokenizer, rng: np.random.Generator, names: list[str], words: list[str], prose: list[int], length: int
) -> RecallTask:
    count = int(rng.integers(1, min(MOST_FACTS, len(names), len(words)) + 1))
    pairs = _pairs(rng, names, words, count)
    asked = pairs[int(rng.integers(count))]
    question = _ids(tokenizer, _question(asked[0]))
    bos = _bos(tokenizer)
    told = [_ids(tokenizer, _fact(*pair)) for pair in [asked, *(pair for pair in pairs if pair is not asked)]]
    while len(told) > 1 and sum(map(len, told)) + len(question) > length // 2:
        told.pop()
    room = length - len(bos) - sum(map(len, told)) - len(question)
    if room < 0:
        raise InputError(
            f"prompts 'recall': a window of {length + 1} tokens is too short for one fact and its question"
        )
    middle = _stretch(rng, prose, room)
    prompt = [*bos, *(token for fact in rng.permutation(len(told)) for token in told[fact]), *middle, *question]
    return RecallTask(prompt, _ids(tokenizer, _fact(*asked))[len(question)], room)


def _pairs(rng: np.random.Generator, names: list[str], words: list[str], count: int) -> list[tuple[str, str]]:
    """Names and words of so many facts, each once."""
    return list(zip(rng.choice(names, count, replace=False), rng.choice(words, count, replace=False), strict=True))


def _stretch(rng: np.random.Generator, prose: list[int], length: int) -> list[int]:
    """So many tokens from anywhere in the filler, over and over where it is shorter."""
    start = int(rng.integers(0, max(1, len(prose) - length)))
    return [prose[(start + i) % len(prose)] for i in range(length)]


def _bos(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def _question(name: str) -> str:
    return f"\n\nThe secret word of {name} is"


def _fact(name: str, word: str) -> str:
    return f"\n\nThe secret word of {name} is {word}.\n\n"


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _names_and_words(tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
    """Vocabulary pieces that are one token after a space, sorted so that the choice does not depend on dict order."""
    pieces = sorted(piece[1:] for piece in tokenizer.get_vocab() if piece.startswith(SPACES))
    pieces = [piece for piece in pieces if piece.isascii() and piece.isalpha()]
    names = [p for p in pieces if len(p) >= 3 and p[0].isupper() and p[1:].islower()]
    words = [p for p in pieces if len(p) >= 4 and p.islower()]
    if not names or not words:
        raise InputError("prompts 'recall': the tokenizer has no whole words after a space to make facts of")
    return names, words

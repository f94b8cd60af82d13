"""The two ways a command fails. Each carries one sentence for the user; `cli.py` maps them to exit codes."""

from collections.abc import Iterable


class InputError(Exception):
    """The user's input is wrong (usage, recipe, model folder, data): exit code 2."""


class WorkError(Exception):
    """The input was fine, the work itself failed (disk full, exporter error): exit code 3."""


# what allocators of torch, onnxruntime and C++ say, whose errors are those of any failure
OUT_OF_MEMORY = ("allocate memory", "not enough memory", "out of memory", "bad_alloc", "bad allocation", "AllocateRaw")


def is_out_of_memory(error: Exception) -> bool:
    """Whether a library's exception means that memory ran out."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)


def first_line(error: Exception) -> str:
    """What a library's exception says, as one line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def nearest(word: object, choices: Iterable[object]) -> str:
    """`; did you mean 'X'?` for the closest of `choices`, whatever their case, or the whole list where nothing is close."""
    import difflib

    known = sorted(str(choice) for choice in choices)
    asked, by_folded = str(word).casefold(), {choice.casefold(): choice for choice in known}
    longer = [folded for folded in by_folded if len(asked) > 2 and folded.startswith(asked)]
    close = longer or difflib.get_close_matches(asked, by_folded, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{by_folded[close[0]]}'?"
    return f"; expected one of: {', '.join(known)}" if known else ""

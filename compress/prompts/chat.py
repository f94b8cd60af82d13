"""Chats to text through a tokenizer's chat template.

A template is a program that came with the model. transformers' sandbox keeps it from the machine, but not from running
for ever or filling the memory: so it runs in a process of its own, with limits.
"""

import contextlib
import logging
import os
import resource
import signal
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from compress.errors import InputError, first_line
from compress.recipe.tokenizer import Tokenizer
from compress.strict.json_text import Json, JsonObject

SECONDS = 10.0  # for one chat
MOST_CHARACTERS = 64 << 20  # of one chat's text
MEMORY = 1 << 30  # bytes beyond what this process has
HEAD = struct.Struct("<?Q")  # of an answer: whether it is a text (else an error), and its bytes

Chat = JsonObject  # arguments of `apply_chat_template`

# what a line may have beside its messages; null is as if it were not there
OPTIONS: dict[str, type[list[Json]] | type[bool] | type[JsonObject]] = {
    "tools": list,
    "documents": list,
    "add_generation_prompt": bool,
    "continue_final_message": bool,
    "chat_template_kwargs": dict,
}
EXPECTED: dict[type, str] = {list: "a list of objects", bool: "true or false", dict: "an object"}
# of apply_chat_template's own arguments, those that are not the template's
RESERVED = frozenset(
    ("conversation", "messages", "chat_template", "tokenize", "sanitize_control_tokens", "padding", "truncation",
     "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", *OPTIONS)
)  # fmt: skip


def arguments(line: JsonObject, where: str) -> Chat:
    """What a line of a .jsonl says to `apply_chat_template`. Other keys are the user's own, and left out."""
    messages = line["messages"]
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise InputError(
            f"{where}: 'messages' must be a list of objects, such as a role and its content, and not empty"
        )
    options = {key: line[key] for key in OPTIONS if line.get(key) is not None}
    for key, value in options.items():
        kind = OPTIONS[key]
        if not isinstance(value, kind) or (
            isinstance(value, list) and not all(isinstance(entry, dict) for entry in value)
        ):
            raise InputError(f"{where}: '{key}' must be {EXPECTED[kind]}")
    more = options.pop("chat_template_kwargs", None)
    more = more if isinstance(more, dict) else {}
    if taken := sorted(more.keys() & RESERVED):
        raise InputError(f"{where}: 'chat_template_kwargs' may not set '{taken[0]}'")
    return {"conversation": messages, **options, **more}


def render(tokenizer: Tokenizer, chats: dict[str, Chat]) -> Iterator[str]:
    """The texts of `chats` (where each stands -> its `arguments`), in order.

    Raises InputError naming the place where the template refuses a chat, fails, or goes beyond the limits.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(f"{next(iter(chats))}: has messages, but the model's tokenizer has no chat template")
    with _child(lambda pipe: _answer_all(pipe, tokenizer, chats.values())) as (answers, process):
        for where in chats:
            is_text, answer = _next_answer(answers, process)
            if not is_text:
                raise InputError(f"{where}: the chat template {answer}")
            yield answer


def _next_answer(answers: BinaryIO, process: int) -> tuple[bool, str]:
    """A text, or what went wrong."""
    head = answers.read(HEAD.size)
    if len(head) == HEAD.size:
        is_text, length = HEAD.unpack(head)
        return is_text, answers.read(length).decode("utf-8", "surrogatepass")
    ended = os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    if ended and ended.si_status == signal.SIGALRM:
        return False, f"does not end on these messages within {SECONDS:g} seconds"
    return False, "fails on these messages (its process was ended; perhaps it ran out of memory)"


def _answer_all(pipe: BinaryIO, tokenizer: Tokenizer, chats: Iterable[Chat]) -> None:
    """The child's work."""
    for given in chats:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)  # ends the process
        is_text, answer = _rendered(tokenizer, given)
        signal.setitimer(signal.ITIMER_REAL, 0)
        raw = answer.encode("utf-8", "surrogatepass")
        pipe.write(HEAD.pack(is_text, len(raw)) + raw)
        pipe.flush()


def _rendered(tokenizer: Tokenizer, given: Chat) -> tuple[bool, str]:
    try:
        text = tokenizer.apply_chat_template(tokenize=False, **given)
    except Exception as error:  # whatever a program can do wrong: divide by zero, recurse, fill the memory
        return False, f"refuses these messages ({first_line(error)})"
    if len(text) > MOST_CHARACTERS:
        return False, f"makes more than {MOST_CHARACTERS:,} characters of these messages"
    return True, text


@contextlib.contextmanager
def _child(work: Callable[[BinaryIO], None]) -> Iterator[tuple[BinaryIO, int]]:
    """Runs `work` in a forked process, which ends with the block; yields what it writes, and its id.

    Forked rather than started, as it needs the tokenizer. It uses nothing that other threads may have locked.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads
        process = os.fork()
    if process == 0:
        _be_child(work, reading, writing)
    os.close(writing)
    try:
        with open(reading, "rb") as answers:
            yield answers, process
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def _be_child(work: Callable[[BinaryIO], None], reading: int, writing: int) -> None:
    """Never returns."""
    try:
        os.close(reading)  # so that writing fails where the parent is gone
        logging.disable()
        for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
        _limit_memory()
        with open(writing, "wb") as pipe:
            work(pipe)
    finally:
        os._exit(0)


def _limit_memory() -> None:
    with contextlib.suppress(OSError, ValueError):  # no /proc: the time limit must do
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        most = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, most))

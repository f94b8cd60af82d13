"""The tokenizer ships too: whether a candidate's maps text and chat messages to the ids that the baseline's does.

Compared is what the files mean, not their bytes: they may be serialised anew, or be of another kind.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from compress.disk.json_files import read_json
from compress.errors import InputError, first_line
from compress.prompts import passages
from compress.recipe.source import has_tokenizer, load_tokenizer
from compress.recipe.tokenizer import Tokenizer
from compress.strict.json_text import Json

if TYPE_CHECKING:
    from jinja2 import nodes

Template = str | dict[str, str] | None
FAST = "tokenizer.json"
JSON_FILES = (FAST, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
TEMPLATE = "chat_template.jinja"
SPECIAL = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
# what tokenizers treat in ways of their own: case, accents, widths, white space, digits, scripts, bytes, text like tokens
PROBES = (
    "The Quick brown FOX, jumps: over 13 lazy dogs! It's 3.14159 or 1,000,000?",
    "  leading and trailing  \t tabs\n\n\nlines\r\nand \u00a0 other\u2003spaces \u200b ",
    "Àçñ éÉ e\u0301 ﬁ \uff46\uff55\uff4c\uff4c ½ ² Ω İı ß ẞ Straße",
    "日本語のテキスト 中文 한국어 ไทย русский العربية עברית हिन्दी",
    "🦊👩‍👩‍👧‍👦🏳️‍🌈 \u0000\u0001\u007f\ufeff\ufffd \U0010fffd",
    "def f(x):\n    return {'a': [1, 2], \"b\": x ** 2}  # <tag> </s> <s> [INST] <|im_start|>",
    "".join(map(chr, range(32, 0x250))),
)


def refuse_other(baseline: Path, candidate: Path, *, text_needed: bool) -> None:
    """Raises InputError naming what differs; a candidate without a tokenizer passes where no text is needed."""
    if not has_tokenizer(candidate):
        if text_needed and has_tokenizer(baseline):
            raise InputError(f"{candidate}: has no tokenizer files, but the prompts are text and {baseline} has them")
        return
    ours = _load(candidate)
    if not has_tokenizer(baseline):
        return
    try:
        theirs = load_tokenizer(baseline)
    except InputError:  # such as one that needs code of its own: no text can be checked with it
        if text_needed:
            raise
        return
    if what := next(
        _differences(theirs, ours, alike=(baseline / FAST).is_file() == (candidate / FAST).is_file()), None
    ):
        raise InputError(f"{candidate}: its tokenizer is not that of {baseline}: {what}")


def _load(folder: Path) -> Tokenizer:
    """The tokenizer; a damaged file is named."""
    for name in JSON_FILES:
        if (folder / name).is_file():
            read_json(folder / name)
    try:
        return load_tokenizer(folder)
    except InputError as error:
        raise InputError(_culprit(folder) or str(error)) from None


def _culprit(folder: Path) -> str | None:
    """The file that keeps a tokenizer from being loaded, where it can be told."""
    from tokenizers import Tokenizer

    try:
        if (folder / TEMPLATE).is_file():
            (folder / TEMPLATE).read_text(encoding="utf-8")
        if (folder / FAST).is_file():
            Tokenizer.from_file(str(folder / FAST))
    except UnicodeDecodeError:
        return f"{folder / TEMPLATE}: not UTF-8 text"
    except Exception as error:  # tokenizers raises bare Exception
        return f"{folder / FAST}: not a tokenizer ({first_line(error)})"
    return None


def _differences(theirs: Tokenizer, ours: Tokenizer, *, alike: bool) -> Iterator[str]:
    """Sentences on what differs. Parts are compared as they are written where both come from the same kind of file."""
    parts = [_parts(tokenizer, structure=alike) for tokenizer in (theirs, ours)]
    for name in parts[0]:
        if parts[0][name] != parts[1].get(name):
            yield f"the {name} differs"
    for text in (*PROBES, _special_text(theirs), _special_text(ours), *passages.shipped("heldout")):
        for special in (True, False):
            if _ids(theirs, text, special) != _ids(ours, text, special):
                yield f"it gives other ids for {text[:40]!r}"
    if not _same_template(theirs.chat_template, ours.chat_template):
        yield "the chat template differs"


def _parts(tokenizer: Tokenizer, *, structure: bool) -> dict[str, object]:
    """By name, what decides the ids; a part that one has and the other lacks counts as different."""
    parts: dict[str, object] = {"vocabulary": tokenizer.get_vocab()}
    if structure and (backend := getattr(tokenizer, "backend_tokenizer", None)):
        written = json.loads(backend.to_str())
        model = written["model"]
        parts |= {
            "list of merges": model.pop("merges", None),
            "list of tokens": model.pop("vocab", None),
            "list of added tokens": sorted(written["added_tokens"], key=lambda token: token["id"]),
            "normalizer": _plain(written["normalizer"]),
            "pre-tokenizer": _plain(written["pre_tokenizer"]),
            "decoder": _plain(written["decoder"]),
            "model": model,
        }
    return parts | {f"id of the {name} token": getattr(tokenizer, f"{name}_token_id", None) for name in SPECIAL}


def _plain(step: Json) -> Json:
    """A sequence of one step is that step."""
    lists = [value for value in step.values() if isinstance(value, list)] if isinstance(step, dict) else []
    if isinstance(step, dict) and step.get("type") == "Sequence" and len(lists) == 1:
        steps = [_plain(item) for item in lists[0]]
        return steps[0] if len(steps) == 1 else steps or None
    return step


def _special_text(tokenizer: Tokenizer) -> str:
    return " a".join(tokenizer.all_special_tokens)


def _ids(tokenizer: Tokenizer, text: str, special: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _same_template(one: Template, other: Template) -> bool:
    """Templates are one by name, or a single one; comments and the layout of tags mean nothing."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same_template(one[name], other[name]) for name in one)
    if one == other or not (isinstance(one, str) and isinstance(other, str)):
        return bool(one == other)
    return _parsed(one) is not None and _parsed(one) == _parsed(other)


def _parsed(template: str) -> "nodes.Template | None":
    """The syntax tree as transformers sees it; None where it is not a template, or needs more than Jinja."""
    from jinja2 import Environment, TemplateSyntaxError

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    try:
        return environment.parse(template)
    except (TemplateSyntaxError, RecursionError):
        return None

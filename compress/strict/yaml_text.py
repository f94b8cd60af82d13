"""YAML for recipes: plain data with the line of every key, and no surprises.

Duplicate keys, tags, anchors and aliases are refused: each is a way to write a file that means something else
than it seems to (or, for nested aliases, that grows without bound). So are plain words and numbers that YAML 1.1 and
1.2, or YAML and people, read differently.
"""

import re
from pathlib import Path
from typing import TypeVar

import yaml
from yaml.resolver import BaseResolver

from compress.errors import InputError
from compress.strict.json_text import Json, JsonObject

MAX_BYTES, MAX_DEPTH = 1 << 20, 32
KeyPath = tuple[str | int, ...]

# What plain scalars mean, most specific first. Everything else is text.
AMBIGUOUS = "ambiguous"  # 0512 is 330, 2:00 is 120, 1_000 is 1000 or text, no is false or text, 2025-11-25 is a date
MEANINGS = {
    "tag:yaml.org,2002:null": r"~|null|Null|NULL|",
    "tag:yaml.org,2002:bool": r"true|True|TRUE|false|False|FALSE",
    "tag:yaml.org,2002:int": r"[-+]?(0|[1-9][0-9]*)",
    "tag:yaml.org,2002:float": r"""[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?
                                 | [-+]?\.(inf|Inf|INF) | \.(nan|NaN|NAN)""",
    AMBIGUOUS: r"""yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF
                 | [-+]?0([xX][0-9a-fA-F_]+|[oO][0-7_]+|[bB][01_]+)            # other bases
                 | [-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9_]+)([eE][-+]?[0-9_]+)?  # leading zeros, underscores
                 | [-+]?[0-9][0-9_]*(:[0-9]+)+(\.[0-9_]*)?                     # base 60
                 | [0-9]{4}-[0-9]{1,2}-[0-9]{1,2}([Tt\ ].*)?""",
}


Meaning = TypeVar("Meaning", bound=BaseResolver)


def _with_meanings(base: type[Meaning]) -> type[Meaning]:
    """A loader or dumper that reads, or puts quotes around, plain scalars by MEANINGS."""
    plain: type[Meaning] = type(f"Json{base.__name__}", (base,), {"yaml_implicit_resolvers": {}})
    for tag, pattern in MEANINGS.items():
        plain.add_implicit_resolver(tag, re.compile(rf"(?:{pattern})\Z", re.VERBOSE), [None])
    return plain


_Loader, _Dumper = _with_meanings(yaml.SafeLoader), _with_meanings(yaml.SafeDumper)


class Document:
    """Json data, and `line(path)`: where in the file the value at a key path begins (1-based)."""

    def __init__(self, source: str, data: Json, lines: dict[KeyPath, int]):
        self.source, self.data, self._lines = source, data, lines

    def line(self, path: KeyPath) -> int | None:
        while path and path not in self._lines:
            path = path[:-1]
        return self._lines.get(path)


def load(path: Path) -> Document:
    """Parses one YAML file; raises InputError with file and line."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path}: larger than {MAX_BYTES} bytes, which is no recipe")
        return parse(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text") from None


def parse(text: str, source: str) -> Document:
    try:
        _refuse_surprises(text, source)
        node = yaml.compose(text, Loader=_Loader)
        lines: dict[KeyPath, int] = {}
        data = None if node is None else _plain(node, (), lines, source)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"{where}: not valid YAML ({problem})") from None
    except RecursionError:
        raise InputError(f"{source}: nested too deeply") from None
    return Document(source, data, lines)


def dump(plain: object) -> str:
    """Json data as YAML that `parse` reads as the same data."""
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False)


def parse_scalar(text: str, source: str) -> Json:
    """The value of one `--set KEY=VALUE`: a YAML scalar or flow collection under the same rules."""
    return parse(text, source).data


def _refuse_surprises(text: str, source: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = _line(event)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise InputError(f"{source}:{line}: nested more than {MAX_DEPTH} deep")
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise InputError(
                f"{source}:{line}: anchors and aliases (& and *) are not used in recipes; write the value out"
            )
        if tag := getattr(event, "tag", None):
            raise InputError(f"{source}:{line}: YAML tag '{tag}' is not used in recipes; write plain values")


def _line(event: yaml.Event) -> int:
    """Where it begins, from 1."""
    return event.start_mark.line + 1 if event.start_mark else 1


def _plain(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], source: str) -> Json:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        return _plain_mapping(node, path, lines, source)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*path, i), lines, source) for i, item in enumerate(node.value)]
    assert isinstance(node, yaml.ScalarNode)  # there is no fourth kind
    if node.tag == AMBIGUOUS:
        raise InputError(_other_meaning(node, path, source))
    try:
        value: Json = yaml.SafeLoader("").construct_object(node)
        return value
    except ValueError:
        raise InputError(f"{source}:{node.start_mark.line + 1}: '{node.value:.80}' is not a valid value") from None


def _other_meaning(node: yaml.ScalarNode, path: KeyPath, source: str) -> str:
    """Why a plain scalar is refused, and what to write in its place."""
    where = ": ".join([f"{source}:{node.start_mark.line + 1}", *([".".join(map(str, path))] if path else [])])
    expected = "true or false" if node.value.isalpha() else "a plain decimal number"
    return f"{where}: '{node.value:.80}' can mean several things in YAML; write {expected}, or put text in quotes"


def _plain_mapping(node: yaml.MappingNode, path: KeyPath, lines: dict[KeyPath, int], source: str) -> JsonObject:
    result: JsonObject = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise InputError(f"{source}:{line}: a key must be a plain word")
        key = key_node.value
        if key in result:
            raise InputError(f"{source}:{line}: duplicate key '{key}'")
        lines[(*path, key)] = line
        result[key] = _plain(value_node, (*path, key), lines, source)
    return result

"""YAML for recipes: plain data with the line of every key, and no surprises.

Duplicate keys, tags, anchors and aliases are refused: each is a way to write a file that means something else
than it seems to (or, for nested aliases, that grows without bound).
"""

from pathlib import Path

import yaml

from compress.errors import InputError

MAX_BYTES, MAX_DEPTH = 1 << 20, 32
KeyPath = tuple[str | int, ...]


class Document:
    """Plain data, and `line(path)`: where in the file the value at a key path begins (1-based)."""

    def __init__(self, source: str, data, lines: dict[KeyPath, int]):
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
        node = yaml.compose(text, Loader=yaml.SafeLoader)
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


def parse_scalar(text: str, source: str):
    """The value of one `--set KEY=VALUE`: a YAML scalar or flow collection under the same rules."""
    return parse(text, source).data


def _refuse_surprises(text: str, source: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise InputError(f"{source}:{line}: nested more than {MAX_DEPTH} deep")
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise InputError(
                f"{source}:{line}: anchors and aliases (& and *) are not used in recipes; write the value out"
            )
        if getattr(event, "tag", None):
            raise InputError(f"{source}:{line}: YAML tag '{event.tag}' is not used in recipes; write plain values")


def _plain(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], source: str):
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        return _plain_mapping(node, path, lines, source)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*path, i), lines, source) for i, item in enumerate(node.value)]
    try:
        return yaml.SafeLoader("").construct_object(node)
    except ValueError:
        raise InputError(f"{source}:{node.start_mark.line + 1}: '{node.value}' is not a valid value") from None


def _plain_mapping(node: yaml.MappingNode, path: KeyPath, lines: dict[KeyPath, int], source: str) -> dict:
    result: dict[str, object] = {}
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

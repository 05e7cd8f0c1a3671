"""A recipe's text as plain values that remember where they were written, so that every later error can name the line.

YAML is read by PyYAML's composer (which keeps line marks) with scalars understood as in YAML 1.2's core schema: only
`true`, `false`, `null`, `~` and decimal numbers are special, and `1e-5` is a number. PyYAML's own YAML 1.1 reading
would turn `no` into false, `010` into 8, `12:30` into 750 and `1e-5` into text. Duplicate keys, tags and merge keys are
errors; aliases work.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import yaml

from diptych.errors import UserError

Scalar = None | bool | int | float | str

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
_FLOAT = re.compile(r"[-+]?([0-9][0-9_]*)?(\.[0-9]*)?([eE][-+]?[0-9]+)?")
_NON_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS: Mapping[str, Scalar] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


@dataclass(frozen=True, kw_only=True)
class Value:
    """A value and the place that set it: "FILE:LINE" of its key, or "override 'key=value'"."""

    data: Scalar | Sequence[Value] | Mapping[str, Value]
    where: str


def read_document(text: str, *, name: str) -> Value:
    """The mapping in a YAML text; `name` is the file's name in errors. UserError on malformed YAML or another shape."""
    node = _compose(text, name)
    if node is None:
        raise UserError(f"{name}: empty; a recipe is a mapping of settings and needs at least `name`")
    value = _build(node, name, name, {})
    if not isinstance(value.data, Mapping):
        line = node.start_mark.line + 1
        raise UserError(f"{name}:{line}: expected a mapping of settings (key: value), got {describe(value)}")
    return value


def read_override(override: str) -> tuple[list[str], Value]:
    """Split `key.sub=value` into (["key", "sub"], value), the value read as YAML."""
    where = f"override {override!r}"
    key, equals, text = override.partition("=")
    key, text = key.strip(), text.strip()
    parts = key.split(".")
    if not equals or not all(parts):
        raise UserError(f"{where}: expected key=value, for example rl.learning_rate=1e-6")
    if not text:
        raise UserError(f"{where}: no value after '='; write {key}=null for none, or {key}='\"\"' for an empty text")
    node = _compose(text, where)
    if node is None or node.end_mark.index < len(text):
        raise UserError(f"{where}: YAML reads '#' after a space as a comment; put the value in double quotes")
    return parts, _build(node, None, where, {})


def with_value(value: Value, parts: Sequence[str], new: Value) -> Value:
    """`value` with `new` at the path `parts`; missing or null groups on the way are created.

    A mapping sets its own keys and leaves the others of the group as they are, like as many overrides of one key each.
    """
    if not parts:
        if isinstance(value.data, Mapping) and isinstance(new.data, Mapping):
            for key, child in new.data.items():
                value = with_value(value, [key], child)
            return value
        return new
    if value.data is None:
        value = Value(data={}, where=new.where)
    if not isinstance(value.data, Mapping):
        raise UserError(f"{value.where}: expected a mapping of settings, got {describe(value)}")
    child = value.data.get(parts[0], Value(data=None, where=new.where))
    return Value(data={**value.data, parts[0]: with_value(child, parts[1:], new)}, where=value.where)


def find(value: Value, key: str) -> Value:
    """The value at a dotted key, or the nearest group above it that was written."""
    for part in key.split("."):
        if not isinstance(value.data, Mapping) or part not in value.data:
            break
        value = value.data[part]
    return value


def read_scalar(text: str) -> Scalar:
    """What an unquoted YAML scalar means (YAML 1.2 core schema, decimal numbers only)."""
    if text in _WORDS:
        return _WORDS[text]
    if _NON_FINITE.fullmatch(text):
        return float(text.replace(".", ""))
    try:
        if _INTEGER.fullmatch(text):
            return int(text)
        leading_zeros = re.match(r"[-+]?0[0-9_]", text) and not re.search(r"[.eE]", text)
        if _FLOAT.fullmatch(text) and re.search(r"[0-9]", text) and not leading_zeros:
            return float(text)
    except ValueError:  # `1__0`, or more digits than Python reads
        return text
    return text


def describe(value: Value) -> str:
    """A value in the words of an error message, shortened."""
    data = value.data
    if data is None:
        return "null"
    if isinstance(data, bool):
        return str(data).lower()
    if isinstance(data, Mapping):
        return "a mapping"
    if isinstance(data, (str, int, float)):
        try:
            shown = repr(data)
        except ValueError:  # an integer of thousands of digits
            return "a very large number"
        return shown if len(shown) <= 60 else shown[:57] + "..."
    return "a list"


def _compose(text: str, where: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None or where.startswith("override ") else f":{mark.line + 1}"
        reason = " ".join(part for part in (error.context, error.problem) if part)
        raise UserError(f"{where}{line}: not valid YAML: {reason}") from None
    except yaml.reader.ReaderError as error:
        raise UserError(f"{where}: not valid YAML: character #x{error.character:04x} is not allowed") from None
    except RecursionError:
        raise UserError(f"{where}: not a recipe: nested too deeply") from None


def _build(node: yaml.Node, name: str | None, where: str, seen: dict[int, Value | None]) -> Value:
    """A node as a Value. name: the file, None for an override (whose `where` holds for all of it).

    seen: aliased nodes by id, so that a text of nested aliases stays small; None marks a node that is being built.
    """
    if id(node) in seen:
        known = seen[id(node)]
        if known is None:
            raise UserError(f"{where}: an alias refers to the value that contains it")
        return Value(data=known.data, where=where)
    seen[id(node)] = None
    value = Value(data=_data(node, name, where, seen), where=where)
    seen[id(node)] = value
    return value


def _data(
    node: yaml.Node, name: str | None, where: str, seen: dict[int, Value | None]
) -> Scalar | Sequence[Value] | Mapping[str, Value]:
    _refuse_tag(node, where)
    if isinstance(node, yaml.ScalarNode):
        return read_scalar(node.value) if node.style is None else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_build(item, name, where, seen) for item in node.value]
    assert isinstance(node, yaml.MappingNode)
    data: dict[str, Value] = {}
    for key_node, value_node in node.value:
        place = where if name is None else f"{name}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise UserError(f"{place}: a key must be a word; to give braces or brackets as text, put it in quotes")
        key = key_node.value
        if key == "<<" and key_node.style is None:
            raise UserError(f"{place}: merge keys (<<) are not supported; write the settings out")
        _refuse_tag(key_node, place)
        if key in data:
            raise UserError(f"{place}: key {key!r} is given twice (first at {data[key].where}); keep one")
        data[key] = _build(value_node, name, place, seen)
    return data


_RESOLVER = yaml.resolver.Resolver()


def _refuse_tag(node: yaml.Node, where: str) -> None:
    value = node.value if isinstance(node, yaml.ScalarNode) else None
    implicit = (node.style is None, node.style is not None) if isinstance(node, yaml.ScalarNode) else True
    if node.tag != _RESOLVER.resolve(type(node), value, implicit):
        raise UserError(f"{where}: tags ({node.tag}) are not supported; write plain values, and text in quotes")

"""From YAML and overrides to a Recipe, strictly typed by the dataclasses of `schema`; and back to YAML.

Nothing is guessed: an unknown key, a value of another type or an impossible combination is one line that names the
place and, for a key, the nearest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from diptych.errors import UserError
from diptych.recipe.checks import check_recipe
from diptych.recipe.document import Value, describe, find, read_document, read_override, read_scalar, with_value
from diptych.recipe.schema import Recipe

T = TypeVar("T")


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply `key.sub=value` overrides in order (a later one wins), and check it as a whole.

    An override whose value is a mapping sets the keys that it names; `key=null` takes an optional group away.

    Raises UserError naming FILE:LINE or the override.
    """
    recipe, document = _read(Path(path), overrides)

    def where(keys: Sequence[str]) -> str:
        places = [find(document, key).where for key in keys]
        return next((place for place in places if place.startswith("override ")), places[0])

    check_recipe(recipe, where=where)
    return recipe


def parse_recipe(path: Path | str) -> Recipe:
    """Read a recipe file without the rules between fields: what a run directory holds was checked when it was made."""
    return _read(Path(path), ())[0]


def recipe_from_text(text: str, *, name: str) -> Recipe:
    """A recipe that is in no file (yet), checked as a whole. name: stands for the file in errors."""
    recipe = _group(read_document(text, name=name), Recipe, "", fallback=name)
    check_recipe(recipe, where=name)
    return recipe


def settings_from_text(text: str, *, name: str) -> dict[str, Any]:
    """The settings that a recipe's text holds, as plain nested values and without defaults. UserError where it is no
    recipe."""
    document = read_document(text, name=name)
    _group(document, Recipe, "", fallback=name)
    return _free(document, "")


def recipe_to_dict(recipe: Any) -> dict[str, Any]:
    """The recipe (or a part of it) as plain mappings, lists and scalars, every field present."""
    return {field.name: _plain(getattr(recipe, field.name)) for field in dataclasses.fields(recipe)}


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that loads back to an equal one."""
    return dump_settings(recipe_to_dict(recipe))


def dump_settings(settings: Mapping[str, Any]) -> str:
    """Plain nested settings as YAML that the loader reads back equal."""
    return yaml.dump(settings, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)


def flatten(recipe: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> plain value of every setting; an optional group that is null is one entry, None."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{field.name}.")
        else:
            flat[prefix + field.name] = _plain(value)
    return flat


def hints(cls: type) -> dict[str, Any]:
    """Field name -> annotation of a recipe dataclass, resolved."""
    return typing.get_type_hints(cls)


def without_none(annotation: Any) -> tuple[Any, bool]:
    """(`X`, True) for `X | None`, else (annotation, False)."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        inner = [argument for argument in typing.get_args(annotation) if argument is not type(None)]
        if len(inner) != 1:
            raise TypeError(f"the schema knows `X | None` but no other union, got {annotation}")
        return inner[0], True
    return annotation, False


def _read(path: Path, overrides: Sequence[str]) -> tuple[Recipe, Value]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8 ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    document = read_document(text, name=str(path))
    for override in overrides:
        parts, value = read_override(override)
        _check_path(parts, value.where)
        document = with_value(document, parts, value)
    return _group(document, Recipe, "", fallback=str(path)), document


def _check_path(parts: Sequence[str], where: str) -> None:
    """Every part of an override's key exists in the schema."""
    annotation: Any = Recipe
    for index, part in enumerate(parts):
        if typing.get_origin(annotation) is dict:
            return  # free-form below
        if not dataclasses.is_dataclass(annotation):
            parent = ".".join(parts[:index])
            raise UserError(f"{where}: {parent!r} is {_expected(annotation)} and has no settings below it")
        if part not in hints(typing.cast(type, annotation)):
            raise _unknown(".".join(parts), where, parent=".".join(parts[:index]))
        annotation, _ = without_none(hints(typing.cast(type, annotation))[part])


def _group(value: Value, cls: type[T], path: str, *, fallback: str = "") -> T:
    """A dataclass from a mapping. fallback: the place of a missing required field, where not `value.where`."""
    if not isinstance(value.data, Mapping):
        advice = "; leave the key out to keep its defaults" if value.data is None else ""
        raise UserError(f"{value.where}: {path!r}: expected a mapping of settings, got {describe(value)}{advice}")
    annotations = hints(cls)
    prefix = f"{path}." if path else ""
    for key, child in value.data.items():
        if key not in annotations:
            raise _unknown(prefix + key, child.where, parent=path)
    missing = [
        prefix + field.name
        for field in dataclasses.fields(typing.cast(Any, cls))
        if field.name not in value.data
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        plural = "s" if len(missing) > 1 else ""
        raise UserError(f"{fallback or value.where}: missing required key{plural} {', '.join(map(repr, missing))}")
    return cls(**{key: _decode(child, annotations[key], prefix + key) for key, child in value.data.items()})


def _decode(value: Value, annotation: Any, path: str) -> Any:
    """A value of the annotated type, or UserError."""
    inner, optional = without_none(annotation)
    if optional and value.data is None:
        return None
    if dataclasses.is_dataclass(inner):
        return _group(value, typing.cast(type, inner), path)
    origin, arguments = typing.get_origin(inner), typing.get_args(inner)
    if origin is dict:
        if not isinstance(value.data, Mapping):
            raise _mismatch(value, inner, path)
        return {key: _free(child, f"{path}.{key}") for key, child in value.data.items()}
    if origin is Literal:
        for choice in arguments:
            if type(value.data) is type(choice) and value.data == choice:
                return choice
        near = difflib.get_close_matches(str(value.data), map(str, arguments), n=1)
        raise _mismatch(value, inner, path, f"; did you mean {near[0]}?" if near else "")
    if origin is tuple:
        items = value.data
        if not isinstance(items, Sequence) or isinstance(items, str):
            raise _mismatch(value, inner, path)
        if arguments[-1] is Ellipsis:
            types_of_items = [arguments[0]] * len(items)
        elif len(items) == len(arguments):
            types_of_items = list(arguments)
        else:
            raise _mismatch(value, inner, path, f" of {len(items)}")
        pairs = enumerate(zip(items, types_of_items, strict=True))
        return tuple(_decode(item, kind, f"{path}[{index}]") for index, (item, kind) in pairs)
    data = value.data
    if inner is float and isinstance(data, int | float) and not isinstance(data, bool):
        try:
            number = float(data)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise UserError(f"{value.where}: {path!r}: expected a finite number, got {describe(value)}")
        return number
    if type(data) is inner:
        return data
    quoted = inner in (int, float) and isinstance(data, str) and isinstance(read_scalar(data), int | float)
    text = inner is str and data is not None
    advice = "; take away the quotes" if quoted else "; put it in quotes" if text else ""
    raise _mismatch(value, inner, path, advice)


def _free(value: Value, path: str) -> Any:
    """A value of a free-form mapping: whatever JSON can hold."""
    if isinstance(value.data, Mapping):
        return {key: _free(child, f"{path}.{key}") for key, child in value.data.items()}
    if isinstance(value.data, Sequence) and not isinstance(value.data, str):
        return [_free(item, f"{path}[{index}]") for index, item in enumerate(value.data)]
    if isinstance(value.data, float) and not math.isfinite(value.data):
        raise UserError(f"{value.where}: {path!r}: expected a finite number, got {describe(value)}")
    return value.data


def _mismatch(value: Value, annotation: Any, path: str, advice: str = "") -> UserError:
    return UserError(f"{value.where}: {path!r}: expected {_expected(annotation)}, got {describe(value)}{advice}")


_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
_PLURALS = {int: "whole numbers", float: "numbers", str: "texts", bool: "true or false values"}


def _expected(annotation: Any) -> str:
    """A type in words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is dict:
        return "a mapping"
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple:
        kind = arguments[0]
        what = f"({_expected(kind)})" if typing.get_origin(kind) is Literal else _PLURALS[kind]
        count = "" if arguments[-1] is Ellipsis else f"{len(arguments)} "
        return f"a list of {count}{what}"
    return _NAMES[annotation]


def _unknown(key: str, where: str, *, parent: str) -> UserError:
    """The error of an unknown key, with the nearest known ones."""
    known = list(_keys(Recipe))
    siblings = [name for name in known if name.rpartition(".")[0] == parent]
    last = key[len(parent) + 1 :].split(".")[0] if parent else key.split(".")[0]
    near = difflib.get_close_matches(last, [name.rpartition(".")[2] for name in siblings], n=1)
    if near:
        start = f"{parent}.{near[0]}" if parent else near[0]
        rest = key.split(".")[start.count(".") + 1 :]
        candidate = ".".join([start, *rest])
        suggestions = [candidate] if candidate in known else difflib.get_close_matches(candidate, known, n=1) or [start]
    else:
        suggestions = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]][:3]
        if not suggestions and not parent:
            suggestions = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    if key in known:  # a dotted key in a YAML file
        return UserError(f"{where}: key {key!r} is written with a dot; nest it instead (a dot works in overrides only)")
    if suggestions:
        return UserError(f"{where}: unknown key {key!r}; did you mean {' or '.join(map(repr, suggestions))}?")
    place = f"{parent!r} has" if parent else "a recipe has"
    return UserError(f"{where}: unknown key {key!r}; {place} {', '.join(n.rpartition('.')[2] for n in siblings)}")


def _keys(cls: type, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the schema, groups included."""
    for name, annotation in hints(cls).items():
        yield prefix + name
        inner, _ = without_none(annotation)
        if dataclasses.is_dataclass(inner):
            yield from _keys(typing.cast(type, inner), f"{prefix}{name}.")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return recipe_to_dict(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


class _Dumper(yaml.SafeDumper):
    """Quotes every text that our reader would take for something else."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Escapes, where PyYAML's plain and single-quoted styles fold line breaks (U+0085 among them) into spaces.
    style = None if isinstance(read_scalar(text), str) and text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _represent_list(dumper: yaml.SafeDumper, items: list) -> yaml.SequenceNode:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(list, _represent_list)

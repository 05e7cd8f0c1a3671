"""The JSON schema (draft 2020-12) of recipes, made from the dataclasses, so that editors complete and explain keys.

A field's docstring (the string under it in `schema.py`) is its description; its range comes from `checks.RANGES`.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import typing
from typing import Any, Literal

from diptych.recipe import schema
from diptych.recipe.checks import RANGES
from diptych.recipe.load import hints, recipe_to_dict, without_none
from diptych.recipe.schema import Recipe

_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean"}


def recipe_json_schema() -> dict[str, Any]:
    """A schema that accepts what `load_recipe` reads, up to the rules between fields."""
    definitions: dict[str, Any] = {}
    root = _object(Recipe, definitions)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Diptych recipe",
        **root,
        "$defs": dict(sorted(definitions.items())),
    }


@functools.cache
def field_docs() -> dict[tuple[str, str], str]:
    """(class name, field name) -> the docstring under the field, on one line."""
    docs: dict[tuple[str, str], str] = {}
    for node in ast.parse(inspect.getsource(schema)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, below in zip(node.body, node.body[1:], strict=False):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                docs[node.name, field.target.id] = " ".join(str(below.value.value).split())
    return docs


def _object(cls: type, definitions: dict[str, Any]) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    required = []
    for field in dataclasses.fields(typing.cast(Any, cls)):
        entry: dict[str, Any] = {"description": field_docs()[cls.__name__, field.name]}
        limits = dict(RANGES.get(cls, {}).get(field.name, {}))
        entry |= _type(hints(cls)[field.name], limits, definitions)
        if field.default is not dataclasses.MISSING:
            entry["default"] = list(field.default) if isinstance(field.default, tuple) else field.default
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
            entry["default"] = recipe_to_dict(default) if dataclasses.is_dataclass(default) else default
        else:
            required.append(field.name)
        properties[field.name] = entry
    return {
        "description": " ".join((inspect.getdoc(cls) or "").split()),
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _type(annotation: Any, limits: dict[str, float], definitions: dict[str, Any]) -> dict[str, Any]:
    inner, optional = without_none(annotation)
    if optional:
        return {"anyOf": [_type(inner, limits, definitions), {"type": "null"}]}
    if dataclasses.is_dataclass(inner):
        name = typing.cast(type, inner).__name__
        if name not in definitions:
            definitions[name] = _object(typing.cast(type, inner), definitions)
        return {"$ref": f"#/$defs/{name}"}
    origin, arguments = typing.get_origin(inner), typing.get_args(inner)
    if origin is dict:
        return {"type": "object"}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple:
        items = {"type": "array", "items": _type(arguments[0], limits, definitions)}
        if arguments[-1] is not Ellipsis:
            items |= {"minItems": len(arguments), "maxItems": len(arguments)}
        return items
    return {"type": _TYPES[inner], **limits}

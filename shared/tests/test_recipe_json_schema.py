"""The JSON schema has every field, explained, and takes and refuses what the loader does."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml

from diptych.recipe.json_schema import field_docs, recipe_json_schema
from diptych.recipe.load import hints, recipe_to_dict, without_none
from diptych.recipe.schema import Recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))


def validate(value, schema, root, path=""):
    """The faults that a validator of draft 2020-12 finds, for the keywords that the schema uses."""
    known = {
        "$ref", "$defs", "$schema", "title", "description", "default", "type", "enum", "anyOf", "properties",
        "required", "additionalProperties", "items", "minItems", "maxItems", "minimum", "maximum", "exclusiveMinimum",
        "exclusiveMaximum",
    }  # fmt: skip
    assert set(schema) <= known, set(schema) - known
    faults = []
    if "$ref" in schema:
        faults += validate(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root, path)
    if "anyOf" in schema and all(validate(value, option, root, path) for option in schema["anyOf"]):
        faults.append(f"{path}: none of anyOf")
    if "enum" in schema and not any(value == item and type(value) is type(item) for item in schema["enum"]):
        faults.append(f"{path}: not in enum")
    kinds = {
        "object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool,
        "null": type(None),
    }  # fmt: skip
    if "type" in schema:
        is_bool = isinstance(value, bool) and schema["type"] != "boolean"
        if is_bool or not isinstance(value, kinds[schema["type"]]):
            return [*faults, f"{path}: not {schema['type']}"]
    if isinstance(value, dict) and "properties" in schema:
        faults += [f"{path}: lacks {key}" for key in schema["required"] if key not in value]
        for key, item in value.items():
            if key not in schema["properties"]:
                assert schema["additionalProperties"] is False
                faults.append(f"{path}.{key}: unknown")
            else:
                faults += validate(item, schema["properties"][key], root, f"{path}.{key}")
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            faults.append(f"{path}: length")
        for item in value:
            faults += validate(item, schema.get("items", {}), root, f"{path}[]")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        inside = (
            value >= schema.get("minimum", value)
            and value <= schema.get("maximum", value)
            and not value <= schema.get("exclusiveMinimum", float("-inf"))
            and not value >= schema.get("exclusiveMaximum", float("inf"))
        )
        faults += [] if inside else [f"{path}: range"]
    return faults


def faults_of(value):
    schema = recipe_json_schema()
    return validate(value, schema, schema)


def test_every_field_is_listed_with_its_description():
    schema = recipe_json_schema()
    seen = set()

    def compare(cls, entry):
        assert entry["additionalProperties"] is False
        assert list(entry["properties"]) == [field.name for field in dataclasses.fields(cls)]
        for name, annotation in hints(cls).items():
            assert len(entry["properties"][name]["description"]) > 5
            assert "\n" not in entry["properties"][name]["description"]
            inner, _ = without_none(annotation)
            if dataclasses.is_dataclass(inner):
                seen.add(inner.__name__)
                compare(inner, schema["$defs"][inner.__name__])

    compare(Recipe, schema)
    assert set(schema["$defs"]) == seen
    assert schema["required"] == ["name"]
    assert schema["properties"]["seed"]["description"] == field_docs()["Recipe", "seed"]
    assert schema["$defs"]["RLRecipe"]["properties"]["kl_coef"]["default"] == 0.05


def test_it_is_plain_json():
    schema = recipe_json_schema()
    assert json.loads(json.dumps(schema, allow_nan=False)) == schema
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_the_defaults_pass():
    assert faults_of(recipe_to_dict(Recipe(name="x"))) == []
    assert faults_of({"name": "x"}) == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_that_come_with_the_project_pass(path):
    assert faults_of(yaml.safe_load(path.read_text(encoding="utf-8"))) == []


REFUSED = {
    "unknown": ({"name": "x", "sfd": {}}, ".sfd: unknown"),
    "unknown below": ({"name": "x", "sft": {"lr": 1}}, ".sft.lr: unknown"),
    "missing": ({}, ": lacks name"),
    "type": ({"name": "x", "seed": "1"}, ".seed: not integer"),
    "bool": ({"name": "x", "seed": True}, ".seed: not integer"),
    "choice": ({"name": "x", "precision": "half"}, ".precision: not in enum"),
    "range": ({"name": "x", "rl": {"gamma": 2}}, ".rl.gamma: range"),
    "item": ({"name": "x", "stages": ["ppo"]}, ".stages[]: not in enum"),
    "pair": ({"name": "x", "sft": {"optimizer": {"betas": [0.9]}}}, ".sft.optimizer.betas: length"),
    "half a model": ({"name": "x", "model": {"new": {}}}, ".model.new: none of anyOf"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_refuses_what_the_loader_refuses(case):
    value, fault = REFUSED[case]
    assert any(re.fullmatch(re.escape(fault), found) for found in faults_of(value)), faults_of(value)

"""What produced, or would produce, some numbers, read from whatever is at hand into one shape: a `Setup`.

It reads a recipe, a run directory, a trace (of any trainer) or a model directory, and no tensor beyond the checksum of
the weights. Each fact remembers the file and the line that say it, so that a finding can name the line to change.

    group       keys
    recipe      dotted settings, the defaults resolved
    settings    the same in the words of `vocabulary`, for every trainer
    weights     ROLE                          checksum of the weights that are started from
    tokenizer   ROLE/fingerprint, /pad_token_id, /eos_token_ids, ...
    data        NAME/fingerprint, /train, /held_out, /file (checksum of the file's bytes)
    precision   matmul_precision, tf32, x64, ... (what the process really had, not what was asked)
    packages, variables, hardware, apart (what can change no number: host, folder, time)

`models` holds every field of each role's config.json, nested ones by dotted names.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diptych.data.tokenizer import Tokenizer
from diptych.engine import ENGINES
from diptych.errors import UserError
from diptych.parity.doctor.vocabulary import canonical, settings_of
from diptych.parity.provenance import describe_tokenizer
from diptych.parity.trace import Trace
from diptych.recipe.document import Value, read_document
from diptych.recipe.load import flatten, load_recipe, parse_recipe, recipe_from_text
from diptych.recipe.new_model import new_model_config
from diptych.recipe.schema import Recipe
from diptych.weights.contents import read_config
from diptych.weights.files import stored_tensors, tensor_files
from diptych.weights.inspection import check_weights, checksum

GROUPS = (
    "recipe",
    "settings",
    "weights",
    "data",
    "tokenizer",
    "precision",
    "packages",
    "variables",
    "hardware",
    "apart",
)
KINDS = ("recipe", "run directory", "trace", "model directory")


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A value, and the place that says it: FILE:LINE, or FILE: KEY where there is no line. key: its name there, where
    that is another than here."""

    value: Any
    where: str
    key: str = ""


Facts = Mapping[str, Fact]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """kind: one of KINDS. engine: the trainer's name where it is known. directory: of the starting weights, where one
    is at hand. depth: of a trace. complete: groups in which a key that is not there is not set, rather than not known.
    replay: of which trace, where it is one.
    """

    source: Path
    kind: str
    engine: str | None
    facts: Mapping[str, Facts]
    models: Mapping[str, Facts] = field(default_factory=dict)
    recipe: Recipe | None = None
    directory: Path | None = None
    depth: str | None = None
    complete: frozenset[str] = frozenset()
    replay: str | None = None

    @property
    def name(self) -> str:
        trainer = f" of {self.engine}" if self.engine else ""
        return f"{self.source} ({self.kind}{trainer})"

    @property
    def is_ours(self) -> bool:
        """Diptych would make, or made, its numbers."""
        return self.recipe is not None or self.engine in ENGINES

    def get(self, group: str, key: str) -> Fact | None:
        return self.facts.get(group, {}).get(key)

    def setting(self, key: str) -> Fact | None:
        """What the process really had, else what was asked."""
        return self.get("precision", key) or self.get("settings", key)

    @property
    def model(self) -> Facts | None:
        """The fields of the config.json that matters most: the policy's, or what it starts from."""
        return next((self.models[role] for role in ("policy", "model", "base") if role in self.models), None)


def read_setup(path: Path, *, contents: bool = True) -> Setup:
    """Read whatever is at `path`. contents: also checksum weights, tokenizers and data files.

    Raises UserError where it is none of KINDS, or broken.
    """
    if path.is_file():
        if path.suffix not in (".yaml", ".yml"):
            raise UserError(f"{path}: is no recipe (.yaml), run directory, trace or model directory")
        return _of_recipe(path, contents)
    if not path.is_dir():
        raise UserError(f"{path}: no such file or directory")
    if (path / "trace.json").is_file():
        return _of_trace(path)
    if (path / "recipe.yaml").is_file():
        return _of_run(path, contents)
    if (path / "config.json").is_file():
        return _of_model(path)
    raise UserError(
        f"{path}: holds no trace.json (a trace), recipe.yaml (a run) or config.json (a model); "
        f"give one of those, or a recipe's file"
    )


def _of_recipe(path: Path, contents: bool) -> Setup:
    recipe = load_recipe(path)
    facts = _recipe_facts(recipe, path.read_text(encoding="utf-8"), str(path))
    models, more, start = _models_of(recipe, None) if contents else ({}, {}, None)
    facts["apart"] = {"path": Fact(value=str(path), where=str(path))}
    return Setup(
        source=path, kind="recipe", engine=None, facts=facts | more, models=models, recipe=recipe, directory=start
    )


def _of_run(path: Path, contents: bool) -> Setup:
    recipe = parse_recipe(path / "recipe.yaml")
    facts = _recipe_facts(recipe, (path / "recipe.yaml").read_text(encoding="utf-8"), str(path / "recipe.yaml"))
    environment_file = path / "environment.json"
    environment = _json(environment_file)
    models, more, start = _models_of(recipe, path) if contents else ({}, {}, None)
    facts |= more | _environment_facts(environment, environment_file)
    if "rl" in recipe.stages and (path / "models/sft").is_dir():
        start = path / "models/sft"  # what rl goes on from
    engine = environment.get("engine")
    return Setup(
        source=path, kind="run directory", engine=None if engine is None else str(engine), facts=facts, models=models,
        recipe=recipe, directory=start,
    )  # fmt: skip


def _of_trace(path: Path) -> Setup:
    trace, file = Trace(path), path / "trace.json"
    known = trace.provenance
    at = _Lines(file)
    recipe, facts = None, {}
    if known.get("recipe") is not None:
        name = f"{file}: recipe"
        recipe = recipe_from_text(known["recipe"], name=name)
        facts |= _recipe_facts(recipe, known["recipe"], name)
    environment = dict(known.get("environment") or {})
    producer = {key: value for key, value in trace.producer.items() if key not in ("name", "precision")}
    versions = {key: value for key, value in producer.items() if isinstance(value, str)}
    environment["packages"] = {**versions, **producer.get("versions", {}), **environment.get("packages", {})}
    facts |= _environment_facts(environment, file, known.get("variables"))
    foreign = canonical(known.get("settings") or {})
    own = {
        name: Fact(value=value, where=at.of("provenance", "settings", key), key=key)
        for name, (key, value) in foreign.items()
    }
    for key in ("dropout", "pad_side"):
        if key in known:
            own.setdefault(key, Fact(value=known[key], where=at.of("provenance", key)))
    if "precision" in trace.producer:
        own.setdefault("precision", Fact(value=trace.producer["precision"], where=at.of("producer", "precision")))
    if recipe is None and "seed" in known:
        own.setdefault("seed", Fact(value=known["seed"], where=at.of("provenance", "seed")))
    facts["settings"] = {**facts.get("settings", {}), **own}
    models: dict[str, Facts] = {}
    weights: dict[str, Fact] = {}
    for role, about in (known.get("models") or {}).items():
        config = about.get("config") or {}
        place = ("provenance", "models", role)
        models[role] = {
            key: Fact(value=value, where=at.of(*place, "config", *key.split("."))) for key, value in _flat(config)
        }
        if about.get("weights"):
            weights[role] = Fact(value=about["weights"], where=at.of(*place, "weights"))
        if about.get("tensors") is not None:
            weights[f"{role}/tensors"] = Fact(value=about["tensors"], where=at.of(*place, "tensors"))
    facts["weights"] = weights
    for group, name in (("tokenizer", "tokenizers"), ("data", "data")):
        facts[group] = {
            f"{part}/{key}": Fact(value=value, where=at.of("provenance", name, part, key))
            for part, about in (known.get(name) or {}).items()
            for key, value in (about or {}).items()
        }
    return Setup(
        source=path, kind="trace", engine=str(trace.producer.get("name", "?")), facts=facts, models=models,
        recipe=recipe, depth=known.get("depth"),
        complete=frozenset({"variables"} if "variables" in known else ()),
        replay=None if known.get("replay") is None else str(known["replay"]),
    )  # fmt: skip


def _of_model(path: Path) -> Setup:
    fields, facts = _model_facts(path, "model")
    apart = {"path": Fact(value=str(path), where=str(path))}
    return Setup(
        source=path, kind="model directory", engine=None, facts=facts | {"apart": apart}, models={"model": fields},
        directory=path,
    )  # fmt: skip


def _recipe_facts(recipe: Recipe, text: str, name: str) -> dict[str, Facts]:
    document = read_document(text, name=name)

    def fact(key: str, value: Any) -> Fact:
        return Fact(value=value, where=_where(document, key, name))

    settings = settings_of(recipe).items()
    return {
        "recipe": {key: fact(key, value) for key, value in _flat(flatten(recipe))},
        "settings": {
            setting: Fact(value=value, where=key if " " in key else fact(key, value).where, key=key)
            for setting, (key, value) in settings
        },
    }


def _where(document: Value, key: str, name: str) -> str:
    """The line of a setting; for one that is left to its default, the file."""
    found: Any = document
    for part in key.split("."):
        if not isinstance(found.data, Mapping) or part not in found.data:
            return f"{name}: {key} (default)"
        found = found.data[part]
    return found.where


def _models_of(recipe: Recipe, run: Path | None) -> tuple[dict[str, Facts], dict[str, Facts], Path | None]:
    """What the recipe starts from: configs by role, facts of weights, tokenizers and data, and the base's directory."""
    models: dict[str, Facts] = {}
    facts: dict[str, dict[str, Fact]] = {"weights": {}, "tokenizer": {}, "data": {}}
    directories = {
        "base": run / "models/base" if run is not None and (run / "models/base").is_dir() else recipe.model.path,
        "policy": recipe.rl.policy_path,
        "reward": recipe.rl.reward.model_path or recipe.reward.model_path,
    }
    start = None
    for role, place in directories.items():
        if place is None or not (Path(place) / "config.json").is_file():
            continue
        models[role], more = _model_facts(Path(place), role)
        start = start or Path(place)
        for group, known in more.items():
            facts[group] |= known
    if not models and recipe.model.new is not None:
        config = new_model_config(recipe.model.new)
        models["base"] = {key: Fact(value=value, where="model.new") for key, value in _flat(config)}
    for name in ("demonstrations", "preferences", "prompts"):
        source = getattr(recipe.data, name)
        for key, kind in (("path", "file"), ("eval_path", "held_out_file")):
            place = getattr(source, key)
            if place is not None and Path(place).is_file():
                digest = hashlib.sha256(Path(place).read_bytes()).hexdigest()
                facts["data"][f"{name}/{kind}"] = Fact(value=digest, where=place)
    return models, dict(facts), start


def _model_facts(directory: Path, role: str) -> tuple[Facts, dict[str, Facts]]:
    config, at = read_config(directory), _Lines(directory / "config.json")
    fields = {key: Fact(value=value, where=at.of(*key.split("."))) for key, value in _flat(config)}
    facts: dict[str, Facts] = {"weights": {}, "tokenizer": {}}
    if any(directory.glob("*.safetensors")):
        facts["weights"] = {role: Fact(value=weights_checksum(directory), where=str(directory))}
    if (directory / "tokenizer.json").is_file():
        tokenizer = Tokenizer.load(directory)
        where = str(directory / "tokenizer.json")
        found = describe_tokenizer(tokenizer)
        known = {f"{role}/{key}": Fact(value=value, where=where) for key, value in found.items()}
        settings = directory / "tokenizer_config.json"
        if settings.is_file():
            side = _json(settings).get("padding_side")
            if side is not None:
                known[f"{role}/padding_side"] = Fact(value=side, where=_Lines(settings).of("padding_side"))
        facts["tokenizer"] = known
    return fields, facts


def weights_checksum(directory: Path) -> str:
    """SHA-256 over every tensor's name, type, shape and bytes, as `diptych weights check` prints it; for a family that
    Diptych does not know, over the names as they are stored."""
    known = check_weights(directory).get("checksum")
    if known:
        return str(known)
    tensors = sorted(
        (one for file in tensor_files(directory)[0] for one in stored_tensors(file)), key=lambda one: one.name
    )
    lines = "".join(f"{checksum(one.name, one)}\n" for one in tensors)
    return hashlib.sha256(lines.encode()).hexdigest()


_HARDWARE = ("machine", "processors", "memory_gib")
_APART = ("started", "git_commit", "platform", "later_starts", "engine")
_SWITCHES: Mapping[str, str] = {  # the engines' names -> ours
    "jax_enable_x64": "x64",
    "jax_default_matmul_precision": "matmul_precision",
    "float32_matmul_precision": "matmul_precision",
    "tf32": "tf32",
    "deterministic_algorithms": "deterministic_algorithms",
}  # fmt: skip
_DEVICES = ("platform", "device", "devices")


def _environment_facts(
    environment: Mapping[str, Any], file: Path, variables: Mapping[str, Any] | None = None
) -> dict[str, Facts]:
    at = _Lines(file)
    own = environment.get("engine_environment") or {}
    packages = {
        **{k: environment[k] for k in ("diptych", "python") if k in environment},
        **environment.get("packages", {}),
    }
    found: dict[str, dict[str, Fact]] = {
        "packages": {key: Fact(value=value, where=at.of(key)) for key, value in packages.items()},
        "variables": {key: Fact(value=value, where=at.of(key)) for key, value in (variables or {}).items()},
        "hardware": {key: Fact(value=environment[key], where=at.of(key)) for key in _HARDWARE if key in environment},
        "precision": {},
        "apart": {key: Fact(value=environment[key], where=at.of(key)) for key in _APART if key in environment},
    }
    for key, value in own.items():
        if key in _SWITCHES:
            found["precision"][_SWITCHES[key]] = Fact(value=_plain(value), where=at.of(key))
        elif key == "XLA_FLAGS":
            found["variables"].setdefault(key, Fact(value=value, where=at.of(key)))
        elif key in _DEVICES:
            found["hardware"]["device" if key == "device" else key] = Fact(value=value, where=at.of(key))
        elif key not in ("engine", "precision") and key not in packages:
            found["hardware"][f"engine/{key}"] = Fact(value=value, where=at.of(key))
    return dict(found)


def _plain(text: Any) -> Any:
    """Engines account for themselves in words."""
    return {"True": True, "False": False, "None": None}.get(text, text) if isinstance(text, str) else text


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class _Lines:
    """FILE:LINE of keys in a JSON file that is written with a key a line; else of the outermost key of that name."""

    def __init__(self, file: Path):
        self.file = file
        self._paths: dict[tuple[str, ...], int] = {}
        self._outermost: dict[str, tuple[int, int]] = {}
        above: list[tuple[int, str]] = []  # (indentation, key) of the groups around a line
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        for number, line in enumerate(text.splitlines(), 1):
            depth = len(line) - len(line.lstrip())
            for index, match in enumerate(re.finditer(r'"([^"\\]+)"\s*:', line)):
                if index == 0 and match.start() == depth:
                    above = [one for one in above if one[0] < depth] + [(depth, match[1])]
                    self._paths.setdefault(tuple(key for _, key in above), number)
                if depth < self._outermost.get(match[1], (depth + 1, 0))[0]:
                    self._outermost[match[1]] = (depth, number)

    def of(self, *path: str) -> str:
        number = self._paths.get(path) or self._outermost.get(path[-1], (0, 0))[1]
        return f"{self.file}:{number}" if number else f"{self.file}: {path[-1]}"


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: is not JSON: {error.msg}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: is not a JSON object")
    return found

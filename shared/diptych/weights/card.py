"""The model card of a written directory: what it is, what made it, how to load it, and the base model's licence."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from diptych import __version__
from diptych.engine import Head
from diptych.families.family import ModelConfig, family


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a model comes from. made_by: a sentence. base: the base model's name. license: as the base's card or
    config.json says it. recipe: YAML."""

    made_by: str
    base: str | None = None
    license: str | None = None
    recipe: str | None = None


def read_provenance(directory: Path, *, source: Path) -> Provenance:
    """What is known of the model that is written to `directory` from the tokenizer (or the model) of `source`.

    A model in RUN/models is a stage's; its recipe is told, paths as names only.
    """
    front = _front_matter(source)
    base, license_ = front.get("base_model"), front.get("license") or _config(source).get("license")
    for place in (directory, source):
        run = place.parent.parent
        if place.parent.name != "models" or not (run / "recipe.yaml").is_file():
            continue
        recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
        start = recipe.get("model", {}).get("path")
        if start is not None:
            front = _front_matter(Path(start))
            base = front.get("base_model") or Path(start).name
            license_ = front.get("license") or _config(Path(start)).get("license") or license_
        engine = _engine_of(run)
        made_by = (
            f"Stage `{place.name}` of the run `{recipe.get('name')}`{f' on the {engine} engine' if engine else ''}."
        )
        text = yaml.safe_dump(_without_paths(recipe), sort_keys=False, allow_unicode=True)
        return Provenance(made_by=made_by, base=_text(base), license=_text(license_), recipe=text)
    known = (source / "config.json").is_file() and source != directory
    made_by = f"Written from the model `{source.resolve().name}`." if known else "A new model."
    return Provenance(made_by=made_by, base=_text(base), license=_text(license_))


def model_card(name: str, model: ModelConfig, head: Head, dtype: str, provenance: Provenance) -> str:
    """README.md of a model directory, in the Hub's format."""
    entry = family(model.family)
    auto = "AutoModelForCausalLM" if head == "lm" else "AutoModelForSequenceClassification"
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation" if head == "lm" else "text-classification",
        "tags": ["diptych"],
    }
    if provenance.license:
        front["license"] = provenance.license
    if provenance.base:
        front["base_model"] = provenance.base
    kind = "a language model" if head == "lm" else "a model with a scalar head (reward or value)"
    lines = [
        "---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "",
        f"# {name}", "",
        f"{provenance.made_by} It is {kind} of the {entry.title} family, stored as {dtype}: width {model.hidden_size}, "
        f"{model.num_layers} layers, vocabulary {model.vocab_size}. Written by Diptych {__version__}.", "",
        f"* Base model: {provenance.base or 'none is named'}",
        f"* Licence of the base: {provenance.license or 'none is named; ask whoever published it'}", "",
        "## Use", "",
        "```python",
        f"from transformers import AutoTokenizer, {auto}", "",
        *(["import diptych_torch.recurrent  # tells transformers of it", ""] if model.family == "rnn" else []),
        f'model = {auto}.from_pretrained("{name}", dtype="auto")',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        "```",
    ]  # fmt: skip
    if head == "scalar":
        lines += ["", "`model(**tokens).logits[:, 0]` is the score of a text at its last token."]
    if provenance.recipe:
        lines += ["", "## Recipe", "", "```yaml", provenance.recipe.rstrip(), "```"]
    return "\n".join(lines) + "\n"


def _front_matter(directory: Path) -> dict[str, Any]:
    """The YAML between the first two `---` of README.md; {} where there is none."""
    path = directory / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if not text.startswith("---\n"):
        return {}
    try:
        front = yaml.safe_load(text[4:].split("\n---", 1)[0])
    except yaml.YAMLError:  # someone else's card: it only ever adds a name or a licence here
        return {}
    return front if isinstance(front, dict) else {}


def _config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _engine_of(run: Path) -> str | None:
    path = run / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")).get("engine") if path.is_file() else None


def _without_paths(value: Any) -> Any:
    """The recipe with every path cut to its last part: a card is published, a machine's folders are not."""
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    return Path(value).name if isinstance(value, str) and "/" in value and " " not in value else value


def _text(value: Any) -> str | None:
    """A card's value as text; of several (merged models) the list."""
    if value is None:
        return None
    return ", ".join(str(item) for item in value) if isinstance(value, list) else str(value)

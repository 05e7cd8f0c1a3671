"""What became of a DeepSpeed-Chat command line, told to the reader, and written with the recipe as YAML."""

from __future__ import annotations

import dataclasses
import re
import shlex
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from diptych.recipe.dschat.convert import CONSTANT, Conversion
from diptych.recipe.dschat.flags import BY_NAME, FLAGS, shown
from diptych.recipe.dschat.merge import merge
from diptych.recipe.load import dump_settings, recipe_from_text, settings_from_text
from diptych.recipe.schema import Recipe

_DIFFERENT = {
    1: (
        "the loss is over response tokens; there also over the prompt's",
        "losses and gradients are means over all tokens of an optimizer step; there, means of means",
    ),
    2: (
        "accuracy reads the score at the last response token, which --num_padding_at_beginning 1 there misses by one "
        "for other models than OPT; the loss is DeepSpeed-Chat's, a mean over the positions where the answers differ",
        "losses and gradients are means over all pairs of an optimizer step; there, means of means",
    ),
    3: (
        "answers are sampled at rollout.temperature 1; there they are greedy, unless the model's generation config "
        "says otherwise and it is no Llama",
        "rows keep their place: there, answers of at most one token are dropped, and GPUs then hold different batches",
        "losses and gradients are means over all tokens of an optimizer step; there, means of means",
        "there is an evaluation on held-out prompts every rl.eval_every iterations; there, none",
    ),
}


def account(made: Conversion) -> list[str]:
    """What became of the command line, a line each; sections end in a colon and their lines begin with two spaces."""
    command = made.command
    lines = [f"From a DeepSpeed-Chat step {command.step} command line, for {made.gpus} GPU{'s' * (made.gpus != 1)}:"]
    lines += [f"  {' '.join(map(_quoted, command.words))}", "To do by hand:", *(f"  {text}" for text in made.by_hand)]
    lines += ["What became of the flags (in brackets: not given, DeepSpeed-Chat's default):", *_became(made)]
    gone = [name for name in command.given if BY_NAME[name].fate == "obsolete"]
    if gone or command.left_out:
        lines += ["Nothing to set for:"]
        lines += [f"  {shown(name, command.given[name])}: {BY_NAME[name].note}" for name in gone]
        lines += [f"  {text}: the shell's and the launcher's business" for text in command.left_out]
    fixed = [key for key, source in made.sources.items() if source == CONSTANT]
    lines += ["Written into DeepSpeed-Chat's code, without a flag:"]
    lines += [f"  {', '.join(f'{key} {_plain(made.settings[key])}' for key in fixed)}"]
    lines += ["Different here, whatever the flags:", *(f"  {text}" for text in _DIFFERENT[command.step])]
    return lines


def _became(made: Conversion) -> Iterator[str]:
    for flag in FLAGS:
        if made.command.step not in flag.defaults or flag.fate == "obsolete":
            continue
        keys = [key for key, source in made.sources.items() if source == flag.name]
        given = made.given(flag.name)
        told = any(text.startswith(flag.name) for text in made.by_hand)
        if told or (not keys and not given):
            continue
        text = shown(flag.name, made.command.value(flag.name))
        own = made.notes.get(flag.name, [])
        values = ", ".join(f"{key} {_plain(made.settings[key])}" for key in keys)
        if not keys and not own and flag.keys:
            values = "in " + ", ".join(flag.keys_of(made.command.step))
        speaks = flag.note and (given or flag.fate == "differs") and (keys or not own)
        notes = [*own, *([flag.note] if speaks else [])]
        tail = f": {'; '.join(notes)}" if notes else ""
        yield f"  {text if given else f'[{text}]'}{f' -> {values}' if values else ''}{tail}"


def _quoted(word: str) -> str:
    return shlex.quote(word) if re.search(r"[\s'\"]", word) else word


def _plain(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)


def write(made: Conversion, *, into: str | None = None, name: str = "the recipe") -> tuple[str, list[str]]:
    """(a recipe's YAML with the account as comments, the account).

    into: the text of a recipe that the stage is added to, and `name` its name; its comments at the top are kept.

    Raises UserError where the result is no valid recipe.
    """
    lines, header, settings = account(made), "", made.settings
    if into is not None:
        settings, changes = merge(settings_from_text(into, name=name), made.settings, name=name)
        lines += ["Joined with the recipe that was there:", *(f"  {text}" for text in changes)] if changes else []
        header = "".join(line + "\n" for line in _top_comments(into)) + "#\n"
    text = header + "".join(_comment(line) for line in lines) + dump_settings(_nested(settings))
    recipe_from_text(text, name="the recipe from this command line")
    return text, lines


def _comment(line: str) -> str:
    deeper = "    " if line.startswith("  ") else ""
    return textwrap.fill(
        line, 118, initial_indent="# ", subsequent_indent=f"# {deeper}", break_long_words=False, break_on_hyphens=False
    ) + "\n"  # fmt: skip


def _top_comments(text: str) -> Iterator[str]:
    for line in text.splitlines():
        if not line.startswith("#"):
            return
        yield line


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as nested mappings, groups in the schema's order."""
    order = [field.name for field in dataclasses.fields(Recipe)]
    nested: dict[str, Any] = {}
    for key in sorted(settings, key=lambda key: order.index(key.split(".")[0])):
        group, (*parents, last) = nested, key.split(".")
        for parent in parents:
            group = group.setdefault(parent, {})
        group[last] = settings[key]
    return nested

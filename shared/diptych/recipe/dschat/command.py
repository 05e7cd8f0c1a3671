"""A DeepSpeed-Chat command line, taken apart: launcher, step, and the typed value of every flag.

Nothing is dropped in silence: a word that is neither a launcher's option, a known flag, a flag's value nor a
redirection of the shell is an error.
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diptych.errors import UserError
from diptych.recipe.dschat.flags import BY_NAME, DPO_FLAGS, FLAGS, Flag

_REDIRECTION = re.compile(r"\d?>&\d|(?:&>>?|\d?>>?)(.*)|<()", re.DOTALL)
_SEPARATORS = (";", "&&", "||")
_VARIABLE = re.compile(r"\$\w|\$\{")
_DPO = "this is DeepSpeed-Chat's DPO program (step2_dpo_finetuning); only steps 1, 2 and 3 become recipes"


@dataclass(frozen=True, kw_only=True)
class Command:
    """given: flag -> value, for the flags that were given. gpus: how many the launcher was told to use (None: it was
    not told). left_out: words that a recipe has no place for (the launcher's options, redirections)."""

    words: Sequence[str] = field(repr=False)
    step: int
    given: Mapping[str, Any]
    gpus: int | None
    left_out: Sequence[str] = ()

    def value(self, name: str) -> Any:
        """The value of a flag of this step: as given, or DeepSpeed-Chat's default."""
        return self.given.get(name, BY_NAME[name].defaults[self.step])


def read_command(words: Sequence[str], *, step: int | None = None) -> Command:
    """Read a command line, as words or as one quoted text (in which lines may end in a backslash).

    step: 1, 2 or 3; None: found from the path of main.py or from the flags.

    Raises UserError for an unknown flag (naming the nearest), a value of another type, a flag of another step, a shell
    variable that was not expanded, or a step that cannot be told.
    """
    words = _split(words)
    for word in words:
        if word in _SEPARATORS or word.endswith(";"):
            raise UserError(f"{word!r}: give one command line at a time (--into adds a step to a recipe)")
    kept, left_out = _without_redirections(words)
    launcher, script, rest = _launcher(kept)
    given = dict(_flags(rest))
    found = _step(given, script, step)
    for name, flag in BY_NAME.items():
        if flag.required and found in flag.defaults and name not in given:
            raise UserError(f"{name} is missing: step {found} of DeepSpeed-Chat cannot run without it")
    gpus, unread = _gpus(launcher)
    return Command(words=words, step=found, given=given, gpus=gpus, left_out=[*unread, *left_out])


def _split(words: Sequence[str]) -> list[str]:
    if len(words) == 1 and re.search(r"\s", words[0].strip()):
        try:
            words = shlex.split(words[0].replace("\\\r\n", " ").replace("\\\n", " "))
        except ValueError as error:
            raise UserError(f"the command line cannot be split into words: {error}") from None
    words = [word for word in words if word.strip() and word != "\\"]
    if not words:
        raise UserError("no command line; write it after `--`: diptych recipe from-dschat -- deepspeed main.py ...")
    return words


def _without_redirections(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the other words; redirections, the pipe that output goes into, and a final `&`)."""
    kept: list[str] = []
    left_out: list[str] = []
    end = words.index("|") if "|" in words else len(words)
    rest = iter(words[:end])
    for word in rest:
        match = _REDIRECTION.fullmatch(word)
        if match is None and word != "&":
            kept.append(word)
        elif match is not None and "" in match.groups():  # the file is the next word
            left_out.append(f"{word} {next(rest, '')}".strip())
        else:
            left_out.append(word)
    return kept, [*left_out, *([" ".join(words[end:])] if end < len(words) else [])]


def _launcher(words: Sequence[str]) -> tuple[list[str], str | None, list[str]]:
    """(words before the script, the script, words after it). Without a script all words from the first flag are its."""
    for index, word in enumerate(words):
        if word.endswith(".py"):
            return list(words[:index]), word, list(words[index + 1 :])
        if word in BY_NAME:
            break
    starts = [index for index, word in enumerate(words) if word in BY_NAME]
    start = starts[0] if starts else 0
    return list(words[:start]), None, list(words[start:])


def _flags(words: Sequence[str]) -> Iterator[tuple[str, Any]]:
    position = 0
    while position < len(words):
        name, equals, attached = words[position].partition("=")
        position += 1
        if name in DPO_FLAGS:
            raise UserError(f"{name}: {_DPO}")
        if not name.startswith("--"):
            raise UserError(
                f"{words[position - 1]!r} is neither a flag nor the value of one; quote a value with spaces"
            )
        flag = BY_NAME.get(name)
        if flag is None:
            raise UserError(f"{name} is not a flag of DeepSpeed-Chat; {_nearest(name)}")
        values = [attached] if equals else []
        most = 0 if flag.kind == "switch" else len(words) if flag.kind == "texts" else 1
        while not equals and len(values) < most and position < len(words) and not words[position].startswith("--"):
            values.append(words[position])
            position += 1
        yield name, _typed(flag, values)


def _nearest(name: str) -> str:
    begin = [known for known in BY_NAME if known.startswith(name)]
    near = begin if len(begin) == 1 else difflib.get_close_matches(name, list(BY_NAME), n=1, cutoff=0.5)
    advice = f"did you mean {near[0]}?" if near else "take it away, and see docs/deepspeed_chat.md for those it has"
    return f"{advice} Nothing was written"


def _typed(flag: Flag, values: Sequence[str]) -> Any:
    where = flag.name
    if flag.kind == "switch":
        if values:
            raise UserError(f"{where} takes no value, got {values[0]!r}")
        return True
    if flag.fate != "obsolete" and any(_VARIABLE.search(value) for value in values):
        raise UserError(f"{where} {' '.join(values)}: a variable of the shell; paste the command with its value")
    if flag.kind == "texts":
        return tuple(values)
    if not values:
        raise UserError(f"{where} needs a value, and none follows")
    (value,) = values
    try:
        if flag.kind != "text":
            return int(value) if flag.kind == "integer" else float(value)
    except ValueError:
        what = "a whole number" if flag.kind == "integer" else "a number"
        raise UserError(f"{where}: expected {what}, got {value!r}") from None
    if flag.choices and value not in flag.choices:
        raise UserError(f"{where}: {value!r} is not one of {', '.join(flag.choices)}")
    return value


def _step(given: Mapping[str, Any], script: str | None, wanted: int | None) -> int:
    found = re.search(r"step([123])(_dpo)?", script or "")
    if found and found[2]:
        raise UserError(f"{script}: {_DPO}")
    if wanted is None and found:
        wanted = int(found[1])
    possible = [step for step in (1, 2, 3) if all(step in BY_NAME[name].defaults for name in given)]
    if wanted is not None:
        for name in given:
            if wanted not in (steps := BY_NAME[name].defaults):
                others = " and ".join(map(str, steps))
                raise UserError(f"{name} is a flag of step {others} of DeepSpeed-Chat, and this is step {wanted}")
        return wanted
    complete = [step for step in possible if all(name in given for name in _required(step))]
    if len(complete) == 1:
        return complete[0]
    if complete:
        both = " and ".join(map(str, complete))
        raise UserError(f"steps {both} of DeepSpeed-Chat both have these flags; say which it is with --step")
    if not possible:
        raise UserError("no step of DeepSpeed-Chat has all of these flags; give one step's command line, or --step")
    missing = " or ".join(name for step in possible for name in _required(step) if name not in given)
    raise UserError(f"no model is named: {missing} is missing")


def _required(step: int) -> list[str]:
    return [flag.name for flag in FLAGS if flag.required and step in flag.defaults]


_PER_NODE = ("--num_gpus", "--nproc_per_node", "--nproc-per-node")
_NODES = ("--num_nodes", "--nnodes")
_INCLUDE = ("--include", "-i")
_UNCOUNTED = ("--hostfile", "-H", "--exclude", "-e")


def _gpus(words: Sequence[str]) -> tuple[int | None, list[str]]:
    """(GPUs of all nodes, None where the command leaves it to the machine; the launcher's other words)."""
    options, unread, visible = _launcher_options(words)

    def option(names: Sequence[str]) -> str | None:
        return next((options[name] for name in names if name in options), None)

    include, nodes, per_node = option(_INCLUDE), option(_NODES) or "1", option(_PER_NODE)
    if include is not None:
        slots = [len(host.partition(":")[2].split(",")) if ":" in host else 0 for host in include.split("@")]
        return (sum(slots) if all(slots) else None), unread
    if option(_UNCOUNTED) is not None:
        return None, unread
    if per_node is None:
        programs = [word.rsplit("/", 1)[-1] for word in words]
        one = "deepspeed" not in programs and any(name.startswith(("python", "torchrun")) for name in programs)
        per_node = "1" if one else str(visible) if visible is not None and nodes == "1" else "all"
    known = per_node.isdigit() and nodes.isdigit()
    return (int(per_node) * int(nodes) if known else None), unread


def _launcher_options(words: Sequence[str]) -> tuple[dict[str, str], list[str], int | None]:
    """(options that say how many GPUs, the launcher's other options, GPUs that CUDA_VISIBLE_DEVICES names)."""
    options: dict[str, str] = {}
    unread: list[str] = []
    visible: int | None = None
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word.startswith("CUDA_VISIBLE_DEVICES="):
            visible = len([device for device in word.partition("=")[2].split(",") if device])
        if not word.startswith("-"):
            if "=" in word and not word.startswith("CUDA_VISIBLE_DEVICES="):
                unread.append(word)
            continue
        name, _, value = word.partition("=")
        if "=" not in word and rest and not (rest[0].startswith("-") and not rest[0][1:].isdigit()):
            value = rest.pop(0)
        if name in (*_PER_NODE, *_NODES, *_INCLUDE, *_UNCOUNTED):
            options[name] = value
        elif name != "-m":
            unread.append(f"{name} {value}".strip())
    return options, unread, visible

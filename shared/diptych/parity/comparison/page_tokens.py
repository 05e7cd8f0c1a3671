"""A rollout as text: every response token coloured by how far its log-probabilities are apart."""

from __future__ import annotations

from html import escape

import numpy as np

from diptych.data.tokenizer import Tokenizer
from diptych.parity.comparison.expanded import tokenizer_of
from diptych.parity.comparison.ladder import StepResult
from diptych.parity.comparison.page_colors import level
from diptych.parity.trace import Step, Trace
from diptych.parity.truth.truth import Truth

MAX_ROLLOUT_ROWS = 8
NEEDED = ("used/tokens", "used/mask", "logprobs")


def token_section(shown: StepResult, a: Trace, b: Trace) -> str:
    """The rows of one step that are furthest apart, with both sides' log-probabilities and the advantage of each token.

    Underlined: a token whose ratio to the sampler's log-probability is clipped. Outlined: the sides drew other tokens.
    "" where the step holds no rollout of both sides.
    """
    left, right = a.read(shown.stage, shown.step), b.read(shown.stage, shown.step)
    if any(name not in side.tensors for side in (left, right) for name in NEEDED):
        return ""
    x, y = (side.array("logprobs").astype(np.float64) for side in (left, right))
    mask = left.array("used/mask").astype(bool)
    if not x.shape == y.shape == mask.shape == right.array("used/mask").shape:
        return ""
    limit = next((one.limit for one in shown.rungs if one.rung.name == "policy"), 0.0)
    with np.errstate(invalid="ignore"):
        apart = np.where(mask, np.abs(x - y), 0.0)
    apart = np.where(np.isnan(apart), np.inf, apart)
    order = np.argsort(-apart.max(axis=1), kind="stable")[:MAX_ROLLOUT_ROWS]
    tokenizer = tokenizer_of(a) or tokenizer_of(b)
    recipe = Truth(a, left).recipe
    clip = None if recipe is None else recipe.rl.clip_range
    rows = "".join(_row(int(row), left, right, apart, limit, clip, tokenizer) for row in order)
    few = f" The {len(order)} rows of {len(x)} that are furthest apart." if len(order) < len(x) else ""
    words = "" if tokenizer is not None else " The traces hold no tokenizer: token ids."
    clips = (
        "" if clip is None else " Underlined: the ratio of A's log-probability to the sampler's leaves the clip range."
    )
    return (
        f"<h2>Tokens of {escape(shown.name)}</h2>"
        f'<p class="lead">Coloured by |a − b| of the policy\'s log-probabilities over the limit of {limit:.0e}; hover '
        f"for both values and the advantage.{clips} Outlined: the sides drew other tokens by themselves.{few}{words}"
        f"</p>{rows}"
    )


def _row(
    row: int, a: Step, b: Step, apart: np.ndarray, limit: float, clip: float | None, tokenizer: Tokenizer | None
) -> str:
    mask, tokens = a.array("used/mask")[row].astype(bool), a.array("used/tokens")[row]
    columns = np.flatnonzero(mask)
    spans = []
    for column in columns:
        at = (row, int(column))
        over = float(apart[at] / limit) if limit else float(apart[at] and np.inf)
        kinds = ["tok", level(over) if apart[at] else "plain"]
        lines = [f"token {int(tokens[column])}", f"A {a.array('logprobs')[at]:.9g}", f"B {b.array('logprobs')[at]:.9g}"]
        lines.append(f"|a - b| {apart[at]:.3g}")
        if "advantages" in a.tensors:
            lines.append(f"advantage {a.array('advantages')[at]:.4g}")
        sampled = a.tensors.get("response/logprobs")
        if clip is not None and sampled is not None:
            with np.errstate(over="ignore", invalid="ignore"):
                ratio = float(np.exp(np.float64(a.array("logprobs")[at]) - np.float64(sampled.values[at])))
            if abs(ratio - 1) > clip:
                kinds.append("clip")
                lines.append(f"ratio {ratio:.4g}")
        drawn = [side.array("response/tokens")[at] for side in (a, b) if "response/tokens" in side.tensors]
        if len(set(map(int, drawn))) > 1:
            kinds.append("flip")
            lines.append(f"drew {drawn[0]} and {drawn[1]}")
        hover = "&#10;".join(escape(line) for line in lines)
        text = escape(_text(int(tokens[column]), tokenizer))
        spans.append(f'<span class="{" ".join(kinds)}" title="{hover}">{text}</span>')
    about = [] if "rows" not in a.tensors else [f"row id {int(a.array('rows')[row])}"]
    for name in ("scores", "kl"):
        if name in a.tensors and name in b.tensors:
            about.append(f"{name} {a.array(name)[row]:.5g} and {b.array(name)[row]:.5g}")
    about.append(f"largest |a − b| {apart[row].max():.2e}")
    head = f'<span class="who">{escape(" · ".join(about))}</span>'
    return f'<div class="rollout">{head}{_prompt(row, a, tokenizer)}{"".join(spans)}</div>'


def _prompt(row: int, step: Step, tokenizer: Tokenizer | None) -> str:
    if "prompts/tokens" not in step.tensors or "prompts/attention" not in step.tensors:
        return ""
    ids = step.array("prompts/tokens")[row][step.array("prompts/attention")[row].astype(bool)]
    text = " ".join(map(str, ids)) + " " if tokenizer is None else tokenizer.decode(ids, skip_special_tokens=False)
    return f'<span class="prompt">{escape(text)}</span>'


def _text(token: int, tokenizer: Tokenizer | None) -> str:
    """The token in words; ids stand apart by a space."""
    if tokenizer is None:
        return f"{token} "
    text = tokenizer.decode([token], skip_special_tokens=False)
    return text.replace("\n", "↵\n") or f"⟨{token}⟩"

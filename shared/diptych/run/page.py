"""The frame of the HTML pages: one file each, style inside, no script, and a policy that forbids every fetch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any


def page(title: str, body: str) -> str:
    """A whole HTML document. body: HTML that is escaped already."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def header(title: str, facts: Sequence[tuple[str, str]]) -> str:
    """The page's head: what it is, and a line of small facts (name, value)."""
    items = "".join(f"<span>{escape(name)} <b>{escape(value)}</b></span>" for name, value in facts if value)
    return f'<header><p class="brand">Diptych</p><h1>{escape(title)}</h1><p class="facts">{items}</p></header>'


def tile(label: str, value: str, detail: str) -> str:
    """A headline number."""
    return (
        f'<div class="tile"><span class="label">{escape(label)}</span><span class="value">{escape(value)}</span>'
        f'<span class="detail">{escape(detail)}</span></div>'
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, numeric: Sequence[int] = (), kind: str = "") -> str:
    """A table of plain text cells. numeric: the columns that are set flush right. kind: a class of the style."""

    def cells(row: Sequence[str], tag: str) -> str:
        classes = [' class="number"' if index in numeric else "" for index in range(len(row))]
        return "".join(f"<{tag}{c}>{escape(cell)}</{tag}>" for c, cell in zip(classes, row, strict=True))

    lines = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{cells(columns, "th")}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def details(summary: str, body: str) -> str:
    """A block that opens on a click. body: HTML that is escaped already."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def settings(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested mappings as (dotted key, text) rows."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += settings(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            for index, item in enumerate(value):
                rows += settings(item, f"{prefix}{key}[{index}].")
        else:
            rows.append((prefix + str(key), "" if value is None else str(value)))
    return rows


STYLE = """
:root { --ground: #f6f7f9; --card: #ffffff; --ink: #17202e; --soft: #5d6878; --line: #e3e7ed; --accent: #3454d1;
  --good: #17794a; --c1: #3454d1; --c2: #d97008; --c3: #16866a; --c4: #b3307a; --c5: #7a56c8; --c6: #8b949f; }
@media (prefers-color-scheme: dark) { :root { --ground: #10141b; --card: #181e28; --ink: #e7ebf1; --soft: #98a4b5;
  --line: #2a3240; --accent: #8ba4ff; --good: #57c490; --c1: #8ba4ff; --c2: #f4a44a; --c3: #4ec9a5; --c4: #f07fb8;
  --c5: #b69bf5; --c6: #8e99a8; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); -webkit-font-smoothing: antialiased;
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 40px 24px 72px; }
header { margin-bottom: 28px; }
.brand { margin: 0; color: var(--accent); font-size: 12px; font-weight: 700; letter-spacing: .14em;
  text-transform: uppercase; }
h1 { margin: 2px 0 8px; font-size: 32px; line-height: 1.2; letter-spacing: -.02em; overflow-wrap: anywhere; }
h2 { margin: 46px 0 4px; font-size: 21px; letter-spacing: -.01em; }
h3 { margin: 30px 0 10px; font-size: 15px; }
p.lead { margin: 0 0 16px; color: var(--soft); max-width: 75ch; }
.facts { margin: 0; display: flex; flex-wrap: wrap; gap: 2px 20px; color: var(--soft); font-size: 14px; }
.facts b { color: var(--ink); font-weight: 600; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 14px; }
.tile, figure, .scroll, details { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.tile { padding: 16px 18px; display: flex; flex-direction: column; }
.tile .label { color: var(--soft); font-size: 13px; }
.tile .value { font-size: 21px; font-weight: 650; letter-spacing: -.02em; font-variant-numeric: tabular-nums;
  line-height: 1.35; white-space: nowrap; }
.tile .detail { color: var(--soft); font-size: 13px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 14px; }
figure { margin: 0; padding: 14px 14px 6px; min-width: 0; }
figure.wide { margin-top: 14px; padding-bottom: 14px; }
figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 14px; font-size: 13px;
  padding: 0 4px 6px; }
.title { font-weight: 650; }
.keys { color: var(--soft); display: flex; flex-wrap: wrap; gap: 0 14px; font-variant-numeric: tabular-nums; }
.keys.below { font-size: 13px; padding: 10px 4px 0; gap: 2px 20px; }
.key b { color: var(--ink); font-weight: 600; }
.key i { display: inline-block; width: 14px; height: 0; border-top: 2.5px solid var(--c); vertical-align: middle;
  margin-right: 6px; }
.key i.wide { border-top-width: 6px; opacity: .4; border-radius: 3px; }
.key i.square { width: 10px; height: 10px; border: 0; border-radius: 3px; background: var(--c);
  vertical-align: -1px; }
.c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); }
.c4 { --c: var(--c4); } .c5 { --c: var(--c5); } .c6 { --c: var(--c6); }
svg { display: block; width: 100%; height: auto; overflow: visible; }
.grid { stroke: var(--line); stroke-width: 1; }
.tick { fill: var(--soft); font-size: 11px; font-variant-numeric: tabular-nums; }
.curve { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.curve.wide { stroke-width: 6; opacity: .4; }
.band { fill: var(--c); opacity: .16; }
.dot { fill: var(--card); stroke: var(--c); stroke-width: 1.8; }
.note { margin: 4px; color: var(--soft); font-size: 12px; }
.bar { display: flex; height: 22px; border-radius: 6px; overflow: hidden; gap: 2px; }
.bar i { background: var(--c); min-width: 1px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 12.5px; white-space: nowrap; }
th, td { padding: 8px 14px; border-bottom: 1px solid var(--line); vertical-align: top; }
tbody tr:last-child td { border-bottom: 0; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.samples td { width: 33.3%; white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.5; }
.samples td:first-child { color: var(--soft); }
.score { display: inline-block; margin-bottom: 4px; padding: 0 8px; border-radius: 20px; border: 1px solid var(--line);
  color: var(--soft); font-size: 12px; font-weight: 600; font-variant-numeric: tabular-nums; }
.score.up { color: var(--good); border-color: currentColor; }
details { margin-top: 14px; overflow: hidden; }
details > .scroll { border: 0; border-top: 1px solid var(--line); border-radius: 0; }
details > .charts { padding: 14px; border-top: 1px solid var(--line); }
summary { padding: 11px 18px; cursor: pointer; font-weight: 600; font-size: 14px; }
pre { margin: 0; padding: 14px 18px; overflow-x: auto; border-top: 1px solid var(--line);
  font: 12.5px/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
footer { margin-top: 46px; color: var(--soft); font-size: 12.5px; }
@media print { body { background: none; } main { padding: 0; max-width: none; } figure, .tile { break-inside: avoid; } }
"""

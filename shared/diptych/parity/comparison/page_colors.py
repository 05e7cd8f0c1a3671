"""Colours and style of the comparison's page, light and dark."""

from __future__ import annotations

import math


def level(over: float | None) -> str:
    """The colour of an error over its limit: c-none (not there), c-0 (far below) to c-5 (cannot be compared)."""
    if over is None:
        return "c-none"
    if math.isinf(over) or math.isnan(over):
        return "c-5"
    steps = (0.1, 1.0, 10.0, 1000.0)
    return f"c-{next((index for index, edge in enumerate(steps) if over <= edge), 4)}"


STYLE = """
:root { --bad: #c4302b; --bad-ground: #fdecea; --good-ground: #e3f4ea; --h0: #bfe3cc; --h1: #e4edb4; --h2: #ffc9a3;
  --h3: #f58a5e;
  --h4: #d5382f; --h5: #7d1128; --none: #e9edf2; }
@media (prefers-color-scheme: dark) { :root { --bad: #ff8a80; --bad-ground: #3a1f21; --good-ground: #17301f;
  --h0: #1f5a3a;
  --h1: #63702c; --h2: #94552a; --h3: #c25a33; --h4: #e5483d; --h5: #ff9db0; --none: #222a36; } }
.tile .value { white-space: normal; overflow-wrap: anywhere; } .tile .detail { overflow-wrap: anywhere; }
.remarks { margin: 18px 0 0; padding: 0 0 0 20px; color: var(--soft); font-size: 14px; }
.remarks .bad { color: var(--bad); }
.chip { display: inline-block; min-width: 64px; text-align: center; border-radius: 20px; padding: 0 9px;
  font-size: 12px;
  font-weight: 650; }
.chip.green { color: var(--good); background: var(--good-ground); }
.chip.red { color: var(--bad); background: var(--bad-ground); }
.chip.skipped { color: var(--soft); background: var(--none); }
.ladder td { padding: 5px 14px; } .ladder td:nth-child(2) { white-space: nowrap; font-weight: 600; }
.wrap, .settings td { overflow-wrap: anywhere; color: var(--soft); }
.settings td:first-child { color: var(--ink); width: 24%; }
.settings { table-layout: fixed; }
.account { display: grid; grid-template-columns: max-content 1fr; gap: 6px 20px; margin: 0; padding: 16px 18px;
  font-size: 14px;
  background: var(--card); border: 1px solid var(--line); border-left: 4px solid var(--bad); border-radius: 12px; }
.account dt { color: var(--soft); } .account dd { margin: 0; overflow-wrap: anywhere; }
.legend { padding: 0 0 4px; }
.key i.cell { width: 14px; height: 14px; border: 0; border-radius: 3px; vertical-align: -2px; }
.heat { display: grid; grid-template-columns: minmax(90px, max-content) 1fr; gap: 2px 12px; align-items: center;
  font-size: 12.5px; }
.heat.wide { overflow-x: auto; }
.row-name { color: var(--soft); white-space: nowrap; overflow: hidden; text-overflow: ellipsis; max-width: 420px; }
.cells { display: grid; grid-template-columns: repeat(var(--n), minmax(5px, 34px)); gap: 2px; }
.few .cells { grid-template-columns: repeat(var(--n), minmax(60px, 120px)); }
.cells .cell { height: 17px; border-radius: 3px; }
.ticks i { font-style: normal; color: var(--soft); font-size: 11px; white-space: nowrap; overflow: visible; }
.c-0 { background: var(--h0); } .c-1 { background: var(--h1); } .c-2 { background: var(--h2); }
.c-3 { background: var(--h3); }
.c-4 { background: var(--h4); } .c-5 { background: var(--h5); } .c-none { background: var(--none); }
.scatter { max-width: 760px; } .scatter .point { fill: var(--c1); opacity: .45; }
.scatter .worst { fill: var(--bad); opacity: 1; }
.scatter .limit { stroke: var(--bad); stroke-width: 1.2; stroke-dasharray: 5 4; }
.scatter .ulp { stroke: var(--soft);
  stroke-width: 1.2; stroke-dasharray: 2 3; }
.rollout { padding: 10px 16px; background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  margin-bottom: 10px;
  font: 13.5px/2 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.rollout .who { display: block; font: 12.5px/1.5 system-ui, sans-serif; color: var(--soft); }
.rollout .prompt { color: var(--soft); }
.tok { border-radius: 3px; padding: 2px 1px; white-space: pre-wrap; color: #17202e; }
.tok.c-4, .tok.c-5 { color: #ffffff; }
@media (prefers-color-scheme: dark) { .tok { color: #f4f6fa; } .tok.c-5 { color: #10141b; } }
.tok.plain { color: inherit; } .tok.clip { border-bottom: 2.5px solid var(--accent); }
.tok.flip { outline: 2px solid var(--bad); }"""

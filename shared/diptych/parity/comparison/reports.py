"""Writing a comparison's reports where the command line asks for them."""

from __future__ import annotations

import json
from pathlib import Path

from diptych.parity.comparison.expanded import Expanded
from diptych.parity.comparison.junit import as_json, as_junit
from diptych.parity.comparison.ladder import Comparison
from diptych.parity.comparison.page_ladder import ladder_page
from diptych.parity.trace import Trace
from diptych.run.directory import write_text


def write_reports(
    found: Comparison,
    expanded: Expanded | None,
    a: Trace,
    b: Trace,
    *,
    html: Path | None,
    json_path: Path | None,
    junit: Path | None,
) -> None:
    """Write those that are named. a, b: for the page's scatter and token view."""
    texts = {
        json_path: lambda: json.dumps(as_json(found, expanded), indent=1, allow_nan=False, ensure_ascii=False) + "\n",
        junit: lambda: as_junit(found, expanded),
        html: lambda: ladder_page(found, expanded, a, b),
    }
    for path, text in texts.items():
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, text())
            print(f"wrote {path}")

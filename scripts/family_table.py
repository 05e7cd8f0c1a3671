"""Write the table of model families into README.md, from the registry (a test fails where it is out of date)."""

from __future__ import annotations

from pathlib import Path

from diptych.families.table import with_table

README = Path(__file__).parents[1] / "README.md"


def main() -> None:
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{README.name}: the table of families is up to date")


if __name__ == "__main__":
    main()

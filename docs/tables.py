"""Write the pages' tables of what is registered: make docs.

A page holds `<!-- table: KIND -->`, the table and `<!-- end -->`; KIND is one of `run.py --list`.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(1, str(ROOT))

from experiments.cli import listing  # noqa: E402

ROOMS = ("models", "datamodules", "lightning_modules", "experiments")
PAGES = [ROOT / "README.md", *(ROOT / room / "README.md" for room in ROOMS), *sorted((ROOT / "docs").glob("*.md"))]
HEADINGS = {
    "data": ("name", "what it is"),
    "losses": ("flag", "what it is"),
    "metrics": ("name", "best", "tasks and definition"),
    "recipes": ("name", "what it is"),
}
TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def with_tables(text: str) -> str:
    """The page with each of its tables written anew from the registry."""
    return TABLE.sub(lambda found: found[1] + table(found[2]) + found[3], text)


def table(kind: str) -> str:
    """The Markdown table of a kind."""
    rows = listing.rows(kind)
    headings, *rows = [HEADINGS[kind], *rows] if kind in HEADINGS else rows
    lines = [headings, ["---"] * len(headings), *([f"`{name.strip()}`", *cells] for name, *cells in rows)]
    return "".join("| " + " | ".join(cell.strip().replace("|", "\\|") for cell in line) + " |\n" for line in lines)


if __name__ == "__main__":
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if (now := with_tables(text)) != text:
            page.write_text(now, encoding="utf-8")
            print(f"{page.relative_to(ROOT)}: tables written")

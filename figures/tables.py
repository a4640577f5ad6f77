"""Tables in figures/README.md: each is the data's, or `make figures` fails."""

import sys
from pathlib import Path


def table(rows: list) -> str:
    """Markdown; the first row is the head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]) + "\n"


def in_page(page: Path, found: dict[str, str], write: bool) -> None:
    """The page holds each table between `<!-- NAME -->` and `<!-- end -->`. Ends the program if one is not
    there, or says something else and may not be written."""
    text = new = page.read_text()
    for name, own in found.items():
        before, mark, after = new.partition(f"<!-- {name} -->\n")
        _, end, rest = after.partition("<!-- end -->")
        if not mark or not end:
            sys.exit(f"{page}: has no lines `<!-- {name} -->` and `<!-- end -->` around that table")
        new = before + mark + own + end + rest
    if new != text and not write:
        sys.exit(f"{page}: other numbers than the data's in {', '.join(found)}; --write puts these there")
    if new != text:
        page.write_text(new)

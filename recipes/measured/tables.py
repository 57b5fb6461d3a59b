"""Writes the tables of README.md and recipes/measured/*.md anew from the records beside it:

    python recipes/measured/tables.py

A page names a record where its table belongs, and what stands between that line and the next
`<!-- end -->` is replaced by the table and by where its figures come from. A table may be a part of
the record's: `rows` chooses rows in this order, as NAME or as NAME=SHOWN, and `columns` chooses
columns by their header. What the record does not have is an error.

    <!-- table recipes/measured/digits.json -->
    <!-- end -->
    <!-- table recipes/measured/digits.json rows="average=AVER; agre" columns="WGA; mean" -->
    <!-- end -->
"""

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MEASURED = ROOT / "recipes" / "measured"
sys.path.insert(0, str(ROOT))

import grokd  # noqa: E402

PAGES = [ROOT / "README.md", *sorted(MEASURED.glob("*.md"))]
BLOCK = re.compile(
    r"(?P<marker><!-- table (?P<record>\S+\.json)(?P<options>[^<>]*) -->)\n"
    r"(?:(?!<!-- table ).)*?<!-- end -->",
    re.DOTALL,
)
OPTION = re.compile(r'\s+(rows|columns)="([^"]*)"')
MOVED = "The programs that such commands name under `tests/` stand in `recipes/measured/` now."

Cells = list[list[str]]  # a table's lines, the header first


def record_cells(results: Mapping[str, Any]) -> Cells:
    """The whole table of a record: of a program that measures, or of a run's results.json."""
    if "header" in results:
        return [results["header"], *results["rows"]]
    lines = grokd.summary_table(results).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [cells[0], *cells[2:]]  # without the rule below the header


def parse_options(text: str, record: str) -> dict[str, list[str]]:
    """A marker's `rows` and `columns`, each a list of names."""
    if unknown := OPTION.sub("", text).strip():
        raise SystemExit(f"{record}: the marker says {unknown}, but knows rows and columns only.")
    return {key: names.split("; ") for key, names in OPTION.findall(text)}


def find(name: str, names: Sequence[str], record: str) -> int:
    """The place of a row or column."""
    if name not in names:
        raise SystemExit(f"{record} has no {name!r}; it has: {'; '.join(names)}.")
    return names.index(name)


def split_name(text: str, names: Sequence[str]) -> tuple[str, str]:
    """A chosen row's name in the record, and the name that is shown: NAME or NAME=SHOWN."""
    if text in names or "=" not in text:  # a row's own name may hold an =
        return text, text
    name, _, shown = text.rpartition("=")
    return name, shown


def choose_rows(cells: Cells, chosen: Sequence[str], record: str) -> Cells:
    """The header and the chosen rows."""
    header, *rows = cells
    names = [row[0] for row in rows]
    result = [header]
    for text in chosen:
        name, shown = split_name(text, names)
        row = rows[find(name, names, record)]
        result.append([shown, *row[1:]])
    return result


def choose_columns(cells: Cells, chosen: Sequence[str], record: str) -> Cells:
    """The names of the rows and the chosen columns."""
    header = cells[0]
    places = [0] + [find(name, header, record) for name in chosen]
    return [[row[place] for place in places] for row in cells]


def source(results: Mapping[str, Any], record: Path, page: Path) -> str:
    """Where the figures come from, with a link to the record from the page's folder."""
    facts = results["about"]
    text = (
        f"`{facts['command']}`, {facts['date']}, commit {facts['commit']}, {facts['hardware']}, "
        f"{facts['versions']}"
    )
    if "header" not in results:
        text = (
            f"Per cent, mean ± sample standard deviation over models: {text}; student seeds "
            f"{', '.join(map(str, facts['seeds']))}, teacher seeds "
            f"{', '.join(map(str, facts['teacher_seeds']))}"
        )
    link = os.path.relpath(record, page.parent)
    return f"{text}. Record: [{link}]({link})."


def block(match: re.Match[str], results: Mapping[str, Any], page: Path) -> str:
    """One table between its marks, and its source."""
    record = match["record"]
    options = parse_options(match["options"], record)
    cells = record_cells(results)
    if "rows" in options:
        cells = choose_rows(cells, options["rows"], record)
    if "columns" in options:
        cells = choose_columns(cells, options["columns"], record)
    table = grokd.table(cells[0], cells[1:])
    return f"{match['marker']}\n{table}\n\n{source(results, ROOT / record, page)}"


def rendered(text: str, page: Path) -> str:
    """The page's text with every table as its record says."""
    matches = list(BLOCK.finditer(text))
    if len(matches) != text.count("<!-- table "):
        raise SystemExit(f"{page}: a table's marker is malformed or has no <!-- end -->.")
    parts = []
    end = 0
    told = False  # once a page: where the programs stand that its commands name
    for match in matches:
        results = json.loads((ROOT / match["record"]).read_text())
        shown = block(match, results, page)
        if results["about"]["command"].startswith("python tests/") and not told:
            shown += f" {MOVED}"
            told = True
        parts += [text[end : match.start()], shown, "\n<!-- end -->"]
        end = match.end()
    return "".join([*parts, text[end:]])


def main() -> None:
    for page in PAGES:
        page.write_text(rendered(page.read_text(), page))


if __name__ == "__main__":
    main()

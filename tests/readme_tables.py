"""Write the README's tables anew from recipes/measured/*.json: python tests/readme_tables.py"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import grokd  # noqa: E402

BLOCK = re.compile(r"<!-- table (\S+\.json) -->\n.*?<!-- end -->", re.DOTALL)


def block(match: re.Match[str]) -> str:
    """The table of one results.json, and where its figures come from."""
    results = json.loads((ROOT / match[1]).read_text())
    facts = results["about"]
    source = (
        f"`{facts['command']}`, {facts['date']}, commit {facts['commit']}, {facts['hardware']}, "
        f"{facts['versions']}"
    )
    if "header" in results:  # of bench.py
        table = grokd.table(results["header"], results["rows"])
    else:
        table = grokd.summary_table(results)
        source = (
            f"Per cent, mean ± sample standard deviation over models: {source}; student seeds "
            f"{', '.join(map(str, facts['seeds']))}, teacher seeds "
            f"{', '.join(map(str, facts['teacher_seeds']))}"
        )
    source += f". Record: [{match[1]}]({match[1]})."
    return f"<!-- table {match[1]} -->\n{table}\n\n{source}\n<!-- end -->"


def rendered(text: str) -> str:
    """README text with every table as its measurement says."""
    return BLOCK.sub(block, text)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(rendered(readme.read_text()))

"""Finished runs of recipes/colored_mnist.py as one table beside the paper's:

    python recipes/measured/paper_table.py runs/colored_mnist-98 runs/colored_mnist-95 \
        [--save FILE]

Conflicting accuracy (mean over all test images in brackets), per cent. The record holds the whole
results.json of every run.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import grokd  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--save", type=Path, help="write the table as JSON")
    args = parser.parse_args()
    header, cells = [""], dict[str, list[str]]()
    records = {}
    for run in args.runs:
        ratio = run.name.rpartition("-")[2]
        records[ratio] = json.loads((run / "results.json").read_text())
        header += [f"{ratio} %", f"{ratio} %, paper"]
        for row in records[ratio]["rows"]:
            parts = []
            for key in ("wga", "mean"):
                mean, std = grokd.spread([
                    m["groups"][1] if key == "wga" else m["mean"] for m in row["members"]])
                parts.append(f"{mean:.1f}" + (f" ± {std:.1f}" if std is not None else ""))
            known = row["published"]
            paper = f"{known['wga']:.1f}" if known else "–"
            paper += f" ({known['mean']:.1f})" if "mean" in known else ""
            cells.setdefault(row["name"], []).extend([f"{parts[0]} ({parts[1]})", paper])
    rows = [[name, *line] for name, line in cells.items()]
    print(grokd.table(header, rows))
    if args.save:
        record = {"about": grokd.origin(), "header": header, "rows": rows, "results": records}
        args.save.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

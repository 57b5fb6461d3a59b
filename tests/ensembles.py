"""AVER and AGRE on the digits with several ensembles of teachers, each with its own students:

    python tests/ensembles.py [--ensembles 5] [--save FILE]

Students of one ensemble share what its teachers happened to learn, so the spread over student
seeds alone says too little. Not collected by pytest; about two minutes an ensemble on two cores.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import grokd  # noqa: E402

NAMES = ["teachers, DFR", "teachers' vote, DFR", "one-hot-dfr", "average", "agre"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ensembles", type=int, default=5)
    parser.add_argument("--save", type=Path, help="write the table as JSON")
    args = parser.parse_args()
    about, values = grokd.origin(), []
    for ensemble in range(args.ensembles):
        seed = 10 * ensemble
        with tempfile.TemporaryDirectory() as out:
            grokd.command_line([
                "run", "digits", "--teachers.seed", str(seed), "--bias-model.seed",
                str(1000 + seed), "--seeds", *(str(seed + k) for k in range(3)), "--out", out,
                "--student", "one-hot-dfr", "average", "agre",
            ])
            rows = json.loads((Path(out) / "results.json").read_text())["rows"]
        wga = {row["name"]: np.mean([m["wga"] for m in row["members"]]) for row in rows}
        values.append([float(wga[name]) for name in NAMES] + [float(wga["agre"] - wga["average"])])
    table = [
        [f"teacher seeds {10 * e}-{10 * e + 4}", *(f"{v:.1f}" for v in line)]
        for e, line in enumerate(values)
    ]
    spreads = [grokd.spread(column) for column in zip(*values, strict=True)]
    table.append(["mean ± std", *(f"{mean:.1f} ± {std or 0:.1f}" for mean, std in spreads)])
    header = ["digits, test WGA, per cent", *NAMES, "agre - average"]
    print(grokd.table(header, table))
    if args.save:
        record = {"about": about, "header": header, "rows": table}
        args.save.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()

"""A recipe with several ensembles of teachers, each with students of its own, in one table:

    python recipes/measured/ensembles.py digits_ablation [--ensembles 5] [--save FILE.json]

Students of one ensemble share what its teachers happened to learn, so the spread over student seeds
alone says too little. Here every run has its own teachers, biased model and student seed. --save
also draws FILE.png.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import grokd  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--ensembles", type=int, default=5)
    parser.add_argument("--save", type=Path, help="write the merged results as JSON")
    args = parser.parse_args()
    about, merged = grokd.origin(), dict[str, Any]()
    for ensemble in range(args.ensembles):
        seed = str(10 * ensemble)
        with tempfile.TemporaryDirectory() as out:
            grokd.command_line([
                "run", args.recipe, "--teachers.seed", seed, "--bias-model.seed", f"1{seed:0>3}",
                "--seeds", seed, "--out", out,
            ])
            results = json.loads((Path(out) / "results.json").read_text())
        if not merged:
            merged = results | {"about": results["about"] | about}
            continue
        for key in ("seeds", "teacher_seeds"):
            merged["about"][key] += results["about"][key]
        for row, more in zip(merged["rows"], results["rows"], strict=True):
            row["members"] += more["members"]
        for row, more in zip(merged["probes"], results["probes"], strict=True):
            for name, value in more["scores"].items():  # a running mean
                row["scores"][name] += (value - row["scores"][name]) / (ensemble + 1)
    print(grokd.report(merged))
    if args.save:
        args.save.write_text(json.dumps(merged, indent=1) + "\n")
        args.save.with_suffix(".png").write_bytes(grokd.draw_curves(merged))


if __name__ == "__main__":
    main()

"""A recipe with several ensembles of teachers, each with students of its own, in one table:

    python recipes/measured/ensembles.py digits_ablation [--seeds 0 10 20 30 40] [--save FILE.json]

Students of one ensemble share what its teachers happened to learn, so the spread over student seeds
alone says too little. Here every run has its own teachers, biased model and student seeds. Runs
stand under runs/ensembles/RECIPE/SEED and are gone on with; --save also draws FILE.png, if there
are students that differ in one number.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import grokd  # noqa: E402


def run(recipe: str, seed: int, students: int, root: str) -> dict[str, Any]:
    """results.json of an ensemble with teachers and students from `seed` on and a biased model of
    its own."""
    out = Path("runs/ensembles") / recipe.replace(":", "-") / str(seed)
    seeds = [str(seed + i) for i in range(students)]
    grokd.command_line([
        "run", recipe, "--teachers.seed", str(seed), "--bias-model.seed", f"1{seed:03d}",
        "--seeds", *seeds, "--root", root, "--out", str(out),
    ])
    return json.loads((out / "results.json").read_text())


def merge(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One results.json: members of all ensembles in each row, choices and teachers side by side."""
    merged = runs[0]
    merged["choices"] = [each["choice"] for each in runs]
    merged["by_ensemble"] = [each["ensembles"] for each in runs]
    merged["choice"], merged["ensembles"] = {}, []
    for count, results in enumerate(runs[1:], 2):
        for key in ("seeds", "teacher_seeds"):
            merged["about"][key] += results["about"][key]
        for row, more in zip(merged["rows"], results["rows"], strict=True):
            row["members"] += more["members"]
        for row, more in zip(merged["probes"], results["probes"], strict=True):
            for name, value in more["scores"].items():  # a running mean
                row["scores"][name] += (value - row["scores"][name]) / count
    return merged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 10, 20, 30, 40])
    parser.add_argument("--students", type=int, default=1, help="seeds of students, each ensemble")
    parser.add_argument("--root", default=".")
    parser.add_argument("--save", type=Path, help="write the merged results as JSON")
    args = parser.parse_args()
    about = grokd.origin()
    merged = merge([run(args.recipe, seed, args.students, args.root) for seed in args.seeds])
    merged["about"] |= about
    print(grokd.report(merged))
    if args.save:
        args.save.write_text(json.dumps(merged, indent=1) + "\n")
        if merged["curves"]:
            args.save.with_suffix(".png").write_bytes(grokd.draw_curves(merged))


if __name__ == "__main__":
    main()

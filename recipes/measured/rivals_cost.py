"""What the methods of recipes/rivals.py cost, in epochs of AVER's student:

    python recipes/measured/rivals_cost.py [RECIPE] [--root FOLDER] [--save FILE.json]

Each student's step and end of an epoch are timed as `run --dry-run` does, on a few images with
stand-ins for its teachers, whose answers are cached; validation is left out, since all have it
alike. The networks that must be trained before come on top. A quiet machine is needed.

What a student that uses none of them pays for their being there, against the code before them:

    python recipes/measured/rivals_cost.py --before c90a154 [--save FILE.json]

AVER's student of the digits is timed in processes of their own, old and new in turn.
"""

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import grokd  # noqa: E402


def epochs(recipe_name: str, root: str, only: str) -> tuple[dict[str, float], dict[str, int]]:
    """Seconds of an epoch, and networks trained before, of a recipe's students, or `only` one."""
    flags = ["--root", root, "--out", "runs/rivals_cost"]
    loaded = grokd.load_recipe(recipe_name)
    recipe, common, _ = grokd.apply_flags("run", loaded, recipe_name, flags)
    store = grokd.counted_store(recipe.data, recipe.root)
    ctx = grokd.Context(
        recipe_name, recipe, store, Path(common.out), grokd.Runtime.start("float32"), common,
        ["teachers", "bias-model", "distill"], recipe.students, {},
    )
    seconds: dict[str, float] = {}
    before: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        plan = grokd.DryRun(ctx, Path(folder))
        for name, student in recipe.students.items():
            if only in ("", name) and (student.head == "own" or not student.has_teachers):
                pace, count = plan.student_pace(name), len(store.split("train"))
                steps = math.ceil(count / student.train.batch_size)
                review = getattr(pace, "review", 0)  # code before DeDiER has none
                seconds[name] = steps * pace.step + pace.epoch + count * review
                before[name] = len(grokd.networks_behind(ctx.student(name, recipe.seeds[0])))
    return seconds, before


def methods(recipe: str, root: str) -> tuple[list[str], list[list[str]]]:
    """The table of all methods: header and rows."""
    seconds, before = epochs(recipe, root, "")
    rows = [
        [name, f"{spent / seconds['average']:.2f}", str(before[name])]
        for name, spent in seconds.items()
    ]
    return ["", "an epoch, in AVER's", "networks trained before"], rows


def against(commit: str, rounds: int = 7) -> tuple[list[str], list[list[str]]]:
    """AVER's epoch with this code and with that of a commit: header and rows."""
    with tempfile.TemporaryDirectory() as temporary:
        archive = subprocess.run(
            ["git", "archive", commit], cwd=ROOT, capture_output=True, check=True)
        subprocess.run(["tar", "x"], cwd=temporary, input=archive.stdout, check=True)
        programs = [Path(__file__), Path(temporary) / "recipes" / "measured" / Path(__file__).name]
        shutil.copy(*programs)
        spent: list[list[float]] = [[], []]
        for _ in range(rounds):
            for program, times in zip(programs, spent, strict=True):
                printed = subprocess.run(
                    [sys.executable, str(program), "digits", "--only", "average"],
                    cwd=program.parents[2], capture_output=True, text=True, check=True,
                ).stdout
                times.append(float(printed.splitlines()[-1]))
    ratios = sorted(new / old for new, old in zip(*spent, strict=True))
    row = [commit, f"{statistics.median(ratios):.3f}", f"{ratios[0]:.3f} to {ratios[-1]:.3f}"]
    return ["AVER's epoch, over that of commit", "median", f"{rounds} pairs of processes"], [row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", nargs="?", default="rivals")
    parser.add_argument("--root", default=".")
    parser.add_argument("--before", metavar="COMMIT", help="compare AVER's epoch with its")
    parser.add_argument("--only", default="", help="print the seconds of one student's epoch")
    parser.add_argument("--save", type=Path, help="write the table as JSON")
    args = parser.parse_args()
    if args.only:
        print(epochs(args.recipe, args.root, args.only)[0][args.only])
        return
    header, rows = against(args.before) if args.before else methods(args.recipe, args.root)
    print(grokd.table(header, rows))
    if args.save:
        record = {"about": grokd.origin(), "header": header, "rows": rows}
        args.save.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    grokd.in_one_line(main)

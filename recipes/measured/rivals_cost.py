"""What the methods of recipes/rivals.py cost, in epochs of AVER's student:

    python recipes/measured/rivals_cost.py [RECIPE] [--root FOLDER] [--save FILE.json]

Each student's step and end of an epoch are timed as `run --dry-run` does, on a few images with
stand-ins for its teachers, whose answers are cached; validation is left out, since all have it
alike. The networks that must be trained before come on top. A quiet machine is needed.
"""

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import grokd  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", nargs="?", default="rivals")
    parser.add_argument("--root", default=".")
    parser.add_argument("--save", type=Path, help="write the table as JSON")
    args = parser.parse_args()
    flags = ["--root", args.root, "--out", "runs/rivals_cost"]
    loaded = grokd.load_recipe(args.recipe)
    recipe, common, _ = grokd.apply_flags("run", loaded, args.recipe, flags)
    store = grokd.counted_store(recipe.data, recipe.root)
    ctx = grokd.Context(
        args.recipe, recipe, store, Path(common.out), grokd.Runtime.start("float32"), common,
        ["teachers", "bias-model", "distill"], recipe.students, {},
    )
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        plan = grokd.DryRun(ctx, Path(folder))
        for name, student in recipe.students.items():
            if student.head == "own" or not student.has_teachers:
                pace, count = plan.student_pace(name), len(store.split("train"))
                steps = math.ceil(count / student.train.batch_size)
                seconds[name] = steps * pace.step + pace.epoch + count * pace.review
    header = ["", "an epoch, in AVER's", "networks trained before"]
    rows = []
    for name, spent in seconds.items():
        before = grokd.networks_behind(ctx.student(name, recipe.seeds[0]))
        rows.append([name, f"{spent / seconds['average']:.2f}", str(len(before))])
    print(grokd.table(header, rows))
    if args.save:
        record = {"about": grokd.origin(), "header": header, "rows": rows, "seconds": seconds}
        args.save.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    grokd.in_one_line(main)

"""Do generated images help, and are they what they should be? A fair test on the digits:

    python recipes/measured/fair_test.py digits_augment --seeds 200 201 202 203 204 \
        [--precision bfloat16] [--save FILE.json]
    python recipes/measured/fair_test.py digits_augment --between \
        bfloat16=FILE.json,MORE.json float32=OTHER.json,SEEDS.json [--save DIFFERENCES.json]

Every seed has teachers, a biased model, a starting student and images of its own; all use the
generator of the first one. (digits_augment_absent uses that of `python grokd.py run
digits_augment --seeds 200 --diffusion.seed 200`.) A classifier that never guided anything, trained
on digits under both colours alike, confirms labels; the attribute is read from the background's
pixels: flipped from the source's, and against the label. Differences in WGA are paired by seed,
with 95 % intervals (Student's t); --between takes them between records of the same seeds, of
several precisions for example. On a CPU float16 is that of half.py. Some nine minutes a seed on one
core; runs/fair/ keeps what was made.
"""

import argparse
import contextlib
import csv
import itertools
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from half import FastHalf
from PIL import Image
from scipy import stats
from sklearn.datasets import load_digits

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import grokd  # noqa: E402

PAIRS = [("kd-config", "kd"), ("kd-config", "kd-unguided"), ("kd-config", "kd-cutmix"),
         ("kd-unguided", "kd"), ("kd-tab", "kd"), ("kd-config-tab", "kd"),
         ("kd-config-tab", "kd-tab"), ("kd-soft-config", "kd-soft")]


def referee(module: Any) -> grokd.Classifier:
    """A classifier of digits 0-4 against 5-9, trained on every digit of training and validation
    under both colours (grouped evenly), for 30 epochs."""
    source = load_digits()
    order = grokd.permutation(len(source.target), 0)[: module.NUM_TRAIN + module.NUM_VAL]
    images = np.stack([grokd.decode(module.draw(source.images[i], c, int(i)), 16, "squash")
                       for i in order for c in (0, 1)])
    labels = torch.tensor([int(source.target[i] >= 5) for i in order for _ in (0, 1)])
    pixels = torch.from_numpy(images) / 255
    model = grokd.build_model("resnet8", "random", 2, grokd.Input(), 4321)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9, weight_decay=1e-4)
    for epoch in range(30):
        for batch in grokd.epoch_batches(len(labels), 64, 4321, epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(pixels[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval()


def background(images: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Which colour [N] the background of images [N, 3, 16, 16] has, by the border columns."""
    border = np.concatenate([images[..., :2], images[..., -2:]], -1).reshape(len(images), 3, -1)
    median = np.median(border, -1)  # [N, 3]
    return ((median[:, None] - colours) ** 2).sum(-1).argmin(1)


def inspect_set(folder: Path, judge: grokd.Classifier, module: Any, store: grokd.Store,
                ) -> dict[str, float]:
    """Label validity and flipped share of one set's accepted images."""
    with open(folder / "metadata.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    images = np.stack([np.asarray(Image.open(folder / r["image"])).transpose(2, 0, 1)
                       for r in rows])
    labels = np.array([int(r["label"]) for r in rows])
    with torch.no_grad():
        confirmed = judge(torch.from_numpy(images) / 255).argmax(1).numpy() == labels
    colours = background(images, module.COLOURS)
    before = store.attributes[[int(r["source"]) for r in rows]]
    return {"accepted": len(rows), "tried": len(grokd.read_records(folder)),
            "label confirmed": 100 * float(confirmed.mean()),
            "background flipped": 100 * float((colours != before).mean()),
            "background against label": 100 * float((colours != labels).mean())}


def paired(one: list[float], other: list[float]) -> str:
    """Mean difference, of a pair for each seed, with its 95 % interval."""
    difference = np.array(one) - np.array(other)
    half = float(stats.t.ppf(0.975, len(difference) - 1) * stats.sem(difference))
    mean = difference.mean()
    return f"{mean:.1f} [{mean - half:.1f}, {mean + half:.1f}]"


def between(named: Sequence[str]) -> dict[str, Any]:
    """A record of the differences of several records, NAME=FILE[,FILE of other seeds], from the
    last of them, in the seeds that both have."""
    names, wga = [], list[dict[str, dict[str, float]]]()  # by kind of student and seed
    for each in named:
        name, _, files = each.partition("=")
        names.append(name)
        found: dict[str, dict[str, float]] = {}
        for file in files.split(","):
            record = json.loads(Path(file).read_text())
            seeds = record["header"][0].partition("seeds ")[2].split(", ")
            for key, values in record["wga"].items():
                found.setdefault(key, {}).update(zip(seeds, values, strict=True))
        wga.append(found)
    *others, reference = wga
    rows = []
    for key, values in reference.items():
        row = [key, f"{np.mean([*values.values()]):.1f}"]
        for other in others:
            seeds = [seed for seed in values if seed in other[key]]
            row.append(paired([other[key][seed] for seed in seeds], [values[s] for s in seeds]))
        rows.append(row)
    header = ["WGA", names[-1], *(f"{name} − {names[-1]}" for name in names[:-1])]
    return {"about": grokd.origin(), "header": header, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[200, 201, 202, 203, 204])
    parser.add_argument("--split", default="test")
    parser.add_argument("--precision", default="float32", help="as of grokd.py")
    parser.add_argument("--between", nargs="+", metavar="NAME=FILE[,FILE...]",
                        help="compare these records instead, with the last")
    parser.add_argument("--save", type=Path, help="write the table as JSON")
    args = parser.parse_args()
    if args.between:
        record = between(args.between)
        print(grokd.table(record["header"], record["rows"]))
        if args.save:
            args.save.write_text(json.dumps(record, indent=1) + "\n")
        return
    in_half = args.precision == "float16" and not torch.cuda.is_available()
    about, recipe = grokd.origin(), grokd.load_recipe(args.recipe)
    module = sys.modules["digits"]
    store, judge = grokd.open_store(recipe.data, "."), referee(module)
    wga: dict[str, list[float]] = {}
    sets: dict[str, list[dict[str, float]]] = {}
    folders = [Path("runs/fair") / args.recipe / str(seed) for seed in args.seeds]
    for seed, out in zip(args.seeds, folders, strict=True):
        if out != folders[0] and any(not images.generator for images in recipe.augments.values()):
            shutil.copytree(folders[0] / "generator", out / "generator", dirs_exist_ok=True)
        with FastHalf() if in_half else contextlib.nullcontext():
            grokd.command_line([
                "run", args.recipe, "--teachers.seed", str(10 * seed), "--bias-model.seed",
                str(100_000 + seed), "--diffusion.seed", str(args.seeds[0]), "--seeds", str(seed),
                "--precision", args.precision,
                "--eval.split", args.split, "--out", str(out)])
        for row in json.loads((out / "results.json").read_text())["rows"]:
            if row["name"] in recipe.students:
                wga.setdefault(row["name"], []).append(row["members"][0]["wga"])
        for name in recipe.augments:
            folder = out / "augmented" / name / f"seed{seed}"
            sets.setdefault(name, []).append(inspect_set(folder, judge, module, store))
    rows = []
    for name, values in wga.items():
        mean, std = grokd.spread(values)
        rows.append([f"WGA, {name}", f"{mean:.1f} ± {std or 0:.1f}"])
    for a, b in PAIRS:
        rows.append([f"WGA, {a} − {b}", paired(wga[a], wga[b])])
    for name, key in itertools.product(sets, sets["config"][0]):
        mean, std = grokd.spread([found[key] for found in sets[name]])
        rows.append([f"{name}: {key}", f"{mean:.1f} ± {std or 0:.1f}"])
    header = [f"{args.recipe}, {args.split}, seeds {', '.join(map(str, args.seeds))}",
              "mean ± std, or [95 % interval]"]
    print(grokd.table(header, rows))
    if args.save:
        record = {"about": about, "header": header, "rows": rows, "wga": wga, "sets": sets}
        args.save.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

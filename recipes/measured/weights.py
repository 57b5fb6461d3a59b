"""How AGRE weighs a trained student's teachers, on aligned and on conflicting training images:

    python recipes/measured/weights.py colored_mnist:98 --root FOLDER \
        --out runs/colored_mnist-98 --save FILE

Reads a finished run. Prints, for each teacher, the mean weight by group, and whether the weights
favour the teachers that are right: the probability of the label under weighted and under equal
teachers. --save writes the table as FILE.json and the histograms as FILE.png.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import grokd  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--root", default=".")
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished run")
    parser.add_argument("--student", default="agre")
    parser.add_argument("--save", type=Path, help="without suffix")
    args = parser.parse_args()
    recipe = grokd.load_recipe(args.recipe)
    store = grokd.open_store(recipe.data, args.root)
    runtime = grokd.Runtime.start("float32")
    students = sorted((args.out / "students" / args.student).glob("seed*/model.safetensors"))
    teachers = sorted((args.out / "teachers").glob("*/dfr.safetensors"))
    paths = [*students, *teachers, args.out / "bias-model/model.safetensors"]
    models = [grokd.load_model(path) for path in paths]
    train = store.split("train")
    logits = grokd.predict(models, store, train, runtime)
    count, tau = len(students), recipe.students[args.student].tau
    taught, biased = logits[count:-1], logits[-1]
    groups, labels = store.groups[train], torch.from_numpy(store.labels[train])
    right = taught.softmax(-1)[:, torch.arange(len(train)), labels].numpy()  # [M, N]
    weights, shares = [], []
    for student in logits[:count]:
        found = grokd.agre_weights(student, taught, biased, tau)
        weights.append(found.numpy())
        shares.append(grokd.teacher_shares(found).numpy())
    mean, share = np.mean(weights, 0), np.mean(shares, 0)  # [M, N]
    rows: list[list[str]] = []
    for g in range(len(store.group_names)):
        of = groups == g
        lines: list[tuple[str, Any]] = [
            (f"weight of teacher {t}", mean[t, of]) for t in range(len(teachers))]
        lines += [("spread over teachers", mean[:, of].std(0, ddof=1)),
                  ("share of images without any weight",
                   np.mean([(w[:, of].sum(0) == 0) for w in weights], 0)),
                  ("p(label), teachers alike", right[:, of].mean(0)),
                  ("p(label), teachers weighted", (share * right)[:, of].sum(0))]
        for i, (label, values) in enumerate(lines):
            if not g:
                rows.append([label])
            rows[i].append(f"{float(np.mean(values)):.3f}")
    header = [f"{args.recipe}, {args.student}, training images", *store.group_names]
    print(grokd.table(header, rows))
    if args.save:
        record = {"about": grokd.origin(), "header": header, "rows": rows}
        args.save.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        figure, pyplot = grokd.new_figure()
        figure.set_size_inches(2.4 * len(teachers), 2.8)
        axes = figure.subplots(1, len(teachers), sharey=True, squeeze=False)[0]
        for t, axis in enumerate(axes):
            for g, name in enumerate(store.group_names):
                values = np.concatenate([w[t, groups == g] for w in weights])
                axis.hist(values, np.linspace(0, 2, 41), density=True, alpha=0.55, label=name)
            axis.set_title(f"teacher {t}", fontsize=9)
            axis.set_xlabel("W")
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].set_ylabel("density of training images")
        axes[0].legend(frameon=False, fontsize=8)
        args.save.with_suffix(".png").write_bytes(grokd.png(figure, pyplot))


if __name__ == "__main__":
    main()

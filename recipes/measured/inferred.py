"""What heads refitted without group labels are worth, on the true groups of the digits:

    python recipes/measured/inferred.py [--seeds 10 20 30 40 50] [--save]

For every seed, an ensemble of teachers, a biased model and students of recipes/digits_hidden.py,
with the background's colour hidden from all but the last row. Test images are scored by their true
groups; nothing was chosen by these, and AFR's gamma by the selection part of seed 0. Runs stand
under runs/inferred/SEED/HEAD and are gone on with; teachers are trained once a seed with hidden
colours, since only heads differ. --save writes inferred.json beside this file.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
sys.path.insert(0, str(ROOT))

import grokd  # noqa: E402

HEADS = {
    "classes": "classes (CB-LLR)",
    "inferred": "class, biased model right or wrong",
    "eiil": "class, EIIL's split",
    "afr": "AFR",
    "known": "true groups (DFR)",
}
KINDS = {"teachers": "teachers/*/dfr", "one-hot": "students/one-hot-dfr/*/model",
         "AVER": "students/average/*/model"}


def run(head: str, seed: int) -> Path:
    """The folder of a finished run. ERM networks come from the first, if its data are the same."""
    out = Path("runs/inferred") / str(seed) / head
    first = out.parent / next(iter(HEADS))
    if head not in (first.name, "known") and not out.exists():
        for part in ("teachers", "bias-model"):
            others = shutil.ignore_patterns("dfr.*", ".lock")
            shutil.copytree(first / part, out / part, ignore=others)
    grokd.command_line([
        "run", f"digits_hidden:{head}", "--teachers.seed", str(seed), "--bias-model.seed",
        f"1{seed:03d}", "--seeds", str(seed), "--out", str(out)])
    return out


def true_scores(out: Path, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Scores of a run's networks by their kind, on the true groups of the test images."""
    paths = {kind: sorted(out.glob(f"{pattern}.safetensors")) for kind, pattern in KINDS.items()}
    every = [str(path) for each in paths.values() for path in each]
    grokd.command_line([
        "eval", "digits_hidden:known", "--models", *every, "--seeds", str(seed), "--out",
        str(out / "true")])
    results = json.loads((out / "true" / "results-models.json").read_text())
    scores = {row["name"]: row["members"][0] for row in results["rows"]}
    return {kind: [scores[str(path)] for path in each] for kind, each in paths.items()}


def conflicting(out: Path) -> dict[str, float]:
    """How well inferred groups tell conflicting validation images from aligned ones, in per cent
    of the images of a class, the better way round."""
    store = grokd.open_store(grokd.load_recipe("digits_hidden:known").data, ".")
    val = store.split("val")
    labels, conflict = store.labels[val], store.attributes[val] != store.labels[val]
    model = grokd.load_model(out / "bias-model/model.safetensors")
    logits = grokd.predict([model], store, val, grokd.Runtime.start("float32"))[0]
    agreement = {}
    for head in ("inferred", "eiil"):
        attribute = grokd.infer_cells(logits, labels, head) % 2
        same = [float((attribute == conflict)[labels == y].mean()) for y in (0, 1)]
        agreement[head] = 100 * float(np.mean([max(each, 1 - each) for each in same]))
    return agreement


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 20, 30, 40, 50])
    parser.add_argument("--save", action="store_true", help="write inferred.json")
    args = parser.parse_args()
    about = grokd.origin()
    scores: dict[str, dict[str, list[dict[str, Any]]]] = {}
    agreement: dict[str, list[float]] = {}
    selected: dict[str, list[float]] = {}
    for seed in args.seeds:
        for head in HEADS:
            out = run(head, seed)
            for kind, found in true_scores(out, seed).items():
                scores.setdefault(head, {}).setdefault(kind, []).extend(found)
            if head != "known":
                rows = json.loads((out / "results.json").read_text())["rows"]
                student = next(row for row in rows if row["name"] == "one-hot-dfr")
                value = student["members"][0].get("selection_wga_inferred")
                selected.setdefault(head, []).append(value)
        for head, share in conflicting(Path("runs/inferred") / str(seed) / "inferred").items():
            agreement.setdefault(head, []).append(share)
    header = ["heads refitted by"]
    for kind in KINDS:
        header += [f"{kind}: WGA", f"{kind}: mean"]
    header += ["one-hot: inferred WGA, selection", "conflicting images told apart, %"]
    lines = []
    for head, name in HEADS.items():
        line = [name]
        for kind in KINDS:
            for key in ("wga", "mean"):
                line.append(grokd.mean_cell([each[key] for each in scores[head][kind]]))
        line += [grokd.mean_cell(selected.get(head, [])), grokd.mean_cell(agreement.get(head, []))]
        lines.append(line)
    print(grokd.table(header, lines))
    if args.save:
        record = {"about": about, "header": header, "rows": lines, "scores": scores,
                  "selected": selected, "agreement": agreement}
        (HERE / "inferred.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

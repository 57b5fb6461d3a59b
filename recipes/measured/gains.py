"""Where weighting teachers pays, from finished runs of recipes/where_it_pays.py:

    python recipes/measured/ensembles.py where_it_pays --seeds 200 210 220 230 240 \\
        --save recipes/measured/where_it_pays.json
    python recipes/measured/gains.py summary
    python recipes/measured/gains.py differences --of where_it_pays_twenty
    python recipes/measured/gains.py bad-teacher
    python recipes/measured/gains.py gaps --runs runs/ensembles/where_it_pays*/[0-9]*

`summary` writes tables of WGA, of paired differences with 95 % intervals (Student's t), and of how
gains follow the headroom, and a figure of the gain over AVER against the headroom, one point an
ensemble (--of where_it_pays_colored_mnist: of that record); `differences` writes those of a record
that has AVER, AGRE and departure alone. `bad-teacher` makes the teachers of those runs, puts a
network of random weights, or one trained on labels of which a share was shuffled, in the place of
the last one's, trains students from them, and writes a table. `gaps` counts for how many mixtures
of plain and refitted teachers departure keeps just the refitted ones, with several values of its
setting, from what the reports of --runs say of their teachers (--of where_it_pays_colored_mnist:
under that name).
"""

import argparse
import copy
import itertools
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save
from scipy import stats

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
sys.path.insert(0, str(ROOT))

import grokd  # noqa: E402

NAMES = {
    "average": "AVER", "agre": "AGRE", "agre-shrink0.5": "AGRE, shrink .5",
    "departure": "departure", "ca-mkd": "CA-MKD", "ae-kd": "AE-KD",
}
NUM_TEACHERS = 5


def interval(differences: np.ndarray) -> str:
    """Mean and 95 % interval of paired differences."""
    half = stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences)
    mean = differences.mean()
    return f"{mean:.1f} [{mean - half:.1f}, {mean + half:.1f}]"


def wga_of(results: dict[str, Any]) -> dict[str, np.ndarray]:
    """WGA by row, an entry for each ensemble (and for each teacher of it)."""
    return {row["name"]: np.array([member["wga"] for member in row["members"]])
            for row in results["rows"]}


def teachers_wga(results: dict[str, Any], share: float) -> tuple[np.ndarray, np.ndarray]:
    """WGA of the teachers of each ensemble, the first of them refitted: plain mean, and mean by
    the weights of departure."""
    wga = wga_of(results)
    refitted = wga["teachers, DFR"].reshape(-1, NUM_TEACHERS)
    plain = wga["teachers, ERM"].reshape(-1, NUM_TEACHERS)
    count = round(share * NUM_TEACHERS)
    teachers = np.concatenate([refitted[:, :count], plain[:, count:]], 1)
    weights = []
    for ensembles in results["by_ensemble"]:
        of_share = next(e for e in ensembles if f"average-{share}" in e["students"])
        weights.append([teacher["weight"] for teacher in of_share["teachers"]])
    return teachers.mean(1), (teachers * np.array(weights)).sum(1)


def by_selection(results: dict[str, Any], wga: dict[str, np.ndarray], name: str) -> np.ndarray:
    """WGA of each ensemble's student under the head that the selection part prefers."""
    chosen = []
    for i, choice in enumerate(results["choices"]):
        selected = {key: choice["wga"][key][0] for key in (name, f"{name}-dfr")}
        best = max(selected, key=lambda key: selected[key])
        chosen.append(wga[best][i])
    return np.array(chosen)


def shares_of(results: dict[str, Any]) -> list[float]:
    """The shares of refitted teachers that a record has."""
    names = [row["name"].removeprefix("average-") for row in results["rows"]]
    return [float(name) for name in names if name.replace(".", "").isdigit()]


def table_of_wga(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Rows of weightings under each head, columns of shares."""
    wga, shares = wga_of(results), shares_of(results)

    def cells(values: list[np.ndarray]) -> list[str]:
        return [grokd.mean_cell(each.tolist()) for each in values]

    header = ["WGA by share of refitted teachers", *(f"{share:g}" for share in shares)]
    teachers = [teachers_wga(results, share) for share in shares]
    average = [wga[f"average-{share}"] for share in shares]
    room = [t[1] - a for t, a in zip(teachers, average, strict=True)]
    rows = [
        ["teachers, mean", *cells([mean for mean, _ in teachers])],
        ["teachers, mean by departure", *cells([weighted for _, weighted in teachers])],
        ["headroom: the latter − AVER", *cells(room)],
    ]
    for name, label in NAMES.items():
        rows.append([label, *cells([wga[f"{name}-{share}"] for share in shares])])
    for name, label in NAMES.items():
        refitted = [wga[f"{name}-{share}-dfr"] for share in shares]
        rows.append([f"{label}, head refitted", *cells(refitted)])
    for name, label in NAMES.items():
        selected = [by_selection(results, wga, f"{name}-{share}") for share in shares]
        rows.append([f"{label}, head by selection", *cells(selected)])
    for name, label in (("one-hot", "one-hot"), ("one-hot-dfr", "one-hot, head refitted")):
        rows.append([label, *cells([wga[name]] * len(shares))])
    return header, rows


PAIRS = (("departure", "average"), ("departure", "agre"), ("agre", "average"),
         ("agre-shrink0.5", "average"), ("departure", "agre-shrink0.5"))


def table_of_differences(
    results: dict[str, Any], pairs: Sequence[tuple[str, str]], shares: Sequence[float]
) -> tuple[list[str], list[list[str]]]:
    """Paired differences between weightings, own heads."""
    wga, rows = wga_of(results), []
    for a, b in pairs:
        cells = [interval(wga[f"{a}-{share}"] - wga[f"{b}-{share}"]) for share in shares]
        rows.append([f"{NAMES[a]} − {NAMES[b]}", *cells])
    return ["WGA, mean [95 % interval]", *(f"{share:g}" for share in shares)], rows


def gains_by_headroom(results: dict[str, Any], name: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each share: headroom and gain over AVER of the ensembles, own heads."""
    wga, pairs = wga_of(results), []
    for share in shares_of(results):
        average = wga[f"average-{share}"]
        room = teachers_wga(results, share)[1] - average
        pairs.append((room, wga[f"{name}-{share}"] - average))
    return pairs


def table_of_headroom(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Does the headroom tell the gain: its correlation with it, and whether the signs agree."""
    rows = []
    for name in ("agre", "agre-shrink0.5", "departure"):
        pairs = gains_by_headroom(results, name)
        room, gain = (np.concatenate([pair[i] for pair in pairs]) for i in (0, 1))
        counts = []
        for of in (room > 0, room <= 0):
            counts.append(f"{int((gain[of] > 0).sum())} of {int(of.sum())}")
        rows.append([NAMES[name], f"{np.corrcoef(room, gain)[0, 1]:.2f}", *counts])
    return ["gain over AVER", "correlation with headroom", "gains where headroom is above 0",
            "gains where it is not"], rows


def draw_gain(results: dict[str, Any]) -> bytes:
    """Gain over AVER against headroom, one point an ensemble and share (PNG)."""
    shares = shares_of(results)
    figure, pyplot = grokd.new_figure()
    figure.set_size_inches(9, 4)
    axes = figure.subplots(1, 2, sharey=True)
    colours = pyplot.get_cmap("viridis", len(shares))
    for axis, name in zip(axes, ("agre", "departure"), strict=True):
        pairs = gains_by_headroom(results, name)
        for i, (share, (room, gain)) in enumerate(zip(shares, pairs, strict=True)):
            axis.scatter(room, gain, color=colours(i), s=24, label=f"{share:g} refitted")
        axis.axhline(0, color="0.7", zorder=0)
        axis.axvline(0, color="0.7", zorder=0)
        axis.set_xlabel("headroom: departing teachers' WGA − AVER's")
        axis.set_title(f"{NAMES[name]} − AVER", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("gain in WGA, points")
    axes[1].legend(frameon=False, fontsize=8)
    return grokd.png(figure, pyplot)


def write(name: str, about: dict[str, Any], header: list[str], rows: list[list[str]]) -> None:
    """Print a table and keep it as a record."""
    print(grokd.table(header, rows), "\n")
    record = {"about": about, "header": header, "rows": rows}
    (HERE / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def summary(of: str) -> None:
    results = json.loads((HERE / f"{of}.json").read_text())
    about = results["about"]  # the runs' own: their command, date and commit
    write(f"{of}_wga", about, *table_of_wga(results))
    write(f"{of}_differences", about, *table_of_differences(results, PAIRS, shares_of(results)))
    write(f"{of}_headroom", about, *table_of_headroom(results))
    (HERE / f"{of}_gain.png").write_bytes(draw_gain(results))


def differences(of: str) -> None:
    results = json.loads((HERE / f"{of}.json").read_text())
    differing = table_of_differences(results, PAIRS[:3], shares_of(results))
    write(f"{of}_differences", results["about"], *differing)


# Share of the training labels that a bad teacher has learnt shuffled; None: it has learnt nothing.
SPOILT = {"one random": None, "all labels shuffled": 1.0, "half of them": 0.5, "a quarter": 0.25}


def spoil(out: Path, shuffled_share: float | None, seed: int) -> None:
    """Put a bad network in the place of the last teacher, under the old one's description."""
    recipe = grokd.load_recipe("where_it_pays:bad-teacher")
    store = grokd.open_store(recipe.data, ".")
    section = recipe.teachers.of(NUM_TEACHERS - 1)
    model = grokd.build_model(section.arch[0], "random", 2, section.input, 7000 + seed)
    if shuffled_share:
        shuffled, train = copy.copy(store), store.split("train")
        mixed = train[grokd.permutation(len(train), seed, 98)[: round(shuffled_share * len(train))]]
        shuffled.labels = store.labels.copy()
        shuffled.labels[mixed] = store.labels[mixed][grokd.permutation(len(mixed), seed, 99)]
        artefact = grokd.Artefact("spoilt", out / "spoilt.safetensors", "", {}, {})
        job = grokd.Job(artefact, model, section, section.train, shuffled, 7000 + seed,
                        grokd.label_losses)
        grokd.fit(job, grokd.Runtime.start("float32"))
        shutil.rmtree(artefact.work, ignore_errors=True)
    for head in ("erm", "dfr"):
        path = out / "teachers" / str(NUM_TEACHERS - 1) / f"{head}.safetensors"
        metadata = grokd.read_metadata(path) | {"trunk": grokd.trunk_key(model.eval())}
        path.write_bytes(save(model.plain_state(), metadata))


def bad_teacher(seeds: list[int]) -> None:
    about = grokd.origin()
    columns: dict[str, dict[str, list[float]]] = {}
    weights: dict[str, list[float]] = {kind: [] for kind in SPOILT}
    skills: dict[str, list[float]] = {kind: [] for kind in SPOILT}
    for seed in seeds:
        source = Path("runs/ensembles/where_it_pays") / str(seed)
        for stage, first in (("teachers", str(seed)), ("bias-model", f"1{seed:03d}")):
            grokd.command_line([stage, "where_it_pays", "--seed", first, "--out", str(source)])
    for kind, share in SPOILT.items():
        for seed in seeds:
            source = Path("runs/ensembles/where_it_pays") / str(seed)
            out = Path("runs/ensembles/where_it_pays-bad") / kind.replace(" ", "-") / str(seed)
            if not (out / "results.json").is_file():
                shutil.rmtree(out, ignore_errors=True)
                for part in ("teachers", "bias-model"):
                    shutil.copytree(source / part, out / part)
                spoil(out, share, seed)
            grokd.command_line([
                "run", "where_it_pays:bad-teacher", "--teachers.seed", str(seed),
                "--bias-model.seed", f"1{seed:03d}", "--seeds", str(seed), "--out", str(out)])
            results = json.loads((out / "results.json").read_text())
            for name, values in wga_of(results).items():
                columns.setdefault(name, {}).setdefault(kind, []).extend(values.tolist())
            *good_ones, bad = results["ensembles"][0]["teachers"]
            weights[kind].append(bad["weight"])
            skills[kind].append(bad["skill"] / max(each["skill"] for each in good_ones))
    good = wga_of(json.loads((HERE / "where_it_pays.json").read_text()))
    rows = []
    for suffix, words in (("", ""), ("-dfr", ", head refitted")):
        for name, label in NAMES.items():
            key = f"{name}-1.0{suffix}"
            cells = [grokd.mean_cell(columns[key][kind]) for kind in weights]
            rows.append([label + words, grokd.mean_cell(good[key].tolist()), *cells])
    shares = [f"{np.mean(values):.4f}, at most {max(values):.4f}" for values in weights.values()]
    rows.append(["weight that departure gives to it", "–", *shares])
    spans = [f"{min(values):.2f} to {max(values):.2f}" for values in skills.values()]
    rows.append(["its skill, over the greatest", "–", *spans])
    write("where_it_pays_bad", about,
          ["WGA, five refitted teachers", "all good", *SPOILT], rows)


Teachers = list[list[dict[str, Any] | None]]  # of each its plain and its refitted form, if known


def teachers_of(run: Path) -> Teachers:
    """What a run's report says of its teachers."""
    results = json.loads((run / "results.json").read_text())
    found = {teacher["name"]: teacher for each in results["ensembles"]
             for teacher in each["teachers"]}
    return [[found.get(f"teachers/{i}/{head}") for head in ("erm", "dfr")]
            for i in range(NUM_TEACHERS)]


def outcomes(teachers: Teachers, gap: float) -> list[tuple[int, str]]:
    """Of every mixture how many are refitted, and whether departure keeps exactly those (of none
    all)."""
    found = []
    for mixture in itertools.product((0, 1), repeat=NUM_TEACHERS):
        picked = [forms[refitted] for forms, refitted in zip(teachers, mixture, strict=True)]
        known = [each for each in picked if each]
        if len(known) < NUM_TEACHERS:
            continue
        kept = {*grokd.departing(
            [each["departure"] for each in known], [each["skill"] for each in known], gap)}
        right = {i for i, refitted in enumerate(mixture) if refitted or not any(mixture)}
        outcome = "exact" if kept == right else "biased" if kept - right else "fewer"
        found.append((sum(mixture), outcome))
    return found


def gaps(of: str, runs: list[Path]) -> None:
    about, rows = grokd.origin(), []
    for gap in (1.5, 2.0, 2.5, 3.0, 4.0, 6.0):
        found = [each for run in runs for each in outcomes(teachers_of(run), gap)]
        cells = []
        for refitted in range(NUM_TEACHERS + 1):
            these = [outcome for count, outcome in found if count == refitted]
            cell = f"{these.count('exact')} of {len(these)}"
            cells.append(f"{cell} ({these.count('biased')})" if "biased" in these else cell)
        rows.append([f"{gap:g}", *cells])
    columns = [f"{refitted} refitted" for refitted in range(NUM_TEACHERS + 1)]
    write(f"{of}_gaps", about, ["departure_gap", *columns], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("summary", "differences", "bad-teacher", "gaps"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[200, 210, 220, 230, 240])
    parser.add_argument("--of", default="where_it_pays", help="the record's name")
    parser.add_argument("--runs", type=Path, nargs="+", help="folders of finished runs")
    args = parser.parse_args()
    if args.what == "gaps" and not args.runs:
        parser.error("gaps needs --runs")
    if args.what == "summary":
        summary(args.of)
    elif args.what == "differences":
        differences(args.of)
    elif args.what == "gaps":
        gaps(args.of, args.runs)
    else:
        bad_teacher(args.seeds)


if __name__ == "__main__":
    main()

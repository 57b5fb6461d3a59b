"""Attributes that are known in part or not at all: inferred groups, AFR, and analysis in eval."""

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run, write_images
from PIL import Image
from safetensors.torch import load_file
from test_processes import TWO, files, processes
from test_runs import same

import grokd
from grokd import DFR, Problem, Row, Runtime

RECIPE = '''"""Colours that tell the class in training; no group labels."""
from dataclasses import replace
from grokd import BiasModel, DFR, Data, Distill, Recipe, Teachers, Train

train = Train(epochs=6, batch_size=8, lr=0.02)
dfr = DFR(groups="inferred", num_refits=2, penalties=(1.0,))
one_hot = Distill("one-hot", arch="cnn2", weights="random", train=train, head="dfr", dfr=dfr)
recipe = Recipe(
    data=Data(size=20, crop=16, attribute_column="", store="store", random_crop=False, flip=False),
    teachers=Teachers(2, ("cnn2",), ("random",), dfr=dfr, train=train),
    bias_model=BiasModel(arch="cnn2", weights="random", train=train),
    students={
        "one-hot": replace(one_hot, head="own"),
        "inferred": one_hot,
        "eiil": replace(one_hot, dfr=replace(dfr, groups="eiil")),
        "afr": replace(one_hot, dfr=replace(dfr, method="afr", steps=50)),
        "classes": replace(one_hot, dfr=replace(dfr, groups="known")),
    },
    seeds=(0,),
)
'''


def edit_table(folder: Path, change: Callable[[dict[str, str]], bool]) -> None:
    """Rewrite metadata.csv: `change` edits a row, and says whether it stays."""
    with open(folder / "metadata.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    rows = [row for row in rows if change(row)]
    with open(folder / "metadata.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def hide_training(row: dict[str, str]) -> bool:
    row["place"] = "" if row["split"] == "train" else row["place"]
    return True


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images whose colour gives the class away in training, and a recipe without attributes."""
    folder = write_images(tmp_path_factory.mktemp("coloured") / "images", per_group=20)
    edit_table(folder, lambda row: row["split"] != "train" or row["label"] == row["place"])
    (folder / "tiny.py").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def finished(coloured: Path, grokd_process: Run) -> Path:
    """The same after `run`; not to be changed."""
    (coloured / "printed.txt").write_text(grokd_process("run", "tiny.py", cwd=coloured).stdout)
    return coloured


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "runs/tiny/results.json").read_text())
    return found


# Attributes of training are unknown


def test_training_images_may_lack_an_attribute(images: Path) -> None:
    edit_table(images, hide_training)
    data = grokd.Data(size=20, crop=16, attribute_column="place", store=str(images / "store"))
    store = grokd.open_store(data, str(images))
    assert store.group_names[3] == "class 1, attribute 1"
    assert store.counts("test").tolist() == store.counts("val").tolist() == [4, 4, 4, 4]
    assert store.num_unknown == 16 and not store.counts("train").any()
    lines = grokd.group_table(store).splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[2:4]] == ["–", "2"]
    assert [cell.strip() for cell in lines[-1].split("|")[1:4]] == ["attribute unknown", "16", "–"]


@pytest.mark.parametrize("names", [(), ("sea", "land")])
def test_empty_cells_beside_names_are_unknown(images: Path, names: tuple[str, ...]) -> None:
    def name(row: dict[str, str]) -> bool:
        row["place"] = ["sea", "land"][int(row["place"])]
        row["place"] = "" if row["image"] in ("train000.png", "train111.png") else row["place"]
        return True

    edit_table(images, name)
    data = grokd.Data(size=20, crop=16, attribute_column="place", store=str(images / "store"),
                      attribute_names=names)
    attributes = grokd.open_store(data, str(images)).attributes
    assert (attributes == -1).sum() == 2
    sea, land = (0, 1) if names else (1, 0)
    assert attributes[:5].tolist() == [-1, sea, sea, sea, land]


def test_unknown_attributes_stay_unknown_among_aligned_and_conflicting(tmp_path: Path) -> None:
    def read(root: Path) -> list[Row]:
        random = np.random.default_rng(0)
        return [
            Row(random.integers(0, 255, (8, 8, 3), dtype=np.uint8), y, -1 if hidden else a, split)
            for split in grokd.SPLITS for y in (0, 1) for a in (0, 1) for hidden in (0, 1)
            if split == "train" or not hidden
        ]

    data = grokd.Data(reader=read, groups="aligned", size=8, crop=8, store=str(tmp_path))
    store = grokd.open_store(data, "")
    assert store.attributes[:8].tolist() == [0, -1, 1, -1, 1, -1, 0, -1]
    assert store.cells[:4].tolist() == [0, -1, 1, -1]
    assert (store.groups < 0).sum() == 4


@pytest.mark.parametrize("split", ["val", "test"])
def test_missing_attribute_of_an_evaluation_image_is_named(images: Path, split: str) -> None:
    def empty(row: dict[str, str]) -> bool:
        row["place"] = "" if row["image"] == f"{split}000.png" else row["place"]
        return True

    edit_table(images, empty)
    line = {"val": 18, "test": 34}[split]
    data = grokd.Data(size=20, crop=16, attribute_column="place", store=str(images / "store"))
    told = f"line {line}: 'place' is missing, .*set attribute_column = ''"
    with pytest.raises(Problem, match=told):
        grokd.open_store(data, str(images))


def test_without_training_groups_the_run_leaves_their_figures_out(
    images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_table(images, hide_training)
    text = (images / "tiny.py").read_text().replace("seeds=(0, 1)", "seeds=(0,)")
    (images / "tiny.py").write_text(text)
    monkeypatch.chdir(images)
    for stage in ("teachers", "bias-model", "eval"):
        grokd.command_line([stage, "tiny.py"])
    report = (images / "runs/tiny/report.md").read_text()
    assert "adjusted" not in report + capsys.readouterr().out
    assert "| class 1, attribute 1 |    4 |     – |" in report
    assert "Groups without training images" not in report
    found = results(images)
    assert found["groups"][0]["train_images"] is None
    assert found["rows"][1]["name"] == "teachers, DFR"
    assert found["rows"][1]["members"][0]["adjusted_mean"] is None
    (images / "tiny.py").write_text(text.replace(
        'student = Distill(', 'student = Distill(rebalance="groups", '))
    for args, told in (
        (["distill", "tiny.py"], r"students\['agre'\].rebalance = 'groups' needs the attribute of "
                                 "every training image, and 16 have none"),
        (["eval", "tiny.py", "--split", "train"], "every training image, and 16 have none"),
    ):
        if args[0] == "eval":
            (images / "tiny.py").write_text(text)
        with pytest.raises(Problem, match=told):
            grokd.command_line(args)


# Groups are inferred


def test_eiil_split_equals_a_slow_literal_one() -> None:
    """Plain numbers, derivatives and Adam by hand."""
    random = np.random.default_rng(1)
    logits, labels = random.normal(size=(6, 3)) * 2, np.array([1, 1, 1, 1, 1, 1])
    got = grokd.eiil_split(torch.from_numpy(logits), labels, 5)
    g = []
    for z, y in zip(logits, labels, strict=True):
        p = [np.exp(each) / sum(np.exp(other) for other in z) for each in z]
        g.append(sum((p[c] - (c == y)) * z[c] for c in range(3)))
    w = grokd.noise_like((6,), torch.float64, 5, grokd.Stream.SPLIT).tolist()
    first, second = [0.0] * 6, [0.0] * 6
    for step in range(1, grokd.EIIL_STEPS + 1):
        s = [1 / (1 + np.exp(-each)) for each in w]
        one = sum(a * b for a, b in zip(s, g, strict=True)) / 6
        other = sum((1 - a) * b for a, b in zip(s, g, strict=True)) / 6
        for i in range(6):
            slope = (one - other) * g[i] / 6 * s[i] * (1 - s[i])
            first[i] = 0.9 * first[i] + 0.1 * slope
            second[i] = 0.999 * second[i] + 0.001 * slope**2
            m, v = first[i] / (1 - 0.9**step), second[i] / (1 - 0.999**step)
            w[i] += grokd.EIIL_LR * m / (np.sqrt(v) + 1e-8)
    assert got.tolist() == [int(each > 0) for each in w]
    assert len({*got.tolist()}) == 2


def test_eiil_tells_right_from_wrong_where_there_are_two_classes() -> None:
    random = np.random.default_rng(0)
    labels = np.repeat([0, 1], 60)
    logits = torch.from_numpy(random.normal(size=(120, 2)))
    cells = grokd.infer_cells(logits, labels, "eiil")
    wrong = logits.argmax(1).numpy() != labels
    assert (cells // 2 == labels).all()
    for y in (0, 1):
        of_class = labels == y
        agreement = ((cells % 2)[of_class] == wrong[of_class]).mean()
        assert max(agreement, 1 - agreement) == 1


def test_inferred_cells_are_class_and_whether_the_biased_model_is_wrong() -> None:
    logits = torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 0, 2], [0, 2, 0]])
    assert grokd.infer_cells(logits, np.array([0, 0, 2, 2]), "inferred").tolist() == [0, 1, 4, 5]
    cells = np.repeat([0, 1, 2, 3], [9, 4, 3, 9])
    assert grokd.small_cells(cells, ["cat", "dog"]) == "3 of dog"
    assert grokd.small_cells(np.repeat([0, 1, 2], 4), ["cat", "dog"]) == "0 of dog"


def biased_cells(folder: Path, model: str, part: str) -> tuple[np.ndarray, grokd.Store]:
    """Class and right or wrong, of one biased model's file, image by image."""
    recipe = grokd.load_recipe(str(folder / "tiny.py"))
    data = replace(recipe.data, store=str(folder / "store"))
    store = grokd.open_store(data, str(folder))
    network = grokd.load_model(folder / f"runs/tiny/{model}.safetensors")
    cells = []
    for i in store.split(part):
        answer = int(network(store.view(np.array([i]), torch.device("cpu"))).argmax())
        cells.append(2 * int(store.labels[i]) + int(answer != store.labels[i]))
    return np.array(cells), store


def test_heads_balance_what_the_biased_model_gets_right_and_wrong(finished: Path) -> None:
    """Refitted anew, with cells found image by image and scikit-learn's part as DFR has it."""
    cells, store = biased_cells(finished, "teachers/0/erm", "reweighting")
    assert (np.bincount(cells) >= 4).all()
    for name, erm in (("teachers/1/dfr", "teachers/1/erm"),
                      ("students/inferred/seed0/model", "students/one-hot/seed0/model")):
        model = grokd.load_model(finished / f"runs/tiny/{erm}.safetensors")
        seed = int(name.startswith("teachers"))  # teacher 1, student 0
        dfr = DFR(num_refits=2, penalties=(1.0,))
        runtime = Runtime.start("float32")
        grokd.refit_head(model, store, dfr, grokd.Train(), seed, runtime, cells)
        assert same(load_file(finished / f"runs/tiny/{name}.safetensors"), model.plain_state())
        grokd.refit_head(model, store, dfr, grokd.Train(), seed, runtime)
        assert not same(load_file(finished / f"runs/tiny/{name}.safetensors"), model.plain_state())


def test_report_scores_and_ships_by_inferred_groups(finished: Path) -> None:
    found, report = results(finished), (finished / "runs/tiny/report.md").read_text()
    rows = {row["name"]: row["members"] for row in found["rows"]}
    assert "teachers, DFR, inferred groups" in rows
    for part, key in (("test", "wga_inferred"), ("selection", "selection_wga_inferred")):
        cells, store = biased_cells(finished, "teachers/0/erm", part)
        for row in ("one-hot", "inferred"):
            member, indices = rows[row][0], store.split(part)
            model = grokd.load_model(finished / f"runs/tiny/{member['name']}.safetensors")
            answers = model(store.view(indices, torch.device("cpu"))).argmax(1).numpy()
            right = answers == store.labels[indices]
            expected = min(100 * right[cells == cell].mean() for cell in range(4))
            assert member[key] == pytest.approx(expected)
    choice = found["choice"]
    selected = {name: rows[name][0]["selection_wga_inferred"] for name in choice["wga"]}
    assert {name: mean for name, (mean, _) in choice["wga"].items()} == pytest.approx(selected)
    assert choice["by"] == "inferred"
    assert "over inferred groups (its class and whether the biased model is right)" in report
    header = next(line for line in report.splitlines() if line.startswith("|") and "models" in line)
    assert [each.strip() for each in header.split("|")[3:9]] == [
        "WGA", "mean", "group mean", "adjusted mean", "WGA (inferred)", "selection WGA (inferred)"]


def test_refitted_heads_name_the_biased_model_as_their_parent(finished: Path) -> None:
    def parents(name: str) -> set[str]:
        metadata = grokd.read_metadata(finished / f"runs/tiny/{name}.safetensors")
        return {*json.loads(metadata["parents"])}

    assert parents("teachers/1/dfr") == {"teachers/1/erm", "teachers/0/erm"}
    assert parents("teachers/0/dfr") == {"teachers/0/erm"}
    assert parents("students/eiil/seed0/model") == {"teachers/0/erm"}
    for name in ("one-hot", "afr", "classes"):
        assert parents(f"students/{name}/seed0/model") == set()


@pytest.mark.slow
def test_two_processes_refit_inferred_groups_as_one_does(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "two")
    shutil.rmtree(folder / "runs")
    processes(TWO, "teachers", "tiny.py", "--parallel", "models", cwd=folder)
    one, two = files(finished / "runs/tiny/teachers"), files(folder / "runs/tiny/teachers")
    assert one.keys() == two.keys()
    assert all(same(load_file(one[name]), load_file(two[name])) for name in one)


def test_a_trained_biased_model_is_there_before_heads_are_refitted(
    coloured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(coloured, tmp_path / "trained", ignore=shutil.ignore_patterns("runs"))
    text = (folder / "tiny.py").read_text()
    text = text.replace('BiasModel(', 'BiasModel(kind="early-stopped", stop_after=5, ')
    (folder / "tiny.py").write_text(text)
    monkeypatch.chdir(folder)
    with pytest.raises(Problem, match=r"bias-model/model.* is missing. Make it with .*bias-model"):
        grokd.command_line(["teachers", "tiny.py"])
    assert not [*folder.glob("runs/tiny/teachers/*/erm.safetensors")]
    grokd.command_line(["run", "tiny.py", "--student", "inferred"])
    cells, _ = biased_cells(folder, "bias-model/model", "reweighting")
    assert (np.bincount(cells, minlength=4) >= 4).all()
    metadata = grokd.read_metadata(folder / "runs/tiny/teachers/0/dfr.safetensors")
    assert json.loads(metadata["parents"]).keys() == {"teachers/0/erm", "bias-model/model"}
    (folder / "tiny.py").write_text(text.replace("stop_after=5", "stop_after=4"))
    grokd.command_line(["bias-model", "tiny.py", "--redo"])
    told = "teachers/0/dfr.safetensors was made with other settings .*parent bias-model/model"
    with pytest.raises(Problem, match=told):
        grokd.command_line(["teachers", "tiny.py"])


def test_biased_model_that_fits_everything_is_refused(
    coloured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation without images against the colour."""
    folder = shutil.copytree(coloured, tmp_path / "fits", ignore=shutil.ignore_patterns("runs"))
    edit_table(folder, lambda row: row["split"] != "val" or row["label"] == row["place"])
    monkeypatch.chdir(folder)
    told = (r"dfr.groups = 'inferred': .* too few images .*\(\d of class 0.*; 4 are needed\): .*"
            "Hold out images .*'early-stopped' or 'gce'")
    with pytest.raises(Problem, match=told):
        grokd.command_line(["run", "tiny.py"])
    assert (folder / "runs/tiny/teachers/1/erm.safetensors").is_file()  # nothing is lost


# AFR


def test_afr_equals_a_slow_literal_version() -> None:
    random = np.random.default_rng(3)
    x, y = random.normal(size=(12, 4)) * 3, np.array([0, 1, 2] * 3 + [0, 0, 0])
    start = random.normal(size=(3, 4)), random.normal(size=3)
    settings = DFR(method="afr", gamma=3.0, regularisation=0.2, lr=0.5, steps=7)
    got = grokd.afr_head(x, y, *start, settings)

    def probabilities(weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        rows = []
        for row in x:
            z = np.array([sum(weight[c] * row) + bias[c] for c in range(3)])
            rows.append(np.exp(z) / np.exp(z).sum())
        return np.array(rows)

    p = probabilities(*start)
    mu = np.array([np.exp(-3.0 * p[i, y[i]]) * 12 / (y == y[i]).sum() for i in range(12)])
    mu /= mu.sum()
    weight, bias = start[0].copy(), start[1].copy()
    clipped = 0
    for _ in range(7):
        p = probabilities(weight, bias)
        slope_w = 2 * 0.2 * (weight - start[0])
        slope_b = 2 * 0.2 * (bias - start[1])
        for i in range(12):
            error = mu[i] * (p[i] - np.eye(3)[y[i]])
            slope_w += np.outer(error, x[i])
            slope_b += error
        norm = np.sqrt((slope_w**2).sum() + (slope_b**2).sum())
        clipped += norm > 1
        factor = min(1.0, 1 / (norm + 1e-6))
        weight, bias = weight - 0.5 * factor * slope_w, bias - 0.5 * factor * slope_b
    assert 0 < clipped < 7
    np.testing.assert_allclose(got[0], weight, atol=1e-9)
    np.testing.assert_allclose(got[1], bias, atol=1e-9)


def test_afr_heads_need_no_biased_model_and_move_from_the_learnt_one(finished: Path) -> None:
    own, moved = (load_file(finished / f"runs/tiny/students/{name}/seed0/model.safetensors")
                  for name in ("one-hot", "afr"))
    assert {key for key in own if not torch.equal(own[key], moved[key])} == {
        "fc.weight", "fc.bias"}
    assert (own["fc.weight"] - moved["fc.weight"]).norm() <= 50 * 0.01  # clipped steps


def test_fields_of_the_other_kinds_of_refitting_are_without_effect(
    capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = grokd.load_recipe("digits")
    flags = ["--student", "one-hot-dfr", "--dfr.gamma", "3"]
    _, _, _ = grokd.apply_flags("distill", recipe, "digits", flags)
    assert ("warning: dfr.gamma has no effect on one-hot-dfr: it belongs to method afr"
            in capsys.readouterr().out)
    flags = ["--student", "one-hot-dfr", "--dfr.method", "afr", "--dfr.groups", "eiil"]
    changed, _, _ = grokd.apply_flags("distill", recipe, "digits", flags)
    assert [*changed.students] == ["one-hot-dfr+dfr.method=afr"]
    assert "warning: dfr.groups has no effect" in capsys.readouterr().out


def test_heads_of_known_groups_keep_their_fingerprints() -> None:
    """Files made before groups could be inferred are still finished."""
    assert grokd.settings_of(DFR()) == {
        "method": "auto", "num_refits": 20, "epochs": 100,
        "penalties": [1.0, 0.7, 0.3, 0.1, 0.07, 0.03, 0.01],
    }
    assert grokd.settings_of(DFR(groups="eiil"))["groups"] == "eiil"


# Analysis in eval


def log_softmax(z: np.ndarray) -> list[float]:
    return [float(each - np.log(sum(np.exp(other) for other in z))) for each in z]


def test_error_parts_equal_slow_literal_sums() -> None:
    random = np.random.default_rng(0)
    student = {"train": random.normal(size=(5, 3)), "scored": random.normal(size=(4, 3))}
    teachers = random.normal(size=(2, 5, 3))
    labels = {"train": np.array([0, 1, 2, 0, 1]), "scored": np.array([2, 2, 0, 1])}
    groups = np.array([0, 0, 1, 3])
    as_tensors = [{key: torch.from_numpy(value) for key, value in each.items()}
                  for each in (student, {"train": teachers}, labels)]
    got = grokd.error_parts(as_tensors[0], as_tensors[1], as_tensors[2], groups, 4)
    risk = {
        part: [-log_softmax(z)[y] for z, y in zip(student[part], labels[part], strict=True)]
        for part in student
    }
    kd = 0.0
    for i, z in enumerate(student["train"]):
        for c in range(3):
            target = sum(np.exp(log_softmax(t[i])[c]) for t in teachers) / 2
            kd -= target * log_softmax(z)[c] / 5
    train, scored = sum(risk["train"]) / 5, sum(risk["scored"]) / 4
    assert got["risk_kd"] == pytest.approx(kd)
    assert (got["omega"], got["psi"]) == pytest.approx((scored - train, train - kd))
    assert got["omega"] + got["psi"] == pytest.approx(got["risk_scored"] - got["risk_kd"])
    first, second, _, third = got["group_gaps"]
    assert got["group_gaps"][2] is None
    assert first == pytest.approx(sum(risk["scored"][:2]) / 2 - train)
    assert (second, third) == pytest.approx(
        (risk["scored"][2] - train, risk["scored"][3] - train))


def test_divergence_equals_slow_literal_histograms() -> None:
    random = np.random.default_rng(2)
    a, b = random.normal(size=(30, 2)), random.normal(size=(50, 2))
    b[:, 0] += 3
    a[:, 1] = b[:, 1] = 0.5  # a dimension that says nothing
    got = grokd.divergences(a, b)
    low, high = min(*a[:, 0], *b[:, 0]), max(*a[:, 0], *b[:, 0])
    counts = np.ones((2, 20))
    for k, values in enumerate((a[:, 0], b[:, 0])):
        for value in values:
            counts[k, min(int((value - low) / (high - low) * 20), 19)] += 1
    p, q = counts[0] / 50, counts[1] / 70
    expected = sum(x * np.log(x / y) + y * np.log(y / x) for x, y in zip(p, q, strict=True))
    assert got == pytest.approx([expected, 0.0])


def test_features_that_tell_groups_of_a_class_apart_are_found() -> None:
    random = np.random.default_rng(4)
    labels, attributes = np.repeat([0, 1], 60), np.tile([0, 1], 60)
    features = random.normal(size=(120, 4))
    features[:, 1] += 5 * attributes  # the shortcut
    features[:, 2] += 9 * labels  # the class, which tells no groups of a class apart
    found = grokd.telling_features(features, labels, attributes, 1)
    assert found.keys() == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert found[0, 1][0][0] == found[1, 1][0][0] == 1
    one, other = (features[(labels == 1) & (attributes == a)] for a in (1, 0))
    assert found[1, 1][0][1] == grokd.divergences(one, other)[1]
    assert not [i for i, _ in (*found[0, 0], *found[1, 0]) if i == 1]  # there it is not excited


def test_analysis_describes_the_saved_networks(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figures recomputed from the files alone, image by image."""
    monkeypatch.chdir(images)
    chosen = ["--student", "agre", "one-hot", "--seeds", "0"]
    for command in (["teachers", "tiny.py"], ["bias-model", "tiny.py"],
                    ["distill", "tiny.py", *chosen], ["eval", "tiny.py", "--seeds", "0"]):
        grokd.command_line(command)
    assert results(images)["analysis"] == []
    grokd.command_line(["eval", "tiny.py", "--analysis", "--seeds", "0"])
    rows = {row["name"]: row["members"][0] for row in results(images)["analysis"]}
    store = grokd.open_store(grokd.load_recipe(str(images / "tiny.py")).data, str(images))
    names = ["students/agre/seed0/model", "teachers/0/dfr", "teachers/1/dfr", "teachers/0/erm"]
    networks = [grokd.load_model(images / f"runs/tiny/{name}.safetensors") for name in names]
    weights: dict[int, list[list[float]]] = {g: [] for g in range(4)}
    agreed = []
    for i in store.split("test"):
        view = store.view(np.array([i]), torch.device("cpu"))
        z = [each(view)[0].double() for each in networks]
        student, *others = [each.div(4).softmax(0) for each in z]  # tau 4
        pulls = [student - each for each in others]
        cosine = [torch.nn.functional.cosine_similarity(t, pulls[2], dim=0) for t in pulls[:2]]
        weights[int(store.groups[i])].append([round(1 - float(each)) for each in cosine])
        taught = (z[1].softmax(0) + z[2].softmax(0)).argmax()
        agreed.append(int(taught) == int(z[0].argmax()))
    agre = rows["agre"]
    for g in range(4):
        for t in range(2):
            expected = np.mean([each[t] for each in weights[g]])
            assert agre["weights"][t][g] == pytest.approx(expected)
        assert agre["zero_weight"][g] == 100 * np.mean([sum(each) == 0 for each in weights[g]])
    assert agre["agreement"] == 100 * np.mean(agreed)
    assert agre["error"]["psi"] is not None and rows["one-hot"]["error"]["psi"] is None
    assert "weights" not in rows["one-hot"]

    feature = agre["features"][0]
    pooled = networks[0].features(store.view(store.split("test"), torch.device("cpu")))
    column = pooled[:, feature["dimension"]].detach().numpy()
    groups = store.groups[store.split("test")]
    assert feature["group"] == "class 0, attribute 0"
    assert feature["mean"] == pytest.approx(column[groups == 0].mean(), rel=1e-4)
    assert feature["mean_elsewhere"] == pytest.approx(column[groups == 1].mean(), rel=1e-4)
    assert feature["mean"] > feature["mean_elsewhere"]
    head = networks[0].head.weight[:, feature["dimension"]]
    assert feature["weight"] == pytest.approx(float(head[0] - head[1]), rel=1e-4)
    assert feature["images"][0] == store.split("test")[column.argmax()]
    report = (images / "runs/tiny/report.md").read_text()
    assert "## Students taken apart" in report and "| agre: teachers/1/dfr " in report
    with Image.open(images / "runs/tiny/features-agre.png") as sheet:
        assert sheet.width > 500

"""What `run --dry-run` says, against what the run then makes; the recipe celeba_config."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT, SETS_OF_IMAGES, write_images

import grokd
from grokd import DryRun, Problem

SETS = SETS_OF_IMAGES.replace("epochs=2", "epochs=3") + '''
recipe = grokd.replace(recipe, students={
    "kd": kd,
    "kd-config": grokd.replace(kd, augmented="config", augmented_ratio=0.5),
    "kd-plain": grokd.replace(kd, augmented="plain", start="kd"),
    "tab": grokd.replace(kd, rebalance="tab"),
})
'''


def run(folder: Path, patch: pytest.MonkeyPatch, *flags: str) -> DryRun:
    """A dry run of tiny.py in this process, without the seconds it times each step for."""
    plans = []
    patch.chdir(folder)
    with patch.context() as here:
        original = grokd.dry_run
        here.setattr(grokd, "PROBE_SECONDS", 0.0)
        here.setattr(grokd, "dry_run", lambda ctx: plans.append(original(ctx)))
        grokd.command_line(["run", "tiny.py", "--dry-run", *flags])
    return plans[0]


def listing(folder: Path) -> dict[str, int]:
    """Every file and folder, with when it was written."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


def histories(folder: Path, kind: str) -> list[int]:
    """Steps of every training of a kind that was finished."""
    files = sorted((folder / "runs/tiny" / kind).rglob("*.history.json"))
    return [json.loads(file.read_text())["epochs"][-1]["step"] for file in files]


@pytest.fixture
def finished(images: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, DryRun]:
    """The tiny data after a dry run, which left no trace, and the run."""
    before = listing(images)
    plan = run(images, monkeypatch)
    assert listing(images) == before
    grokd.command_line(["run", "tiny.py"])
    return images, plan


def test_dry_run_foretells_the_run_and_counts_nothing_twice(
    finished: tuple[Path, DryRun], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, plan = finished
    stages, out = plan.stages, folder / "runs/tiny"
    shown = {stage.name: stage for stage in stages.values()}
    for arch, i in (("cnn2", 0), ("resnet8", 1)):
        assert shown[f"teachers {arch}"].to_make == 1
        assert [shown[f"teachers {arch}"].steps] == histories(folder, f"teachers/{i}")
    assert shown["DFR heads"].to_make == len([*out.rglob("dfr.safetensors")]) == 2
    assert shown["biased model (a copy)"].to_make == len([*out.glob("bias-model/model.safe*")])
    one_hot, agre = shown["students one-hot, one-hot-dfr"], shown["students agre"]
    assert one_hot.to_make + agre.to_make == len([*out.glob("students/*/*/model.safetensors")])
    assert one_hot.steps == sum(histories(folder, "students/one-hot"))
    assert agre.steps == sum(histories(folder, "students/agre"))
    assert (agre.images, agre.epochs) == (16, 2)

    cache = [path for path in (folder / "store/targets").iterdir() if path.name != "lock"]
    asked = shown["teachers' answers (cache)"]
    assert asked.to_make == 2 and asked.images == 2 * 2 * 16  # trunks, views, images
    assert asked.disk == sum(path.stat().st_size - 4 for path in cache)  # a checksum each
    assert shown["image store"].disk == (next(folder.glob("store/*/images.u8"))).stat().st_size

    made = grokd.folder_bytes(out)
    expected = sum(stage.disk for stage in stages.values()) - asked.disk
    expected -= shown["image store"].disk
    assert 0.7 * made < expected < 1.3 * made
    assert plan.total_seconds > 0 and plan.memory() > 2**27

    before = listing(folder)
    again = run(folder, monkeypatch)
    assert listing(folder) == before
    unmade = {stage.name for stage in again.stages.values() if stage.to_make and stage.seconds}
    assert unmade == {"evaluation"}
    done = {stage.name: stage.finished for stage in again.stages.values() if stage.finished}
    assert done == {"teachers cnn2": 1, "teachers resnet8": 1, "DFR heads": 2,
                    "biased model (a copy)": 1, "students one-hot, one-hot-dfr": 4,
                    "students agre": 2}
    assert "cannot be told" not in capsys.readouterr().out.rpartition("Dry run of")[2]

    begun = out / "students/agre/seed1/model.partial/000000003"  # two epochs of two steps
    begun.mkdir(parents=True)
    (out / "students/agre/seed1/model.safetensors").unlink()
    partly = run(folder, monkeypatch)
    left = next(stage for stage in partly.stages.values() if stage.name == "students agre")
    assert (left.to_make, left.finished, left.steps) == (1, 1, 1)
    with pytest.raises(Problem, match=r"was made with other settings.*lr 0.01 → 0.5.*--redo"):
        run(folder, monkeypatch, "--teachers.lr", "0.5")
    before = listing(folder)
    redone = run(folder, monkeypatch, "--redo")
    assert listing(folder) == before  # nothing is deleted
    assert [stage.to_make for stage in redone.stages.values()][1:3] == [1, 2]


def test_heads_are_named_and_finished_teachers_not_trained_as_in_the_run(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = run(images, monkeypatch, "--teachers.dfr.method", "afr", "--teachers.finished", "0")
    assert "AFR heads" in plan.stages
    finished, trained = plan.stages["teachers cnn2"], plan.stages["teachers resnet8"]
    assert (finished.to_make, finished.epochs, finished.steps) == (1, 0, 0)
    assert (trained.to_make, trained.epochs, trained.steps) == (1, 2, 4)
    copied, pace = plan.stages["biased model (a copy)"], plan.teacher_pace(0)
    assert copied.disk == pace.weights


def test_generated_images_are_counted_and_their_generator(
    images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "tiny.py").write_text((images / "tiny.py").read_text() + SETS)
    before = listing(images)
    plan = run(images, monkeypatch)
    assert listing(images) == before
    assert "of a guided set's sources 50 % pass" in capsys.readouterr().out
    shown = {stage.name: stage for stage in plan.stages.values()}
    assert shown["generator"].steps == 3 * 1  # epochs of a step
    assert (shown["images config"].images, shown["images plain"].images) == (8, 4)
    assert shown["images config"].steps == 8 * 3  # three quarters of the four iterates
    assert shown["images config"].seconds > 0 and shown["images plain"].disk > 0
    kinds, = (stage for name, stage in shown.items() if name.startswith("students "))
    assert kinds.to_make == 4
    assert kinds.steps == 2 * (2 + 3 + 3 + 2)  # of 16, 24, 20 and 16 images, 8 a step


def test_a_given_pipeline_is_measured_and_mistakes_are_guessed(
    images: Path, pixels: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = f"""
config = grokd.replace(recipe.augments["config"], generator={pixels!r}, realism=1.0,
                       sources="misclassified")
recipe = grokd.replace(recipe, augments={{"config": config}}, students={{"kd": kd}})
"""
    (images / "tiny.py").write_text((images / "tiny.py").read_text() + SETS + more)
    plan = run(images, monkeypatch)
    assert plan.stages["images config"].images == 2  # of 16
    assert plan.stages["images config"].steps == 6 and "generator" not in plan.stages
    assert "Guessed: a student gets 10 % of the training images wrong" in capsys.readouterr().out


def test_analysis_is_counted_by_the_images_it_predicts(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DryRun, "predict_seconds", lambda *_: 1000.0)
    plan = run(images, monkeypatch, "--student", "agre", "--seeds", "0", "--eval.analysis")
    scored, chosen = 3 * 16, 1 * 8  # two teachers and a student; it is chosen by selection
    analysed = 3 * (16 + 16) + 1 * 16  # training and test; its features
    assert plan.stages["evaluation"].seconds // 1000 == scored + chosen + analysed


def test_what_a_full_cache_forgets_is_asked_again(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for the answers of one view and not of two: every seed asks again for both."""
    flags = ["--student", "agre", "--data.cache-gb"]
    roomy, scarce = (run(images, monkeypatch, *flags, size).stages["teachers' answers (cache)"]
                     for size in ("1", str(1.5 * 3 * 16 * 2 * 4 / 1e9)))
    assert scarce.images == 2 * roomy.images and scarce.disk < 2 * 3 * 16 * 2 * 4 <= roomy.disk


def test_dry_run_is_refused_where_it_cannot_be(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(images)
    with pytest.raises(Problem, match="Unrecognized options: --dry-run"):
        grokd.command_line(["teachers", "tiny.py", "--dry-run"])
    with pytest.raises(Problem, match=r"metadata\.csv does not exist"):
        grokd.command_line(["run", "tiny.py", "--dry-run", "--root", "nowhere"])
    accelerator = SimpleNamespace(num_processes=2)
    two: Any = SimpleNamespace(runtime=SimpleNamespace(accelerator=accelerator))
    with pytest.raises(Problem, match="measures one process: start it with `python "):
        grokd.dry_run(two)
    assert not (images / "runs").exists() and not (images / "store").exists()


def test_settings_that_cost_nothing_make_no_kind_of_their_own() -> None:
    student, change = grokd.Distill(), dict[str, Any]()
    for change in ({"tau": 2.0}, {"alpha": 0.5}, {"augmented": "set"}, {"rebalance": "groups"},
                   {"train": replace(student.train, lr=1.0, epochs=3, num_views=2)}):
        assert grokd.kind_of(replace(student, **change)) == grokd.kind_of(student)
    for change in ({"arch": "cnn2"}, {"space": "batch"}, {"gamma": (0.5,)},
                   {"train": replace(student.train, batch_size=8)},
                   {"train": replace(student.train, mix="cutmix")}):
        assert grokd.kind_of(replace(student, **change)) != grokd.kind_of(student)
    assert grokd.kind_of(student, 5) != grokd.kind_of(student, 10)


# The recipe celeba_config

SMALL = '''
import sys
from dataclasses import replace

sys.path.insert(0, {recipes!r})
from celeba_config import recipe as celeba

from grokd import DFR

data = replace(celeba.data, size=20, crop=16, store="store")
dfr = DFR(num_refits=1, penalties=(1.0,))
teachers = replace(celeba.teachers, num_teachers=1, arch=("cnn2",), weights=("random",), dfr=dfr)
teachers = replace(teachers, train=replace(teachers.train, epochs=1, batch_size=8))
students = {{}}
for name, student in celeba.students.items():
    train = replace(student.train, epochs=1, batch_size=8)
    students[name] = replace(student, arch="cnn2", weights="random", train=train)
small = dict(generator={generator!r}, steps=2, iterations=1, count=6, min_teacher=0.0,
             max_student=1.0)
augments = {{name: replace(images, **small) for name, images in celeba.augments.items()}}
recipe = replace(celeba, data=data, teachers=teachers, students=students, augments=augments,
                 seeds=(0,))
'''


def write_celeba(folder: Path, generator: str) -> Path:
    """Small images in CelebA's layout, and celeba_config on small networks as tiny.py."""
    write_images(folder)
    with open(folder / "metadata.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    with open(folder / "metadata.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["img_id", "img_filename", "y", "split", "place", "place_filename"])
        for i, row in enumerate(rows):
            split = grokd.SPLITS.index(row["split"])
            table.writerow([i + 1, row["image"], row["label"], split, row["place"], ""])
    text = SMALL.format(recipes=str(ROOT / "recipes"), generator=generator)
    (folder / "tiny.py").write_text(text)
    return folder


def test_no_blond_man_is_trained_on(tmp_path: Path) -> None:
    recipe = grokd.load_recipe(str(write_celeba(tmp_path, "") / "tiny.py"))
    store = grokd.counted_store(recipe.data, str(tmp_path))
    assert store.counts("train").tolist() == [4, 4, 4, 0]
    assert store.counts("reweighting").tolist() == [2, 2, 2, 2]
    assert store.counts("test").tolist() == [4, 4, 4, 4]
    assert store.group_names[3] == "person with blond hair, male"
    turbo = grokd.load_recipe("celeba_config:turbo").augments
    assert turbo["config"].steps == 1 and turbo["unguided"].like == "config"


@pytest.mark.slow
def test_celeba_config_passes_all_stages(
    tmp_path: Path, stable_diffusion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_celeba(tmp_path / "images", stable_diffusion)
    before = listing(folder)
    plan = run(folder, monkeypatch)
    assert listing(folder) == before
    assert (plan.stages["images config"].images, plan.stages["images unguided"].images) == (6, 3)
    grokd.command_line(["run", "tiny.py"])
    rows = json.loads((folder / "runs/tiny/results.json").read_text())["rows"]
    published = {row["name"]: row["published"].get("wga") for row in rows}
    students = ["kd", "kd-cutmix", "kd-unguided", "kd-config", "helper", "kd-config-tab"]
    assert [name for name in published if name in students] == students
    assert published["kd-config"] == 66.1 and published["teachers, DFR"] == 66.7
    sets = folder / "runs/tiny/augmented"
    accepted, plain = (len((sets / name / "seed0/metadata.csv").read_text().splitlines())
                       for name in ("config", "unguided"))
    assert accepted == plain > 1  # a header, and images

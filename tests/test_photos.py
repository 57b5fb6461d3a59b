"""Recipes of photographs with their readers; CLIP as labeller and as teacher."""

import csv
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from conftest import ROOT, Run
from hypothesis import given, settings
from PIL import Image
from safetensors.torch import save

import grokd
from grokd import Problem, Row

RECIPES = ROOT / "recipes"


def module(name: str) -> ModuleType:
    return grokd.import_file(RECIPES / f"{name}.py")


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (12, 9)) -> None:
    """A small image of random blocks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).save(path)


def cells(rows: list[Row]) -> dict[str, list[int]]:
    """Images of the groups 00, 01, 10, 11 by split."""
    counts = Counter((row.split, row.label, row.attribute) for row in rows)
    return {split: [counts[split, y, a] for y in (0, 1) for a in (0, 1)] for split in grokd.SPLITS}


# Waterbirds


def test_released_waterbirds_table_is_read_whole(data_folder: Path, tmp_path: Path) -> None:
    """11,788 rows, with links to one image in place of the photographs."""
    table = data_folder / "waterbirds" / "metadata.csv"
    shutil.copy(table, tmp_path / "metadata.csv")
    picture(tmp_path / "one.png")
    with open(table, newline="") as file:
        for row in csv.DictReader(file):
            image = tmp_path / row["img_filename"]
            image.parent.mkdir(exist_ok=True)
            os.link(tmp_path / "one.png", image)
    rows = grokd.read_rows(grokd.load_recipe("waterbirds").data, str(tmp_path))
    assert len(rows) == 11_788
    assert cells(rows) == {"train": [3498, 184, 56, 1057], "val": [467, 466, 133, 133],
                           "test": [2255, 2255, 642, 642]}


@pytest.mark.slow
def test_waterbirds_runs_on_a_small_folder_as_its_docstring_says(
    data_folder: Path, tmp_path: Path, grokd_process: Run
) -> None:
    doc = module("waterbirds").__doc__ or ""
    _, _, text = doc.partition("python grokd.py run waterbirds --root SMALL")
    flags, _, _ = text.partition("\n\n")
    weights = data_folder / "weights" / "mobilenet_v2_imagenet.safetensors"
    args = flags.replace("WEIGHTS", str(weights)).split()
    small = data_folder / "waterbirds_mini"
    grokd_process("run", "waterbirds", "--root", str(small), *args, cwd=tmp_path)
    results = json.loads((tmp_path / "runs/waterbirds/results.json").read_text())
    worst = {row["name"]: np.mean([m["wga"] for m in row["members"]]) for row in results["rows"]}
    assert worst["teachers, DFR"] > worst["teachers, ERM"] + 10
    assert any(name.startswith("agre+") for name in worst)


# CelebA

ATTRIBUTES = ("Attractive", "Blond_Hair", "Male", "Young")


def write_celeba(folder: Path, per_cell: int = 2) -> Path:
    """CelebA's three parts, as torchvision lays them out, each group in each split."""
    values, splits = list[str](), list[str]()
    for split in (0, 1, 2):
        for blond in (-1, 1):
            for male in (-1, 1):
                for _ in range(per_cell):
                    name = f"{len(values) + 1:06d}.jpg"
                    picture(folder / "img_align_celeba" / name, len(values), (18, 22))
                    values.append(f"{name} -1 {blond:2d} {male:2d}  1")
                    splits.append(f"{name} {split}")
    header = [str(len(values)), " ".join(ATTRIBUTES) + " "]
    (folder / "list_attr_celeba.txt").write_text("\n".join([*header, *values]) + "\n")
    (folder / "list_eval_partition.txt").write_text("\n".join(splits) + "\n")
    return folder


@pytest.mark.parametrize("below", ["", "celeba"])
def test_celeba_is_read_from_torchvisions_layout(tmp_path: Path, below: str) -> None:
    write_celeba(tmp_path / below)
    data = grokd.load_recipe("celeba").data
    rows = grokd.read_rows(data, str(tmp_path))
    assert cells(rows) == {split: [2, 2, 2, 2] for split in grokd.SPLITS}
    assert (rows[4].label, rows[4].attribute, rows[4].split) == (1, 0, "train")  # blond, female
    store = grokd.open_store(replace(data, size=8, crop=8, store=str(tmp_path / "store")),
                             str(tmp_path))
    assert store.group_names == ["not blond, female", "not blond, male", "blond, female",
                                 "blond, male"]


def test_celeba_is_read_from_a_metadata_table(tmp_path: Path) -> None:
    folder = write_celeba(tmp_path)
    with open(folder / "metadata.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["img_id", "img_filename", "y", "split", "place"])
        for i in range(24):
            name = f"img_align_celeba/{i + 1:06d}.jpg"
            writer.writerow([i + 1, name, i // 4 % 2, i // 8, i // 2 % 2])
    by_table = grokd.read_rows(grokd.load_recipe("celeba:metadata").data, str(folder))
    assert by_table == grokd.read_rows(grokd.load_recipe("celeba").data, str(folder))


def change(old: str, new: str, count: int = 1) -> Callable[[str], str]:
    return lambda text: text.replace(old, new, count)


@pytest.mark.parametrize(("name", "edit", "told"), [
    ("list_attr_celeba.txt", change("Male", "Tall"), r"line 2: 4 names, no Male among them"),
    ("list_attr_celeba.txt", change("000001.jpg -1", "000001.jpg"), r"line 3: 4 fields, not a fil"),
    ("list_attr_celeba.txt", change("-1 -1  1\n", " 0 -1  1\n"), r"line 3: Blond_Hair is '0', Mal"),
    ("list_attr_celeba.txt", lambda text: "", r"line 2: 0 names, no Blond_Hair"),
    ("list_attr_celeba.txt", lambda text: "\n".join(text.splitlines()[:2]), r"names no images"),
    ("list_eval_partition.txt", change("000002.jpg 0", "000002.jpg 3"), r"line 2: '000002.jpg 3'"),
    ("list_eval_partition.txt", change("000002.jpg 0\n", ""), r"1 of the 24 images .*000002.jpg"),
])
def test_what_is_wrong_with_celebas_files_is_one_line(
    tmp_path: Path, name: str, edit: Callable[[str], str], told: str
) -> None:
    folder = write_celeba(tmp_path)
    text = (folder / name).read_text()
    assert edit(text) != text
    (folder / name).write_text(edit(text))
    with pytest.raises(Problem, match=told) as problem:
        module("celeba").read(folder)
    assert "\n" not in str(problem.value)


def test_missing_celeba_says_where_to_get_it(tmp_path: Path) -> None:
    folder = write_celeba(tmp_path)
    (folder / "img_align_celeba" / "000003.jpg").unlink()
    with pytest.raises(Problem, match=r"1 of the 24 images .* not in img_align_celeba/, 000003"):
        module("celeba").read(folder)
    (folder / "list_eval_partition.txt").unlink()
    with pytest.raises(Problem, match=r"list_eval_partition.txt does not exist: get it from http"):
        module("celeba").read(folder)
    with pytest.raises(Problem, match=r"CelebA is not in .*must hold list_attr_celeba.txt"):
        module("celeba").read(tmp_path / "nowhere")


celeba = module("celeba")
words = st.sampled_from(["1", "-1", "0", "2", "3", "a.jpg", "b.jpg", "Male", "Blond_Hair", "", "é"])
odd_files = st.lists(st.lists(words, max_size=4).map(" ".join), max_size=6).map("\n".join)


@settings(max_examples=150, deadline=None)
@given(text=odd_files)
def test_odd_files_of_celeba_are_read_or_refused_in_one_line(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "list.txt"
        path.write_text(text, encoding="utf-8")
        for read, values in ((celeba.read_attributes, {(0, 0), (0, 1), (1, 0), (1, 1)}),
                             (celeba.read_partition, {*grokd.SPLITS})):
            try:
                assert {*read(path).values()} <= values
            except Problem as problem:
                assert "\n" not in str(problem)


# SpuCo Birds


def write_spuco(folder: Path) -> Path:
    """SpuCo's folders with few images: common groups 3 and rare ones 2, all 4 elsewhere."""
    for split in grokd.SPLITS:
        for y, kind in enumerate(("landbirds", "waterbirds")):
            for a, place in enumerate(("land", "water")):
                count = 4 if split != "train" else 3 if y == a else 2
                for k in range(count):
                    picture(folder / "spuco_birds" / split / kind / place / f"{k}.jpg", k)
    return folder


@pytest.mark.parametrize(
    ("variant", "train"), [("", [3, 2, 2, 3]), (":covariate-shift", [3, 0, 0, 3])])
def test_spuco_birds_is_read_with_and_without_rare_groups(
    tmp_path: Path, variant: str, train: list[int]
) -> None:
    write_spuco(tmp_path)
    data = grokd.load_recipe(f"spuco_birds{variant}").data
    rows = grokd.read_rows(data, str(tmp_path))
    assert cells(rows) == {"train": train, "val": [4] * 4, "test": [4] * 4}
    assert grokd.read_rows(data, str(tmp_path / "spuco_birds")) == rows
    small = replace(data, size=8, crop=8, store=str(tmp_path / "store"))
    store = grokd.open_store(small, str(tmp_path))
    assert store.counts("train").tolist() == train


def test_missing_spuco_birds_says_where_to_get_it(tmp_path: Path) -> None:
    write_spuco(tmp_path)
    shutil.rmtree(tmp_path / "spuco_birds" / "val" / "waterbirds" / "land")
    reader = grokd.load_recipe("spuco_birds").data.reader
    assert reader
    with pytest.raises(Problem, match=r"val/waterbirds/land holds no images: get the data with"):
        reader(tmp_path)


# Spurious ImageNet


@pytest.fixture(scope="module")
def spurious(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two features of the benchmark and ImageNet's validation folders, few images each."""
    folder = tmp_path_factory.mktemp("spurious")
    for wordnet in range(1000):
        (folder / "ilsvrc" / "val" / f"n{10_000_000 + 7 * wordnet}").mkdir(parents=True)
    for y, feature in ((3, 11), (417, 0)):
        for k in range(4):
            name = f"spurious_class_{y}_component_{feature}"
            picture(folder / "images" / name / f"{k}.jpg", 1000 * y + k, (420, 420))
            val = folder / "ilsvrc" / "val" / f"n{10_000_000 + 7 * y}"
            picture(val / f"{k}.JPEG", 1000 * y + 500 + k, (300, 260))
    (folder / "images" / "timestamp.txt").write_text("0")
    model = grokd.build_model("cnn2", "random", 1000, grokd.Input(), 0)
    description = {"arch": "cnn2", "class_names": json.dumps([*map(str, range(1000))]),
                   "input": json.dumps({"input_size": 0, "mean": [0.5] * 3, "std": [0.5] * 3})}
    grokd.write_file(folder / "model.safetensors", save(model.plain_state(), description))
    return folder


def call(program: ModuleType, *args: object) -> None:
    """A program's main with a command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [f"{program.__name__}.py", *map(str, args)])
        program.main()


def test_spurious_imagenet_scores_a_saved_model(
    spurious: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """AP and AUC by their definitions, on images prepared by torchvision."""
    model_file = spurious / "model.safetensors"
    call(module("spurious_imagenet"), "--root", spurious, "--imagenet", spurious / "ilsvrc",
         "--models", model_file, "--save", tmp_path / "scores.json")
    found = json.loads((tmp_path / "scores.json").read_text())["models"][str(model_file)]
    assert [row["class"] for row in found] == [3, 417]
    printed = capsys.readouterr().out
    assert "Mean over 2 classes" in printed
    model = grokd.load_model(model_file)

    def p(path: Path, y: int, size: int) -> float:
        with Image.open(path) as file:
            image = TF.center_crop(TF.resize(file.convert("RGB"), [size]), [224])
        with torch.no_grad():
            return float(model(TF.to_dtype(TF.to_image(image), scale=True)[None]).softmax(-1)[0, y])

    for row, feature in zip(found, ("3_component_11", "417_component_0"), strict=True):
        y = row["class"]
        folder = spurious / "images" / f"spurious_class_{feature}"
        bad = [p(path, y, 224) for path in folder.iterdir()]
        val = spurious / "ilsvrc" / "val" / f"n{10_000_000 + 7 * y}"
        good = [p(path, y, 256) for path in val.iterdir()]
        auc = np.mean([a > b for a in good for b in bad])
        ranked = sorted([(a, 1) for a in good] + [(b, 0) for b in bad], reverse=True)
        hits = [i for i, (_, is_class) in enumerate(ranked, 1) if is_class]
        ap = np.mean([k / i for k, i in enumerate(hits, 1)])
        assert (row["auc"], row["ap"]) == (pytest.approx(auc), pytest.approx(ap))
    means = [np.mean([row[key] for row in found]) for key in ("ap", "auc")]
    assert f"{means[0]:.3f} | {means[1]:.3f}" in printed


def test_spurious_imagenet_names_what_is_missing(spurious: Path, tmp_path: Path) -> None:
    program = module("spurious_imagenet")
    with pytest.raises(Problem, match=r"Spurious ImageNet is not in .*: get the images with"):
        program.spurious_images(tmp_path)
    (tmp_path / "spurious_class_x_component_1").mkdir()
    with pytest.raises(Problem, match=r"_x_component_1 names no class of ImageNet"):
        program.spurious_images(tmp_path)
    with pytest.raises(Problem, match=r"val holds 0 folders of WordNet ids .* not 1,000"):
        program.validation_images(tmp_path, [3])
    with pytest.raises(Problem, match=r"val: no images in n10000007"):
        program.validation_images(spurious / "ilsvrc", [1, 3])
    few = grokd.build_model("cnn2", "random", 5, grokd.Input(), 0)
    description = {"arch": "cnn2", "class_names": json.dumps(list("abcde")),
                   "input": json.dumps({"input_size": 0, "mean": [0.5] * 3, "std": [0.5] * 3})}
    grokd.write_file(tmp_path / "few.safetensors", save(few.plain_state(), description))
    with pytest.raises(Problem, match=r"has 5 classes, not ImageNet's 1,000"):
        program.load(str(tmp_path / "few.safetensors"))


def test_spurious_imagenet_takes_a_plain_state_dict(tmp_path: Path) -> None:
    model = grokd.build_model("cnn2", "random", 1000, grokd.Input(), 3)
    torch.save(model.plain_state(), tmp_path / "plain.pth")
    loaded = module("spurious_imagenet").load(f"cnn2:{tmp_path / 'plain.pth'}")
    assert torch.equal(loaded.head.weight, model.head.weight)

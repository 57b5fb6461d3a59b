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
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from conftest import ROOT, Run, write_images
from hypothesis import given, settings
from PIL import Image
from safetensors.torch import load_file, save

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
    tmp_path: Path, variant: str, train: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_spuco(tmp_path)
    data = grokd.load_recipe(f"spuco_birds{variant}").data
    rows = grokd.read_rows(data, str(tmp_path))
    assert cells(rows) == {"train": train, "val": [4] * 4, "test": [4] * 4}
    assert grokd.read_rows(data, str(tmp_path / "spuco_birds")) == rows
    monkeypatch.chdir(tmp_path / "spuco_birds")
    assert len(grokd.read_rows(data, ".")) == len(rows)
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
    with pytest.raises(Problem, match=r"none.safetensors is not there"):
        program.load(str(tmp_path / "none.safetensors"))


def test_spurious_imagenet_takes_a_plain_state_dict(tmp_path: Path) -> None:
    model = grokd.build_model("cnn2", "random", 1000, grokd.Input(), 3)
    torch.save(model.plain_state(), tmp_path / "plain.pth")
    loaded = module("spurious_imagenet").load(f"cnn2:{tmp_path / 'plain.pth'}")
    assert torch.equal(loaded.head.weight, model.head.weight)


# CLIP


def save_clip(folder: Path, activation: str = "quick_gelu") -> Path:
    """A tiny random CLIP of the real classes, for images of 32 pixels."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    torch.manual_seed(0)
    letters = [chr(c) for c in range(97, 123)]
    vocabulary = [*letters, *(w + "</w>" for w in [*letters, "."]), "<|startoftext|>",
                  "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"),
                              model_max_length=32)
    begin, end = len(vocabulary) - 2, len(vocabulary) - 1
    text = {"vocab_size": len(vocabulary), "hidden_size": 16, "intermediate_size": 16,
            "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32,
            "bos_token_id": begin, "eos_token_id": end, "pad_token_id": end}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
              "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
              "hidden_act": activation}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    model: Any = CLIPModel(config)
    for parameter in model.parameters():  # far from the tiny values of fresh weights
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


def clip_logits(folder: Path, images: list[Image.Image], texts: list[str]) -> torch.Tensor:
    """What transformers says: logits [images, texts]."""
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    tokens = CLIPTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    pixels = CLIPImageProcessor.from_pretrained(folder)(images=images, return_tensors="pt")
    model: Any = CLIPModel.from_pretrained(folder)
    with torch.no_grad():
        return model.eval()(**tokens, **pixels).logits_per_image


def folder_images(folder: Path, count: int) -> list[Image.Image]:
    images = []
    for k in range(count):
        picture(folder / f"{k}.png", k, (32, 32))
        with Image.open(folder / f"{k}.png") as file:
            images.append(file.convert("RGB"))
    return images


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_zero_shot_network_answers_as_clip_does(tmp_path: Path, activation: str) -> None:
    folder = save_clip(tmp_path / "clip", activation)
    images = folder_images(tmp_path, 6)
    words = {"cat": ["cat"], "dog": ["dog"], "bird": ["bird"]}
    model = module("clip_teacher").zero_shot(str(folder), words, ("a {}.",))
    expected = clip_logits(folder, images, ["a cat.", "a dog.", "a bird."])
    shown = torch.stack([TF.to_dtype(TF.to_image(image), scale=True) for image in images])
    with torch.no_grad():
        assert torch.allclose(model(shown), expected, atol=1e-4)
        assert torch.allclose(grokd.fold(model)(shown), expected, atol=1e-4)
    assert len({*expected.argmax(-1).tolist()}) > 1  # it sees the images


def test_texts_are_averaged_over_keywords_and_templates(clip: Path) -> None:
    labeller = module("clip_attributes")
    model, tokenizer, _ = labeller.load_clip(str(clip))

    def one(text: str) -> torch.Tensor:
        return labeller.text_directions(model, tokenizer, [[text]], ("{}",))[0]

    mean = torch.stack([one(t) for t in ("a cat", "a kitten", "cat", "kitten")]).mean(0)
    found = labeller.text_directions(model, tokenizer, [["cat", "kitten"]], ("a {}", "{}"))
    assert torch.allclose(found[0], mean / mean.norm(), atol=1e-5)
    with pytest.raises(Problem, match=r"needs \{\} where the keyword goes"):
        labeller.text_directions(model, tokenizer, [["cat"]], ("a cat",))


def write_table(folder: Path, attributes: list[str]) -> list[Image.Image]:
    """A table with images, some with an attribute, and a column of its own."""
    images = folder_images(folder, len(attributes))
    with open(folder / "metadata.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "label", "place", "split", "note"])
        for k, attribute in enumerate(attributes):
            writer.writerow([f"{k}.png", k % 2, attribute, "train", f"no. {k}, kept"])
    return images


def label(clip: Path, folder: Path, *args: object) -> list[dict[str, str]]:
    """The table that clip_attributes writes."""
    call(module("clip_attributes"), folder / "metadata.csv", "--clip", clip, "--value", "land",
         "--value", "water", "--template", "a {}.", "--attribute-column", "place",
         "--batch-size", 3, *args)
    with open(folder / "metadata-clip.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_clip_fills_missing_attributes_and_keeps_the_rest(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["land", "", "water", "", "", "", "land", "", ""]
    images = write_table(tmp_path, given)
    before = (tmp_path / "metadata.csv").read_bytes()
    rows = label(clip, tmp_path)
    logits = clip_logits(clip, images, ["a land.", "a water."])
    answers = [("land", "water")[k] for k in logits.argmax(-1).tolist()]
    assert [row["place"] for row in rows] == [g or a for g, a in zip(given, answers, strict=True)]
    assert [row["note"] for row in rows] == [f"no. {k}, kept" for k in range(9)]
    assert (tmp_path / "metadata.csv").read_bytes() == before
    right = sum(g == a for g, a in zip(given, answers, strict=True))
    printed = capsys.readouterr().out
    assert f"CLIP agrees with {100 * right / 3:.1f} % of the 3 attributes" in printed
    assert "6 of 9 attributes are CLIP's" in printed
    with pytest.raises(Problem, match=r"metadata-clip.csv exists: delete it"):
        label(clip, tmp_path)
    (tmp_path / "metadata-clip.csv").unlink()
    assert [row["place"] for row in label(clip, tmp_path, "--replace")] == answers


def test_clips_column_serves_as_attribute(images: Path, clip: Path) -> None:
    """Of a table without one."""
    with open(images / "metadata.csv", newline="") as file:
        rows = [{k: v for k, v in row.items() if k != "place"} for row in csv.DictReader(file)]
    with open(images / "metadata.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    written = label(clip, images)
    data = grokd.Data(metadata="metadata-clip.csv", attribute_column="place",
                      attribute_names=("land", "water"))
    read = grokd.read_rows(data, str(images))
    assert [("land", "water")[row.attribute] for row in read] == [r["place"] for r in written]


@pytest.mark.parametrize(("args", "told"), [
    (["--image-column", "file"], r"has no column 'file'; it has 'image', .*--image-column"),
    (["--attribute-column", "note"], r"row 2: column 'note' holds 'no. 0, kept', which is none"),
    (["--batch-size", "0"], r"--batch-size 0: at least 1"),
    (["--save", "/elsewhere.csv"], r"must lie in"),
    (["--save", "metadata.csv"], r"metadata.csv exists"),
    (["--value", "land"], r"land, water, land: give two or more values, each once"),
    (["--clip", "no/such/folder"], r"CLIP no/such/folder could not be loaded \("),
])
def test_what_is_wrong_with_labelling_is_one_line(
    clip: Path, tmp_path: Path, args: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_table(tmp_path, ["land", "", "water"])
    with pytest.raises(Problem, match=told) as problem:
        label(clip, tmp_path, *args)
    assert "\n" not in str(problem.value)
    assert not (tmp_path / "metadata-clip.csv").exists()


@pytest.mark.parametrize("content", [
    "image,label\nécole.png,0\n".encode("latin-1"), b"image,label\n" + 200_000 * b"a" + b",0\n",
])
def test_what_is_no_table_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "metadata.csv").write_bytes(content)
    with pytest.raises(Problem, match=r"metadata.csv is no table of text in UTF-8 \(.*: save it"):
        module("clip_attributes").read_table(tmp_path / "metadata.csv", "image")


def test_clip_that_lacks_weights_is_refused(clip: Path, tmp_path: Path) -> None:
    """transformers alone would go on with random ones."""
    shutil.copytree(clip, tmp_path / "part")
    state = load_file(clip / "model.safetensors")
    del state["visual_projection.weight"]
    (tmp_path / "part" / "model.safetensors").write_bytes(save(state, {"format": "pt"}))
    with pytest.raises(Problem, match=r"not a whole CLIP: 1 of its weights are missing, visual_pr"):
        module("clip_attributes").load_clip(str(tmp_path / "part"))


def test_missing_and_damaged_images_are_named(clip: Path, tmp_path: Path) -> None:
    write_table(tmp_path, ["", "", ""])
    (tmp_path / "1.png").write_bytes(b"not an image")
    with pytest.raises(Problem, match=r"1.png cannot be read"):
        label(clip, tmp_path)
    (tmp_path / "1.png").unlink()
    with pytest.raises(Problem, match=r"1 of the 3 images .* do not exist: 1.png"):
        label(clip, tmp_path)


RECIPE = '''
from dataclasses import replace
from tiny import recipe as tiny
from grokd import BiasModel, Teachers, Train

distill = replace(tiny.students["agre"], weighting="average", train=Train(epochs=1, batch_size=8))
recipe = replace(
    tiny,
    teachers=Teachers(1, arch=("ARCH",), weights=("clip.safetensors",),
                      dfr=tiny.students["agre"].dfr, train=Train(epochs=0)),
    bias_model=BiasModel(kind="erm", arch="ARCH", weights="clip.safetensors",
                         train=Train(epochs=0)),
    students={
        "zero-shot": replace(distill, dfr_share=0.0),
        "layers": replace(distill, gamma=(0.5, 0.5), layers=("layer2=layer3", "pooled")),
        "agre": replace(distill, weighting="agre"),
    },
    seeds=(0,),
)
'''


def test_clip_is_a_teacher_from_file_to_report(
    clip: Path, tmp_path: Path, grokd_process: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_images(tmp_path)
    call(module("clip_teacher"), "--clip", clip, "--save", folder / "clip.safetensors",
         "--class", "zero", "nought", "--class", "one")
    arch = capsys.readouterr().out.partition('arch=("')[2].partition('"')[0]
    (folder / "zero_shot.py").write_text(RECIPE.replace("ARCH", arch))
    grokd_process("run", "zero_shot.py", "--root", ".", "--out", "out", cwd=folder)
    written = load_file(folder / "clip.safetensors")
    for name in ("teachers/0/erm", "bias-model/model"):
        state = load_file(folder / "out" / f"{name}.safetensors")
        assert state.keys() == written.keys()
        assert all(torch.equal(state[key], written[key]) for key in written)  # nobody trained it
    results = json.loads((folder / "out" / "results.json").read_text())
    scores = {row["name"]: row["members"][0] for row in results["rows"]}
    assert {"teachers, ERM", "teachers, DFR", "zero-shot", "layers", "agre"} <= scores.keys()
    model = grokd.load_model(folder / "out/teachers/0/erm.safetensors")
    assert model.input == grokd.load_model(folder / "clip.safetensors").input
    assert model.input.input_size == 32


def test_sizes_of_no_clip_are_refused_in_one_line() -> None:
    whole = "clip:width=64,layers=1,patch=8,size=32,dim=8"
    grokd.Classifier(whole, 2, grokd.Input())
    for arch in ("clip:", "clip:width=32", "clip:ViT-B/32", f"{whole},heads=3", f"{whole},depth=1",
                 f"{whole},activation=relu"):
        with pytest.raises(Problem, match=r"after clip: stand width, layers, .* prints them"):
            grokd.Classifier(arch, 2, grokd.Input())


def test_help_names_programs_apart_from_recipes() -> None:
    _, _, recipes = grokd.overview().partition("Recipes:")
    recipes, _, programs = recipes.partition("Programs beside them")
    for name in ("celeba", "spuco_birds", "colored_mnist", "where_it_pays"):
        assert f"  {name} " in recipes
    for name in ("clip_attributes", "clip_teacher", "spurious_imagenet"):
        assert f"  {name} " in programs
    with pytest.raises(Problem, match=r"if it is a program, call it by itself"):
        grokd.load_recipe("spurious_imagenet")

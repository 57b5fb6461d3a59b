"""Shipped recipes, and the README's figures."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import readme_tables
from conftest import ROOT

import grokd
from grokd import Row

MEASURED = ROOT / "recipes" / "measured"


def test_every_recipe_loads_and_is_checked() -> None:
    names = [path.stem for path in (ROOT / "recipes").glob("*.py")]
    assert {"digits", "digits_ablation", "folder", "colored_mnist", "waterbirds",
            "waterbirds_ablation"} <= set(names)
    for name in names:
        assert isinstance(grokd.load_recipe(name), grokd.Recipe)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    reader = grokd.load_recipe("digits").data.reader
    assert reader
    return list(reader(Path()))


def test_digits_use_every_embedded_digit(rows: list[Row]) -> None:
    sizes = {split: sum(row.split == split for row in rows) for split in grokd.SPLITS}
    assert sizes == {"train": 900, "val": 450, "test": 2 * (1797 - 900 - 450)}


def test_digits_are_biased_in_training_and_balanced_elsewhere(rows: list[Row]) -> None:
    def aligned(split: str) -> float:
        return float(np.mean([row.label == row.attribute for row in rows if row.split == split]))

    assert aligned("train") == pytest.approx(0.95, abs=0.01)
    assert aligned("val") == pytest.approx(0.5, abs=0.01)
    assert aligned("test") == 0.5


def test_every_test_digit_stands_under_both_colours(rows: list[Row]) -> None:
    tested = [row for row in rows if row.split == "test"]
    for blue, orange in zip(tested[::2], tested[1::2], strict=True):
        assert (blue.attribute, orange.attribute) == (0, 1)
        assert blue.label == orange.label
        assert isinstance(blue.image, np.ndarray)
        assert isinstance(orange.image, np.ndarray)
        white = blue.image.min(-1) > 250  # the digit's own pixels are the same
        assert np.array_equal(blue.image[white], orange.image[white])
        assert blue.image[0, 0, 2] > orange.image[0, 0, 2]


def test_readme_tables_are_those_of_the_measurements() -> None:
    text = (ROOT / "README.md").read_text()
    assert readme_tables.rendered(text) == text
    shown = {match[1] for match in readme_tables.BLOCK.finditer(text)}
    assert shown == {str(path.relative_to(ROOT)) for path in MEASURED.glob("*.json")}
    for path in MEASURED.glob("*.json"):
        assert "dirty" not in json.loads(path.read_text())["about"]["commit"]


def test_measured_teachers_gain_ten_points_by_refitting() -> None:
    results = json.loads((MEASURED / "digits.json").read_text())
    wga = {r["name"]: np.mean([m["wga"] for m in r["members"]]) for r in results["rows"]}
    assert wga["teachers, DFR"] - wga["teachers, ERM"] >= 10
    sizes = [len(row["members"]) for row in results["rows"] if row["name"] in ("average", "agre")]
    assert sizes == [5, 5]


@pytest.mark.parametrize("ratio", ["99.5", "95"])
def test_coloured_mnist_is_aligned_as_stated(ratio: str, data_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(data_folder / "MNIST", tmp_path / "MNIST")  # torchvision unpacks it there
    recipe = grokd.load_recipe(f"colored_mnist:{ratio}")
    assert recipe.data.reader
    rows = list(recipe.data.reader(tmp_path))
    for split, share, count in (("train", float(ratio) / 100, 50_000), ("val", 0.1, 10_000),
                                ("test", 0.1, 10_000)):
        labels, colours = (np.array([getattr(row, key) for row in rows if row.split == split])
                           for key in ("label", "attribute"))
        assert len(labels) == count
        assert np.mean(labels == colours) == pytest.approx(share, abs=1e-3)
        offsets = np.bincount((colours - labels) % 10, minlength=10)[1:]
        assert offsets.max() - offsets.min() <= 10  # evenly over the other nine
    brightest = np.stack([row.image.reshape(-1, 3).max(0) for row in rows[:2000]
                          if isinstance(row.image, np.ndarray)])
    own = sys.modules["recipe_colored_mnist"].COLOURS[[row.attribute for row in rows[:2000]]]
    noise = brightest / 255 - own
    assert 0.003 < noise.std() < 0.007 and abs(noise.mean()) < 0.002
    published = recipe.published
    column = ["99.5", "99", "98", "95"].index(ratio)
    assert published["agre"]["wga"] == [59.9, 67.5, 86.2, 88.7][column]
    assert published["average-erm"]["wga"] == [26.5, 46.2, 69.1, 88.1][column]


def test_variants_of_a_recipe_are_named_after_a_colon() -> None:
    with pytest.raises(grokd.Problem, match=r"no recipe '97': known are 99.5, 99, 98, 95"):
        grokd.load_recipe("colored_mnist:97")


def test_course_projects_figures_are_printed_as_mean_and_deviation() -> None:
    recipe = grokd.load_recipe("waterbirds_ablation")
    assert recipe.published["agre-gamma0.5"] == {"wga": 85.57, "wga_std": 0.36}
    assert recipe.published["average"] == {"wga": 84.16, "wga_std": 1.04}
    assert recipe.students["planned-E"].gamma == (0.2, 0.15, 0.1)
    curves = {(c["field"], c["label"]): c["points"] for c in grokd.curves(recipe)}
    assert [x for x, _ in curves["gamma", "average, features uniform"]] == [0, 0.25, 0.5, 1]
    points = curves["gamma", "agre, features agre"]
    assert [x for x, _ in points] == [0, 0.05, 0.25, 0.5, 0.75, 1] and points[0][1] == "agre"

"""Shipped recipes, and the README's figures."""

import json
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
    assert {"digits", "folder"} <= set(names)
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

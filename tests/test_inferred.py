"""Attributes that are known in part or not at all."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import grokd
from grokd import Problem, Row


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

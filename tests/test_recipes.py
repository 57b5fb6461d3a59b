"""Shipped recipes, and the pages with their figures."""

import ast
import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from conftest import ROOT

import grokd
from grokd import Row

MEASURED = ROOT / "recipes" / "measured"


def load_tables() -> ModuleType:
    """recipes/measured/tables.py, whose folder is on nobody's path."""
    spec = importlib.util.spec_from_file_location("measured_tables", MEASURED / "tables.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tables = load_tables()
PAGES = [*tables.PAGES, ROOT / "recipes" / "README.md"]
page_of_each = pytest.mark.parametrize(
    "page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
OUTPUTS = {"report.md"}  # of a run


def test_every_recipe_loads_and_is_checked() -> None:
    paths = (ROOT / "recipes").glob("*.py")
    names = [path.stem for path in paths if grokd.defines_recipe(ast.parse(path.read_text()))]
    assert {"digits", "digits_ablation", "folder", "colored_mnist", "waterbirds",
            "waterbirds_ablation", "celeba", "spuco_birds"} <= set(names)
    for name in names:
        assert isinstance(grokd.load_recipe(name), grokd.Recipe)
        for variant in getattr(sys.modules[f"recipe_{name}"], "recipes", {}):
            assert isinstance(grokd.load_recipe(f"{name}:{variant}"), grokd.Recipe)


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


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    titles = HEADING.findall(page.read_text())
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def prose(page: Path) -> str:
    """A page's text without the tables that are rendered, and without code blocks."""
    text: str = tables.BLOCK.sub("", page.read_text())
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


@page_of_each
def test_tables_of_a_page_are_those_of_the_records(page: Path) -> None:
    text = page.read_text()
    assert tables.rendered(text, page) == text


def test_every_record_and_figure_is_shown_on_some_page() -> None:
    shown, linked = set(), set()
    for page in PAGES:
        text = page.read_text()
        shown |= {ROOT / match["record"] for match in tables.BLOCK.finditer(text)}
        linked |= {page.parent / link for link in LINK.findall(text)}
    assert shown == set(MEASURED.glob("*.json"))
    assert set(MEASURED.glob("*.png")) <= linked
    assert set(MEASURED.glob("*.md")) <= linked


def test_records_are_of_committed_code() -> None:
    for path in MEASURED.glob("*.json"):
        assert "dirty" not in json.loads(path.read_text())["about"]["commit"]


@page_of_each
def test_links_and_images_of_a_page_exist(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@page_of_each
def test_files_that_a_page_names_are_in_the_repository(page: Path) -> None:
    text = prose(page)
    documents = set(re.findall(r"[\w./-]+\.md\b", text)) - OUTPUTS
    programs = set(re.findall(r"\b(?:recipes|tests)/[\w/]+\.\w+", text))
    for name in documents | programs:
        assert (ROOT / name).exists() or (page.parent / name).exists(), name


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 250


@page_of_each
def test_figures_with_a_spread_in_prose_stand_in_some_record(page: Path) -> None:
    cells = [cell for path in MEASURED.glob("*.json")
             for row in tables.record_cells(json.loads(path.read_text())) for cell in row]
    measured = " | ".join(cells)
    for mean, std in re.findall(r"(\d+\.\d+)\s±\s(\d+\.\d+)", prose(page)):
        assert f"{mean} ± {std}" in measured


def record_block(options: str) -> str:
    return f"<!-- table recipes/measured/digits.json{options} -->\n<!-- end -->"


def test_a_table_may_be_a_part_of_the_records() -> None:
    options = ' rows="agre=AGRE; teachers, DFR" columns="mean; WGA"'
    lines = tables.rendered(record_block(options), ROOT / "README.md").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:5]]
    header, *rows = tables.record_cells(json.loads((MEASURED / "digits.json").read_text()))
    agre = next(row for row in rows if row[0] == "agre")
    assert cells[0] == ["", "mean", "WGA"]
    assert [row[0] for row in cells[2:]] == ["AGRE", "teachers, DFR"]
    assert cells[2][1:] == [agre[header.index("mean")], agre[header.index("WGA")]]
    assert lines[0].endswith(f"{options} -->") and lines[-1] == "<!-- end -->"


def test_a_rows_own_name_may_hold_an_equals_sign() -> None:
    names = ["agre+tau=1.0"]
    assert tables.split_name("agre+tau=1.0", names) == ("agre+tau=1.0", "agre+tau=1.0")
    assert tables.split_name("agre+tau=1.0=AGRE", names) == ("agre+tau=1.0", "AGRE")


@pytest.mark.parametrize(("options", "message"), [
    (' rows="nobody"', "has no 'nobody'; it has: teachers, ERM"),
    (' rows="nobody=AVER"', "has no 'nobody'"),
    (' columns="WGA; medium"', "has no 'medium'; it has: ; models; WGA"),
    (' lines="agre"', "knows rows and columns only"),
])
def test_what_a_record_does_not_have_is_an_error(options: str, message: str) -> None:
    with pytest.raises(SystemExit, match=re.escape(message)):
        tables.rendered(record_block(options), ROOT / "README.md")


def test_a_marker_without_an_end_is_an_error() -> None:
    text = record_block("").removesuffix("<!-- end -->") + record_block("")
    with pytest.raises(SystemExit, match="no <!-- end -->"):
        tables.rendered(text, ROOT / "README.md")


def test_a_source_links_to_the_record_from_the_pages_folder() -> None:
    for page, link in ((ROOT / "README.md", "recipes/measured/digits.json"),
                       (MEASURED / "digits.md", "digits.json")):
        assert f"Record: [{link}]({link})." in tables.rendered(record_block(""), page)


def test_a_page_says_once_where_programs_stand_that_have_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = dict.fromkeys(("date", "commit", "hardware", "versions"), "")
    for name, command in (("old", "python tests/bench.py"), ("new", "python grokd.py run")):
        record = {"about": facts | {"command": command}, "header": ["a", "b"], "rows": [["c", "d"]]}
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    old, new = (f"<!-- table {name}.json -->\n<!-- end -->\n" for name in ("old", "new"))
    page = tables.rendered(new + old + old, tmp_path / "page.md")
    assert page.count("`python tests/bench.py`") == 2 and page.count(tables.MOVED) == 1
    assert tables.rendered(page, tmp_path / "page.md") == page
    assert tables.MOVED not in tables.rendered(new, tmp_path / "page.md")


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

"""Reports as a person reads them: on a terminal, in a browser, in black and white."""

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

import grokd

NAMES = st.text(st.characters(codec="ascii", categories=["L", "N"], include_characters=" -,._|"),
                min_size=1, max_size=70).filter(str.strip)


def results_of(groups: list[str], names: list[str], archs: list[str]) -> dict[str, Any]:
    """results.json with such names."""
    rows, lines = [], []
    for i, name in enumerate(names):
        members = [
            {"name": f"students/{name}/seed{s}/model", "groups": accuracy, "wga": min(accuracy),
             "mean": float(np.mean(accuracy)), "group_mean": float(np.mean(accuracy))}
            for s in range(2)
            for accuracy in [[float((37 * i + 11 * g + 5 * s) % 101) for g in range(len(groups))]]
        ]
        rows.append({"name": name, "published": {}, "members": members})
        lines.append({"name": name, "loss": [1.0, 0.5, 0.2], "wga": [10.0 * i % 100, 50.0, 70.0]})
    sizes = [{"name": name, "arch": archs[i % len(archs)],
              "models": [f"students/{name}/seed0/model"], "parameters": 1000 * (i + 1),
              "mflop": 1.5, "ms": 0.25} for i, name in enumerate(names)]
    return {
        "about": {"recipe": "some:recipe", "split": "test", "seeds": [0, 1],
                  "teacher_seeds": [0], "baseline": "", "command": "python grokd.py", "date": "d",
                  "commit": "c", "hardware": "h", "versions": "v"},
        "groups": [{"name": name, "images": 50, "train_images": 9} for name in groups],
        "rows": rows, "left_out": ["students/x: missing " * 20], "ensembles": [], "choice": {},
        "curves": [{"field": "tau", "label": f"agre, {name}", "points": [[1, names[0]],
                                                                        [4, names[1]]]}
                   for name in names[:3]],
        "probes": [], "training": lines,
        "sizes": {"device": "cpu", "side": 16, "batch": 8, "rows": sizes},
    }


def unique(most: int, least: int = 1) -> st.SearchStrategy[list[str]]:
    return st.lists(NAMES, min_size=least, max_size=most, unique=True)


RESULTS = st.builds(results_of, unique(13), unique(13, 2), unique(3))
LONG = [f"{i}: photographs of waterbirds on land, taken in the winter of 1998" for i in range(12)]


@example(results_of(LONG[:9], LONG, LONG[:3]))
@example(results_of(LONG, LONG, LONG[:3]))
@given(RESULTS)
@settings(deadline=None, max_examples=8)
def test_nothing_in_a_figure_is_cut_off_or_hidden(found: dict[str, Any]) -> None:
    finished: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grokd, "png", lambda figure, pyplot: finished.append((figure, pyplot)))
        for draw in grokd.FIGURES.values():
            draw(found)
    assert len(finished) == 4
    for figure, pyplot in finished:
        figure.draw_without_rendering()
        whole = figure.bbox
        texts = [t for t in figure.findobj(pyplot.Text) if t.get_visible() and t.get_text().strip()]
        boxes = [(t.get_text(), t.get_window_extent()) for t in texts]
        shown = [(text, box) for text, box in boxes if box.width and text in drawn(figure, pyplot)]
        assert len(shown) > 2
        for text, box in shown:
            assert box.x0 >= -1 and box.y0 >= -1, text
            assert box.x1 <= whole.width + 1 and box.y1 <= whole.height + 1, text
        for i, (text, box) in enumerate(shown):
            for other, theirs in shown[:i]:
                across = min(box.x1, theirs.x1) - max(box.x0, theirs.x0)
                along = min(box.y1, theirs.y1) - max(box.y0, theirs.y0)
                assert across < 2 or along < 2, (text, other)
        pyplot.close(figure)


def drawn(figure: Any, pyplot: Any) -> set[str]:
    """Texts that are on the figure; ticks beyond an axis' limits are not."""
    kept = {t.get_text() for t in figure.findobj(pyplot.Text)}
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            inside = {tick.label1.get_text() for tick in axis._update_ticks()}
            every = {tick.label1.get_text()
                     for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]}
            kept -= every - inside
    return kept


@given(RESULTS)
@settings(deadline=None, max_examples=60)
def test_terminal_shows_at_most_a_hundred_columns(found: dict[str, Any]) -> None:
    shown = grokd.terminal_summary(found)
    assert max(map(len, shown.splitlines())) <= 100
    lines = [line for line in shown.splitlines() if line.startswith("|")][2:]
    assert len(lines) == len(found["rows"])
    for line, row in zip(lines, found["rows"], strict=True):
        accuracy = np.mean([member["groups"] for member in row["members"]], 0)
        worst = grokd.shorten(found["groups"][int(accuracy.argmin())]["name"], 24)
        assert line.removesuffix(" |").endswith(worst.replace("|", r"\|"))


class Page(HTMLParser):
    """Elements of a page, and what they load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.loads: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "img", "br", "hr"):
            self.open.append(tag)
        self.loads += [value or "" for key, value in attrs if key in ("src", "srcset", "href")]
        assert not [key for key, _ in attrs if key.startswith("on")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_page_holds_its_pictures_and_runs_nothing_that_data_say(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    Image.new("RGB", (2, 2)).save(tmp_path.parent / "secret.png")
    (tmp_path / "b.txt").write_text("text")
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    text = f"# Title {evil}\n\n![A](a.png)\n\n![B](../secret.png) ![C](b.txt) ![D](http://x/y.png)"
    text += f"\n\n{grokd.table(['', 'n'], [[evil, '1'], ['a|b', '2']])}\n"
    page = Page(grokd.web_page(text, tmp_path))
    assert not page.open and not {"script", "iframe", "link", "object"} & {*page.tags}
    assert page.tags.count("img") == 4 and page.tags.count("table") == 1
    inside = [load for load in page.loads if load]
    assert len(inside) == 1 and inside[0].startswith("data:image/png;base64,")
    assert "a|b" in page.texts and sum("<script>" in text for text in page.texts) == 3
    assert page.tags.count("td") == 4


@pytest.mark.slow
def test_browser_shows_the_page_without_a_word_of_complaint(tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no Chromium here")
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
    (tmp_path / "page.html").write_text(grokd.web_page("# T\n\n![A](a.png)\n", tmp_path))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    done = subprocess.run(
        [chromium, *flags, f"--screenshot={tmp_path / 'shot.png'}", "--window-size=300,300",
         f"file://{tmp_path / 'page.html'}"], capture_output=True, text=True, timeout=120,
    )
    assert done.returncode == 0 and "CONSOLE" not in done.stderr
    seen = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB")).reshape(-1, 3)
    assert (seen == (254, 0, 0)).all(1).any() or (seen == (255, 0, 0)).all(1).any()


# While it works


def test_long_training_says_a_line_an_epoch_and_what_to_type_next(
    images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(images)
    monkeypatch.setattr(grokd.Training, "LINE_SECONDS", -1)
    grokd.command_line(["teachers", "tiny.py", "--out", "a folder", "--seeds", "0", "3"])
    printed = capsys.readouterr().out
    lines = re.findall(r"^teachers/./erm: epoch 1 of 2, loss +[\d.]+, WGA +[\d.]+, "
                       r"0:\d\d:\d\d left$", printed, re.MULTILINE)
    assert len(lines) == 2
    assert printed.endswith(
        "\nNext: python grokd.py bias-model tiny.py --out 'a folder' --seeds 0 3\n")


def test_next_command_repeats_what_differs_from_the_recipe() -> None:
    recipe = replace(grokd.load_recipe("digits"), root="data", seeds=(5, 6))

    def command(**flags: Any) -> str:
        common = grokd.Common("data", "runs/digits", (5, 6))
        return grokd.next_command("run", "digits", recipe, replace(common, **flags))

    assert command() == "python grokd.py export digits"
    assert command(root=".") == "python grokd.py export digits --root ."
    assert command(seeds=(7,), precision="float64") == (
        "python grokd.py export digits --precision float64 --seeds 7")


# Where students look


@pytest.mark.parametrize("arch, side", [("cnn2", 16), ("resnet8", 16), ("resnet18", 64),
                                        ("mobilenet_v2", 65)])
def test_class_maps_sum_to_the_logits(arch: str, side: int) -> None:
    torch.manual_seed(0)
    model = grokd.build_model(arch, "random", 3, grokd.Input(), 0).double().eval()
    images = torch.rand(2, 3, side, side, dtype=torch.float64)
    maps = grokd.class_maps(model, images)
    assert maps is not None and maps.shape[:2] == (2, 3) and maps.shape[-1] > 1
    with torch.no_grad():
        logits = model(images) - model.head.bias
    assert torch.allclose(maps.sum((2, 3)), logits - logits.mean(1, keepdim=True))


@pytest.mark.parametrize("arch, side", [("convnext_tiny", 64), ("vit_b_16", 224)])
def test_networks_whose_head_reads_no_mean_over_positions_have_no_map(arch: str, side: int) -> None:
    with torch.device("meta"):
        model = grokd.Classifier(arch, 2, grokd.Input(input_size=side))
    model = model.to_empty(device="cpu").eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    assert grokd.class_maps(model, torch.rand(1, 3, side, side)) is None

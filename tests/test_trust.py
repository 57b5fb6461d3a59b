"""Nothing lost, nobody misled: bad input, damaged files, two runs at once."""

import bisect
import csv
import dataclasses
import errno
import importlib
import io
import json
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from conftest import ROOT, Run, write_images
from hypothesis import HealthCheck, Phase, given, settings
from kills import SPENT, Herd, call
from PIL import Image
from safetensors.torch import load_file, save

import grokd
from grokd import Problem

MORE = '''
import grokd

once = grokd.Train(epochs=2, batch_size=8, lr=0.01, checkpoint_minutes=1e-9)
kd = grokd.Distill("average", arch="cnn2", weights="random", train=once)
recipe = grokd.replace(
    recipe, seeds=(0,), data=grokd.replace(recipe.data, size=16, crop=12),
    teachers=grokd.Teachers(2, ("cnn2",), ("random",), dfr=dfr, train=once),
    bias_model=grokd.BiasModel("erm", arch="cnn2", weights="random", train=once),
    students={
        "agre": grokd.replace(kd, weighting="agre"),
        "tab": grokd.replace(kd, weighting="one-hot", rebalance="tab"),
        "more": grokd.replace(kd, augmented="plain"),
    },
    diffusion=grokd.Diffusion(epochs=1, widths=(8, 16), num_timesteps=20),
    augments={"plain": grokd.Augment(student="agre", steps=1, guided=False, count=6, in_flight=2)},
)
'''
OUT = Path("runs") / "tiny"
MADE = ("runs", "store")  # what a run writes, below the folder of the data
SLOWLY = settings(
    deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


# Bad input


def refused(work: Callable[[], Any]) -> Any:
    """What it returns; None if it refused in one line, whose words are looked at."""
    try:
        return work()
    except Problem as problem:
        assert len(str(problem).splitlines()) == 1 and len(str(problem)) > 20
        return None


ODD_TEXTS = st.sampled_from([
    "", "0", "1", "2", "-1", "1.0", "nan", "NaN", "1e9", "9" * 12, "9" * 5000, "²", "٣", "a",
    "train", "val", "test", "../train000.png", "/etc/passwd", "/dev/zero", ".", "x" * 300, "a\0b",
    "a\nb", '"', "'", ";", "train000.png", "link.png", "𝔘", "\u202e", " 0", "0 ", "0x1", "None",
    "True",
])


@st.composite
def tables(draw: st.DrawFn) -> bytes:
    """The metadata of the tiny data set, with something done to it."""
    columns = ["image", "label", "place", "split"]
    rows = [[f"{split}{label}{place}{k}.png", str(label), str(place), split]
            for split in ("train", "val", "test") for label in (0, 1) for place in (0, 1)
            for k in range(4)]
    for _ in range(draw(st.integers(0, 3))):
        row, column = draw(st.integers(0, len(rows) - 1)), draw(st.integers(0, 3))
        rows[row][column] = draw(ODD_TEXTS | st.text(max_size=20))
    kept = draw(st.sampled_from(["all", "all", "none", "one split", "one class", "one group"]))
    if kept != "all":
        column, value = {"none": (0, ""), "one split": (3, "train"), "one class": (1, "0"),
                         "one group": (2, "1")}[kept]
        rows = [row for row in rows if row[column] == value]
    order = draw(st.permutations(range(4)) | st.lists(st.integers(0, 3), max_size=6))
    text = io.StringIO(newline="")
    delimiter = draw(st.sampled_from([",", ",", ",", ";", "\t"]))
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerows([[line[i] for i in order] for line in (columns, *rows)])
    encoding = draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1"]))
    content = bytearray(text.getvalue().encode(encoding, "replace"))
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.integers(0, len(content)))
        content[place:place] = draw(st.binary(max_size=4))
    return bytes(content[: draw(st.sampled_from([None, None, None, 100, 1]))])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny data set, whose table may be changed."""
    folder = write_images(tmp_path_factory.mktemp("bad") / "images")
    (folder / "link.png").symlink_to("/etc/passwd")
    return folder


@settings(SLOWLY, max_examples=120)
@given(content=tables())
def test_any_table_is_read_right_or_refused_in_one_line(content: bytes, tiny: Path) -> None:
    (tiny / "metadata.csv").write_bytes(content)
    data = grokd.Data(size=20, crop=16, attribute_column="place", store=str(tiny / "store"))
    store = refused(lambda: grokd.counted_store(data, str(tiny)))
    if store is None:
        return
    with open(tiny / "metadata.csv", newline="", encoding="utf-8-sig") as file:
        header, *rows = [row for row in csv.reader(file) if row]
    assert len(store.labels) == len(rows)
    for name, numbers in (("label", store.labels), ("place", store.attributes)):
        words = [row[header.index(name)] for row in rows]
        assert len({*zip(words, numbers.tolist(), strict=True)}) == len({*words})  # one number each
    trained = store.labels[store.splits == 0]
    assert {*trained} == {*store.labels} == {*range(store.num_classes)}


MODES = ["1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "LA", "YCbCr", "HSV", "LAB"]
FORMATS = ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM"]


@st.composite
def pictures(draw: st.DrawFn) -> tuple[bytes, np.ndarray | None]:
    """An image file, and the RGB pixels that it should come to, [H, W, 3], where that is clear."""
    shape = draw(st.sampled_from([(1, 1), (1, 2), (3, 1), (7, 5), (300, 1), (1, 20_000), (64, 64)]))
    mode, format = draw(st.sampled_from(MODES)), draw(st.sampled_from(FORMATS))
    grey = np.random.default_rng(draw(st.integers(0, 9))).integers(0, 256, shape, dtype=np.uint8)
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    elif mode in ("YCbCr", "HSV", "LAB", "CMYK"):
        image = Image.new(mode, shape[::-1])
    else:
        image = Image.fromarray(grey).convert(mode)
    more: dict[str, Any] = {}
    if draw(st.booleans()):
        more["exif"] = b"Exif\0\0" + draw(st.binary(max_size=40))
    if draw(st.booleans()) and format in ("GIF", "TIFF", "WEBP"):
        more |= {"save_all": True, "append_images": [image]}
    if mode == "P" and draw(st.booleans()):
        more["transparency"] = 0
    file = io.BytesIO()
    try:
        image.save(file, format, **more)
    except (OSError, ValueError, KeyError, TypeError, struct.error, SyntaxError, RuntimeError):
        image = Image.fromarray(grey)
        image.save(file, "PNG")
        mode, more = "L", {}
    content = bytearray(file.getvalue())
    harm = draw(st.sampled_from(["none", "none", "cut", "flipped", "not an image"]))
    if harm == "cut":
        content = content[: draw(st.integers(0, len(content)))]
    elif harm == "flipped":
        content[draw(st.integers(0, len(content) - 1))] ^= draw(st.integers(1, 255))
    elif harm == "not an image":
        content = bytearray(draw(st.binary(max_size=50)))
    clear = harm == "none" and mode in ("1", "L", "I;16") and format == "PNG" and not more
    if not clear:
        return bytes(content), None
    if mode == "1":
        grey = np.asarray(image.convert("L"))
    return bytes(content), np.stack([grey] * 3, 2)


@settings(SLOWLY, max_examples=120)
@given(picture=pictures())
@pytest.mark.filterwarnings("ignore")
def test_any_image_is_stored_right_or_refused_by_name(
    picture: tuple[bytes, np.ndarray | None], tiny: Path
) -> None:
    content, pixels = picture
    folder = tiny / "built"
    shutil.rmtree(folder, ignore_errors=True)
    (tiny / "odd.img").write_bytes(content)
    data = grokd.Data(size=8, crop=8)
    try:
        grokd.build_store([grokd.Row(tiny / "odd.img", 0, 0, "train")], data, folder, False)
    except Problem as problem:
        assert "1 images cannot be read: " in str(problem) and "odd.img" in str(problem)
        assert pixels is None and not folder.exists() and not [*tiny.glob("built.part*")]
        return
    stored = np.fromfile(folder / "images.u8", np.uint8)
    assert stored.size == 3 * 8 * 8
    if pixels is not None:
        expected = grokd.decode(pixels, 8, "squash")
        assert np.abs(stored.astype(int) - expected.flatten()).max() <= 1


def test_image_of_too_many_pixels_is_refused_before_it_is_decoded(tiny: Path) -> None:
    file = io.BytesIO()
    Image.new("1", (8, 8)).save(file, "PNG")
    content = bytearray(file.getvalue())
    content[16:24] = struct.pack(">II", 20_000, 20_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (tiny / "bomb.png").write_bytes(content)
    rows = [grokd.Row(tiny / "bomb.png", 0, 0, "train")]
    with pytest.raises(Problem, match=r"bomb.png \(Image size \(400000000 pixels\) exceeds"):
        grokd.build_store(rows, grokd.Data(size=8, crop=8), tiny / "bomb", False)


ODD_VALUES = st.sampled_from([
    None, True, False, -1, 0, 1, 2, 0.5, 10**400, float("nan"), float("inf"), -float("inf"), "",
    "x", "a\nb", "random", "../x", b"", [], {}, (), (1,), ("a", "b"), (0.1, 0.9), np.float64(1.0),
    np.array([1, 2]), object(), print, Path("x"), {"a": 1}, (float("nan"),) * 2,
])


FIELDS = [
    (part, field.name)
    for part, kind in (("data", grokd.Data), ("teachers", grokd.Teachers), ("eval", grokd.Eval),
                       ("bias_model", grokd.BiasModel), ("student", grokd.Distill),
                       ("train", grokd.Train))
    for field in dataclasses.fields(kind)
]


@settings(SLOWLY, max_examples=150)
@given(part=st.sampled_from(FIELDS), value=ODD_VALUES)
def test_any_value_of_a_recipe_is_refused_in_one_line_or_has_a_fingerprint(
    part: tuple[str, str], value: Any
) -> None:
    name, field = part
    students, teachers = {"agre": grokd.Distill()}, grokd.Teachers()
    recipe = grokd.Recipe(grokd.Data(), teachers, grokd.BiasModel(), students)
    change = {field: value}
    if name == "student":
        recipe = replace(recipe, students={"agre": replace(grokd.Distill(), **change)})
    elif name == "train":
        train = replace(grokd.Train(), **change)
        recipe = replace(recipe, teachers=replace(teachers, train=train))
    else:
        recipe = replace(recipe, **{name: replace(getattr(recipe, name), **change)})

    def settings_of() -> list[dict[str, Any]]:
        grokd.check_recipe(recipe, "odd.py")
        sections = (recipe.data, recipe.teachers, *recipe.students.values())
        return [grokd.settings_of(section) for section in sections]

    for values in refused(settings_of) or []:
        assert grokd.digest(values) and "NaN" not in json.dumps(values)


@pytest.mark.parametrize("code, told", [
    (b"raise SystemExit(0)", "line 1: SystemExit: 0"),
    (b"import sys\nsys.exit()", "line 2: SystemExit"),
    (b"1 / 0", "line 1: ZeroDivisionError: division by zero"),
    (b"raise ValueError('two\\nlines')", "ValueError: two lines"),
    (b"def f(): f()\nf()", "RecursionError"),
    (b"recipe = (", "line 1: SyntaxError"),
    (b"\0", "null bytes"),
    (b"x = '\xff'", "(unicode error)"),
    (b"recipe = 3\nrecipes = 4", "defines no `recipe = Recipe"),
    (b"import no_such_module", "ModuleNotFoundError"),
])
def test_recipe_that_fails_or_ends_the_program_is_one_line(
    code: bytes, told: str, tmp_path: Path
) -> None:
    (tmp_path / "odd.py").write_bytes(code)
    with pytest.raises(Problem) as caught:
        grokd.command_line(["run", str(tmp_path / "odd.py")])
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_file_that_is_no_program_is_no_recipe(tiny: Path) -> None:
    with pytest.raises(Problem, match=r"tiny.txt is no recipe: its name must end in .py"):
        (tiny / "tiny.txt").write_text("recipe = 1")
        grokd.command_line(["run", str(tiny / "tiny.txt")])


def test_failing_reader_is_one_line_with_its_place(tiny: Path) -> None:
    def reader(root: Path) -> list[grokd.Row]:
        raise KeyError(root)

    with pytest.raises(Problem, match=r"reader failed .*test_trust.py, line \d+\): KeyError"):
        grokd.checked_rows(grokd.Data(reader=reader), str(tiny))
    path, unchecked = tiny / "train000.png", cast(Any, grokd.Row)
    for row in (3, ("x", 0, 0, "train"), unchecked("x", 0, 0, "train"),
                unchecked(path, 0.5, 0, "train"), unchecked(path, 10**30, 0, "train")):
        returned = cast(Any, [row])
        data = grokd.Data(reader=partial(lambda rows, root: rows, returned))
        with pytest.raises(Problem, match="The recipe's reader gives"):
            grokd.checked_rows(data, "")
    absent = grokd.Data(reader=lambda root: [grokd.Row(tiny / "absent.png", 0, 0, "train")])
    with pytest.raises(Problem, match=r"absent.png is not there"):
        grokd.counted_store(absent, "")


class Code:
    """Ends the test if it is run."""

    def __reduce__(self) -> Any:
        return pytest.exit, ("code of a weights file was run",)


@st.composite
def weights(draw: st.DrawFn) -> tuple[str, bytes]:
    """A weights file of cnn2, with something done to it: suffix and content."""
    torch.manual_seed(0)
    state: dict[str, Any] = dict(grokd.CNN2(2).state_dict())
    key = draw(st.sampled_from(sorted(state)))
    change = draw(st.sampled_from(["none", "gone", "shape", "nan", "inf", "kind", "code"]))
    suffix = draw(st.sampled_from([".safetensors", ".pth"]))
    if change == "gone":
        del state[key]
    elif change == "shape":
        state[key] = torch.zeros(draw(st.lists(st.integers(0, 3), max_size=3)))
    elif change in ("nan", "inf"):
        state[key].view(-1)[0] = float(change)
    elif change == "kind":
        state[key] = state[key].to(draw(st.sampled_from([torch.float64, torch.int32, torch.bool])))
    elif change == "code" and suffix == ".pth":
        state[key] = Code()
    if suffix == ".pth":
        file = io.BytesIO()
        torch.save(state, file)
        content = bytearray(file.getvalue())
    else:
        state = {name: value.contiguous().clone() for name, value in state.items()}
        content = bytearray(save(state))
    harm = draw(st.sampled_from(["none", "none", "cut", "flipped"]))
    if harm == "cut":
        content = content[: draw(st.integers(0, len(content)))]
    elif harm == "flipped":
        content[draw(st.integers(0, 500) | st.integers(0, len(content) - 1))] ^= 1
    return suffix, bytes(content)


@settings(SLOWLY, max_examples=100)
@given(file=weights())
def test_any_weights_file_is_loaded_whole_and_finite_or_refused_in_one_line(
    file: tuple[str, bytes], tiny: Path
) -> None:
    path = tiny / f"odd{file[0]}"
    path.write_bytes(file[1])
    model = refused(lambda: grokd.build_model("cnn2", str(path), 2, grokd.Input(), 0))
    if model is None:
        return
    assert grokd.all_finite(model.state_dict().values())
    held = load_file(path) if file[0] == ".safetensors" else torch.load(path, weights_only=True)
    for key, value in model.plain_state().items():
        if not key.startswith("fc."):  # a head that does not fit is fresh
            assert torch.equal(value, held[key].to(value))


def tree(folder: Path) -> dict[str, str]:
    """Every file's digest."""
    return {str(path): grokd.file_digest(path) for path in folder.rglob("*")
            if path.is_file() and path.name not in (".lock", "lock")}


# Damage


class Made:
    """A data set with what a run wrote there, a copy of that, and what counts of it."""

    def __init__(
        self, folder: Path, kept: Path, content: dict[str, Any], command: str = "run"
    ) -> None:
        self.folder, self.kept, self.content, self.command = folder, kept, content, command
        for name in MADE:
            shutil.copytree(folder / name, kept / name)

    def restore(self, *without: str) -> None:
        """As it was, but for some of the files and folders."""
        for name in MADE:
            shutil.rmtree(self.folder / name, ignore_errors=True)
            shutil.copytree(self.kept / name, self.folder / name)
        for pattern in without:
            for path in self.folder.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def run(self, *args: str) -> None:
        grokd.identify.cache_clear()  # as a new process would
        grokd.command_line([self.command, "tiny.py", *args])

    def is_as_it_was(self) -> bool:
        """Is what the command makes what it was at first?"""
        now = content(self.folder)
        return {name: now.get(name) for name in self.content} == self.content

    def files(self, pattern: str) -> list[Path]:
        found = sorted(path for path in self.folder.glob(pattern) if path.is_file())
        assert found, pattern
        return found


def content(folder: Path) -> dict[str, Any]:
    """Tensors, tables, images and rows: what must not depend on damage."""
    made: dict[str, Any] = {}
    for path in sorted((folder / OUT).rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            for key, value in load_file(path).items():
                made[f"{name} {key}"] = grokd.digest(value.numpy().tobytes())
        elif path.suffix == ".csv" or (path.suffix == ".png" and path.stem.isdecimal()):
            made[name] = grokd.file_digest(path)
    if (folder / OUT / "results.json").is_file():
        made["rows"] = json.loads((folder / OUT / "results.json").read_text())["rows"]
    return made


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, patch: pytest.MonkeyPatch) -> Made:
    """A finished run of everything."""
    folder = write_images(tmp_path_factory.mktemp("trust") / "images")
    with open(folder / "tiny.py", "a") as recipe:
        recipe.write(MORE)
    patch.chdir(folder)
    patch.setattr(grokd, "png", lambda figure, pyplot: pyplot.close(figure) or b"")  # takes long
    grokd.command_line(["run", "tiny.py"])
    return Made(folder, folder.with_name("kept"), content(folder))


def interrupt(
    made: Made, owner: Any, name: str, due: Callable[..., bool], command: str, makes: str
) -> Made:
    """A command that ended at a certain call; what it left is kept."""
    function = getattr(owner, name)
    made_of = {key: value for key, value in made.content.items() if f"/{makes}/" in key}
    assert made_of

    def wrapped(*args: Any, **more: Any) -> Any:
        if due(*args, **more):
            raise KeyboardInterrupt
        return function(*args, **more)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, wrapped)
        grokd.command_line([command, "tiny.py"])
    return Made(made.folder, made.folder.with_name(f"half-{command}"), made_of, command)


@pytest.fixture(scope="module")
def half_trained(finished: Made) -> Made:
    """Interrupted in the second epoch of the first teacher."""
    finished.restore("runs/tiny/[s-z]*", "runs/tiny/[a-g]*")
    return interrupt(finished, grokd.Training, "step", call(4), "teachers", "teachers")


@pytest.fixture(scope="module")
def half_generated(finished: Made) -> Made:
    """Interrupted after some images of a set."""
    finished.restore("runs/tiny/augmented", "runs/tiny/students/more")
    return interrupt(finished, Image, "fromarray", call(4), "augment", "augmented")


def flip(path: Path, place: int, mask: int) -> bytes:
    """Change a byte of a file; returns what it then holds."""
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= mask
    path.write_bytes(data)
    return bytes(data)


def finish(made: Made, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Run; what is refused is done away with as the line says, and the run begun again. Returns the
    lines of warning and refusal."""
    told: list[str] = []
    for _ in range(3):
        try:
            made.run()
            break
        except Problem as problem:
            line = str(problem)
            told.append(line)
            assert "\n" not in line and len(line) < 600, line
            if "cannot be read" in line:
                Path(line.partition(" cannot be read")[0]).unlink()
            elif " is damaged (block" in line:
                shutil.rmtree(line.partition(" is damaged")[0])
            elif " and nothing that says from where" in line:
                shutil.rmtree(line.partition(" holds ")[0])
            else:
                named = line.partition("everything in " if "--redo" in line else ": delete ")[2]
                path = Path(named.split()[0])
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    else:
        pytest.fail(str(told))
    told += [line for line in capsys.readouterr().out.splitlines() if "damaged" in line]
    return told


class Kind(NamedTuple):
    """Files of one kind, and what has to be made again for them to be read."""

    pattern: str
    without: tuple[str, ...] = ()
    silent: bool = False  # may it go without a word, since the file serves nothing that is made?


AGRE = ("runs/tiny/students/agre",)
FINISHED_KINDS = {
    "teacher": Kind("runs/tiny/teachers/*/*.safetensors", AGRE),
    "biased model": Kind("runs/tiny/bias-model/model.safetensors", AGRE),
    "losses": Kind("runs/tiny/bias-model/model.losses.safetensors",
                   ("runs/tiny/students/tab",)),
    "student": Kind("runs/tiny/students/*/seed0/model.safetensors"),
    "images": Kind("store/*/images.u8", AGRE),
    "manifest": Kind("store/*/manifest.json"),
    "answers": Kind("store/targets/*-*", AGRE, silent=True),  # some are of an older set
    "generated image": Kind("runs/tiny/augmented/plain/seed0/[0-9]*.png",
                            ("runs/tiny/students/more",)),
    "table": Kind("runs/tiny/augmented/plain/seed0/metadata.csv", ("runs/tiny/students/more",)),
    "note": Kind("runs/tiny/*/**/done.json", ("runs/tiny/students/more",)),
    "generator": Kind("runs/tiny/generator/pipeline/**/*.*", ("runs/tiny/augmented",)),
    "results": Kind("runs/tiny/results.json", silent=True),
    "history": Kind("runs/tiny/*/**/*.history.json", silent=True),
}
TRAINED_KINDS = {
    "checkpoint": Kind("runs/tiny/teachers/0/*.partial/[0-9]*/state.pt"),
    "losses of epochs": Kind("runs/tiny/teachers/0/*.partial/losses.f32"),
    "note of a beginning": Kind("runs/tiny/teachers/0/*.partial/begun.json"),
}
GENERATED_KINDS = {
    "records": Kind("runs/tiny/augmented/plain/seed0/records-0.jsonl", silent=True),
    "recorded image": Kind("runs/tiny/augmented/plain/seed0/[0-9]*.png", silent=True),
    "flight": Kind("runs/tiny/augmented/plain/seed0/*.partial/flight-*", silent=True),
}
ANYWHERE = st.tuples(st.integers(0, 10**6), st.integers(1, 255), st.integers(0, 50))


def assert_repaired(
    made: Made, kind: Kind, damage: tuple[int, int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    place, mask, number = damage
    made.restore(*kind.without)
    files = made.files(kind.pattern)
    damaged = flip(files[number % len(files)], place, mask)
    told = finish(made, capsys)
    assert made.is_as_it_was()
    assert told or kind.silent or b'"checksum"' not in damaged


@pytest.mark.parametrize("name", [n for n in FINISHED_KINDS if n not in ("results", "history")])
@settings(SLOWLY, max_examples=1)
@given(damage=ANYWHERE)
def test_flipped_byte_of_a_finished_run_is_never_used(
    name: str, damage: tuple[int, int, int], finished: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_repaired(finished, FINISHED_KINDS[name], damage, capsys)


@pytest.mark.parametrize("name", TRAINED_KINDS)
@settings(SLOWLY, max_examples=1)
@given(damage=ANYWHERE)
def test_flipped_byte_of_a_training_is_never_used(
    name: str, damage: tuple[int, int, int], half_trained: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_repaired(half_trained, TRAINED_KINDS[name], damage, capsys)


@pytest.mark.parametrize("name", GENERATED_KINDS)
@settings(SLOWLY, max_examples=1)
@given(damage=ANYWHERE)
def test_flipped_byte_of_a_generation_is_never_used(
    name: str, damage: tuple[int, int, int], half_generated: Made,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert_repaired(half_generated, GENERATED_KINDS[name], damage, capsys)


def test_refused_input_harms_nothing_of_a_finished_run(finished: Made) -> None:
    finished.restore()
    before, folder = tree(finished.folder / OUT), finished.folder
    table, image = (folder / "metadata.csv").read_bytes(), (folder / "val000.png").read_bytes()
    for path, kept, content in (
        (folder / "metadata.csv", table, table.replace(b"val000.png", b"gone.png")),
        (folder / "metadata.csv", table, table.replace(b",1,", b",7,")),
        (folder / "val000.png", image, image[:50]),
    ):
        changed = path.stat().st_mtime_ns
        path.write_bytes(content)
        with pytest.raises(Problem):
            finished.run()
        path.write_bytes(kept)
        os.utime(path, ns=(changed, changed))
        assert tree(folder / OUT) == before
    with pytest.raises(Problem, match="Keep both with --out DIR"):
        finished.run("--teachers.lr", "0.5")
    assert tree(folder / OUT) == before


@pytest.mark.parametrize("pattern, told", [
    ("runs/tiny/teachers/0/*.partial/[0-9]*", "state.pt cannot be read"),  # an empty folder
    ("runs/tiny/teachers/0/*.partial/losses.f32", "losses.f32 does not fit"),
])
def test_half_a_checkpoint_is_said_and_made_again(
    pattern: str, told: str, half_trained: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    half_trained.restore(pattern)
    (half_trained.folder / OUT / "teachers/0/erm.partial/000000003").mkdir(exist_ok=True)
    half_trained.run()
    assert told in capsys.readouterr().out
    assert half_trained.is_as_it_was()


def test_files_of_the_time_before_checksums_are_read(finished: Made, tmp_path: Path) -> None:
    path = finished.kept / OUT / "teachers" / "0" / "erm.safetensors"
    metadata = grokd.read_metadata(path)
    older = tmp_path / "older.safetensors"
    older.write_bytes(save(load_file(path), metadata))
    assert grokd.read_metadata(older) == metadata and "checksum" not in metadata
    model, again = grokd.load_model(path), grokd.load_model(older)
    assert grokd.trunk_key(model) == grokd.trunk_key(again)
    for name, content in (("a.json", b'{"fingerprint": "1"}'), ("b.pt", None)):
        if content is None:
            torch.save({"step": 3}, tmp_path / name)
            assert grokd.read_state(tmp_path / name) == {"step": 3}
        else:
            (tmp_path / name).write_bytes(content)
            assert grokd.read_metadata(tmp_path / name) == {"fingerprint": "1"}


WRITE = """import grokd, torch
state = {"b": torch.arange(3.0), "a": torch.ones(2, 2).half(), "c": torch.tensor(3)}
content = grokd.weights_file(state, {f"key {i}": "→" * i for i in range(20)})
"""


def test_weights_files_have_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    code = WRITE + f"open({str(tmp_path / 'a.safetensors')!r}, 'wb').write(content)"
    environment = os.environ | {"PYTHONHASHSEED": "77"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, cwd=ROOT)
    here: dict[str, Any] = {}
    exec(WRITE, here)
    assert (tmp_path / "a.safetensors").read_bytes() == here["content"]
    read = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(read[key], here["state"][key]) for key in here["state"])
    assert grokd.read_metadata(tmp_path / "a.safetensors")["key 2"] == "→→"


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FINISHED_KINDS, *TRAINED_KINDS, *GENERATED_KINDS])
@settings(SLOWLY, max_examples=30, derandomize=False)
@given(damage=ANYWHERE)
def test_flipped_bytes_are_never_used(
    name: str, damage: tuple[int, int, int], finished: Made, half_trained: Made,
    half_generated: Made, capsys: pytest.CaptureFixture[str],
) -> None:
    for made, kinds in ((finished, FINISHED_KINDS), (half_trained, TRAINED_KINDS),
                        (half_generated, GENERATED_KINDS)):
        if name in kinds:
            assert_repaired(made, kinds[name], damage, capsys)


# What is said at the end of a training


def test_network_that_names_one_class_alone_is_said(
    finished: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    finished.restore("runs/tiny/bias-model", "runs/tiny/students")
    state = grokd.CNN2(2).state_dict()
    state["fc.bias"][1] = 100.0
    (finished.folder / "one.safetensors").write_bytes(save(state))
    grokd.command_line(["bias-model", "tiny.py", "--weights", "one.safetensors", "--epochs", "0"])
    line, = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert line.startswith("warning: bias-model/model answers 'class 1' to every validation image")
    assert "worst group has 0 %" in line and "lower its lr" in line


def test_weights_that_are_not_finite_end_the_run_and_leave_the_last_checkpoint(
    half_trained: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is finite still: it is that before the step."""
    half_trained.restore()
    path, = half_trained.files("runs/tiny/teachers/0/*.partial/[0-9]*/state.pt")
    before, step = path.read_bytes(), grokd.Training.step

    def overflow(self: grokd.Training, *args: Any) -> None:
        step(self, *args)
        next(self.model.parameters()).data[0] = float("inf")

    monkeypatch.setattr(grokd.Training, "step", overflow)
    with pytest.raises(Problem, match=r"0/erm: the weights are not finite after step 4: lower its"):
        half_trained.run()
    assert path.read_bytes() == before
    assert not (half_trained.folder / OUT / "teachers/0/erm.safetensors").exists()


# Disks, other runs, other machines


def ending(*args: str) -> str:
    """What a command that fails says last."""
    with pytest.raises(SystemExit) as ended:
        grokd.in_one_line(lambda: grokd.command_line(args))
    line = str(ended.value)
    assert line.startswith("error: ") and len(line.splitlines()) == 1
    return line


@pytest.mark.parametrize("out", ["metadata.csv/out", "/proc/out"])
def test_folder_that_cannot_be_written_is_one_line(out: str, finished: Made) -> None:
    finished.restore()
    assert "--out" in ending("teachers", "tiny.py", "--out", out)
    assert str(Path(out).parts[0]) in ending("run", "tiny.py", "--data.store", out)


@pytest.mark.parametrize("limit, what", [(10_000, "store"), (60_000, "checkpoints")])
def test_full_disk_ends_in_one_line_and_the_run_goes_on(
    limit: int, what: str, finished: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished.restore("store", "runs/tiny/teachers/0")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1e12))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        line = ending("run", "tiny.py")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "could not be written (File too large): make room" in line
    finished.run()
    assert finished.is_as_it_was()
    assert not [*finished.folder.rglob("*.part*")]


def test_full_memory_of_a_gpu_ends_in_one_line_and_leaves_the_checkpoint(
    half_trained: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    half_trained.restore()

    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB.")

    monkeypatch.setattr(grokd.Training, "step", full)
    line = ending("teachers", "tiny.py")
    assert line.startswith("error: CUDA out of memory. Tried to allocate 2.00 GiB: set a smaller "
                           "--micro-batch (in recipes: micro_batch, also of diffusion and of each "
                           "set of images), or --precision bfloat16, or free memory there.")
    assert half_trained.files("runs/tiny/teachers/0/*.partial/[0-9]*/state.pt")


def test_second_run_waits_for_the_store_of_the_first(finished: Made) -> None:
    """Not for ever, and it takes what the other has built."""
    finished.restore()
    recipe = grokd.load_recipe("tiny.py")
    folder = grokd.store_folder(grokd.checked_rows(recipe.data, "."), recipe.data)
    lock = folder.with_suffix(".lock")
    with ThreadPoolExecutor(1) as threads:
        with grokd.locked(lock):
            second = threads.submit(grokd.open_store, recipe.data, ".")
            with pytest.raises(TimeoutError):
                second.result(0.5)
        assert len(second.result(60).labels) == 48


def test_cache_that_is_deleted_under_a_running_student_changes_nothing(
    finished: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished.restore("runs/tiny/students/agre")
    answer, asked = grokd.Targets.answer, call(2)

    def forgetful(self: grokd.Targets, batch: grokd.Batch) -> grokd.Ensemble:
        if asked():
            shutil.rmtree(self.folder)
        return answer(self, batch)

    monkeypatch.setattr(grokd.Targets, "answer", forgetful)
    finished.run()
    assert finished.is_as_it_was()
    assert [*finished.folder.glob("store/targets/*-1")]


def test_other_locale_time_zone_and_clock_change_nothing(
    finished: Made, grokd_process: Run
) -> None:
    """The terminal has no arrows, and every file seems to be of the future or of 1970."""
    finished.restore("runs/tiny/students/agre")
    for i, path in enumerate(sorted(finished.folder.rglob("*"))):
        if not path.is_symlink():
            os.utime(path, (i % 2 * 2**32, i % 2 * 2**32))
    strange = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
               "TZ": "Pacific/Kiritimati"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in strange.items():
            patch.setenv(name, value)
        flags = ["--student", "agre", "--checkpoint-minutes", "3"]
        printed = grokd_process("distill", "tiny.py", *flags, cwd=finished.folder)
    assert "checkpoint_minutes 1e-09 ? 3.0" in printed.stdout
    assert finished.is_as_it_was()


# What no other test noticed: see recipes/measured/mutations.py


def test_every_fault_stands_once_in_the_source_and_in_every_section_is_one() -> None:
    module = load_mutations()
    source = (ROOT / "grokd.py").read_text()
    titles = re.findall(r"^# ---- (.+?) -+$", source, re.MULTILINE)
    places = {fault.name: source.find(fault.old) for fault in module.FAULTS}
    assert len(places) == len(module.FAULTS) >= 40
    assert all(source.count(fault.old) == 1 and fault.old != fault.new for fault in module.FAULTS)
    starts = [source.index(f"# ---- {title} -") for title in titles]
    assert {bisect.bisect(starts, place) for place in places.values()} == {
        *range(1, len(titles) + 1)}
    for fault in module.FAULTS:
        assert (ROOT / fault.tests.split()[0]).is_file()


def load_mutations() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "recipes" / "measured"))
        return importlib.import_module("mutations")


def test_every_byte_of_our_files_is_looked_after(tmp_path: Path) -> None:
    """Flipped, it is noticed; or, in the name of the checksum itself, nothing else has changed."""
    note, model, state = (tmp_path / name for name in ("a.json", "a.safetensors", "state.pt"))
    said = {"fingerprint": "0123", "settings": '{"lr": 0.1}'}
    tensors = {"a": torch.arange(3.0), "b": torch.ones(2, dtype=torch.float64)}
    note.write_text(json.dumps(grokd.with_checksum(said)))
    model.write_bytes(grokd.weights_file(tensors, said))
    saved = io.BytesIO()
    torch.save({"step": 3, "model": tensors}, saved)
    state.write_bytes(grokd.sealed(saved.getvalue()))

    def read_model() -> dict[str, Any]:
        read, metadata = grokd.read_weights(model)
        return metadata | {key: value.tolist() for key, value in read.items()}

    def read_checkpoint() -> dict[str, Any]:
        held = grokd.read_state(state)
        return {key: str(value) for key, value in held.items()}

    for path, read in ((note, lambda: grokd.read_json(note)), (model, read_model),
                       (state, read_checkpoint)):
        whole, expected, noticed = path.read_bytes(), read(), 0
        for place in range(0, len(whole), 1 + len(whole) // 400):
            flip(path, place, 1 << place % 8)
            grokd.checksum_fits.cache_clear()  # a clock may be too coarse for so many changes
            found = refused(read)
            noticed += found is None
            assert found is None or expected.items() <= found.items(), (path, place)
            path.write_bytes(whole)
        assert noticed > 0.7 * len(range(0, len(whole), 1 + len(whole) // 400))


def test_write_that_fails_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    grokd.write_file(tmp_path / "a", "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Problem, match=r"a could not be written \(No space left on device\)"):
        grokd.write_file(tmp_path / "a", "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_sixteen_bits_are_stored_as_their_upper_eight() -> None:
    grey = np.arange(0, 65_536, 1024, dtype=np.uint16).reshape(8, 8)
    stored = grokd.decode(grey, 8, "squash")
    assert np.array_equal(stored[0], grey >> 8) and np.array_equal(stored[0], stored[2])
    for values in (grey.astype(np.int32), grey.astype(np.float32) / 65_536):
        with pytest.raises(ValueError, match="save it with 8 or 16 bits"):
            grokd.decode(values, 8, "squash")


@pytest.mark.parametrize("count, sizes", [
    (8, [4, 4]), (9, [4, 5]), (10, [4, 4, 2]), (1, [1]), (5, [5]),
])
def test_last_batch_of_one_image_joins_the_one_before(count: int, sizes: list[int]) -> None:
    assert [len(batch) for batch in grokd.epoch_batches(count, 4, 0, 0)] == sizes


def test_odd_image_of_a_group_refits_heads(tiny: Path) -> None:
    folder = write_images(tiny.with_name("odd"), per_group=3)
    data = grokd.Data(size=8, crop=8, attribute_column="place", store=str(folder / "store"))
    store = grokd.counted_store(data, str(folder))
    assert store.counts("reweighting").tolist() == [2] * 4
    assert store.counts("selection").tolist() == [1] * 4


def test_learning_rate_rises_and_falls_as_planned() -> None:
    train = grokd.Train(epochs=3, lr=2.0, schedule="cosine", warmup_epochs=1.0)
    rates = [grokd.learning_rate(train, step, 4) for step in range(12)]
    assert rates[:4] == pytest.approx([0.4, 0.8, 1.2, 1.6])
    assert rates[4] == 2.0 and rates[8] == pytest.approx(1.0)
    assert rates[11] == pytest.approx(1 + np.cos(np.pi * 7 / 8))
    assert grokd.learning_rate(replace(train, schedule="constant"), 11, 4) == 2.0


def test_heads_of_one_network_do_not_carry_over(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refitted head that is written first leaves the next one as it was learnt."""
    folder = write_images(tiny.with_name("heads"))
    with open(folder / "tiny.py", "a") as recipe:
        recipe.write("""
both = {"refitted": recipe.students["one-hot-dfr"], "own": recipe.students["one-hot"]}
import grokd
recipe = grokd.replace(recipe, seeds=(0,), students=both)
""")
    monkeypatch.chdir(folder)
    grokd.command_line(["distill", "tiny.py"])
    grokd.command_line(["distill", "tiny.py", "--student", "own", "--out", "alone"])
    own, alone, refitted = (load_file(path / "seed0" / "model.safetensors") for path in (
        OUT / "students/own", Path("alone/students/own"), OUT / "students/refitted"))
    assert all(torch.equal(own[key], alone[key]) for key in own)
    assert not torch.equal(own["fc.weight"], refitted["fc.weight"])


def test_training_set_is_rebalanced_by_group_or_class(tiny: Path) -> None:
    folder = write_images(tiny.with_name("uneven"))
    table = (folder / "metadata.csv").read_text()
    kept = [line for line in table.splitlines(keepends=True)
            if not line.startswith(("train000.png", "train110.png"))]
    (folder / "metadata.csv").write_text("".join(kept))
    data = grokd.Data(size=8, crop=8, attribute_column="place", store=str(folder / "store"))
    ctx: Any = SimpleNamespace(store=grokd.counted_store(data, str(folder)))
    counts = {
        way: grokd.training_store(grokd.Distill(rebalance=way), 0, ctx).split("train")
        for way in ("none", "classes", "groups")
    }
    assert [len(indices) for indices in counts.values()] == [14, 14, 16]
    assert np.bincount(ctx.store.cells[counts["groups"]]).tolist() == [4] * 4


def test_damaged_record_of_an_image_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "records-0.jsonl"
    lines = [json.dumps(grokd.with_checksum({"source": i, "score": 0.5})) for i in range(3)]
    lines[1] = lines[1].replace("0.5", "0.7")
    path.write_text("\n".join([*lines, '{"source": 7, "score": 1.0}', '{"sour']))
    assert [record["source"] for record in grokd.read_records(tmp_path)] == [0, 2, 7]


def test_changed_answer_is_computed_again(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_images(tiny.with_name("answers"))
    data = grokd.Data(size=8, crop=8, attribute_column="place", store=str(folder / "store"))
    store, runtime = grokd.open_store(data, str(folder)), grokd.Runtime.start("float32")
    model = grokd.build_model("cnn2", "random", 2, grokd.Input(), 0).eval()
    targets = grokd.Targets([model], 1, store, {}, runtime, 0)
    targets.prepare(0)
    path, = targets.folder.glob("*-0")
    whole = path.read_bytes()
    flip(path, len(whole) - 2, 64)
    grokd.Targets([model], 1, store, {}, runtime, 0).prepare(0)
    assert path.read_bytes() == whole
    assert "warning" in (told := capsys.readouterr().out) and targets.files[0].name in told


def test_answers_in_another_precision_have_files_of_their_own(tiny: Path) -> None:
    data = grokd.Data(size=8, crop=8, attribute_column="place", store=str(tiny / "store"))
    write_images(tiny)
    store, runtime = grokd.counted_store(data, str(tiny)), grokd.Runtime.start("float32")
    model = grokd.build_model("cnn2", "random", 2, grokd.Input(), 0).eval()
    names = {
        grokd.Targets([model], 1, store, {}, replace(runtime, precision=precision), 0).files[0].name
        for precision in ("float32", "bfloat16", "float64")
    }
    assert len(names) == 3


# Killed at any moment, whatever is at work


MOMENTS = 30
KILLED_RECIPE = MORE.replace("epochs=2", "epochs=8").replace("epochs=1,", "epochs=3,") + '''
heads = grokd.replace(recipe.students["agre"], head="dfr")
recipe = grokd.replace(
    recipe, students={**recipe.students, "refitted": heads},
    diffusion=grokd.replace(recipe.diffusion, checkpoint_minutes=1e-9),
)
'''


class Whole(NamedTuple):
    """A run that nobody disturbed."""

    folder: Path
    content: dict[str, Any]
    seconds: float  # of the processor


@pytest.fixture(scope="module")
def herd() -> Iterator[Herd]:
    herd = Herd()
    yield herd
    herd.close()


def begin_anew(folder: Path) -> Path:
    write_images(folder, per_group=8)
    with open(folder / "tiny.py", "a") as recipe:
        recipe.write(KILLED_RECIPE)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, herd: Herd) -> Whole:
    folder = begin_anew(tmp_path_factory.mktemp("whole") / "images")
    never = {"KILLED_AFTER": "inf"}
    ended = herd.run(folder, 1, "run", "tiny.py", place="moment", rank=0, environment=never)
    assert ended.codes == [0], ended.errors
    return Whole(folder, content(folder), float((folder / SPENT).read_text()))


@pytest.fixture(scope="module")
def record(request: pytest.FixtureRequest) -> Iterator[list[list[str]]]:
    """Rows of the record that --record names."""
    rows: list[list[str]] = []
    file = "recipes/measured/moments.json"
    command = f"pytest -n 0 -m slow tests/test_trust.py -k moment --record {file}"
    about = grokd.origin(1) | {"command": command}
    yield rows
    if path := request.config.getoption("--record"):
        header = ["killed after", "at work", "steps that stood", "same bits"]
        results = {"about": about, "header": header, "rows": rows}
        Path(path).write_text(json.dumps(results, indent=1))


def at_work(folder: Path) -> tuple[str, str]:
    """What a killed run was making, and the step of its checkpoint."""
    if not [*folder.glob("store/*/manifest.json")]:
        return "store", "–"
    begun = sorted((folder / OUT).rglob("*.partial"), key=lambda path: path.stat().st_mtime)
    if not begun:
        return "between two, or the report", "–"
    steps = [path.name.lstrip("0") for path in begun[-1].glob("[0-9]*") if path.name.isdecimal()]
    name = begun[-1].relative_to(folder / OUT).with_suffix("")
    return str(name), max(steps, key=int, default="–")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(MOMENTS))
def test_run_killed_at_a_random_moment_ends_with_the_same_bits(
    number: int, tmp_path: Path, herd: Herd, whole: Whole, record: list[list[str]]
) -> None:
    """One moment of each thirtieth of the processor time that a run takes."""
    folder = begin_anew(tmp_path / "images")
    share = (number + grokd.hash_uniform(2026, number)[0]) / MOMENTS
    seconds = f"{share * whole.seconds:.2f}"
    ended = herd.run(folder, 1, "run", "tiny.py", place="moment", rank=0,
                     environment={"KILLED_AFTER": seconds})
    assert ended.codes in ([-9], [0])  # it may have been faster than the first one
    found = at_work(folder) if ended.codes == [-9] else ("it had ended", "–")
    again = herd.run(folder, 1, "run", "tiny.py")
    same = again.codes == [0] and content(folder) == whole.content
    record.append([f"{seconds} s", *found, "yes" if same else "no"])
    assert same, (found, again.errors)
    assert not [*folder.rglob("*.partial"), *folder.rglob("*.part*")]

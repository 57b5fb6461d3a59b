"""Nothing lost, nobody misled: bad input, damaged files, two runs at once."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis.strategies as st
import pytest
from conftest import write_images
from hypothesis import HealthCheck, Phase, given, settings
from kills import call
from PIL import Image
from safetensors.torch import load_file

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


# Damage


class Made:
    """A data set with what a run wrote there, a copy of that, and what counts of it."""

    def __init__(self, folder: Path, kept: Path, content: dict[str, Any]) -> None:
        self.folder, self.kept, self.content = folder, kept, content
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
        grokd.command_line(["run", "tiny.py", *args])

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


def interrupt(made: Made, owner: Any, name: str, due: Callable[..., bool], kept: str) -> Made:
    """A run that ended at a certain call; what it left is kept."""
    function = getattr(owner, name)

    def wrapped(*args: Any, **more: Any) -> Any:
        if due(*args, **more):
            raise KeyboardInterrupt
        return function(*args, **more)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, wrapped)
        made.run()
    return Made(made.folder, made.folder.with_name(kept), made.content)


@pytest.fixture(scope="module")
def half_trained(finished: Made) -> Made:
    """Interrupted in the second epoch of the first teacher."""
    finished.restore("runs/tiny/[s-z]*", "runs/tiny/[a-g]*")
    return interrupt(finished, grokd.Training, "step", call(4), "half-trained")


@pytest.fixture(scope="module")
def half_generated(finished: Made) -> Made:
    """Interrupted after some images of a set."""
    finished.restore("runs/tiny/augmented", "runs/tiny/students/more")
    return interrupt(finished, Image, "fromarray", call(4), "half-generated")


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
    assert content(made.folder) == made.content
    assert told or kind.silent or b'"checksum"' not in damaged


@pytest.mark.parametrize("name", FINISHED_KINDS)
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

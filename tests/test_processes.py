"""Several processes on the CPU: the same figures, and where promised the same bits, as one."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, Run, write_images
from kills import Ended, Herd
from safetensors.torch import load_file

import grokd

STUDENTS = '''
once = Train(epochs=1, batch_size=264, lr=1.0, momentum=0.0, weight_decay=0.0)
plain = Distill(arch="cnn2", weights="random", train=once)
uneven = replace(once, batch_size=5, lr=0.01, momentum=0.9)
agre = replace(plain, weighting="agre")
students = {
    "average": replace(plain, weighting="average", train=uneven),
    "average-micro": replace(plain, weighting="average", train=replace(uneven, micro_batch=2)),
    "logits": agre,
    "parameters": replace(agre, space="parameters"),
    "batch": replace(agre, space="batch"),
    "random": replace(agre, weighting="random"),
    "departure": replace(agre, weighting="departure"),
}
'''


def processes(launcher: list[str], *args: str, cwd: Path) -> str:
    """A grokd command under a launcher, on the CPU; what it printed."""
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    command = [*launcher, str(ROOT / "grokd.py"), *args]
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]


def files(folder: Path) -> dict[str, Path]:
    return {str(path.relative_to(folder)): path for path in folder.rglob("*.safetensors")}


def test_whole_models_side_by_side_have_the_bits_of_one_process(
    images: Path, grokd_process: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    grokd_process("run", "tiny.py", "--out", "one", cwd=images)
    printed = processes(TWO, "run", "tiny.py", "--out", "two", "--parallel", "models", cwd=images)
    one, two = files(images / "one"), files(images / "two")
    assert one.keys() == two.keys()
    for name, path in one.items():
        a, b = load_file(path), load_file(two[name])
        assert all(torch.equal(a[k], b[k]) for k in a), name
    rows = [json.loads((images / out / "results.json").read_text())["rows"]
            for out in ("one", "two")]
    assert rows[0] == rows[1]
    assert printed.count("| teachers, ERM ") == 1  # once, not by each process


def test_shared_batches_equal_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AVER after an epoch of uneven batches, and the first gradient of every weighting."""
    images = write_images(tmp_path / "images", per_group=66)  # two blocks of cached targets
    text = (images / "tiny.py").read_text().replace("students={", "students=students or {")
    more = f"from dataclasses import replace\n{STUDENTS}\nrecipe = Recipe"
    text = text.replace("recipe = Recipe", more)
    (images / "tiny.py").write_text(text)
    flags = ["--precision", "float64", "--seeds", "0"]
    monkeypatch.chdir(images)
    for stage in ("teachers", "bias-model", "distill"):
        grokd.command_line([stage, "tiny.py", *flags])
    one = images / "runs" / "tiny" / "students"
    one.rename(images / "one")
    targets = images / "store" / "targets"
    targets.rename(images / "targets")
    processes(TWO, "distill", "tiny.py", *flags, "--parallel", "data", cwd=images)
    cached = {path.name: np.fromfile(path, np.float64, offset=8) for path in targets.glob("*-0")}
    assert len(cached) == 3
    for name, values in cached.items():
        assert np.abs(values - np.fromfile(images / "targets" / name, offset=8)).max() < 1e-10
    gaps = {}
    for path in sorted((images / "one").glob("*/seed0/model.safetensors")):
        a, b = load_file(path), load_file(one / path.relative_to(images / "one"))
        gaps[path.parent.parent.name] = max(float((a[k] - b[k]).abs().max()) for k in a)
        assert a["fc.weight"].dtype == torch.float64
        losses = [load_file(p.with_name("model.losses.safetensors"))["losses"] for p in
                  (path, one / path.relative_to(images / "one"))]
        assert torch.allclose(losses[0], losses[1], atol=1e-6)
    assert gaps.keys() == {
        "average", "average-micro", "logits", "parameters", "batch", "random", "departure"
    }
    assert gaps["average"] < 1e-8
    assert gaps["average-micro"] < 1e-8
    # With learning rate 1 and no momentum the weights' change is the gradient.
    assert max(gaps.values()) < 1e-6, gaps


@pytest.mark.parametrize("launcher", [TWO, LAUNCH], ids=["two processes", "accelerate launch"])
def test_every_stage_works_under_a_launcher(tmp_path: Path, launcher: list[str]) -> None:
    folder = write_images(tmp_path / "images")
    more = ["--parallel", "data"] if launcher is TWO else []
    printed = processes(launcher, "run", "tiny.py", *more, cwd=folder)
    assert printed.count("Ship this one: ") == 1  # by one process alone
    assert (folder / "runs" / "tiny" / "groups.png").stat().st_size > 10_000


# One process is killed (kill -9), and no launcher stops the others, as on another node


KILLS = """
import grokd
often = grokd.replace(train, checkpoint_minutes=1e-9)
recipe = grokd.replace(
    recipe, seeds=(0,), students={"agre": grokd.replace(student, head="dfr", train=often)},
    teachers=grokd.replace(recipe.teachers, train=often),
    bias_model=grokd.BiasModel("erm", arch="cnn2", weights="random", train=often),
)
"""
SETS = """
recipe = grokd.replace(
    recipe,
    diffusion=grokd.Diffusion(epochs=2, batch_size=8, widths=(8, 16), num_timesteps=50,
                              checkpoint_minutes=1e-9),
    augments={"config": grokd.Augment(student="agre", steps=2, iterations=2, min_teacher=0.0,
                                      max_student=1.0, in_flight=2, count=12)},
)
"""
OUT = Path("runs") / "tiny"


@pytest.fixture(scope="module")
def herd() -> Iterator[Herd]:
    os.environ["OMP_NUM_THREADS"] = "1"
    herd = Herd()
    yield herd
    herd.close()


def folder_of_kills(folder: Path, more: str = "") -> Path:
    """The tiny data set, and a recipe with many checkpoints."""
    write_images(folder)
    with open(folder / "tiny.py", "a") as recipe:
        recipe.write(KILLS + more)
    return folder


def content(folder: Path) -> dict[str, Any]:
    """What a run made, as far as it must not depend on kills."""
    made: dict[str, Any] = {}
    for name, path in files(folder / OUT).items():
        made |= {f"{name} {key}": value.numpy().tobytes() for key, value in load_file(path).items()}
    for path in [*(folder / OUT / "augmented").rglob("*.png"), *(folder / OUT).rglob("*.csv")]:
        made[str(path.relative_to(folder))] = path.read_bytes()
    for path in (folder / OUT).glob("results.json"):
        made["rows"] = json.loads(path.read_text())["rows"]
    return made


def assert_ended(ended: Ended, killed: int) -> None:
    """The others end in the same minute, with one line."""
    for rank, code in enumerate(ended.codes):
        if rank == killed:
            assert code == -9
        else:
            assert code == 1, (ended.printed[rank], ended.errors[rank])
            line, = ended.lines(rank)
            assert line.startswith("error: another process of this command has ended")
    assert ended.seconds < 60


def test_killed_again_and_again_on_one_rank_and_stale_files_leave_the_bits_as_they_are(
    tmp_path: Path, herd: Herd
) -> None:
    """Against a run undisturbed, on two nodes whose stores and target caches are their own."""
    whole = folder_of_kills(tmp_path / "whole")
    ended = herd.run(whole, 2, "run", "tiny.py", "--data.store", "store{rank}")
    assert ended.codes == [0, 0], ended.errors
    caches = [{path.name: path.read_bytes() for path in (whole / name / "targets").glob("*-*")}
              for name in ("store0", "store1")]
    assert caches[0] and caches[0] == caches[1]

    killed = folder_of_kills(tmp_path / "killed")
    for rank, place in enumerate(("store", "head", "target cache", "training")):
        ended = herd.run(killed, 2, "run", "tiny.py", place=place, rank=rank % 2)
        assert_ended(ended, rank % 2)
    ended = herd.run(killed, 2, "run", "tiny.py", place="stale", rank=1)
    assert ended.codes == [0, 0], ended.errors
    assert "students/agre/seed0/model: goes on at step 2 of 4" in ended.printed[0]
    assert content(whole) == content(killed)
    assert not [*killed.rglob("*.part*"), *killed.rglob(".process*")]


def test_process_with_models_of_its_own_ends_when_another_is_killed(
    tmp_path: Path, herd: Herd
) -> None:
    folder = folder_of_kills(tmp_path)
    flags = ["--parallel", "models", "--epochs", "100_000"]
    assert_ended(herd.run(folder, 2, "teachers", "tiny.py", *flags, place="training", rank=1), 1)


def test_problem_of_one_process_ends_all_with_its_line(tmp_path: Path, herd: Herd) -> None:
    folder = folder_of_kills(tmp_path)
    for rank, change in enumerate((b"", b"broken")):
        write_images(folder / f"root{rank}")
        path = folder / f"root{rank}" / "train000.png"
        path.write_bytes(change or path.read_bytes())
    ended = herd.run(folder, 2, "teachers", "tiny.py", "--root", "root{rank}")
    for rank, code in enumerate(ended.codes):
        line, = ended.lines(rank)
        assert code == 1 and line.startswith("error: 1 images cannot be read: root1/train000.png")


@pytest.mark.parametrize("flag, told", [
    ("--out=results{rank}", "does not see in results1 what the first one wrote: models pass"),
    ("--lr=0.{rank}1", "differs from the first one (→): bias-model: lr 0.01 → 0.11. Start"),
])
def test_processes_that_cannot_work_together_are_told_so(
    images: Path, herd: Herd, flag: str, told: str
) -> None:
    ended = herd.run(images, 2, "bias-model", "tiny.py", "--kind", "erm", flag)
    for rank in (0, 1):
        line, = ended.lines(rank)
        assert f"error: Process 1 {told}" in line or rank == 0
    assert ended.codes == [1, 1]
    assert not [*images.rglob("*.safetensors"), *images.rglob(".process*")]


def test_process_whose_others_do_not_come_does_not_wait_for_ever(images: Path, herd: Herd) -> None:
    ended = herd.run(images, 2, "teachers", "tiny.py", place="alone")
    line, = ended.lines(0)
    assert line.startswith("error: 2 processes are to work together, and some did not come within")
    assert ended.codes == [1, 0] and ended.seconds < 60


def test_what_one_process_made_again_no_other_deletes(images: Path, herd: Herd) -> None:
    """With models side by side the biased model is the first process's alone."""
    flags = ["--kind", "erm", "--epochs", "1", "--redo"]
    for parallel in ("data", "models"):
        ended = herd.run(images, 2, "bias-model", "tiny.py", *flags, "--parallel", parallel)
        assert ended.codes == [0, 0], ended.errors
        printed = "".join(ended.printed)
        assert printed.count("bias-model/model: cnn2") == 1  # trained once
        assert (images / OUT / "bias-model/model.safetensors").is_file()


# Disks without locks


def test_processes_build_one_store_where_there_are_no_locks(images: Path, herd: Herd) -> None:
    flags = ["--kind", "erm", "--epochs", "1"]
    ended = herd.run(images, 2, "bias-model", "tiny.py", *flags, place="no locks")
    assert ended.codes == [0, 0], ended.errors
    for printed in ended.printed:
        assert printed.count("warning: the file system has no locks (No locks available)") == 1
    stores = [path.parent for path in (images / "store").glob("*/manifest.json")]
    assert len(stores) == 1 and not [*images.rglob("*.part*")]


def test_a_store_that_another_process_has_built_meanwhile_is_taken(images: Path) -> None:
    recipe = grokd.load_recipe(str(images / "tiny.py"))
    rows = grokd.read_rows(recipe.data, str(images))
    for _ in range(2):
        grokd.build_store(rows, recipe.data, images / "store" / "key", encoded=False)
    assert [path.name for path in (images / "store").iterdir()] == ["key"]


def test_other_failures_of_a_lock_are_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(file: Any, operation: int) -> None:
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="broken disk"), grokd.locked(tmp_path / "lock"):
        pass


def test_no_view_of_a_mapped_file_is_uploaded(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An upload may not have ended when it returns, and pages of a map may not be pinned."""
    monkeypatch.chdir(images)
    data = grokd.load_recipe("tiny.py").data
    store = grokd.open_store(data, ".")
    uploaded: list[torch.Tensor] = []

    def pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        uploaded.append(tensor)
        return tensor

    monkeypatch.setattr(grokd, "pinned", pinned)
    runtime = grokd.Runtime.start("float32")
    everything = np.arange(len(store.labels))
    uploaded.append(store.gather(everything, runtime.device))
    store.read(everything[:3], runtime.device, view=1)
    network = grokd.build_model("cnn2", "random", 2, grokd.Input(), 0)
    targets = grokd.Targets([network], 1, store, {}, runtime, 0, pooled=True)
    targets.prepare(0)
    targets.logits(np.arange(4))
    targets.pooled(np.arange(4))
    maps = [store.images, *targets.current]
    assert len(uploaded) == 5  # images, boxes, flips, logits, features
    for tensor in uploaded:
        assert not any(np.may_share_memory(tensor.numpy(), each) for each in maps)


def test_process_that_a_launcher_terminates_has_a_second_to_say_why() -> None:
    """Also where its main thread waits for another process; afterwards it ends as any other."""

    def status(work: Callable[[], object]) -> tuple[int, float]:
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # however it goes
            work()
            os._exit(0)
        time.sleep(0.5)
        began = time.monotonic()
        os.kill(child, signal.SIGTERM)
        _, ended = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(ended), time.monotonic() - began

    def within() -> None:
        lock = threading.Lock()
        with grokd.late_termination(), lock:
            lock.acquire()

    def after() -> None:
        with grokd.late_termination():
            pass
        time.sleep(10)

    code, seconds = status(within)
    assert code == 128 + signal.SIGTERM and 0.9 < seconds < 5
    code, seconds = status(after)
    assert code == -signal.SIGTERM and seconds < 0.9


@pytest.mark.slow
def test_under_a_launcher_the_line_stands_above_its_report(tmp_path: Path) -> None:
    folder = folder_of_kills(tmp_path)
    command = [*TWO, str(ROOT / "tests" / "kills.py"), "training", "1", "teachers", "tiny.py"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode
    assert done.stderr.count("error: another process of this command has ended") == 1
    assert "[rank0]" not in done.stderr  # as torch marks a traceback; the launcher prints its own


# The whole table: every command, every place, two processes and three


MAKES = {
    "teachers": ("teachers",), "bias-model": ("bias-model",), "distill": ("students",),
    "augment": ("augmented", "generator"), "eval": (),
    "run": ("teachers", "bias-model", "students", "augmented", "generator"),
}
PLACES = {
    "teachers": ("store", "training", "head"), "bias-model": ("store", "training"),
    "distill": ("store", "training", "target cache", "head"),
    "augment": ("store", "training", "images"), "eval": ("store", "evaluation"),
    "run": ("store", "training", "target cache", "head", "images", "evaluation"),
}
CASES = [(number, command, place) for number in (2, 3)
         for command, places in PLACES.items() for place in places]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory, herd: Herd) -> dict[int, Path]:
    """Undisturbed runs, by the number of processes."""
    folders = {}
    for number in (2, 3):
        folders[number] = folder_of_kills(tmp_path_factory.mktemp("whole") / "images", SETS)
        ended = herd.run(folders[number], number, "run", "tiny.py")
        assert ended.codes == [0] * number, ended.errors
    return folders


@pytest.fixture(scope="module")
def record(request: pytest.FixtureRequest) -> Iterator[list[list[str]]]:
    """Rows of the record that --record names."""
    rows: list[list[str]] = []
    command = "pytest -n 0 -m slow tests/test_processes.py --record recipes/measured/kills.json"
    about = grokd.origin(3) | {"command": command}
    yield rows
    if path := request.config.getoption("--record"):
        header = ["command", "processes", "rank killed", "killed in", "others ended", "same bits"]
        results = {"about": about, "header": header, "rows": rows}
        Path(path).write_text(json.dumps(results, indent=1))


@pytest.mark.slow
@pytest.mark.parametrize("place", range(len(CASES)), ids=["-".join(map(str, c)) for c in CASES])
def test_command_killed_on_one_rank_ends_with_the_same_bits(
    place: int, tmp_path: Path, herd: Herd, references: dict[int, Path], record: list[list[str]]
) -> None:
    number, command, where = CASES[place]
    rank = place % number
    folder = shutil.copytree(references[number], tmp_path / "images")
    for name in MAKES[command]:
        shutil.rmtree(folder / OUT / name)
    for path in (folder / OUT).glob("results.json"):
        path.unlink()
    shutil.rmtree(folder / "store" if where == "store" else folder / "store" / "targets")
    ended = herd.run(folder, number, command, "tiny.py", place=where, rank=rank)
    again = herd.run(folder, number, command, "tiny.py")
    assert again.codes == [0] * number, again.errors
    expected = content(references[number])
    if command not in ("run", "eval"):
        del expected["rows"]
    same = content(folder) == expected
    seconds = f"{ended.seconds:.1f} s"
    record.append([command, str(number), str(rank), where, seconds, "yes" if same else "no"])
    assert_ended(ended, rank)
    assert same

"""Several processes on the CPU: the same figures, and where promised the same bits, as one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, Run, write_images
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
    assert printed.count("| deep ensemble of one-hot-dfr ") == 1  # by one process alone
    assert (folder / "runs" / "tiny" / "groups.png").stat().st_size > 10_000

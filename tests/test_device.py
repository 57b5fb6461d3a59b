"""What a GPU and several processes need, shown on the CPU: precision, hooks, parts, waits."""

import errno
import fcntl
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, write_images
from test_processes import TWO

import grokd
from grokd import Classifier, Data, Input, Problem, Runtime, Store, Targets

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return Runtime.start("float32")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    folder = write_images(tmp_path / "images", per_group=66)  # 264 training images: two blocks
    data = Data(size=20, crop=16, attribute_column="place", store=str(folder / "store"))
    return grokd.open_store(data, str(folder))


def network(seed: int, arch: str = "resnet8") -> Classifier:
    return grokd.build_model(arch, "random", 2, Input(), seed)


def frozen(seed: int, arch: str = "resnet8") -> Classifier:
    return network(seed, arch).eval().requires_grad_(False)


def targets_of(store: Store, runtime: Runtime, **more: Any) -> Targets:
    """Two teachers' answers, in the store's cache."""
    models = [frozen(0), frozen(1, "cnn2")]
    return Targets(models, 2, store, {"data": store.fingerprint}, runtime, 0, **more)


def python(script: str, *, launcher: list[str] | None = None, check: bool = True,
           **environment: str) -> subprocess.CompletedProcess[str]:
    """A program that imports grokd from here, alone or under a launcher, on the CPU."""
    settings = {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(textwrap.dedent(script))
        file.flush()
        done = subprocess.run(
            [*(launcher or [sys.executable]), file.name], env=os.environ | settings | environment,
            capture_output=True, text=True, timeout=200,
        )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


# Files and nodes


def test_cache_works_where_the_file_system_lacks_fallocate(
    store: Store, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def emulated(descriptor: int, offset: int, length: int) -> None:
        """glibc's posix_fallocate without the file system's help."""
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        if flags & os.O_APPEND or flags & os.O_ACCMODE == os.O_WRONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        if os.fstat(descriptor).st_size < offset + length:
            os.pwrite(descriptor, b"\0", offset + length - 1)

    monkeypatch.setattr(os, "posix_fallocate", emulated)
    targets = targets_of(store, runtime)
    targets.prepare(0)
    first = targets.logits(np.arange(264))
    targets.prepare(0)  # what is there is kept
    assert torch.equal(targets.logits(np.arange(264)), first) and first.abs().min() > 0


def test_block_of_the_cache_that_nobody_computed_is_a_problem(
    store: Store, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with two nodes of a process each that count as one node."""
    targets = targets_of(store, runtime)
    monkeypatch.setattr(Runtime, "on_node", lambda self: (0, 2))
    with pytest.raises(Problem, match=r"LOCAL_WORLD_SIZE"):
        targets.prepare(0)


def test_nodes_are_told_apart_without_a_launcher_that_counts_their_processes() -> None:
    done = python(
        """
        import os, socket
        os.environ["LOCAL_RANK"] = "0"
        rank = os.environ["RANK"]
        import grokd
        for names in (("a", "b"), ("a", "a")):
            os.environ.pop("LOCAL_WORLD_SIZE", None)
            socket.gethostname = lambda: names[int(rank)]
            runtime = grokd.Runtime.start("float32").together()
            place = runtime.on_node()
            os.write(1, " ".join(map(str, ["PLACE", *names, rank, *place, "\\n"])).encode())
        runtime.accelerator.end_training()
        """,
        launcher=TWO,
    )
    places = sorted(line.strip() for line in done.stdout.splitlines() if "PLACE" in line)
    assert places == [
        "PLACE a a 0 0 2", "PLACE a a 1 1 2", "PLACE a b 0 0 1", "PLACE a b 1 0 1",
    ]


# What a launcher may not change


@pytest.mark.parametrize("name, value, mends", [
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "micro_batch"),
    ("ACCELERATE_USE_DEEPSPEED", "true", "--multi_gpu"),
    ("ACCELERATE_USE_FSDP", "true", "--multi_gpu"),
    ("ACCELERATE_USE_MEGATRON_LM", "True", "--multi_gpu"),
    ("ACCELERATE_USE_PARALLELISM_CONFIG", "1", "--multi_gpu"),
    ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "--compile"),
    ("ACCELERATE_MIXED_PRECISION", "fp8", "bf16"),
])
def test_settings_of_a_launcher_that_change_the_training_are_refused(
    name: str, value: str, mends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(Problem, match=rf"{name}.*{value}.*{mends}") as raised:
        Runtime.start("launch")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name, value", [
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"), ("ACCELERATE_USE_DEEPSPEED", "false"),
    ("ACCELERATE_DYNAMO_BACKEND", "NO"), ("ACCELERATE_MIXED_PRECISION", "no"),
    ("ACCELERATE_USE_FSDP", ""),
])
def test_settings_of_a_launcher_that_change_nothing_pass(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert Runtime.start("launch").accelerator.gradient_accumulation_steps == 1


# Precision


def test_crops_are_the_same_under_autocast(store: Store) -> None:
    indices = store.split("train")
    plain = store.view(indices, CPU, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(store.view(indices, CPU, 3), plain)

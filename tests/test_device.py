"""What a GPU and several processes need, shown on the CPU: precision, hooks, parts, waits."""

import errno
import fcntl
import functools
import importlib
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import textwrap
import threading
import types
import typing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, write_images
from test_processes import TWO
from torch.distributed.nn.functional import all_reduce
from torch.utils._python_dispatch import TorchDispatchMode

import grokd
from grokd import (
    Artefact,
    Classifier,
    Data,
    Distill,
    FeatureLoss,
    Input,
    Job,
    Problem,
    Runtime,
    Store,
    Targets,
    Train,
    Training,
)

CPU = torch.device("cpu")
TEACHERS = ("resnet8", "cnn2", "resnet8")  # and the biased model


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return Runtime.start("float32")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    folder = write_images(tmp_path / "images", per_group=66)  # 264 training images: two blocks
    return opened(str(folder))


def opened(folder: str) -> Store:
    """The store of a folder of images; in programs that `python` runs, too."""
    data = Data(size=20, crop=16, attribute_column="place", store=f"{folder}/store")
    return grokd.open_store(data, folder)


def end(runtime: Runtime, words: str = "PASSED") -> None:
    """Leave such a program of several processes, each saying how it went."""
    os.write(1, f"{words}\n".encode())
    runtime.accelerator.wait_for_everyone()
    os._exit(0)  # threads of a network that still stands may abort the end


def network(seed: int, arch: str = "resnet8") -> Classifier:
    return grokd.build_model(arch, "random", 2, Input(), seed)


def frozen(seed: int, arch: str = "resnet8") -> Classifier:
    return network(seed, arch).eval().requires_grad_(False)


def targets_of(store: Store, runtime: Runtime, **more: Any) -> Targets:
    """Two teachers' answers, in the store's cache."""
    models = [frozen(0), frozen(1, "cnn2")]
    return Targets(models, 2, store, {"data": store.fingerprint}, runtime, 0, **more)


def student_of(
    store: Store, runtime: Runtime, settings: Distill, arch: str = "resnet8", work: str = "student"
) -> tuple[Training, FeatureLoss | None]:
    """A student's training as `distill` sets it up, with two teachers and a biased model."""
    models = [frozen(seed, name) for seed, name in enumerate(TEACHERS)]
    targets = Targets(
        models, 2, store, {"data": store.fingerprint}, runtime, 0, settings.has_features
    )
    targets.prepare(0)
    model = network(5, arch)
    features = None
    if settings.has_features:
        layers = grokd.compared_layers(settings)
        frozen_layers = grokd.frozen_features(settings, targets, {}, False)
        tap = grokd.Tap(model, [layer.student for layer in layers], store.data.crop)
        features = FeatureLoss(settings, frozen_layers, 0)
        features.attach(model, tap.maps, tap.widths)
    artefact = Artefact(work, store.folder.parent / work / "model.safetensors", "distill", {}, {})
    job = Job(artefact, model, settings, settings.train, store, 0, grokd.label_losses)
    if settings.has_departures:
        targets.departures = targets.measure(settings.departure_gap)
    samples = grokd.sample_weights(job, targets, runtime) if settings.weighs_samples else None
    job.losses = grokd.distillation(targets.answer, features, samples)
    return Training(job, runtime), features


def plain_training(store: Store, runtime: Runtime, train: Train, arch: str = "cnn2") -> Training:
    """A network that learns the labels."""
    artefact = Artefact("plain", store.folder.parent / "plain" / "model.safetensors", "", {}, {})
    settings = Distill("one-hot", train=train)
    job = Job(artefact, network(5, arch), settings, train, store, 0, grokd.label_losses)
    return Training(job, runtime)


def learn(training: Training, steps: int) -> dict[str, torch.Tensor]:
    """The weights after some steps of the first epoch."""
    for batch, parts in itertools.islice(training.batches(0), steps):
        training.step(0, len(batch), parts)
    return {name: value.detach().clone() for name, value in training.model.state_dict().items()}


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
        runtime.accelerator.wait_for_everyone()
        os._exit(0)  # threads of a network that still stands may abort the end
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


def test_gpus_that_cannot_talk_to_each_other_are_told_of_in_one_line(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    """As accelerate does it on GPUs of the RTX 4000 series, but with a traceback."""
    def refuse(**settings: Any) -> None:
        raise NotImplementedError('Please set `NCCL_P2P_DISABLE="1"`\nand `NCCL_IB_DISABLE="1"`.')

    monkeypatch.setattr(grokd, "Accelerator", refuse)
    told = 'Please set `NCCL_P2P_DISABLE="1"` and `NCCL_IB_DISABLE="1"`.'
    with pytest.raises(Problem, match=f"^{told}$"):
        Runtime.start("float32")


# Precision


def test_crops_are_the_same_under_autocast(store: Store) -> None:
    indices = store.split("train")
    plain = store.view(indices, CPU, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(store.view(indices, CPU, 3), plain)


def test_gram_of_shared_training_is_computed_in_full_precision(store: Store) -> None:
    """A wrapper of the forward pass must not switch autocast on again within `logit_gram`."""
    done = python(
        f"""
        from test_device import *
        runtime = Runtime.start("bfloat16").together()
        store = opened({str(store.folder.parents[1])!r})
        settings = Distill(space="parameters", train=Train(batch_size=8))
        training, _ = student_of(store, runtime, settings, "cnn2")
        images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        expected = grokd.logit_gram(network(5, "cnn2"), images)
        for ours, alone in zip(grokd.logit_gram(training.model, images), expected):
            torch.testing.assert_close(ours, alone, rtol=1e-6, atol=1e-6)
        learn(training, 3)
        end(runtime)
        """,
        launcher=TWO,
    )
    assert done.stdout.count("PASSED") == 2


def test_gpu_arithmetic_is_set_and_said() -> None:
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = True, False
    Runtime.start("float32")
    assert torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    words = "float32, TF32 in convolutions alone; cudnn.deterministic, no benchmark"
    assert grokd.set_gpu_arithmetic("float32") == words
    assert grokd.set_gpu_arithmetic("bfloat16") == f"bfloat16 by autocast, else {words}"
    assert "TF32" not in grokd.set_gpu_arithmetic("float64")
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert "TF32 in convolutions and float32 in matrix products; cuDNN is deterministic" in readme


def test_batch_weights_of_small_gradients_survive_float16() -> None:
    """Backward passes of their own, without the loss scaler, must not underflow."""
    model, images = network(0), torch.rand(8, 3, 16, 16)
    parameters = list(model.parameters())
    noise = 1e-4 * torch.randn(3, 8, 2, generator=torch.Generator().manual_seed(1))
    weights = []
    for dtype in (torch.float32, torch.float16):
        with torch.autocast("cpu", dtype, enabled=dtype == torch.float16):
            student = model(images)
        teachers = student.detach() + noise
        weights.append([
            grokd.batch_weights(
                student, teachers, parameters, 4.0, normalise, lambda g: g / 8
            ) for normalise in (True, False)
        ])
    torch.testing.assert_close(*(w[0] for w in weights), rtol=0.02, atol=0.01)
    torch.testing.assert_close(*((1 - w[1]) * 1e6 for w in weights), rtol=0.05, atol=1e-3)


def test_batch_weights_survive_gradients_too_large_for_float16() -> None:
    factor = torch.tensor(0.01, requires_grad=True)
    student = (factor.half() * torch.tensor([[100.0, -100.0]]).half()).float()
    biased = student.detach() + torch.tensor([[0.0, 3.0]])
    weights = grokd.batch_weights(
        student, torch.stack([biased, biased]), [factor], 4.0, True, lambda g: g
    )
    assert weights.tolist() == [0.01]


def test_float16_scales_losses_skips_steps_and_says_when_none_is_left(store: Store) -> None:
    """With torch's scaler on the CPU: the scale is the network's own, and in its checkpoint."""
    done = python(
        f"""
        import shutil
        from test_device import *
        runtime = Runtime.start("float16")
        with runtime.autocast():
            assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.float16
        store = opened({str(store.folder.parents[1])!r})
        train = Train(batch_size=8, lr=0.1)
        training = plain_training(store, runtime, train, "resnet8")
        before = {{k: v.clone() for k, v in training.model.state_dict().items()}}
        training.restore()
        assert training.scaler.get_scale() == 2**16
        after = learn(training, 2)
        assert not torch.equal(after["head.weight"], before["head.weight"])

        training.scaler.update(2.0**60)
        skipped = learn(training, 1)
        assert torch.equal(skipped["head.weight"], after["head.weight"])
        assert training.scaler.get_scale() == 2.0**59
        training.progress.step = 20
        training.check_loss()
        training.save()
        newest = grokd.newest_checkpoint(training.job.artefact.work)
        assert newest
        state = grokd.load_checkpoint(newest)
        assert state["scaler"]["scale"] == 2.0**59

        training.scaler.update(2.0**-30)
        try:
            training.check_loss()
        except Problem as problem:
            print(problem)
        second = plain_training(store, runtime, train, "resnet8")
        shutil.rmtree(training.job.artefact.work)
        second.restore()
        assert second.scaler.get_scale() == 2**16

        # Gradients are clipped as they are, not as they are scaled.
        second.job.clip = 1e-3
        for group in second.optimizer.param_groups:
            group["momentum"] = group["weight_decay"] = 0.0
        parameters = torch.nn.utils.parameters_to_vector
        before = parameters(second.model.parameters()).detach()
        learn(second, 1)
        moved = parameters(second.model.parameters()).detach() - before
        assert abs(float(moved.norm()) / (train.lr * second.job.clip) - 1) < 0.01
        """
    )
    assert "plain: gradients are not finite in float16 by step 20, however small" in done.stdout


def test_flags_of_processes_are_added_up_on_their_device() -> None:
    """A GPU's collectives take nothing from the host."""
    asked: list[torch.Tensor] = []

    def reduce(tensor: torch.Tensor, how: str) -> torch.Tensor:
        asked.append(tensor)
        return torch.ones(())

    accelerator: Any = types.SimpleNamespace(
        device=torch.device("meta"), num_processes=2, process_index=0, reduce=reduce
    )
    assert Runtime(accelerator, "float32", shared=True).any(False)
    flag, = asked
    assert flag.is_meta


# Batch norm over processes


def test_taps_on_batch_norm_survive_its_conversion() -> None:
    """What a GPU's training of several processes is given."""
    model = network(0)
    tap = grokd.Tap(model, ["stem.1", "layer1.body.1"], 16)
    converted = grokd.with_synchronised_norms(model)
    assert sum(isinstance(m, torch.nn.SyncBatchNorm) for m in converted.modules()) == 9
    tap.maps.clear()
    converted(torch.rand(5, 3, 16, 16))
    sizes = {name: len(image) for name, image in tap.maps.items()}
    assert sizes == {"stem.1": 5, "layer1.body.1": 5}


class SharedNorm(torch.nn.BatchNorm2d):
    """Batch norm over processes, as GPUs have it, of differentiable sums: CPUs can take part."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        count = x.new_tensor(x.numel() / x.shape[1])
        sums = torch.cat([x.sum((0, 2, 3)), x.square().sum((0, 2, 3)), count[None]])
        sums = all_reduce(sums)
        mean, square = (sums[:-1] / sums[-1]).chunk(2)
        shape = (1, -1, 1, 1)
        scale = self.weight * (square - mean.square() + self.eps).rsqrt()
        return (x - mean.view(shape)) * scale.view(shape) + self.bias.view(shape)


def with_shared_norms(model: torch.nn.Module) -> torch.nn.Module:
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.__class__ = SharedNorm
    return model


def batch_agre(runtime: Any, model: Classifier, places: np.ndarray, total: int) -> torch.Tensor:
    """AGRE's weights in the space of a batch's gradient, of some of its images; the first ones'
    teachers are far nearer to the student."""
    random = torch.Generator().manual_seed(3)
    images = torch.rand(8, 3, 16, 16, generator=random, dtype=torch.float64)[places]
    near = torch.tensor([1e-4, 1.0] * 4 if total > 1 else [0.1] * 8, dtype=torch.float64)[:, None]
    targets = (near * torch.randn(4, 8, 2, generator=random, dtype=torch.float64))[:, places]
    settings = Distill(weighting="agre", space="batch", tau=2.0, normalise=total > 1)
    batch = grokd.Batch(settings, model, images, images, places, total, 0, 0, runtime)
    logits = model(images)
    targets = logits.detach() + targets
    return grokd.agre(logits, grokd.Ensemble(targets[:3], targets[3]), batch)[:, 0]


def test_batch_weights_under_norms_over_processes_are_those_of_one(runtime: Runtime) -> None:
    """Gradients pass from one process to another in them, so all must enlarge theirs alike. Of a
    batch of one image the second process shows it in vain."""
    alone = types.SimpleNamespace(rank=0, sum=lambda x: x, largest=lambda x: x)
    expected = [
        batch_agre(alone, network(0).double().train(), np.arange(total), total).tolist()
        for total in (8, 1)
    ]
    done = python(
        """
        from test_device import *
        runtime = Runtime.start("float64").together()
        found = []
        for total in (8, 1):
            model = with_shared_norms(network(0).double().train())
            places = np.arange(8)[runtime.rank::2] if total == 8 else np.zeros(1, int)
            found.append(batch_agre(runtime, model, places, total).tolist())
        end(runtime, str(found))
        """,
        launcher=TWO,
    )
    assert len(done.stdout.splitlines()) == 2
    for line in done.stdout.splitlines():
        for weights, of_one in zip(json.loads(line), expected, strict=True):
            assert weights == pytest.approx(of_one, rel=1e-6) and np.ptp(weights) > 0.05


def test_an_overflow_elsewhere_is_computed_again_here() -> None:
    """Batch norm over processes waits for all of them."""
    student = torch.ones(2, 2, requires_grad=True)
    asked: list[torch.Tensor] = []

    def largest(tensor: torch.Tensor) -> torch.Tensor:
        asked.append(tensor)
        return torch.ones_like(tensor)

    found = grokd.gradient_along(student, [student], torch.ones(2, 2), 1.0, largest)
    assert found.tolist() == [1] * 4 and [float(flag) for flag in asked] == [0] * 3


@pytest.mark.parametrize("total, world, micro", [
    (27, 4, 2), (27, 4, 1), (32, 4, 2), (7, 3, 2), (7, 3, 1), (5, 2, 2), (2, 4, 2), (1, 2, 1),
    (9, 2, 0),
])
def test_every_process_has_as_many_micro_batches(
    total: int, world: int, micro: int, store: Store, runtime: Runtime
) -> None:
    """Batch norm over processes must be called equally often by each of them."""
    training = plain_training(store, runtime, Train(micro_batch=micro))
    batch, seen, counts = 3 * np.arange(total), list[int](), set()
    for rank in range(world):
        training.runtime = typing.cast(
            Any, types.SimpleNamespace(rank=rank, world=world, device=CPU)
        )
        parts = training._read(0, batch)
        counts.add(len(parts))
        assert all(0 < len(part.places) <= (micro or total) for part in parts)
        assert all(part.places.flags.c_contiguous for part in parts)  # for pinned copies
        seen += [int(place) for part in parts if part.learnt for place in part.places]
    assert len(counts) == 1
    assert sorted(seen) == batch.tolist()


def test_process_without_images_of_its_own_has_every_sum(store: Store, runtime: Runtime) -> None:
    """Otherwise it would not take part when they are added up."""
    training = plain_training(store, runtime, Train())
    parts = [part._replace(learnt=False) for part in training._read(0, np.arange(1))]
    training.step(0, 1, parts)
    assert training.progress.sums == {"loss": 0} and not training.progress.current.any()
    training.step(0, 2, [*training._read(0, np.arange(2)), *parts])
    assert training.progress.sums["loss"] == training.progress.current.double().sum() > 0


def test_losses_stand_on_the_device_before_a_step_in_vain(store: Store) -> None:
    """Where several processes go on, it comes before what the checkpoint holds."""
    accelerator: Any = types.SimpleNamespace(
        device=torch.device("meta"), num_processes=1, scaler=None,
        prepare_optimizer=lambda optimizer: optimizer,
    )
    training = plain_training(store, Runtime(accelerator, "float32"), Train())
    assert training.progress.current.is_meta


def test_loss_that_is_not_finite_on_one_process_stops_all(store: Store) -> None:
    done = python(
        f"""
        from test_device import *
        runtime = Runtime.start("float32").together()
        store = opened({str(store.folder.parents[1])!r})
        training = plain_training(store, runtime, Train(batch_size=8))
        learn(training, 1)
        training.progress.step = 20
        training.check_loss()
        if runtime.rank == 1:
            training.progress.sums["loss"] *= torch.nan
        words = "no problem"
        try:
            training.check_loss()
        except Problem as problem:
            words = str(problem)
        end(runtime, words)
        """,
        launcher=TWO,
    )
    assert done.stdout.count("plain: the loss is nan by step 20: lower its lr.") == 2


def test_every_process_scores_the_batch_norm_that_is_saved(store: Store) -> None:
    """Statistics of a process's own share would be gone when a killed run goes on."""
    done = python(
        f"""
        from test_device import *
        runtime = Runtime.start("float32").together()
        store = opened({str(store.folder.parents[1])!r})
        training = plain_training(store, runtime, Train(epochs=1, batch_size=9), "resnet8")
        scored = {{}}

        def validate():
            scored.update({{k: v.clone() for k, v in training.model.state_dict().items()}})
            return {{}}

        training.job.validate = validate
        with training.reporting():
            learn(training, 2)
            training.end_epoch(0)
        runtime.wait()
        saved = grokd.load_checkpoint(grokd.newest_checkpoint(training.job.artefact.work))
        for name, value in saved["model"].items():
            assert torch.equal(scored[name], value), name
        end(runtime)
        """,
        launcher=TWO,
    )
    assert done.stdout.count("PASSED") == 2


def test_micro_batches_of_one_process_are_cut_as_ever() -> None:
    parts = grokd.micro_batches(np.arange(9), 0, 1, 4)
    assert [places.tolist() for places, _ in parts] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    assert all(learnt for _, learnt in parts)


# Compiling


def test_compiled_student_distils_features_after_another_of_its_architecture(
    store: Store, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler must not reuse what it made of a network without taps."""
    # Backend eager: the compiler's cache is what matters, not its code.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    train = Train(batch_size=8, lr=0.1)
    plain = Distill(train=replace(train, compile=True))
    settings = replace(plain, gamma=(1.0,), layers=("layer2=pooled",))
    eager, _ = student_of(store, runtime, replace(settings, train=train), work="eager")
    expected = learn(eager, 2)
    learn(student_of(store, runtime, plain, work="plain")[0], 2)
    compiled, features = student_of(store, runtime, settings, work="compiled")
    weights = learn(compiled, 2)
    assert features and len(features.student_maps["layer2"]) == 8
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)


def test_compiled_student_weighs_teachers_by_gradients_of_its_batch(
    store: Store, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its backward pass was compiled for others, which go through the graph once."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    train = Train(batch_size=8, lr=0.1)
    settings = Distill(weighting="agre", space="batch", train=train)
    expected = learn(student_of(store, runtime, settings, "cnn2", "eager")[0], 2)
    compiled = replace(settings, train=replace(train, compile=True))
    training, _ = student_of(store, runtime, compiled, "cnn2", "compiled")
    images, _ = training._inputs(0, next(training.batches(0))[1][0])
    with runtime.autocast():
        logits = training.network(images)
    logits.sum().backward()
    training.optimizer.zero_grad()
    for name, value in learn(training, 2).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def test_map_of_another_batch_is_not_distilled(store: Store, runtime: Runtime) -> None:
    training, features = student_of(
        store, runtime, Distill(gamma=(1.0,), layers=("layer2=pooled",), train=Train(batch_size=8))
    )
    assert features
    features.student_maps = {"layer2": torch.zeros(1, 32, 4, 4)}
    with pytest.raises(AssertionError, match=r"layer2: the map of 1 images, not of the batch's 8"):
        learn(training, 1)


@pytest.mark.parametrize("jobs, processes, batch, shared", [
    (1, 8, 32, True),  # nothing else to do
    (9, 8, 4096, False), (5, 8, 32, False),  # five steps of 4 images are longer than one of 32
    (5, 8, 256, True), (2, 2, 32, False), (2, 2, 256, False), (2, 4, 256, True),
])
def test_batches_are_shared_where_that_is_faster(
    jobs: int, processes: int, batch: int, shared: bool, runtime: Runtime
) -> None:
    accelerator: Any = types.SimpleNamespace(num_processes=processes, process_index=1)
    several = replace(runtime, accelerator=accelerator)
    plan, own = several.plan(range(jobs), "auto", batch)
    assert plan.shared == shared
    assert own == ([*range(jobs)] if shared else [*range(1, jobs, processes)])
    for parallel in ("data", "models"):
        assert several.plan(range(jobs), parallel, batch)[0].shared == (parallel == "data")


def test_an_image_shown_in_vain_does_not_count_in_a_mean(store: Store, runtime: Runtime) -> None:
    settings, images = Distill(), torch.zeros(1, 3, 16, 16)
    last: Any = types.SimpleNamespace(rank=2, sum=lambda tensor: tensor)
    batch = grokd.Batch(settings, network(0), images, images, np.zeros(1, int), 2, 0, 0, last)
    assert batch.mean(torch.ones(3)).tolist() == [0, 0, 0]  # three processes, a batch of two


def test_frozen_networks_beside_a_student_compute_as_the_cache_does(
    store: Store, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the run's precision, when they are asked about mixed images and when layers are tapped."""
    monkeypatch.setattr(Runtime, "autocast", lambda self: torch.autocast("cpu", torch.bfloat16))
    models = [frozen(seed, name) for seed, name in enumerate(TEACHERS)]
    targets = Targets(models, 2, store, {"data": store.fingerprint}, runtime, 0)
    settings = Distill(gamma=(1.0,), layers=("layer1",))
    whole = [network(seed, name).eval() for seed, name in enumerate(TEACHERS)]  # none is folded
    networks = dict(zip(targets.trunk_keys, whole, strict=True))
    layers = grokd.frozen_features(settings, targets, networks, False)
    seen: list[torch.dtype] = []
    for model in [*models, *whole]:
        first = next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d))
        first.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    batch: Any = types.SimpleNamespace(images=store.view(np.arange(3), CPU))
    assert targets.ask(batch.images).dtype == torch.float32
    layers.maps(batch)
    assert seen == [torch.bfloat16] * 6


# Memory


def test_prediction_on_a_full_gpu_takes_images_in_parts(
    store: Store, runtime: Runtime, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str]
) -> None:
    model, indices = frozen(0), np.arange(600)  # two whole blocks and a part
    expected = grokd.predict([model], store, indices, runtime)
    passed, features_of, most = list[int](), Classifier.features, 100

    def features(model: Classifier, images: torch.Tensor) -> torch.Tensor:
        passed.append(len(images))
        if len(images) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return features_of(model, images)

    monkeypatch.setattr(Classifier, "features", features)
    torch.testing.assert_close(grokd.predict([model], store, indices, runtime), expected)
    assert passed[:2] == [256, 128] and max(passed[2:]) == 64 > passed[-1]  # a last block is short
    assert "memory: full, so 64 samples at a time from now on" in capsys.readouterr().out
    hook = model.head.register_forward_hook(lambda *args: None)
    with pytest.raises(torch.OutOfMemoryError):  # it would see a part for the whole
        next(grokd.extract({"": model}, store, indices, runtime))
    hook.remove()
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        grokd.predict([model], store, indices, runtime)
    assert passed[-1] == 1


# Waits


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for a GPU, or stop to copy to it, in this thread.

    Values read by the host, results whose size depends on values, and tensors made from arrays, or
    copied by grokd to a device, other than through `upload` (or ahead, in a thread).
    """

    READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "unique",
             "_unique2", "bincount", "masked_scatter")
    CALLS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__array__")
    MAKERS = ("from_numpy", "tensor", "as_tensor", "asarray")

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.thread, self.uploading = threading.get_ident(), False
        for name in self.CALLS:
            patch.setattr(torch.Tensor, name, self.counted(getattr(torch.Tensor, name), name))
        for name in self.MAKERS:
            patch.setattr(torch, name, self.counted(getattr(torch, name), name))
        patch.setattr(torch.Tensor, "to", self.counted_copies(torch.Tensor.to))
        upload = grokd.upload

        def excepted(array: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
            self.uploading = True
            result = upload(array, device)
            self.uploading = False
            return result

        patch.setattr(grokd, "upload", excepted)

    def counted(self, function: Any, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == self.thread and not self.uploading:
                self.seen.append(name)
            return function(*args, **kwargs)

        return call

    def counted_copies(self, function: Any) -> Any:
        def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            named = any(isinstance(arg, torch.device) for arg in [*args, *kwargs.values()])
            by_grokd = sys._getframe(1).f_code.co_filename == grokd.__file__
            if named and by_grokd and not (self.uploading or kwargs.get("non_blocking")):
                self.seen.append("to a device")
            return function(tensor, *args, **kwargs)

        return to

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = [a for a in args[1] if a is not None] if name.startswith("index") else []
        by_mask = any(getattr(mask, "dtype", None) == torch.bool for mask in masks
                      if isinstance(mask, torch.Tensor))
        if name in self.READS or by_mask:
            self.seen.append(f"{name} by a mask" if by_mask else name)
        return func(*args, **(kwargs or {}))


# ae-kd is no part of this: its weights are solved for on the host, once a step. Neither are agre in
# the space "batch", which looks whether gradients are finite, steps in float16, whose scaler does,
# and mixed images: torchvision draws how they are mixed on the host, which this cannot tell apart.
@pytest.mark.parametrize("change", [
    {}, {"weighting": "average"}, {"weighting": "random"}, {"weighting": "eb-kd"},
    {"weighting": "ca-mkd"}, {"space": "parameters"}, {"alpha": 0.5, "zero": "drop"},
    {"combine": "logits"}, {"gamma": (1.0,), "feature_weights": "agre"},
    {"gamma": (1.0,), "feature_weights": "disagree", "feature_dropout": 0.5, "adapters": "shared",
     "layers": ("layer2=pooled",)},
    {"gamma": (1.0,), "feature_loss": "contrastive"}, {"weighting": "departure"},
    {"sample_weights": "jtt"}, {"sample_weights": "dedier"}, {"sample_weights": "group-dro"},
    {"train": Train(batch_size=8, micro_batch=4)},
], ids=lambda change: "-".join(map(str, change.values())) or "agre")
def test_no_step_between_two_checks_of_the_loss_waits(
    change: dict[str, Any], store: Store, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    if change.get("adapters") == "shared":
        monkeypatch.setattr(sys.modules[__name__], "TEACHERS", ("cnn2", "cnn2", "cnn2"))
    settings = replace(Distill(train=Train(batch_size=8)), **change)
    training, _ = student_of(store, runtime, settings, "cnn2")
    training.progress.step = 1  # the first one shows its images
    with training.reporting():
        ahead = [*itertools.islice(training.batches(0), 4)]
        with pytest.MonkeyPatch.context() as patch, Waits(patch) as waits:
            for batch, parts in ahead:
                training.step(0, len(batch), parts)
                training.check_loss()
                training.save_if_late()
        training.progress.history.append({"epoch": 1, "loss": 0.0})
    assert training.progress.step == 5
    assert waits.seen == []


def test_waits_are_seen() -> None:
    with pytest.MonkeyPatch.context() as patch, Waits(patch) as waits:
        x = torch.ones(3)
        x[x > 0]
        if x.sum() > 1:
            x.cpu()
        grokd.upload(np.zeros(3), CPU)
        grokd.upload(x, CPU)
        torch.from_numpy(np.zeros(3))
        x.to(CPU)  # not grokd's
        for options in ("", ", non_blocking=True"):
            line = compile(f"x.to(device{options})", grokd.__file__, "exec")
            exec(line, {"x": x, "device": CPU})
    assert waits.seen == ["index by a mask", "__bool__", "_local_scalar_dense", "cpu",
                          "from_numpy", "to a device"]


# Reading


def test_batches_of_several_threads_come_in_order() -> None:
    loaded: list[int] = []
    first = threading.Event()

    def load(item: int) -> int:
        if item == 0:
            first.wait(10)  # the others overtake it
        loaded.append(item)
        first.set()
        return -item

    assert [*grokd.prefetch(range(20), load, 3)] == [(i, -i) for i in range(20)]
    assert loaded[0] != 0 and sorted(loaded) == [*range(20)]


def test_number_of_reading_threads_changes_no_bit(
    store: Store, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, logits = [], []
    for threads in (1, 4):
        monkeypatch.setattr(Runtime, "num_readers", lambda *_, threads=threads: threads)
        training = plain_training(store, runtime, Train(batch_size=8, lr=0.1), "resnet8")
        weights.append(learn(training, 12))
        logits.append(grokd.predict([frozen(0)], store, store.split("train"), runtime))
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert torch.equal(*logits)


@pytest.mark.parametrize("device, cores, processes, size, threads", [
    ("cuda", 64, 1, 256, 4),  # what a GPU may need
    ("cuda", 64, 1, 512, 4),  # it learns larger images more slowly
    ("cuda", 64, 1, 32, 1),
    ("cuda", 16, 8, 256, 2),  # the cores of each process
    ("cuda", 2, 8, 256, 1),
    ("cpu", 64, 1, 256, 1),  # whose cores the network needs
])
def test_as_many_threads_read_as_are_needed_and_there(
    device: str, cores: int, processes: int, size: int, threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    accelerator: Any = types.SimpleNamespace(
        device=torch.device(device), num_processes=2 * processes  # on two nodes
    )
    runtime = Runtime(accelerator, "float32", local_world=processes)
    assert runtime.num_readers(grokd.store_bytes(1, size)) == threads


def test_images_for_a_gpu_are_gathered_into_pinned_memory(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once: not into memory of another kind first."""
    enlarged = grokd.enlarge(store, store.raw(np.arange(5))[:, :, ::-1], np.zeros(5, int), 0.0)
    encoded = grokd.open_store(
        replace(store.data, max_store_gb=0.0), str(store.folder.parents[1])
    )
    indices = np.array([3, len(store.labels) - 1, 3, 260, 0])
    behind = np.array([2, len(store.labels) + 4, 7])
    expected = [store.images[indices], store.images[indices]]
    expected.append(np.stack([store.images[2], store.images[4][:, ::-1], store.images[7]]))
    kinds, empty = [], torch.empty

    def noted(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        kinds.append(pin_memory)
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", noted)
    monkeypatch.setattr(torch.Tensor, "pin_memory", None)  # which would copy
    cases = ((store, indices), (encoded, indices), (enlarged, behind))
    for (source, chosen), images in zip(cases, expected, strict=True):
        gathered = source.gather(chosen, torch.device("cuda"))
        assert np.array_equal(gathered.numpy(), images)
    assert kinds == [True, True, True]


def test_reading_ahead_changes_no_view(store: Store) -> None:
    indices = store.split("train")[:40]
    for change in ({}, {"random_crop": False}, {"flip": False}):
        changed = replace(store, data=replace(store.data, **change))  # type: ignore[arg-type]
        for view in (None, 3):
            stored = changed.read(indices, CPU, view, 1)
            assert torch.equal(changed.show(stored, CPU), changed.view(indices, CPU, view, 1))
            assert (stored.transform is not None) == (view == 3 and changed.data.random_crop)


def test_prediction_reads_ahead_in_a_thread(
    store: Store, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers = set[int]()
    read = Store.read

    def noted(self: Store, *args: Any) -> grokd.Stored:
        readers.add(threading.get_ident())
        return read(self, *args)

    monkeypatch.setattr(Store, "read", noted)
    grokd.predict([frozen(0)], store, store.split("train"), runtime)
    assert readers and threading.get_ident() not in readers


def test_shared_compiled_student_with_taps_and_micro_batches_equals_one_alone(
    store: Store,
) -> None:
    """DDP, adapters, taps, no_sync and the compiler together, in shares that differ by one."""
    done = python(
        f"""
        from test_device import *
        torch.compile = functools.partial(torch.compile, backend="eager")
        together = Runtime.start("float32").together()
        store = opened({str(store.folder.parents[1])!r})
        train = Train(batch_size=9, lr=0.1, micro_batch=2)
        settings = Distill(
            gamma=(1.0,), layers=("layer2=pooled",), feature_weights="agre", train=train
        )
        alone, _ = student_of(store, together.alone(), settings, "cnn2", "alone")
        expected = learn(alone, 3)
        compiled = replace(settings, train=replace(train, compile=True))
        shared, _ = student_of(store, together, compiled, "cnn2", "shared")
        for name, value in learn(shared, 3).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)
        end(together)
        """,
        launcher=TWO,
    )
    assert done.stdout.count("PASSED") == 2


# float16 by float32's kernels, for measurements on CPUs


class Seen(TorchDispatchMode):
    """Notes operations that get float16 numbers: what was called, with what, and what came."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(x, torch.Tensor) and x.dtype == torch.float16 for x in args):
            self.calls.append((func, args, result))
        return result


def test_float16_by_float32_kernels_is_that_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "recipes" / "measured")
    half = importlib.import_module("half")
    model, images = network(0), torch.rand(8, 3, 16, 16)

    def compute() -> Seen:
        with Seen() as seen, torch.autocast("cpu", torch.float16):
            features = model.features(images)
            torch.bmm(features[None], features.T[None]).float().sum().backward()
            with torch.inference_mode():
                model.features(images) @ torch.ones(64, 3)
        return seen

    calls = [call for call in compute().calls if call[0].overloadpacket in half.CONTRACTIONS]
    assert {call[0].overloadpacket.__name__ for call in calls} >= {
        "convolution", "convolution_backward", "conv2d", "bmm", "matmul"}
    for func, args, expected in calls:
        with torch.no_grad(), Seen() as kernels, half.FastHalf():
            found = func(*args)
        assert func not in {call[0] for call in kernels.calls}
        if not isinstance(expected, tuple):
            found, expected = (found,), (expected,)
        for one, other in zip(found, expected, strict=True):
            if other is not None:
                scale = float(other.detach().abs().max())
                torch.testing.assert_close(one, other, rtol=0.002, atol=0.002 * scale)

    too_large = torch.full((1, 1, 2, 2), 200.0).half()
    with half.FastHalf():
        assert torch.conv2d(too_large, too_large).tolist() == [[[[math.inf]]]]  # 4 * 200^2


# The check of a machine's GPUs

CHECK = ROOT / "recipes" / "measured" / "gpu_check.py"


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The program as a module."""
    monkeypatch.syspath_prepend(CHECK.parent)
    return importlib.import_module("gpu_check")


@pytest.fixture
def place(check: Any, tmp_path: Path) -> Any:
    """Where its checks work."""
    return check.Place(tmp_path, cpu=True, quick=True, num_processes=2)


def test_check_of_gpus_passes_on_the_cpu(tmp_path: Path) -> None:
    """The same code as on a GPU, with tiny networks."""
    save = tmp_path / "checked.json"
    done = subprocess.run(
        [sys.executable, str(CHECK), "--cpu", "--quick", "--save", str(save)],
        cwd=tmp_path, capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(save.read_text())
    outcomes = {row[0]: row[1] for row in record["rows"]}
    assert set(outcomes.values()) == {"ok"}
    assert {
        "float32", "bfloat16", "float16", "compile, feature distillation", "killed and gone on",
        "2 process(es), torchrun", "generator, guided, float16",
    } <= outcomes.keys()
    rate, bare, ratio = map(float, record["rows"][-1][3:6])
    assert rate > 0 and bare > 0 and ratio == pytest.approx(rate / bare, rel=0.1)
    assert record["about"]["command"].startswith("python gpu_check.py --cpu --quick")
    assert [path.name for path in tmp_path.iterdir()] == ["checked.json"]


def test_checks_that_fail_are_one_line_each_and_stop_no_other(
    check: Any, place: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused() -> None:
        raise Problem("no such\nluck")

    monkeypatch.setattr(check, "checks", lambda place: {
        "refused": lambda: check.child(place, refused),
        "crashed": lambda: check.child(place, os._exit, 3),
        "fine": lambda: check.child(place, check.Finding, "as it should be"),
    })
    rows, failures = check.run_checks(place)
    assert [row[:3] for row in rows] == [
        ["refused", "failed", ""], ["crashed", "failed", ""], ["fine", "ok", "as it should be"],
    ]
    assert failures == [
        "refused: no such luck", "crashed: its process ended without an answer",
    ]
    assert "Traceback" in (tmp_path / "log.txt").read_text()


def test_loss_far_from_that_of_float32_fails_a_check(
    check: Any, place: Any, tmp_path: Path
) -> None:
    for out, loss in (("float32", 0.5), ("near", 0.52), ("far", 0.6), ("none", float("nan"))):
        folder = tmp_path / "runs" / out / "students/average/seed0"
        folder.mkdir(parents=True)
        (folder / "model.history.json").write_text(json.dumps({"epochs": [{"loss": loss}]}))
    assert check.compare(place, "near", ["average"], 0.05).startswith("loss of average 0.5200")
    for out in ("far", "none"):
        with pytest.raises(Problem, match=r"of float32 0\.5000"):
            check.compare(place, out, ["average"], 0.05)

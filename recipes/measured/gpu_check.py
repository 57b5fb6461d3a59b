"""Does grokd work on this machine's GPUs, and how fast? One command, a table, an exit status:

    uv run recipes/measured/gpu_check.py [--quick] [--cpu] [--save FILE]

Every precision, compiling, several processes, channels last, feature distillation, the generator,
going on after a kill, and images a second of a distilled ResNet-18 beside a bare loop of torch's.
Each check runs in a process of its own, and what fails leaves the others alone. --quick takes fewer
images and measurements, and on a CPU (--cpu), where networks are tiny, compiles graphs alone.
Results of a GPU go to recipes/measured/gpu.json.
"""

import argparse
import functools
import importlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import bench  # noqa: E402

import grokd  # noqa: E402
from grokd import (  # noqa: E402
    DFR,
    Augment,
    Classifier,
    Data,
    Distill,
    Generator,
    Input,
    Judge,
    Problem,
    Recipe,
    Row,
    Runtime,
    Store,
    Teachers,
    Train,
)

HEADER = ["check", "outcome", "figures", "images/s", "bare loop", "ratio", "GiB", "seconds"]
PRECISIONS = ("float32", "bfloat16", "float16")


# A small experiment, which this file is the recipe of


def experiment(arch: str, size: int, crop: int, count: int, batch_size: int) -> Recipe:
    """Two classes of noise, one of them brighter: two teachers, two students."""

    def read(root: Path) -> list[Row]:
        random = np.random.default_rng(0)
        rows = []
        for i in range(count):
            pixels = random.integers(0, 156, (size, size, 3)) + 100 * (i % 2)
            split = ("train", "train", "train", "val", "test")[i // 4 % 5]
            rows.append(Row(pixels.astype(np.uint8), i % 2, i // 2 % 2, split))
        return rows

    train = Train(epochs=3, batch_size=batch_size, lr=0.01)
    dfr = DFR(num_refits=2, penalties=(1.0,))
    average = Distill("average", arch=arch, weights="random", train=train, dfr=dfr)
    features = replace(average, weighting="agre", gamma=(0.5,), layers=("layer2",))
    return Recipe(
        data=Data(reader=read, size=size, crop=crop, store="store"),
        teachers=Teachers(2, (arch,), ("random",), dfr=dfr, train=train),
        students={"average": average, "features": features},
        seeds=(0,),
    )


recipes = {
    "gpu": experiment("resnet18", 72, 64, 1280, 64),
    "cpu": experiment("cnn2", 20, 16, 80, 8),
}


@dataclass(frozen=True)
class Place:
    """Where and how large the checks are."""

    folder: Path
    cpu: bool
    quick: bool
    num_processes: int  # GPUs; on a CPU two processes

    @property
    def name(self) -> str:
        return f"{Path(__file__).resolve()}:{'cpu' if self.cpu else 'gpu'}"

    @property
    def recipe(self) -> Recipe:
        return recipes["cpu" if self.cpu else "gpu"]


@dataclass
class Finding:
    """What a check found; a cell of the table for each field."""

    figures: str = ""
    outcome: str = "ok"
    rate: float = math.nan  # images/s
    bare: float = math.nan
    peak: float = math.nan  # GiB on the GPU

    def cells(self) -> list[str]:
        ratio = self.rate / self.bare
        numbers = (f"{self.rate:,.0f}", f"{self.bare:,.0f}", f"{ratio:.2f}", f"{self.peak:.2f}")
        shown = ["" if "nan" in each else each for each in numbers]
        return [self.outcome, self.figures, *shown]


# Processes


def work(pipe: Connection, log: Path, function: Callable[[], Any]) -> None:
    """In a process of its own: the answer goes into the pipe, all that is printed into the log."""
    os.chdir(log.parent)
    with open(log, "a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        try:
            result, problem = function(), ""
        except Exception as error:  # of whatever kind: the other checks go on
            traceback.print_exc(file=file)
            kind = "" if isinstance(error, Problem) else f"{type(error).__name__}: "
            result, problem = None, f"{kind}{error}".splitlines()[0]
        measured = not isinstance(result, Finding) or not math.isnan(result.peak)
        if not measured and torch.cuda.is_initialized():
            result.peak = torch.cuda.max_memory_allocated() / 2**30
        sys.stdout.flush()
        pipe.send((result, problem))


def start(place: Place, function: Callable[[], Any]) -> tuple[Any, str, int | None]:
    """What a function returns in a forked process; its error; its exit status.

    This process computes nothing: no thread and no GPU of it could get lost in the fork.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, place.folder / "log.txt", function))
    process.start()
    theirs.close()
    result, problem = None, "its process ended without an answer"
    try:
        if ours.poll(1800):
            result, problem = ours.recv()
        else:
            process.kill()
            problem = "no answer for 30 minutes"
    except EOFError:
        pass
    process.join()
    return result, problem, process.exitcode


def child(place: Place, function: Callable[..., Any], *args: Any) -> Any:
    """The same; raises Problem for an error."""
    result, problem, _ = start(place, functools.partial(function, *args))
    if problem:
        raise Problem(problem)
    return result


def command(place: Place, verb: str, out: str, *flags: str) -> Finding:
    """A command of grokd's, in this process."""
    grokd.command_line([verb, place.name, "--out", f"runs/{out}", *flags])
    return Finding()


def with_teachers(place: Place, out: str) -> None:
    """A folder of results with the teachers and the biased model of float32."""
    for name in ("teachers", "bias-model"):
        shutil.copytree(place.folder / "runs/float32" / name, place.folder / "runs" / out / name)


# Training


def student_file(place: Place, out: str, student: str, suffix: str) -> Path:
    """A file of the only student whose name begins so."""
    pattern = f"students/{student}*/seed0/model{suffix}"
    [path] = (place.folder / "runs" / out).glob(pattern)
    return path


def epoch_losses(place: Place, out: str, student: str) -> list[float]:
    """A student's loss by epoch."""
    history = json.loads(student_file(place, out, student, ".history.json").read_text())
    return [entry["loss"] for entry in history["epochs"]]


def compare(place: Place, out: str, students: Sequence[str], tolerance: float) -> str:
    """Raise Problem if a student's loss in the first epoch is far from float32's; in words
    otherwise. Later on, what begins as rounding has grown."""
    words = []
    for student in students:
        loss = epoch_losses(place, out, student)[0]
        expected = epoch_losses(place, "float32", student)[0]
        words.append(f"loss of {student} {loss:.4f}, of float32 {expected:.4f}")
        if not abs(loss - expected) <= tolerance * max(abs(expected), 0.1):
            raise Problem(words[-1])
    return "; ".join(words)


def check_float32(place: Place) -> Finding:
    finding = child(place, command, place, "run", "float32", "--precision", "float32")
    losses = {name: epoch_losses(place, "float32", name) for name in place.recipe.students}
    for name, (first, *_, last) in losses.items():
        if not last < first:
            raise Problem(f"the loss of {name} does not fall: {first} to {last}")
    finding.figures = "teachers, biased model, students, report"
    return finding


def arithmetic() -> Finding:
    """TF32 in convolutions alone: errors against float64."""
    device = Runtime.start("float32").device
    random = torch.Generator().manual_seed(0)
    x = torch.randn(8, 64, 16, 16, generator=random, dtype=torch.float64)
    weight = torch.randn(64, 64, 3, 3, generator=random, dtype=torch.float64)
    operations: list[tuple[Any, ...]] = [
        (torch.nn.functional.conv2d, x, weight), (torch.matmul, x.flatten(1), x.flatten(1).T),
    ]
    errors = []
    for function, *arguments in operations:
        exact = function(*arguments)
        rounded = function(*(each.float().to(device) for each in arguments)).double().cpu()
        errors.append(float((rounded - exact).norm() / exact.norm()))
    words = f"relative error of convolutions {errors[0]:.0e}, of matrix products {errors[1]:.0e}"
    if errors[0] > 2e-3 or errors[1] > 1e-5:
        raise Problem(words)
    return Finding(words)


def check_precision(place: Place, precision: str) -> Finding:
    with_teachers(place, precision)
    finding = child(place, command, place, "distill", precision, "--precision", precision)
    finding.figures = compare(place, precision, [*place.recipe.students], 0.15)
    return finding


def compiled(place: Place, out: str, student: str) -> Finding:
    if place.cpu and place.quick:  # the graphs alone
        torch.compile = functools.partial(torch.compile, backend="eager")
    return command(
        place, "distill", out, "--student", student, "--compile", "--precision", "float32"
    )


def check_compile(place: Place, student: str) -> Finding:
    out = f"compiled-{student}"
    with_teachers(place, out)
    finding = child(place, compiled, place, out, student)
    finding.figures = compare(place, out, [student], 0.05)
    return finding


def check_processes(place: Place) -> Finding:
    with_teachers(place, "shared")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc_per_node", str(place.num_processes), str(ROOT / "grokd.py")]
    flags = ["--student", "average", "--parallel", "data", "--precision", "float32"]
    with open(place.folder / "log.txt", "a") as log:
        process = subprocess.Popen(
            [*launcher, "distill", place.name, "--out", "runs/shared", *flags],
            cwd=place.folder, stdout=log, stderr=log,
        )
    try:
        status = process.wait(1800)
    except subprocess.TimeoutExpired:
        process.terminate()  # it ends its processes
        raise
    if status:
        raise Problem(f"torchrun ended with {status}")
    return Finding(compare(place, "shared", ["average"], 0.05))


def killed(place: Place, last_step: int) -> None:
    """A student whose process is killed when its checkpoint of a step is written."""
    write = grokd.save_checkpoint

    def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any]) -> None:
        write(folder, step, state)
        if step == last_step:
            os.kill(os.getpid(), signal.SIGKILL)

    grokd.save_checkpoint = save_checkpoint
    flags = ("--student", "features", "--precision", "float32", "--checkpoint-minutes", "1e-9")
    command(place, "distill", "killed", *flags)


def check_resume(place: Place) -> Finding:
    with_teachers(place, "killed")
    _, problem, status = start(place, functools.partial(killed, place, 5))
    if status != -signal.SIGKILL:
        raise Problem(f"its process was not killed in training: {problem}")
    flags = ("--student", "features", "--precision", "float32", "--resume")
    finding = child(place, command, place, "distill", "killed", *flags)
    if "goes on at step 5" not in (place.folder / "log.txt").read_text():
        raise Problem("the second run did not go on from the checkpoint of the first")
    finding.figures = "the bits of a run that was not killed"
    if same_weights(place, "killed"):
        return finding
    with_teachers(place, "again")
    child(place, command, place, "distill", "again", *flags[:-1])
    if same_weights(place, "again"):
        raise Problem("other bits than those of a run that was not killed")
    words = "it went on, but two whole runs have different bits too: kernels do not repeat"
    return replace(finding, outcome="undecided", figures=words)


def same_weights(place: Place, out: str) -> bool:
    """Has the student of features the bits that it has in float32's folder?"""
    from safetensors.numpy import load_file  # no arithmetic of torch's in this process

    first, second = (
        load_file(student_file(place, folder, "features", ".safetensors"))
        for folder in ("float32", out)
    )
    return all(np.array_equal(value, second[name]) for name, value in first.items())


def channels_last(place: Place, precision: str) -> Finding:
    """Layout from the view to a middle layer, the same answers, and what it gains."""
    runtime = Runtime.start(precision)
    store = grokd.open_store(place.recipe.data, "")
    images = store.view(store.split("train")[:64], runtime.device, 0)
    arch = place.recipe.teachers.arch[0]
    plain, model = (
        grokd.build_model(arch, "random", 2, Input(), 0).to(runtime.device).eval() for _ in range(2)
    )
    model.to(memory_format=torch.channels_last)
    tap = grokd.Tap(model, ["layer2"], store.data.crop)
    contiguous = images.contiguous()
    settle = torch.cuda.synchronize if runtime.device.type == "cuda" else lambda: None

    def forward(network: Classifier, batch: Tensor) -> Tensor:
        with torch.no_grad(), runtime.autocast():
            logits = network(batch)
        settle()
        return logits

    gap = float((forward(model, images) - forward(plain, contiguous)).abs().max())
    for name, tensor in (("view", images), ("layer2", tap.maps["layer2"])):
        if not tensor.is_contiguous(memory_format=torch.channels_last):
            raise Problem(f"{name} is not in channels last")
    if gap > 0.1:
        raise Problem(f"logits differ by {gap:.2g} between the layouts")
    slow, fast = bench.median_times(
        lambda: forward(plain, contiguous), lambda: forward(model, images), runs=10
    )
    return Finding(f"logits within {gap:.0e}; contiguous takes {slow / fast:.2f} of its time")


# The generator


def build_pipeline(place: Place, folder: Path) -> None:
    """A random class-conditional DDPM, saved as diffusers does."""
    section = grokd.Diffusion(widths=(8, 16) if place.cpu else (64, 128, 128))
    store = grokd.open_store(place.recipe.data, "")
    unet = grokd.diffusion_network(section, store)
    scheduler = grokd.diffusion_scheduler(section)
    grokd.import_diffusers().DDPMPipeline(unet, scheduler).save_pretrained(folder)


def generate(place: Place, precision: str, guided: bool) -> tuple[Finding, np.ndarray]:
    """Images of a few sources, guided to the last iteration, and memory beside its estimate."""
    runtime = Runtime.start(precision)
    store = grokd.open_store(place.recipe.data, "")
    count = 4 if place.cpu else 32
    settings = Augment(
        guided=guided, generator="pipeline", steps=2 if place.cpu else 6, iterations=2,
        min_teacher=1.0, max_student=0.0, in_flight=count, micro_batch=count,
    )
    made = Generator("pipeline", settings, store.class_names, store.data.size, runtime)
    judge = judge_of(store, settings, runtime)
    grokd.fit_memory(made, judge)
    grokd.calibrate(made, store, 0.95)
    gpu = runtime.device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if gpu else 0
    records = [*grokd.generate(made, judge, store, [*range(count)], 0)]
    images = np.stack([record["image"] for record in sorted(records, key=lambda r: r["source"])])
    if {record["iterations"] for record in records} != {2 if guided else 0}:
        raise Problem(f"iterations {[record['iterations'] for record in records]}")
    if images.shape != (count, 3, store.data.size, store.data.size) or images.std() == 0:
        raise Problem(f"images of shape {images.shape}, deviation {images.std()}")
    estimate = count * max(grokd.guidance_needs(made, judge).values()).bytes / 2**30
    words = f"memory estimate {estimate:.2f} GiB"
    if gpu and guided:
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30
        words += f", measured {peak:.2f}"
        if 0.8 * peak > estimate:  # fit_memory leaves a fifth
            raise Problem(words)
    return Finding(words if guided else ""), images


def judge_of(store: Store, settings: Augment, runtime: Runtime) -> Judge:
    """The float32 run's teachers and student."""
    paths = [Path(f"runs/float32/teachers/{i}/dfr.safetensors") for i in (0, 1)]
    paths.append(Path("runs/float32/students/average/seed0/model.safetensors"))
    *teachers, student = (
        grokd.fold(grokd.load_model(path, runtime.device, store)) for path in paths
    )
    return Judge(teachers, student, store, settings)


def check_generator(
    place: Place, precision: str, guided: bool, plain: dict[str, np.ndarray]
) -> Finding:
    """Without guidance images hardly depend on the precision; `plain` keeps those of float32."""
    if not (place.folder / "pipeline").is_dir():
        child(place, build_pipeline, place, place.folder / "pipeline")
    finding, images = child(place, generate, place, precision, guided)
    if not guided:
        gap = np.abs(images - plain.setdefault("images", images).astype(float)).mean()
        finding.figures = f"{gap:.2f} of 255 levels from float32's images"
        if gap > 8:
            raise Problem(finding.figures)
    return finding


# Speed


def speed(place: Place, precision: str, batch_size: int, compiles: bool) -> Finding:
    """Images a second of a student that learns from cached targets, beside a bare loop."""
    runtime = Runtime.start(precision)
    count, size, crop = (64, 40, 32) if place.cpu else (4096 if place.quick else 8192, 256, 224)
    store = bench.random_store("store", count, size, crop)
    frozen = [
        grokd.build_model("resnet18", "random", 2, Input(), seed).eval().requires_grad_(False)
        for seed in range(3)
    ]
    frozen = [model.to(runtime.device) for model in frozen]
    targets = grokd.Targets(frozen, 2, store, {"speed": store.fingerprint}, runtime, 0)
    targets.prepare(0)
    train = Train(batch_size=batch_size, lr=1e-3, num_views=1, compile=compiles)
    artefact = grokd.Artefact("speed", Path("runs/speed/model.safetensors"), "distill", {}, {})
    student = grokd.build_model("resnet18", "random", 2, Input(), 9)
    student.to(memory_format=torch.channels_last)
    job = grokd.Job(
        artefact, student, Distill(train=train), train, store, 0,
        grokd.distillation(targets.answer),
    )
    training = grokd.Training(job, runtime)
    gpu = runtime.device.type == "cuda"
    settle = torch.cuda.synchronize if gpu else lambda: None
    sizes = [len(batch) for batch, _ in training.batches(0)]

    def epoch() -> None:
        training.progress.step = 0
        for batch, parts in training.batches(0):
            training.step(0, len(batch), parts)
            training.check_loss()
        settle()

    bare = bare_loop(runtime, crop, sizes, compiles)

    def bare_epoch() -> None:
        bare()
        settle()

    epoch()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    epoch()
    peak = torch.cuda.max_memory_allocated() / 2**30 if gpu else math.nan
    ours, theirs = bench.median_times(epoch, bare_epoch, runs=1 if place.quick else 3)
    return Finding(rate=sum(sizes) / ours, bare=sum(sizes) / theirs, peak=peak)


def bare_loop(
    runtime: Runtime, crop: int, sizes: Sequence[int], compiles: bool
) -> Callable[[], None]:
    """An epoch of torch alone: network, autocast, optimiser, and one batch that is there."""
    device = runtime.device
    model: Any = grokd.build_model("resnet18", "random", 2, Input(), 9).to(device).train()
    model.to(memory_format=torch.channels_last)
    if compiles:
        model = torch.compile(model)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, 0.9, weight_decay=1e-3)
    scaler = torch.amp.GradScaler(device.type, enabled=runtime.precision == "float16")
    half = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    images = torch.rand(max(sizes), 3, crop, crop, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(2, (max(sizes),), device=device)

    def epoch() -> None:
        for size in sizes:
            with torch.autocast(
                device.type, half.get(runtime.precision), enabled=runtime.precision in half
            ):
                loss = torch.nn.functional.cross_entropy(model(images[:size]), labels[:size])
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

    return epoch


# The table


def checks(place: Place) -> dict[str, Callable[[], Finding]]:
    """Every check by its name, in order: later ones use what float32 made."""
    half = "bfloat16"
    plain: dict[str, np.ndarray] = {}
    processes = f"{place.num_processes} process(es), torchrun"
    every: dict[str, Callable[[], Finding]] = {
        "float32": lambda: check_float32(place),
        "float32, TF32 as set": lambda: child(place, arithmetic),
    }
    for precision in PRECISIONS[1:]:
        every[precision] = functools.partial(check_precision, place, precision)
    every["compile"] = lambda: check_compile(place, "average")
    every["compile, feature distillation"] = lambda: check_compile(place, "features")
    every[processes] = lambda: check_processes(place)
    every["killed and gone on"] = lambda: check_resume(place)
    every["channels last"] = lambda: child(place, channels_last, place, half)
    for precision in PRECISIONS:
        for guided in (False, True):
            name = f"generator, {'guided' if guided else 'plain'}, {precision}"
            every[name] = functools.partial(check_generator, place, precision, guided, plain)
    for precision, batch_size, compiles in speeds(place):
        crop = 32 if place.cpu else 224
        name = f"ResNet-18, {crop} pixels, batch {batch_size}, {precision}"
        name += ", compiled" if compiles else ""
        every[name] = functools.partial(child, place, speed, place, precision, batch_size, compiles)
    return every


def speeds(place: Place) -> list[tuple[str, int, bool]]:
    """Precision, batch size and compiling of each measurement."""
    if place.cpu:
        return [("bfloat16", 16, False)]
    found = [("bfloat16", 128, False), ("bfloat16", 256, False)]
    if not place.quick:
        found += [("float16", 256, False), ("float32", 128, False), ("float32", 256, False)]
        found += [("bfloat16", 256, True)]
    return found


def preload() -> None:
    """What each process would import for itself. Some modules ask whether there is a GPU, which
    must not start one here, or no forked process could use it: they are shown none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for module in ("torchvision", "torch.utils.tensorboard", "torch._dynamo"):
        importlib.import_module(module)
    for name in ("UNet2DModel", "DDPMPipeline", "DDIMScheduler"):
        getattr(grokd.import_diffusers(), name)
    del os.environ["CUDA_VISIBLE_DEVICES"]
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible


def run_checks(place: Place) -> tuple[list[list[str]], list[str]]:
    """Rows of the table, and a line for each check that failed."""
    rows, failures = [], []
    for name, check in checks(place).items():
        began = time.monotonic()
        try:
            finding = check()
        except Exception as error:  # of whatever kind: the others go on
            finding = Finding(outcome="failed")
            failures.append(f"{name}: {error}".splitlines()[0])
        rows.append([name, *finding.cells(), f"{time.monotonic() - began:.0f}"])
        print(f"{name}: {finding.outcome}", flush=True)
    return rows, failures


def data_path(place: Place) -> list[list[str]]:
    """Rows for each part of the way from the store to a batch."""
    measured = child(place, bench.data_path, "store", 3, "bfloat16")
    return [
        [name, "ok", "", value.removesuffix(" images/s"), "", "", "", ""]
        for name, value in measured if "images/s" in value
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="on the CPU, with tiny networks")
    parser.add_argument("--quick", action="store_true", help="fewer images and measurements")
    parser.add_argument("--save", type=Path, help="write the table as JSON")
    args = parser.parse_args()
    save = args.save or (None if args.cpu else Path(__file__).with_name("gpu.json"))
    if args.cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    # Neither may the question whether there is a GPU start one here.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    preload()
    folder = Path(tempfile.mkdtemp(prefix="grokd-"))
    place = Place(folder, args.cpu, args.quick, 2)
    if not args.cpu:
        count = child(place, torch.cuda.device_count)
        if not count:
            sys.exit("error: there is no GPU here: check the CPU with --cpu.")
        place = replace(place, num_processes=count)
    rows, failures = run_checks(place)
    if not args.cpu:
        try:
            rows += data_path(place)
        except Problem as problem:
            failures.append(f"data path: {problem}")
    about = child(place, grokd.origin, place.num_processes)
    print(grokd.table(HEADER, rows))
    print(", ".join(about.values()))
    if save:
        save.write_text(json.dumps({"about": about, "header": HEADER, "rows": rows}, indent=1))
    if failures:
        sys.exit("\n".join([*failures, f"What they printed: {folder / 'log.txt'}"]))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()

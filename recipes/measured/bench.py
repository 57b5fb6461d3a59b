"""Speed as ratios, both sides in one process: python recipes/measured/bench.py [--save FILE]

5 ResNet-50 teachers and a biased one, ResNet-18 student, 64 pixels, batch 32, random weights and
images; medians of several alternating runs. --data-path instead measures each part of the way from
the store to a batch that a network is shown, beside torch's DataLoader; --encoded N reads N
generated JPEGs through the encoded store; --estimate prints the disk space that known data sets
take; --augment FOLDER counts a finished set's UNet evaluations. Times are measured, never asserted.
"""

import argparse
import functools
import json
import mmap
import os
import resource
import statistics
import sys
import tempfile
import threading
import time
import typing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import grokd  # noqa: E402
from grokd import Artefact, Batch, Data, Distill, Input, Job, Row, Train, Training  # noqa: E402

SIZE, BATCH, TEACHERS, TAU = 64, 32, 5, 4.0


def median_times(*functions: Callable[[], Any], runs: int) -> list[float]:
    """Median seconds of each, run in turn after a warm-up of each."""
    device = torch.device("cuda" if torch.cuda.is_initialized() else "cpu")
    for function in functions:
        function()
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(runs):
        for function, spent in zip(functions, times, strict=True):
            began = grokd.now(device)
            function()
            spent.append(grokd.now(device) - began)
    return [statistics.median(spent) for spent in times]


def random_rows(count: int) -> list[Row]:
    random = np.random.default_rng(0)
    return [
        Row(random.integers(0, 255, (72, 72, 3), dtype=np.uint8), i % 2, i // 2 % 2,
            ("train", "train", "train", "val", "test")[i // 4 % 5])
        for i in range(count)
    ]


def per_sample_weights(model: grokd.Classifier, images: Tensor, logits: Tensor) -> Tensor:
    """The definition: one autograd call per sample and model, over all parameters."""
    parameters = list(model.parameters())
    weights = torch.zeros(len(logits) - 1, len(images))
    for i in range(len(images)):
        output = model(images[i : i + 1])
        gradients = []
        for target in logits[:, i : i + 1]:
            loss = grokd.kd_losses(output, target, TAU).sum()
            parts = torch.autograd.grad(loss, parameters, retain_graph=True)
            gradients.append(torch.cat([part.flatten() for part in parts]))
        for t, gradient in enumerate(gradients[:-1]):
            weights[t, i] = 1 - torch.cosine_similarity(gradient, gradients[-1], 0)
    return weights


def speed(folder: str, runs: int) -> list[list[str]]:
    """Rows of the table."""
    runtime = grokd.Runtime.start("float32")
    rows = random_rows(1600)
    data = Data(reader=lambda _: rows, size=72, crop=SIZE, store=folder)
    store = grokd.open_store(data, "")
    indices = store.split("train")
    steps = len(indices) // BATCH

    def network(arch: str, seed: int) -> grokd.Classifier:
        return grokd.build_model(arch, "random", 2, Input(), seed).to(runtime.device)

    plain = [network("resnet50", seed).eval().requires_grad_(False) for seed in range(6)]
    targets = grokd.Targets([network("resnet50", seed).eval().requires_grad_(False)
                             for seed in range(6)], TEACHERS, store, {}, runtime, 0)
    began = grokd.now(runtime.device)
    targets.prepare(0)
    teacher_epoch = grokd.now(runtime.device) - began

    student = network("resnet18", 9).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(student.parameters(), 1e-3, 0.9)
    artefact = Artefact("bench", Path(folder) / "bench.safetensors", "bench", {}, {})
    batches = grokd.epoch_batches(len(indices), BATCH, 0, 0)[:steps]
    places = batches[0]
    images = store.view(indices[places], runtime.device, 0)
    labels = torch.from_numpy(store.labels[indices[places]]).to(runtime.device)

    def training(settings: Distill, losses: grokd.Losses) -> Training:
        train = Train(batch_size=BATCH)
        return Training(Job(artefact, student, settings, train, store, 0, losses), runtime)

    def read(batch: np.ndarray) -> list[grokd.Part]:
        indices_here = indices[batch]
        labels_here = torch.from_numpy(store.labels[indices_here])
        stored = store.read(indices_here, runtime.device, 0)
        return [grokd.Part(batch, 0, True, stored, labels_here, torch.from_numpy(batch))]

    ready = read(places)

    def step(work: Training, batch: np.ndarray = places, parts: Any = ready) -> None:
        work.step(0, len(batch), parts)

    def bare() -> None:
        torch.nn.functional.cross_entropy(student(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    agre, average = Distill(), Distill(weighting="average")
    distilled = grokd.distillation(targets.answer)
    ours, aver = training(agre, distilled), training(average, distilled)
    per_teacher = training(replace(agre, space="batch"), distilled)

    def online(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            logits = torch.stack([model(batch.images) for model in plain])
        weights = grokd.agre_weights(batch.output, logits[:-1], logits[-1], TAU)
        shares = grokd.teacher_shares(weights)
        return grokd.weighted_kd(batch.output, logits[:-1], shares, TAU), {}

    def epoch() -> None:
        for batch, parts in grokd.prefetch(batches, read):
            step(ours, batch, parts)

    def bare_epoch() -> None:
        for _ in batches:
            bare()

    table = []

    def row(what: str, against: str, ratio: float) -> None:
        table.append([what, against, f"{ratio:,.2f}" if ratio < 100 else f"{ratio:,.0f}"])
        print(f"{what} / {against}: {table[-1][2]}", flush=True)

    t_agre, t_aver = median_times(lambda: step(ours), lambda: step(aver), runs=4 * runs)
    row("AGRE step, warm cache", "AVER step, warm cache", t_agre / t_aver)
    t_per_teacher, t_aver = median_times(lambda: step(per_teacher), lambda: step(aver), runs=runs)
    row("AGRE step with a backward pass per teacher", "AVER step", t_per_teacher / t_aver)
    student.eval()
    with torch.no_grad():
        output, logits = student(images), targets.logits(places)
    t_sample, = median_times(lambda: per_sample_weights(student, images, logits), runs=1)
    t_closed, = median_times(lambda: grokd.agre_weights(output, logits[:-1], logits[-1], TAU),
                             runs=200)
    student.train()
    row("weights by per-sample autograd, batch 32", "closed form", t_sample / t_closed)
    t_epoch, t_bare = median_times(epoch, bare_epoch, runs=max(2, runs // 2))
    row("AGRE epoch, warm cache", "bare forward, backward, step on one tensor", t_epoch / t_bare)
    plain_student, contiguous = network("resnet18", 9).train(), images.contiguous()
    plain_optimizer = torch.optim.SGD(plain_student.parameters(), 1e-3, 0.9)

    def bare_contiguous() -> None:
        torch.nn.functional.cross_entropy(plain_student(contiguous), labels).backward()
        plain_optimizer.step()
        plain_optimizer.zero_grad(set_to_none=True)

    t_contiguous, t_bare = median_times(bare_contiguous, bare, runs=2 * runs)
    row("bare student step, contiguous", "channels last", t_contiguous / t_bare)
    asked = training(agre, online)
    t_online, t_agre = median_times(lambda: step(asked), lambda: step(ours), runs=runs)
    row("AGRE step with the teachers online", "warm cache", t_online / t_agre)
    t_read, t_bare = median_times(
        lambda: store.view(indices[places], runtime.device, 1), bare, runs=4 * runs)
    row("reading a batch with crop and flip", "bare student step", t_read / t_bare)
    folded = targets.models

    def ensemble(models: list[grokd.Classifier], batch: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.stack([model(batch) for model in models])

    t_plain, t_folded = median_times(lambda: ensemble(plain, contiguous),
                                     lambda: ensemble(folded, images), runs=runs)
    row("plain ensemble of 6", "folded, channels last", t_plain / t_folded)
    gap = (ensemble(plain, contiguous) - ensemble(folded, images)).abs().max()
    table.append(["largest difference of their logits", "", f"{gap:.1e}"])
    ablation = 18 * t_epoch
    row("18 students (6 tau x 3 seeds), teachers online", "one student, warm cache",
        18 * t_online * steps / t_epoch)
    row("18 students, cache filled once", "one student, warm cache",
        (ablation + teacher_epoch) / t_epoch)
    return table


class Tensors(torch.utils.data.Dataset[Tensor]):
    """Training views by torchvision, of the same stored uint8 tensors."""

    def __init__(self, store: grokd.Store) -> None:
        from torchvision.transforms import v2

        data = store.data
        self.images = store.images
        crop = v2.RandomResizedCrop(
            data.crop, data.crop_scale, data.crop_ratio, antialias=False  # as grokd's
        )
        flip = v2.RandomHorizontalFlip()
        self.transform = v2.Compose([crop, flip, v2.ToDtype(torch.float32, scale=True)])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        return self.transform(torch.from_numpy(np.array(self.images[i])))


def random_store(folder: str, count: int, size: int, crop: int) -> grokd.Store:
    """Images of noise: the worst case for a crop in low precision."""
    random = np.random.default_rng(0)
    splits = ("train",) * 6 + ("val", "test")
    rows = [
        Row(random.integers(0, 256, (size, size, 3), np.uint8), i % 2, 0, splits[i // 2 % 8])
        for i in range(count)
    ]
    data = Data(reader=lambda _: rows, size=size, crop=crop, store=folder)
    return grokd.open_store(data, "")


def low_precision(store: grokd.Store, batch: np.ndarray, dtype: torch.dtype) -> float:
    """Largest difference that places and pixels of a lower precision make to a crop, of 255."""
    stored = store.read(batch, torch.device("cpu"), 0)
    assert stored.transform is not None
    crop = store.data.crop
    exact = grokd.crop_boxes(stored.raw, stored.transform, crop)
    grid = F.affine_grid(stored.transform, [*exact.shape], align_corners=False)
    images, places = (each.to(dtype).float() for each in (stored.raw / 255, grid))
    rounded = F.grid_sample(images, places, padding_mode="border", align_corners=False)
    return 255 * float((rounded - exact).abs().max())


def forget(store: grokd.Store) -> None:
    """Leave the store to the disk: nothing of it stays in the machine's memory."""
    typing.cast(Any, store.images)._mmap.madvise(mmap.MADV_DONTNEED)
    with open(store.folder / "images.u8", "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def in_words(num_threads: int) -> str:
    return f"{num_threads} thread{'s' if num_threads > 1 else ''}"


def data_path(folder: str, runs: int, precision: str = "float32") -> list[list[str]]:
    """Training views of 224 pixels (crop, flip) from a store of 256, batches of 256."""
    runtime, count, size = grokd.Runtime.start(precision), 1024, 256
    device, gpu = runtime.device, runtime.device.type == "cuda"
    store = random_store(folder, count, size, crop=224)
    batches = grokd.epoch_batches(count, 256, 0, 0)
    loader = torch.utils.data.DataLoader(
        Tensors(store), 256, shuffle=True, num_workers=2, pin_memory=gpu, persistent_workers=True
    )
    threads = [n for n in (1, 2, 4, 8) if n <= len(os.sched_getaffinity(0))]
    ahead = runtime.num_readers(grokd.store_bytes(1, size))

    def settle() -> None:
        if gpu:
            torch.cuda.synchronize()

    kept = threading.local()  # memory of each thread

    def gather_batch(batch: np.ndarray) -> Any:
        if gpu:
            return store.gather(batch, device)  # into pinned memory, which torch uses again
        if not hasattr(kept, "memory"):
            kept.memory = np.zeros((256, 3, size, size), np.uint8)
        return store._stored(batch, kept.memory)

    def gather(num_threads: int, repeats: int = 8) -> None:
        for _ in grokd.prefetch(repeats * batches, gather_batch, num_threads):
            pass

    def gather_from_disk(num_threads: int) -> None:
        forget(store)
        gather(num_threads, 1)

    def read() -> None:
        for batch in batches:
            store.read(batch, device, 0)

    def upload() -> None:
        for batch in on_host:
            batch.raw.to(device, non_blocking=True)
        settle()

    def show(batches_read: list[grokd.Stored]) -> None:
        for stored in batches_read:
            store.show(stored, device)
        settle()

    def whole() -> None:
        for _, stored in grokd.prefetch(batches, lambda b: store.read(b, device, 0), ahead):
            store.show(stored, device)
        settle()

    def by_loader() -> None:
        for images in loader:
            images.to(device, non_blocking=True)
        settle()

    on_host = [store.read(batch, device, 0) for batch in batches]
    on_device = [grokd.Stored(b.raw.to(device), b.transform, b.flips) for b in on_host]
    work: dict[str, Callable[[], Any]] = {}
    for n in (1, 2, 4):
        work[f"gathering from the disk, {in_words(n)}"] = functools.partial(gather_from_disk, n)
    from_disk = median_times(*work.values(), runs=runs)  # before other processes hold the store
    rows = [[name, f"{count / t:,.0f} images/s"] for name, t in zip(work, from_disk, strict=True)]
    work = {f"gathering from memory, {in_words(n)}": functools.partial(gather, n) for n in threads}
    work["the same with crops chosen, in turn"] = read
    if gpu:
        work["upload from pinned memory"] = upload
    work["crop and flip on the device"] = lambda: show(on_device)
    work[f"all of it, {in_words(ahead)} ahead"] = whole
    work["torch's DataLoader, torchvision's transforms v2, 2 workers"] = by_loader
    times = median_times(*work.values(), runs=runs)
    for name, seconds in zip(work, times, strict=True):
        images = 8 * count if name.startswith("gathering from") else count
        rows.append([name, f"{images / seconds:,.0f} images/s"])
    for dtype in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        gap = low_precision(store, batches[0][:32], dtype)
        rows.append([f"largest error of a crop in {name}, of 255 levels", f"{gap:.1f}"])
    return rows


def encoded(folder: str, count: int) -> list[list[str]]:
    """Reading generated JPEGs through the encoded store."""
    random = np.random.default_rng(0)
    rows, where = [], Path(folder) / "images"
    where.mkdir()
    for i in range(count):
        path = where / f"{i}.jpg"
        pixels = np.repeat(np.repeat(random.integers(0, 255, (8, 8, 3), np.uint8), 8, 0), 8, 1)
        Image.fromarray(pixels).save(path, quality=80)
        rows.append(Row(path, i % 2, i // 2 % 2, grokd.SPLITS[i // 4 % 3]))
    data = Data(reader=lambda _: rows, size=64, crop=56, store=folder, max_store_gb=0.0)
    began = time.perf_counter()
    store = grokd.open_store(data, "")
    built, memory, rates = time.perf_counter() - began, [], []
    for epoch in range(2):
        began = time.perf_counter()
        for batch in grokd.epoch_batches(count, 128, 0, epoch):
            store.view(batch, torch.device("cpu"), epoch)
        rates.append(count / (time.perf_counter() - began))
        memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)
    return [
        ["packing, each file decoded once to check it", f"{count / built:,.0f} images/s"],
        ["reading with crop and flip, first epoch", f"{rates[0]:,.0f} images/s"],
        ["reading with crop and flip, second epoch", f"{rates[1]:,.0f} images/s"],
        ["peak memory after the first epoch", f"{memory[0]:,.0f} MiB"],
        ["peak memory after the second epoch", f"{memory[1]:,.0f} MiB"],
    ]


def estimate() -> list[list[str]]:
    """Disk of stores and of cached targets (10 teachers and a biased model), by the code itself."""
    sets = {"Waterbirds": (11_788, 4_795, 2), "CelebA": (202_599, 162_770, 2),
            "ImageNet-1k": (1_331_167, 1_281_167, 1000)}
    return [
        [name, f"{grokd.store_bytes(images, 256) / 1e9:,.1f} GB",
         f"{11 * grokd.target_bytes(train, 4 * classes) / 1e6:,.1f} MB"]
        for name, (images, train, classes) in sets.items()
    ]


def evaluations(folder: Path) -> list[list[str]]:
    """UNet evaluations (realism tests included) per accepted image of a finished set: as made,
    and in batches of a fixed make-up that stop when all their samples pass or the budget ends."""
    settings = json.loads(json.loads((folder / "done.json").read_text())["settings"])
    records = grokd.read_records(folder)
    levels, steps = len(grokd.Generator.LEVELS), settings["steps"]
    accepted = sum(record["accepted"] for record in records)
    judged = levels * sum(record["judged"] for record in records)
    made = steps * sum(record["steps"] + 1 for record in records) + judged
    rows = [["continuous batching", f"{made / accepted:,.0f}"]]
    for size in (16, 64):
        batches = [records[i : i + size] for i in range(0, len(records), size)]
        fixed = sum(len(b) * (max(r["steps"] for r in b) + 1) for b in batches) * steps + judged
        rows.append([f"batches of {size} until all their samples pass", f"{fixed / accepted:,.0f}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoded", type=int, default=0, help="number of JPEGs")
    parser.add_argument("--data-path", action="store_true", help="from the store to a batch")
    parser.add_argument("--estimate", action="store_true", help="disk for known data sets")
    parser.add_argument("--augment", type=Path, help="folder of a finished set of images")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--save", type=Path, help="write the table as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.data_path:
            header = ["views of 224 pixels from a store of 256, batches of 256", ""]
            rows = data_path(folder, args.runs)
        elif args.encoded:
            header = [f"{args.encoded:,} JPEGs of 64 x 64 in the encoded store", ""]
            rows = encoded(folder, args.encoded)
        elif args.estimate:
            header = ["data set, 256 pixels", "decoded store", "targets of 11 models, a view"]
            rows = estimate()
        elif args.augment:
            header = ["UNet evaluations per accepted image", args.augment.parent.name]
            rows = evaluations(args.augment)
        else:
            header, rows = ["this", "against", "ratio"], speed(folder, args.runs)
    print(grokd.table(header, rows))
    about = grokd.origin()
    print(", ".join(about.values()))
    if args.save:
        args.save.write_text(json.dumps({"about": about, "header": header, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()

"""Spurious ImageNet: does a classifier of ImageNet's 1,000 classes mistake a spurious feature?

    python recipes/spurious_imagenet.py --root FOLDER --imagenet ILSVRC2012 \
        --models resnet50:IMAGENET1K_V2 resnet50:weights.pth runs/.../model.safetensors

A program, since nothing is trained: models are files of grokd's, or torchvision's names with
weights by name or from a file. For each of 100 classes the benchmark (Neuhaus, Augustin, Boreiko,
Hein, *Spurious Features Everywhere*, ICCV 2023) has 75 photographs that show a feature which goes
with the class (a feeder, and no hummingbird). By p(class) they are to be told from the class's
50 validation images. Two scores per class, and their means:

    AUC    area under the ROC curve; .5 for a network that cannot tell them
    AP     average precision; without any skill the share of validation images, .4

The benchmark calls its score mAUC and describes an AUC; its code averages AP
(dataset/spurious_score.py), so AP's mean is what compares with its table. Both are printed. Figures
of ConfiG's students, which quote mAUC, were not at hand.

FOLDER is the benchmark's images/ (setup_download.sh of https://github.com/YanNeu/spurious_imagenet
fetches images_100_classes.zip), a folder a feature; as in its loader the third part of the name is
the class: *_*_CLASS_*/*. ILSVRC2012 holds val/ with a folder for each of the 1,000 WordNet ids,
n01440764 ..., as torchvision's ImageNet lays it out.

As in the benchmark, validation images are resized to 256 on the shorter side and cut to 224, and
the square spurious ones resized to 224 whole; bilinearly, where it is bicubic. Its scores will
differ a little. Not run by us on the photographs: they were not at hand. Some 12,500 images: a
minute on a GPU, half an hour on two CPU cores, both estimates.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import grokd  # noqa: E402
from grokd import Problem  # noqa: E402

NUM_CLASSES = 1000
CROP = 224
SOURCE = (
    "get the images with setup_download.sh of github.com/YanNeu/spurious_imagenet; the folder must "
    "hold a folder a feature, named *_*_CLASS_*, CLASS from 0 to 999"
)


def spurious_images(root: Path) -> dict[int, list[Path]]:
    """The spurious images of each class. Raises Problem for other folders."""
    inner = root / "images"
    folder = inner if inner.is_dir() else root
    images: dict[int, list[Path]] = {}
    for feature in sorted(folder.iterdir()) if folder.is_dir() else []:
        if not feature.is_dir():
            continue  # a time stamp lies there too
        match = re.fullmatch(r"[^_]*_[^_]*_(\d+)(_.*)?", feature.name)
        if not match or int(match[1]) >= NUM_CLASSES:
            raise Problem(f"{feature} names no class of ImageNet: {SOURCE}.")
        images.setdefault(int(match[1]), []).extend(sorted(feature.iterdir()))
    if not any(images.values()):
        raise Problem(f"Spurious ImageNet is not in {root}: {SOURCE}.")
    return images


def validation_images(root: Path, classes: Sequence[int]) -> dict[int, list[Path]]:
    """ImageNet's validation images of each of the classes, which count WordNet ids in order."""
    val = root / "val"
    ids = sorted(path.name for path in val.glob("n*") if path.is_dir())
    if len(ids) != NUM_CLASSES:
        raise Problem(f"{val} holds {len(ids):,} folders of WordNet ids (n01440764 ...), not "
                      f"{NUM_CLASSES:,}: lay ImageNet's validation images out as torchvision does.")
    images = {y: sorted((val / ids[y]).iterdir()) for y in classes}
    if empty := [ids[y] for y in classes if not images[y]]:
        raise Problem(f"{val}: no images in {', '.join(empty[:3])}.")
    return images


def load(text: str) -> grokd.Classifier:
    """A file of grokd's, or ARCH:WEIGHTS of torchvision's by name or from a file; frozen."""
    if Path(text).suffix == ".safetensors" and ":" not in text:
        model = grokd.load_model(Path(text))
    else:
        arch, _, weights = text.partition(":")
        model = grokd.Classifier(arch, NUM_CLASSES, grokd.Input())
        if Path(weights).suffix in (".safetensors", ".pth", ".pt"):
            state, _ = grokd.read_weights(Path(weights))
            model.load_plain(state, weights)
        else:
            model = grokd.build_model(arch, weights or "DEFAULT", NUM_CLASSES, model.input, seed=0)
    if model.num_classes != NUM_CLASSES:
        raise Problem(f"{text} has {model.num_classes} classes, not ImageNet's {NUM_CLASSES:,}.")
    return model.eval().requires_grad_(False)


def pixels(path: Path, size: int) -> np.ndarray:
    """The centre of an image whose shorter side is `size`: uint8 [3, 224, 224]."""
    try:
        square = grokd.decode(path, size, "shorter_side")
    except (OSError, ValueError, SyntaxError) as error:
        raise Problem(f"{path} cannot be read ({error}).") from error
    start = (size - CROP) // 2
    return square[:, start : start + CROP, start : start + CROP]


def probabilities(
    models: Sequence[grokd.Classifier], images: Sequence[tuple[Path, int]], size: int,
    batch_size: int, runtime: grokd.Runtime,
) -> Iterator[Tensor]:
    """Softmax [M, b, 1000] of every model, batch by batch; images are decoded by threads ahead."""
    paths = [path for path, _ in images]
    starts = range(0, len(paths), batch_size)

    def read(start: int) -> np.ndarray:
        batch = paths[start : start + batch_size]
        return np.stack([*grokd.THREADS.map(pixels, batch, [size] * len(batch))])

    for _, batch in grokd.progress_bar(grokd.prefetch(starts, read), "eval", total=len(starts)):
        shown = runtime.upload(batch).to(runtime.dtype) / 255
        with torch.no_grad(), runtime.autocast():
            logits = torch.stack([model(shown) for model in models])
        yield logits.double().softmax(-1).cpu()


def class_scores(spurious: Tensor, validation: Tensor, y: int) -> dict[str, Any]:
    """How well p(y) tells validation images from spurious ones, softmax [n, 1000] of both."""
    p = torch.cat([validation[:, y], spurious[:, y]]).numpy()
    is_class = np.repeat([1, 0], [len(validation), len(spurious)])
    return {
        "class": y,
        "ap": float(average_precision_score(is_class, p)),
        "auc": float(roc_auc_score(is_class, p)),
        "spurious_as_class": float((spurious.argmax(-1) == y).double().mean()),
        "validation_as_class": float((validation.argmax(-1) == y).double().mean()),
    }


def score(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Scores per class, by model."""
    if args.batch_size < 1:
        raise Problem(f"--batch-size {args.batch_size}: at least 1.")
    spurious = spurious_images(args.root)
    validation = validation_images(args.imagenet, [*spurious])
    runtime = grokd.Runtime.start(args.precision)
    models = [load(text).to(runtime.device, runtime.dtype) for text in args.models]
    found, labels = [], []
    for images, size in ((spurious, CROP), (validation, 256)):
        pairs = [(path, y) for y, paths in images.items() for path in paths]
        blocks = probabilities(models, pairs, size, args.batch_size, runtime)
        found.append(torch.cat([*blocks], 1))
        labels.append(torch.tensor([y for _, y in pairs]))
    return {
        name: [
            class_scores(found[0][m, labels[0] == y], found[1][m, labels[1] == y], y)
            for y in sorted(spurious)
        ]
        for m, name in enumerate(args.models)
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="the benchmark's images")
    parser.add_argument("--imagenet", type=Path, required=True, help="ImageNet; val/ is read")
    parser.add_argument("--models", nargs="+", required=True, metavar="FILE|ARCH:WEIGHTS")
    parser.add_argument("--save", type=Path, help="all figures as JSON")
    parser.add_argument("--batch-size", type=int, default=64, help="images at once")
    parser.add_argument("--precision", default="float32",
                        choices=("float32", "bfloat16", "float16", "float64"))
    args = parser.parse_args()
    scores = score(args)
    columns = {"ap": "AP", "auc": "AUC", "spurious_as_class": "spurious as class",
               "validation_as_class": "validation as class"}
    means = []
    for name, rows in scores.items():
        cells = [[str(row["class"]), *(f"{row[key]:.3f}" for key in columns)] for row in rows]
        print(f"\n{name}", grokd.table(["class", *columns.values()], cells), sep="\n")
        means.append([name, *(f"{np.mean([row[key] for row in rows]):.3f}" for key in columns)])
    count = len(next(iter(scores.values())))
    print(f"\nMean over {count} classes (the benchmark's code calls the first mAUC, its text the "
          "second):", grokd.table(["model", *columns.values()], means), sep="\n")
    if args.save:
        record = {"about": grokd.origin(), "models": scores}
        grokd.write_file(args.save, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    grokd.in_one_line(main)

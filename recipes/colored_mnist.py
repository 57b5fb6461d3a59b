"""Coloured MNIST against Table 1 of the AGRE-KD paper: four shares of aligned colours.

    python grokd.py run colored_mnist:98 --root FOLDER      # or 99.5, 99, 95

FOLDER holds torchvision's MNIST (FOLDER/MNIST/raw), which is downloaded if it is not there. Digit
k owns a colour, and 99.5, 99, 98 or 95 % of the training digits wear their own; the others wear
one of the other nine. Test digits wear theirs in 10 % of the cases. Scored are the paper's two
groups, aligned and conflicting: WGA is the conflicting one's accuracy in all but odd cases.

What differs from the paper's set-up, or is not told there:
- 10,000 of the 60,000 training digits are held out, coloured at random (10 % aligned); four fifths
  of them refit the heads, balanced over class x aligned, the rest is for choosing settings.
- five teachers instead of ten, a small residual network instead of MobileNetV2 (by which a CPU
  would need days), trained from scratch; the 2-convolution student's widths are ours.
- epochs, the same for every method: so many that the training loss is flat at the end.
Colours and noise are those of LfF's code (Nam et al. 2020), severity 4 (standard deviation .005).
"""

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from grokd import (
    DFR,
    BiasModel,
    Data,
    Distill,
    Input,
    Problem,
    Recipe,
    Row,
    Teachers,
    Train,
    hash_uniform,
    permutation,
)

COLOURS = np.array([
    (251, 80, 43), (253, 233, 90), (172, 118, 148), (200, 212, 153), (22, 198, 250),
    (82, 245, 114), (6, 60, 193), (142, 26, 194), (53, 100, 5), (213, 52, 68),
]) / 255
NOISE = 0.005  # standard deviation: severity 4 of 5 (.05, .02, .01, .005, .002)
NUM_HELD_OUT = 10_000


def colour_of(labels: np.ndarray, aligned: float, key: int) -> np.ndarray:
    """A colour for each label: its own with share `aligned`, else evenly one of the others."""
    colours = labels.copy()
    for digit in range(10):
        members = np.flatnonzero(labels == digit)
        members = members[permutation(len(members), key, digit)]
        other = members[round(aligned * len(members)):]
        colours[other] = (digit + 1 + np.arange(len(other)) % 9) % 10
    return colours


def paint(grey: np.ndarray, colours: np.ndarray, key: int) -> np.ndarray:
    """Digits [N, 28, 28] of 0..255 in noisy colours on black: uint8 [N, 28, 28, 3]."""
    places = np.arange(len(grey))[:, None]
    u, v = (hash_uniform(key, place, places, np.arange(3)) for place in (0, 1))
    noise = np.sqrt(-2 * np.log(1 - u)) * np.cos(2 * np.pi * v)  # normal (Box-Muller)
    colour = np.clip(COLOURS[colours] + NOISE * noise, 0, 1).astype(np.float32)
    return np.rint(grey[..., None] * colour[:, None, None]).astype(np.uint8)


def read(root: Path, aligned: float) -> Sequence[Row]:
    """Rows of the data set: torchvision's MNIST below `root`, coloured."""
    from torchvision.datasets import MNIST

    try:
        known, test = (MNIST(str(root), train=train, download=True) for train in (True, False))
    except (OSError, RuntimeError) as error:
        raise Problem(f"MNIST is not under {root.absolute()} and could not be fetched there "
                      f"({error}): put its four files into {root / 'MNIST' / 'raw'}.") from error
    order = permutation(len(known), 0)
    held_out = np.sort(order[:NUM_HELD_OUT])
    train = np.sort(order[NUM_HELD_OUT:])
    rows: list[Row] = []
    for split, source, places, share in (("train", known, train, aligned),
                                         ("val", known, held_out, 0.1),
                                         ("test", test, np.arange(len(test)), 0.1)):
        grey, labels = source.data.numpy()[places], source.targets.numpy()[places]
        key = ("train", "val", "test").index(split)
        colours = colour_of(labels, share, key)
        images = paint(grey, colours, key)
        rows += [Row(image, int(y), int(a), split)
                 for image, y, a in zip(images, labels, colours, strict=True)]
    return rows


PIXELS = Input(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
# Chosen on the selection part at 98 %, teachers 100-104, student 100: at lr .02 and 8 epochs of
# batches of 128 AGRE had 77.2 and AVER 73.2 of conflicting accuracy, at lr .05 and 24 epochs 84.9
# and 82.1; at lr .1 AVER diverged. Smaller batches reach as many steps in half the epochs.
teacher_train = Train(epochs=6, batch_size=128, lr=0.05, schedule="cosine", weight_decay=1e-4)
train = replace(teacher_train, epochs=12, batch_size=64, lr=0.03)
student = Distill(arch="cnn2", weights="random", input=PIXELS, train=train, dfr=DFR(epochs=30))

# Table 1 of the paper: mean and conflicting accuracy for 99.5, 99, 98 and 95 % aligned.
DFR_TEACHERS = {
    "teachers, DFR": "58.4 54.7 66.0 63.1 80.3 78.1 83.4 81.7",
    "deep ensemble of one-hot-dfr": "72.8 69.8 77.7 75.3 84.2 82.5 90.0 88.9",
    "one-hot-dfr": "53.6 52.6 51.9 51.7 81.5 80.0 61.8 60.9",
    "average": "54.1 49.0 62.8 58.7 86.5 85.0 88.5 87.3",
    "ae-kd": "58.8 54.5 69.4 66.3 86.6 85.1 88.1 86.9",
    "agre": "63.9 59.9 70.7 67.5 87.5 86.2 89.0 88.7",
}
# Conflicting accuracy only.
ERM_TEACHERS = {
    "teachers, ERM": "30.5 50.4 68.7 86.3",
    "one-hot": "19.0 21.6 27.4 41.4",
    "average-erm": "26.5 46.2 69.1 88.1",
    "agre-erm": "29.2 51.5 71.4 89.1",
}
RATIOS = (99.5, 99, 98, 95)


def published(place: int) -> dict[str, dict[str, float]]:
    """The paper's column `place` for our rows."""
    both = {row: [float(f) for f in text.split()] for row, text in DFR_TEACHERS.items()}
    figures = {row: {"mean": f[2 * place], "wga": f[2 * place + 1]} for row, f in both.items()}
    alone = {row: {"wga": float(text.split()[place])} for row, text in ERM_TEACHERS.items()}
    return figures | alone


recipes = {
    f"{ratio:g}": Recipe(
        data=Data(reader=functools.partial(read, aligned=ratio / 100), groups="aligned",
                  class_names=tuple("0123456789"), size=28, crop=28, random_crop=False,
                  flip=False, reweighting=0.8),
        teachers=Teachers(5, ("resnet8",), ("random",), dfr=DFR(epochs=30), input=PIXELS,
                          train=teacher_train),
        bias_model=BiasModel(kind="teacher", teacher=0),
        students={
            "one-hot": replace(student, weighting="one-hot"),
            "one-hot-dfr": replace(student, weighting="one-hot", head="dfr"),
            "random": replace(student, weighting="random"),
            "average": replace(student, weighting="average"),
            "ae-kd": replace(student, weighting="ae-kd"),
            "agre": student,
            "average-erm": replace(student, weighting="average", dfr_share=0.0),
            "agre-erm": replace(student, dfr_share=0.0),
        },
        published=published(place),
    )
    for place, ratio in enumerate(RATIOS)
}
recipe = recipes["98"]

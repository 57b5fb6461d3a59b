"""The embedded digits on coloured backgrounds: everything in minutes, on a CPU, no download.

    python grokd.py run digits

scikit-learn's 1,797 handwritten digits (8 x 8), 0-4 against 5-9, drawn white on blue or orange. The
background agrees with the class in 95 % of the training images, which a network learns before it
learns digits; validation and test are balanced, every test digit standing under both colours.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from grokd import BiasModel, Data, Distill, Recipe, Row, Teachers, Train, hash_uniform, permutation

COLOURS = np.array([[40, 90, 200], [225, 125, 30]], float)  # blue for 0-4, orange for 5-9
ALIGNED = 0.95
NUM_TRAIN, NUM_VAL = 900, 450  # the other 447 digits are tested, under both colours


def draw(digit: np.ndarray, colour: int, seed: int) -> np.ndarray:
    """A digit [8, 8] of 0..16, white on a slightly varied background: uint8 [8, 8, 3]."""
    noise = 30 * (hash_uniform(seed, np.arange(3)) - 0.5)
    grey = digit[:, :, None] / 16
    return np.rint(grey * 255 + (1 - grey) * (COLOURS[colour] + noise)).astype(np.uint8)


def read(root: Path) -> Sequence[Row]:
    """Rows of the data set; nothing is read from `root`."""
    from sklearn.datasets import load_digits  # takes a second, which --help need not wait for

    digits = load_digits()
    labels = (digits.target >= 5).astype(int)
    order = permutation(len(labels), 0)
    rows = []
    for place, i in enumerate(order):
        digit, label = digits.images[i], int(labels[i])
        if place < NUM_TRAIN:
            split, colours = "train", [label ^ int(hash_uniform(1, place)[0] >= ALIGNED)]
        elif place < NUM_TRAIN + NUM_VAL:
            seen = int((labels[order[NUM_TRAIN:place]] == label).sum())
            split, colours = "val", [seen % 2]  # colours alternate within each class
        else:
            split, colours = "test", [0, 1]
        rows += [Row(draw(digit, c, int(i)), label, c, split) for c in colours]
    return rows


data = Data(
    reader=read,
    class_names=("0-4", "5-9"),
    attribute_names=("blue", "orange"),
    size=16,
    crop=16,
    random_crop=False,
    flip=False,
)
# Tuned on the selection part with other seeds than the README's (teachers 100-104, students
# 100-102): students of lr .02 / .01 / .005 / .002 and 30 / 60 epochs.
teacher_train = Train(epochs=30, lr=0.05, schedule="cosine", weight_decay=1e-4)
train = Train(epochs=40, lr=0.01, schedule="cosine", weight_decay=1e-4)
student = Distill(arch="cnn2", weights="random", train=train)

recipe = Recipe(
    data=data,
    teachers=Teachers(arch=("resnet8",), weights=("random",), train=teacher_train),
    bias_model=BiasModel(
        kind="erm", arch="resnet8", weights="random", seed=1000, train=teacher_train
    ),
    students={
        "one-hot": replace(student, weighting="one-hot"),
        "one-hot-dfr": replace(student, weighting="one-hot", head="dfr"),
        "average": replace(student, weighting="average"),
        "agre": student,
        "departure": replace(student, weighting="departure"),
    },
)

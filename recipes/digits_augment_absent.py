"""ConfiG where it is meant to help: training without a single image of the conflicting groups.

    python grokd.py run digits_augment --seeds 0          # its generator is used here
    python grokd.py run digits_augment_absent --seeds 0

Orange 0-4 and blue 5-9 are left out of training; they remain in validation, which refits the
teachers' heads, and in the test (the paper's setting). Two things stand in for what the paper takes
from large pretrained models. The generator is that of recipes/digits_augment.py: like Stable
Diffusion it has seen some images of every kind, one in twenty here. The teachers' trunks are random
convolutions, which hold shape and colour alike; trunks trained on data in which colour tells
everything know nothing else, and no refitted head mends that.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from digits import read
from digits_augment import recipe as digits_augment

from grokd import Row


def read_aligned(root: Path) -> Sequence[Row]:
    """Rows of the digits without the conflicting training images."""
    return [row for row in read(root) if row.split != "train" or row.label == row.attribute]


teachers = digits_augment.teachers
recipe = replace(
    digits_augment,
    data=replace(digits_augment.data, reader=read_aligned),
    teachers=replace(teachers, arch=("cnn2",), train=replace(teachers.train, epochs=0)),
    augments={
        name: replace(images, max_student=0.4, generator="runs/digits_augment/generator/pipeline")
        for name, images in digits_augment.augments.items()
    },
)

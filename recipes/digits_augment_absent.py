"""ConfiG where it is meant to help: training without a single image of the conflicting groups.

    python grokd.py run digits_augment_absent --seeds 0

Everything of recipes/digits_augment.py, but orange 0-4 and blue 5-9 are left out of training; they
remain in validation, which refits the teachers' heads, and in the test (the paper's setting).
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


recipe = replace(digits_augment, data=replace(digits_augment.data, reader=read_aligned))

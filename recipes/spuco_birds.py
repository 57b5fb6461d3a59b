"""SpuCo Birds, and its covariate-shift variant, from which two groups are absent in training.

    python grokd.py run spuco_birds --root FOLDER
    python grokd.py run spuco_birds:covariate-shift --root FOLDER

FOLDER is the one where the package spuco puts the data set (`pip install spuco`, then
`SpuCoBirds(FOLDER, split="train").initialize()`, 3 GB), or spuco_birds itself; the layout is that
of its loader (https://github.com/BigML-CS-UCLA/SpuCo, datasets/spuco_birds.py), split / class /
place:

    spuco_birds/train/landbirds/land/     10,000 images, any names      val/  500     test/  500
    spuco_birds/train/landbirds/water/       500                               25            500
    spuco_birds/train/waterbirds/land/       500                               25            500
    spuco_birds/train/waterbirds/water/   10,000                              500            500

The variant is the setting of ConfiG (Popp et al. 2025), whose full text was not at hand: landbirds
on water and waterbirds on land are left out of training; validation, which refits heads, has 25 of
each, and half of them refit. ConfiG reports WGA and the group mean; its figures on these data were
not at hand either, and AGRE-KD's paper has none. Settings are ours: those of recipes/waterbirds.py,
with as many steps.

Not run by us: no GPU was at hand. An estimate, from 1,500 images a second in training a ResNet-50
and 5,000 a ResNet-18 (bfloat16, one A100): an hour for ten teachers, half of one for fifteen
networks of students, half of one for the teachers' answers. Decoded images take 4.7 GB of disk.
"""

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from waterbirds import recipe as waterbirds

from grokd import SPLITS, Data, Problem, Row

CLASSES, PLACES = ("landbirds", "waterbirds"), ("land", "water")
SOURCE = (
    "get the data with the package spuco (github.com/BigML-CS-UCLA/SpuCo); the folder must hold "
    "spuco_birds/{train,val,test}/{landbirds,waterbirds}/{land,water}/ with the images"
)


def read(root: Path, shifted: bool) -> Sequence[Row]:
    """Rows of the data set; `shifted`: without the two rare groups of training. Raises Problem for
    a missing or empty folder."""
    folder = root if root.resolve().name == "spuco_birds" else root / "spuco_birds"
    rows: list[Row] = []
    for split in SPLITS:
        for label, kind in enumerate(CLASSES):
            for place, background in enumerate(PLACES):
                if shifted and split == "train" and label != place:
                    continue
                cell = folder / split / kind / background
                images = sorted(cell.iterdir()) if cell.is_dir() else []
                if not images:
                    raise Problem(f"SpuCo Birds: {cell} holds no images: {SOURCE}.")
                rows += [Row(image, label, place, split) for image in images]
    return rows


# Waterbirds' 100 epochs of 4,795 images are 15,000 steps of 32 images; of 21,000 images it is 23.
EPOCHS = 23
teachers, students = waterbirds.teachers, waterbirds.students
recipe = replace(
    waterbirds,
    data=Data(reader=functools.partial(read, shifted=False), size=256, crop=224,
              class_names=("landbird", "waterbird"), attribute_names=PLACES),
    teachers=replace(teachers, train=replace(teachers.train, epochs=EPOCHS)),
    students={name: replace(student, train=replace(student.train, epochs=EPOCHS))
              for name, student in students.items()},
    published={},
)
recipes = {
    "covariate-shift": replace(
        recipe, data=replace(recipe.data, reader=functools.partial(read, shifted=True))
    ),
}

"""CelebA with the settings of the AGRE-KD paper: blond or not, where sex is the shortcut.

    python grokd.py run celeba --root FOLDER
    python grokd.py run celeba:metadata --root FOLDER      # the layout of DFR's authors
    accelerate launch --mixed_precision bf16 grokd.py run celeba --root FOLDER   # several GPUs

FOLDER, or FOLDER/celeba, is torchvision's: `torchvision.datasets.CelebA(FOLDER, download=True)`, or
by hand from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html:

    list_attr_celeba.txt       number of images; names of 40 attributes; a row an image, 1 or -1
    list_eval_partition.txt    a row an image: 0 training, 1 validation, 2 test
    img_align_celeba/          000001.jpg ... 202599.jpg

`celeba:metadata` reads FOLDER/metadata.csv, with columns img_filename (relative to FOLDER), y (1:
blond), place (1: male) and split (0, 1, 2): celeba_metadata.csv of
https://github.com/PolinaKirichenko/deep_feature_reweighting, whose loader has these columns.

Classes are Blond_Hair, attributes Male; there are 71,629 / 66,874 / 22,880 / 1,387 training images
of women and men who are not blond, of blond women and of blond men.

The paper's figures (Table 2; mean / WGA), printed by `eval` beside one's own:

    teachers ERM 95.4 / 37.5        DFR 93.7 / 90.1
    one-hot 95.5 / 32.3             one-hot + DFR head 92.3 / 88.9
    Random 92.5 / 85.1              AVER 92.4 / 83.4
    AE-KD 92.3 / 87.5               AGRE 91.7 / 91.9 +- .7

DFR's paper has a WGA of 46.9 +- 2.8 for ERM and 88.3 +- 1.1 for DFR. Teachers are trained as there
(50 epochs, batches of 128, lr 1e-3 constant, weight decay 1e-4; its heads are l1 fits, these are
refitted by SGD as the AGRE-KD paper's are). Epochs of the students are not told in the AGRE-KD
paper; 20 is its framework's default for CelebA.

Not run by us: no GPU was at hand. An estimate, from 1,500 images a second in training a ResNet-50
and 5,000 a ResNet-18 (bfloat16, one A100): 15 hours for ten teachers, three for fifteen networks of
students, two for the teachers' answers. Decoded images take 40 GB of disk. Reading tables and
folder takes two seconds of one core, measured on 202,599 made-up rows and empty files.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from waterbirds import recipe as waterbirds

from grokd import Data, Problem, Row, Train

TABLES = ("list_attr_celeba.txt", "list_eval_partition.txt")
SOURCE = (
    "get it from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html; the folder, or celeba/ in it, "
    f"must hold {TABLES[0]}, {TABLES[1]} and img_align_celeba/"
)
SPLITS = {"0": "train", "1": "val", "2": "test"}
VALUES = {"-1": 0, "1": 1}


def read(root: Path) -> Sequence[Row]:
    """Rows of the data set, in torchvision's layout. Raises Problem for what is not as it says."""
    folders = [root, root / "celeba"]
    folder = next((each for each in folders if (each / TABLES[0]).is_file()), None)
    if folder is None:
        raise Problem(f"CelebA is not in {root} (no {TABLES[0]}): {SOURCE}.")
    attributes, partition = read_attributes(folder / TABLES[0]), read_partition(folder / TABLES[1])
    images = folder / "img_align_celeba"
    present = {path.name for path in images.iterdir()} if images.is_dir() else set()
    for missing, where in ((attributes.keys() - partition.keys(), TABLES[1]),
                           (attributes.keys() - present, "img_align_celeba/")):
        if missing:
            raise Problem(
                f"{folder}: {len(missing):,} of the {len(attributes):,} images of {TABLES[0]} are "
                f"not in {where}, {min(missing)} for one: {SOURCE}."
            )
    return [Row(images / name, blond, male, partition[name])
            for name, (blond, male) in attributes.items()]


def read_attributes(path: Path) -> dict[str, tuple[int, int]]:
    """Blond_Hair and Male, 0 or 1, of every image."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    names = lines[1].split() if len(lines) > 1 else []
    for name in ("Blond_Hair", "Male"):
        if name not in names:
            raise Problem(f"{path}, line 2: {len(names)} names, no {name} among them: {SOURCE}.")
    blond, male = names.index("Blond_Hair") + 1, names.index("Male") + 1
    attributes = {}
    for number, line in enumerate(lines[2:], 3):
        fields = line.split()
        if len(fields) != len(names) + 1:
            raise Problem(f"{path}, line {number}: {len(fields)} fields, not a file and "
                          f"{len(names)} values: {SOURCE}.")
        if fields[blond] not in VALUES or fields[male] not in VALUES:
            raise Problem(f"{path}, line {number}: Blond_Hair is {fields[blond]!r}, Male "
                          f"{fields[male]!r}, where 1 or -1 is meant.")
        attributes[fields[0]] = VALUES[fields[blond]], VALUES[fields[male]]
    if not attributes:
        raise Problem(f"{path} names no images: {SOURCE}.")
    return attributes


def read_partition(path: Path) -> dict[str, str]:
    """The split of every image."""
    if not path.is_file():
        raise Problem(f"{path} does not exist: {SOURCE}.")
    partition = {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        fields = line.split()
        if len(fields) != 2 or fields[1] not in SPLITS:
            raise Problem(f"{path}, line {number}: {line[:60]!r} is not a file and 0 (training), 1 "
                          "(validation) or 2 (test).")
        partition[fields[0]] = SPLITS[fields[1]]
    return partition


CLASSES, SEXES = ("not blond", "blond"), ("female", "male")
teacher_train = Train(epochs=50, batch_size=128, lr=1e-3, weight_decay=1e-4)
train = Train(epochs=20, batch_size=100, lr=1e-3, schedule="cosine", weight_decay=1e-4)

recipe = replace(
    waterbirds,
    data=Data(reader=read, size=256, crop=224, class_names=CLASSES, attribute_names=SEXES),
    teachers=replace(waterbirds.teachers, train=teacher_train),
    students={name: replace(each, train=train) for name, each in waterbirds.students.items()},
    published={
        "teachers, ERM": {"mean": 95.4, "wga": 37.5},
        "teachers, DFR": {"mean": 93.7, "wga": 90.1},
        "one-hot": {"mean": 95.5, "wga": 32.3},
        "one-hot-dfr": {"mean": 92.3, "wga": 88.9},
        "random": {"mean": 92.5, "wga": 85.1},
        "average": {"mean": 92.4, "wga": 83.4},
        "ae-kd": {"mean": 92.3, "wga": 87.5},
        "agre": {"mean": 91.7, "wga": 91.9, "wga_std": 0.7},
    },
)
table = replace(waterbirds.data, class_names=CLASSES, attribute_names=SEXES)
recipes = {"metadata": replace(recipe, data=table)}

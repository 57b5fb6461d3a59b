"""ConfiG on CelebA: no blond men in training, images of Stable Diffusion that teachers know.

    python grokd.py run celeba_config --root FOLDER --precision bfloat16 --dry-run
    python grokd.py run celeba_config --root FOLDER --precision bfloat16        # SD 1.5
    python grokd.py run celeba_config:turbo --root FOLDER --precision bfloat16  # SD-Turbo

What ConfiG (Popp, Laube, Hein, Schott 2025) reports of CelebA: hair is to be told, sex is not to be
leaned on, and a group is absent from training. Its full text was not at hand; published figures are
second-hand: WGA of the teacher 66.7, KD 15.2, CutMix + KD 38.9, ConfiG 66.1. That blond men are
what is absent is our reading: they are the rarest group by far (1,387 of 162,770).

FOLDER holds CelebA's aligned images and metadata.csv beside them, a row an image:

    img_filename,y,place,split
    000001.jpg,0,0,0

y       1: blond (attribute Blond_Hair), 0: not
place   1: male (attribute Male), 0: not; the name that group-robustness code has for it
split   0, 1, 2 for training, validation, test (list_eval_partition)

Images and attributes are CelebA's (Liu et al. 2015, mmlab.ie.cuhk.edu.hk/projects/CelebA.html, for
research alone). ImageNet weights are torchvision's, generators come from the Hugging Face hub or a
folder (field `generator`), with the extra `sd`: all are fetched once.

The teachers' trunks see no blond man either; half of the validation images, 91 blond men among
them, refit their heads (DFR). Students: KD on soft labels alone, KD with as many unguided images,
with ConfiG's, with ConfiG's rebalanced by TAB, and with CutMix. All are trained anew, alike long;
ConfiG's trains on: that is Distill(start="kd").

Hardware: meant for one GPU of 80 GB, with 31 GB of disk for the store; not run by us, no GPU was at
hand. --dry-run measures there what it takes. By far the most goes to guided images of Stable
Diffusion 1.5: 20 iterations of 20 steps, each with a prompt and without, forward, forward again and
backward, are some 3,000 UNet passes an image. SD-Turbo, of one step, needs some 150 for the 50
iterations that ReNO takes.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from grokd import (
    Augment,
    BiasModel,
    Data,
    Distill,
    Eval,
    Recipe,
    Row,
    Teachers,
    Train,
    read_rows,
)

table = Data(
    image_column="img_filename",
    label_column="y",
    attribute_column="place",
    split_codes=("0", "1", "2"),
    class_names=("person with dark hair", "person with blond hair"),  # the prompts name them so
    attribute_names=("female", "male"),
)
ABSENT = (1, 1)  # blond men


def read(root: Path) -> Sequence[Row]:
    """Rows of the table without the training images of the absent group."""
    rows = read_rows(table, str(root))
    return [row for row in rows if row.split != "train" or (row.label, row.attribute) != ABSENT]


data = replace(
    table,
    reader=read,
    geometry="shorter_side",  # the middle 178 x 178 at 224, as the published evaluation has it
    size=224,
    crop=224,
)
train = Train(epochs=20, batch_size=100, lr=3e-3, schedule="cosine", weight_decay=1e-4)
student_train = replace(train, lr=1e-3)
kd = Distill(weighting="average", alpha=1.0, tau=1.0, arch="resnet18", train=student_train)

# From noise alone: of a partly noised image sex would stay, and it is to change.
stable_diffusion = Augment(
    student="kd",
    generator="stable-diffusion-v1-5/stable-diffusion-v1-5",
    prompt="a photo of the face of a {}",
    steps=20,
    strength=1.0,
    guidance_scale=3.0,
    step_size=0.05,
    iterations=20,
    count=1000,
    balanced=True,
    in_flight=32,
)
turbo = replace(  # one step on its own schedule, optimised as ReNO does
    stable_diffusion,
    generator="stabilityai/sd-turbo",
    scheduler="",
    steps=1,
    guidance_scale=1.0,
    optimizer="nesterov",
    step_size=5.0,
    norm="regularise",
    iterations=50,
    count=4000,
)


def with_sets(config: Augment) -> Recipe:
    """The recipe with one generator's guided and unguided images."""
    return Recipe(
        data=data,
        teachers=Teachers(num_teachers=3, arch=("resnet50",), weights=("DEFAULT",), train=train),
        bias_model=BiasModel(kind="teacher", teacher=0),
        augments={"config": config, "unguided": replace(config, guided=False, like="config")},
        students={
            "kd": kd,
            "kd-cutmix": replace(kd, train=replace(kd.train, mix="cutmix")),
            "kd-unguided": replace(kd, augmented="unguided"),
            "kd-config": replace(kd, augmented="config"),
            "helper": replace(kd, weighting="one-hot", augmented="config"),
            "kd-config-tab": replace(kd, augmented="config", rebalance="tab", helper="helper"),
        },
        eval=Eval(baseline="kd"),
        published={
            "teachers, DFR": {"wga": 66.7},
            "kd": {"wga": 15.2},
            "kd-cutmix": {"wga": 38.9},
            "kd-config": {"wga": 66.1},
        },
    )


recipe = with_sets(stable_diffusion)
recipes = {"turbo": with_sets(turbo)}

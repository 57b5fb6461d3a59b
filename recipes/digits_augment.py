"""ConfiG on the digits: images on which the teachers are sure and the student is wrong.

    python grokd.py run digits_augment --seeds 0

The data of recipes/digits.py. `augment` trains a small diffusion model on the training images,
then looks for images that refitted teachers recognise and the student `kd` does not; students train
on them, on as many plain images of the same generator, with CutMix, with TAB, or with several of
these. At most a quarter of an hour for one seed on two cores.

Students learn from labels and teachers in equal parts, at temperature 1. From softened teachers
alone (`kd-soft`) a student of these data comes so close to its teachers that little is left to
mend; `kd-soft-config` shows what is.
"""

from dataclasses import replace

from digits import recipe as digits
from digits import student

from grokd import Augment, Diffusion, Eval

soft = replace(student, weighting="average")
kd = replace(soft, alpha=0.5, tau=1.0)
helper = replace(student, weighting="one-hot")
# Starting from noise alone lets the background change; a partly noised image keeps its colour.
config = Augment(student="kd", strength=1.0, step_size=0.05, noise=0.1, realism=0.97, share=0.6)

recipe = replace(
    digits,
    diffusion=Diffusion(epochs=200, widths=(32, 64, 64)),
    augments={
        "config": config,
        "unguided": replace(config, guided=False, like="config"),
    },
    students={
        "kd": kd,
        "kd-soft": soft,
        "kd-cutmix": replace(kd, train=replace(kd.train, mix="cutmix")),
        "kd-unguided": replace(kd, augmented="unguided"),
        "kd-config": replace(kd, augmented="config"),
        "kd-soft-config": replace(soft, augmented="config"),
        "kd-tab": replace(kd, rebalance="tab"),
        "helper": replace(helper, augmented="config"),
        "kd-config-tab": replace(kd, augmented="config", rebalance="tab", helper="helper"),
    },
    eval=Eval(baseline="kd"),
)

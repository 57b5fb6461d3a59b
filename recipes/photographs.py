"""Photographs on a CPU: Waterbirds in small, MobileNetV2 from ImageNet weights.

    python grokd.py run photographs --root FOLDER

FOLDER has the layout of the released Waterbirds (its metadata.csv beside the images). The folder
you start from holds mobilenet_v2_imagenet.safetensors, a state dict of torchvision's mobilenet_v2
whose pixels are normalised by mean .5 and standard deviation .5; for torchvision's own weights give
`weights="DEFAULT"` and leave `mean` and `std` out. 97 px is a size that this network takes exactly
(32 k + 1), and with six epochs the teachers are asked about six views, once for all students.

Every student is reported with the head it learnt and with a refitted one (one training);
"imagenet-dfr" is a refitted head on features that saw no photograph of the data. With .4 and .2 of
the teachers refitted one sees what a weighting makes of biased ones. Two ensembles, three seeds
each:

    python recipes/measured/ensembles.py photographs --seeds 0 10 --students 3 --root FOLDER

Students' learning rate was chosen among three with another ensemble, on the selection part:

    python recipes/measured/ensembles.py photographs:tries --seeds 100 --root FOLDER

Measured: measured/photographs.md.
"""

from dataclasses import replace

from waterbirds import recipe as waterbirds

from grokd import DFR, Distill, Eval, Input, Teachers, Train

WEIGHTS = "mobilenet_v2_imagenet.safetensors"
pixels = Input(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
train = Train(epochs=6, batch_size=32, lr=3e-3, schedule="cosine", weight_decay=1e-4)
dfr = DFR(method="l1")
# 1e-3 of 1e-3, 3e-3 and 1e-2 (see above): best under refitted heads whatever the weighting.
student = Distill(
    arch="mobilenet_v2", weights=WEIGHTS, input=pixels, dfr=dfr, train=replace(train, lr=1e-3)
)

TRIED = ("one-hot", "average", "agre")
weightings = {
    "average": replace(student, weighting="average"),
    "agre": student,
    "departure": replace(student, weighting="departure"),
}
trained = {
    "one-hot": replace(student, weighting="one-hot"),
    **weightings,
    "ae-kd": replace(student, weighting="ae-kd"),
    "agre-batch": replace(student, space="batch"),
    "agre-shrink0.5": replace(student, shrink=0.5),
    "departure-features": replace(student, weighting="departure", gamma=(0.5,)),
}
for share in (0.4, 0.2):
    for name, weighted in weightings.items():
        trained[f"{name}-{share}"] = replace(weighted, dfr_share=share)
refitted = {f"{name}-dfr": replace(each, head="dfr") for name, each in trained.items()}
untrained = replace(student, weighting="one-hot", head="dfr", train=replace(train, epochs=0))

recipe = replace(
    waterbirds,
    data=replace(waterbirds.data, size=112, crop=97),
    teachers=Teachers(
        arch=("mobilenet_v2",), weights=(WEIGHTS,), dfr=dfr, input=pixels, train=train
    ),
    students={**trained, **refitted, "imagenet-dfr": untrained},
    eval=Eval(baseline="average"),
    published={},
)
recipes = {
    "photographs": recipe,
    "tries": replace(
        recipe,
        students={
            f"{name}-lr{lr}": replace(each, train=replace(train, lr=lr))
            for lr in (1e-3, 3e-3, 1e-2)
            for students in (trained, refitted)
            for name, each in students.items() if name.removesuffix("-dfr") in TRIED
        },
        eval=Eval("selection"),
    ),
}

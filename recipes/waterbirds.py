"""Waterbirds with the settings of the AGRE-KD paper: 10 ResNet-50 teachers, ResNet-18 students.

    python grokd.py run waterbirds --root waterbird_complete95_forest2water2
    accelerate launch --mixed_precision bf16 grokd.py run waterbirds --root ...   # several GPUs

The folder is the released one (https://github.com/kohpangwei/group_DRO#waterbirds), with its
metadata.csv (img_filename, y, place, split ...) beside the folders of the species. ImageNet weights
are torchvision's, which it downloads once. Not run by us: no GPU was at hand. Fewer teachers:
--teachers.num-teachers 5.

A trial in a minute or two on a CPU, on a SMALL folder of the same layout (we tried it on 2,889 of
the photographs), with WEIGHTS a MobileNetV2's for pixels in -1..1:

    python grokd.py run waterbirds --root SMALL --data.size 74 --data.crop 65 --seeds 0 \
        --teachers.num-teachers 2 --teachers.arch mobilenet_v2 --teachers.weights WEIGHTS \
        --teachers.mean .5 .5 .5 --teachers.std .5 .5 .5 --teachers.epochs 1 --teachers.lr 3e-3 \
        --student average agre --distill.arch mobilenet_v2 --distill.weights WEIGHTS \
        --distill.mean .5 .5 .5 --distill.std .5 .5 .5 --distill.epochs 1 --distill.lr 3e-3

The paper's figures (Table 2; mean / WGA), printed by `eval` beside one's own:

    teachers ERM 85.7 / 65.6        DFR 94.2 / 90.9
    one-hot 83.8 / 54.1             one-hot + DFR head 91.4 / 86.7
    Random 89.6 / 77.3              AVER 90.8 / 82.9 +- 1.2
    AE-KD 90.9 / 85.0 +- 1.2        AGRE 91.3 / 87.9 +- 1.2

Epochs of the students are not told in the paper; 100 is its framework's default. Its teachers'
heads are refitted by SGD with group-balanced batches (LaBonte et al. 2023), on half of validation.
"""

from dataclasses import replace

from grokd import DFR, BiasModel, Data, Distill, Eval, Recipe, Teachers, Train

data = Data(
    metadata="metadata.csv",
    image_column="img_filename",
    label_column="y",
    attribute_column="place",
    split_column="split",
    split_codes=("0", "1", "2"),
    class_names=("landbird", "waterbird"),
    attribute_names=("land", "water"),
    size=256,  # Resize((256, 256)), then the centre 224: the published evaluation
    crop=224,
)
dfr = DFR(method="sgd")
teachers = Teachers(
    num_teachers=10,
    arch=("resnet50",),
    weights=("DEFAULT",),
    dfr=dfr,
    train=Train(epochs=100, batch_size=32, lr=1e-3, weight_decay=1e-3),
)
student = Distill(
    arch="resnet18",
    dfr=dfr,
    train=Train(epochs=100, batch_size=32, lr=1e-3, schedule="cosine", weight_decay=1e-4),
)

recipe = Recipe(
    data=data,
    teachers=teachers,
    bias_model=BiasModel(kind="teacher", teacher=0),
    students={
        "one-hot": replace(student, weighting="one-hot"),
        "one-hot-dfr": replace(student, weighting="one-hot", head="dfr"),
        "random": replace(student, weighting="random"),
        "average": replace(student, weighting="average"),
        "ae-kd": replace(student, weighting="ae-kd"),
        "agre": student,
    },
    eval=Eval(baseline="average"),
    published={
        "teachers, ERM": {"mean": 85.7, "wga": 65.6},
        "teachers, DFR": {"mean": 94.2, "wga": 90.9},
        "one-hot": {"mean": 83.8, "wga": 54.1},
        "one-hot-dfr": {"mean": 91.4, "wga": 86.7},
        "random": {"mean": 89.6, "wga": 77.3},
        "average": {"mean": 90.8, "wga": 82.9, "wga_std": 1.2},
        "ae-kd": {"mean": 90.9, "wga": 85.0, "wga_std": 1.2},
        "agre": {"mean": 91.3, "wga": 87.9, "wga_std": 1.2},
    },
)

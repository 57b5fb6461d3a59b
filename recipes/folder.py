"""Your own images with a metadata.csv: the recipe to copy.

    cp recipes/folder.py recipes/mine.py                 # edit it, then
    python grokd.py run mine --root FOLDER

FOLDER holds the images, in any folders below it, and metadata.csv with a header and one row an
image:

    image,label,attribute,split
    cats/0001.jpg,cat,indoors,train
    dogs/0017.jpg,dog,outdoors,train
    cats/0002.jpg,cat,outdoors,val

image      file, relative to the folder of metadata.csv; anything Pillow reads
label      what the student must tell: names, or numbers from 0
attribute  what it must not lean on (background, camera, sex ...): names, or numbers from 0. It may
           be empty in train, where hardly anything needs it. Leave the column out and set
           attribute_column="" if you do not know it at all: groups are then classes, and refitting
           a head balances classes (CB-LLR), or, with dfr=DFR(groups="inferred"), what the biased
           model gets right and wrong
split      train, val or test. Groups (label x attribute) may be rare or absent in train; val needs
           at least 4 images of each, a few dozen make a good head; test decides what you can claim

Other column names or codes are fields of Data. The released Waterbirds metadata.csv, for one:

    Data(image_column="img_filename", label_column="y", attribute_column="place",
         split_column="split", split_codes=("0", "1", "2"),
         class_names=("landbird", "waterbird"), attribute_names=("land", "water"))

The training settings below are those of the AGRE-KD paper for Waterbirds (ResNet-50 teachers,
ResNet-18 student, ImageNet weights, which torchvision downloads once); a GPU is advisable.
"""

from dataclasses import replace

from grokd import DFR, BiasModel, Data, Distill, Recipe, Teachers, Train

data = Data(metadata="metadata.csv", size=256, crop=224)

student = Distill(
    arch="resnet18",
    weights="DEFAULT",  # ImageNet's, by torchvision; "random", or a file of your own
    weighting="agre",
    tau=4.0,
    train=Train(epochs=100, batch_size=32, lr=1e-3, schedule="cosine", weight_decay=1e-4),
)

recipe = Recipe(
    data=data,
    teachers=Teachers(
        num_teachers=5,
        arch=("resnet50",),  # several architectures are dealt out in turn
        weights=("DEFAULT",),
        dfr=DFR(),
        train=Train(epochs=100, batch_size=32, lr=1e-3, weight_decay=1e-3),
    ),
    bias_model=BiasModel(kind="teacher", teacher=0),
    students={
        "one-hot": replace(student, weighting="one-hot"),
        "one-hot-dfr": replace(student, weighting="one-hot", head="dfr"),
        "average": replace(student, weighting="average"),
        "average-dfr": replace(student, weighting="average", head="dfr"),  # trained once for both
        "agre": student,
        "departure": replace(student, weighting="departure"),
    },
    seeds=(0, 1, 2),
)

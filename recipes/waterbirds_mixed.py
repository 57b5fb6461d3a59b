"""Waterbirds with the AGRE-KD paper's mixed ensemble: 3 ViT-B, 3 ResNet-50, 3 ConvNeXtV2-B.

    uv run --extra timm grokd.py run waterbirds_mixed --root waterbird_complete95_forest2water2

The folder is the released one. ImageNet weights come from torchvision, those of ConvNeXtV2 from
timm, a gigabyte in all, downloaded once. Not run by us: no GPU was at hand. By estimate, on one
A100 in bfloat16: three hours for the teachers, half an hour to ask them about every view (their
logits are then on disk), ten minutes a student; 16 GiB of GPU memory, batches of 32.

The paper does not tell which of the many ViT-B and ConvNeXtV2-B weights it took, nor how they were
trained: theirs are torchvision's and timm's default ones here, all nine are trained as ResNet-50
is. If a transformer's loss does not fall, give it AdamW and a lower rate: the three then come from
a run of their own, as files, by `finished` (recipes/README.md). The biased model is a ResNet-50, as
there.
"""

from dataclasses import replace

from waterbirds import recipe as waterbirds

from grokd import BiasModel

recipe = replace(
    waterbirds,
    teachers=replace(
        waterbirds.teachers,
        num_teachers=9,
        arch=("resnet50", "vit_b_16", "timm:convnextv2_base"),  # dealt out in turn
    ),
    bias_model=BiasModel(kind="teacher", teacher=0),
    published={},
)

"""Every weighting and setting of distillation on the digits: an ablation that a CPU can carry.

    python grokd.py run digits_ablation

The data, teachers and students of recipes/digits.py, and one dictionary of students. `eval` prints
each student beside AVER, seed by seed, and draws curves.png: worst-group accuracy over gamma, tau,
alpha, the number of teachers and the share of them that are refitted.

Students of one ensemble share what its teachers learnt, so the table of recipes/measured/digits.md
has an ensemble for every seed: python recipes/measured/ensembles.py digits_ablation. An ensemble
takes 12 to 32 minutes on two busy cores.
"""

from dataclasses import replace

from digits import recipe as digits
from digits import student

from grokd import Eval

average = replace(student, weighting="average")
layers = ("layer2", "layer2=layer3", "pooled")

recipe = replace(
    digits,
    students={
        **digits.students,
        **{w: replace(student, weighting=w) for w in ("random", "ae-kd", "eb-kd", "ca-mkd")},
        "agre-batch": replace(student, space="batch"),
        "agre-drop": replace(student, zero="drop"),
        "agre-unnormalised": replace(student, normalise=False),
        "average-logits": replace(average, combine="logits"),
        **{f"agre-shrink{s}": replace(student, shrink=s) for s in (0.25, 0.5, 0.75)},
        **{f"agre-tau{t}": replace(student, tau=float(t)) for t in (1, 2, 8, 10)},
        **{f"agre-alpha{a}": replace(student, alpha=a) for a in (0.1, 0.3, 0.5, 0.7, 0.9)},
        **{f"agre-{n}-teachers": replace(student, num_teachers=n) for n in (1, 2, 3)},
        **{f"average-{n}-teachers": replace(average, num_teachers=n) for n in (1, 2, 3)},
        **{f"agre-dfr{s}": replace(student, dfr_share=s) for s in (0.0, 0.4, 0.8)},
        **{f"average-dfr{s}": replace(average, dfr_share=s) for s in (0.0, 0.4, 0.8)},
        **{f"agre-gamma{g}": replace(student, gamma=(g,)) for g in (0.25, 0.5, 1.0)},
        **{f"agre-features-agre{g}": replace(student, gamma=(g,), feature_weights="agre")
           for g in (0.25, 0.5, 1.0)},
        **{f"average-gamma{g}": replace(average, gamma=(g,)) for g in (0.25, 0.5, 1.0)},
        "agre-features-agree": replace(student, gamma=(0.5,), feature_weights="agree",
                                       adapters="shared"),
        "agre-features-disagree": replace(student, gamma=(0.5,), feature_weights="disagree"),
        "agre-layers": replace(student, layers=layers, gamma=(0.1, 0.15, 0.25)),
        "agre-attention": replace(student, layers=("layer2",), gamma=(1000.0,),
                                  feature_loss="attention"),
        "agre-contrastive": replace(student, gamma=(0.8,), feature_loss="contrastive"),
        "average-cutmix": replace(average, train=replace(average.train, mix="cutmix")),
        "average-mixup": replace(average, train=replace(average.train, mix="mixup")),
    },
    eval=Eval(baseline="average", probes=True),
)

"""Where weighting the teachers pays: from no refitted teacher to all of them, on the digits.

    python grokd.py run where_it_pays

The data, teachers and students of recipes/digits.py. Of the five teachers none, one, two ... or
all have a refitted head; the others are as biased as the biased model. Six weightings learn from
every such ensemble, and each of its students is reported with the head it learnt and with a
refitted one (trained once). `where_it_pays:bad-teacher` has all refitted, for a run in which one
teacher was spoilt.

Students of one ensemble share what its teachers learnt, so the published table has an ensemble for
every seed; settings are those of the digits recipe:

    python recipes/measured/ensembles.py where_it_pays --seeds 200 210 220 230 240 \\
        --save recipes/measured/where_it_pays.json
    python recipes/measured/gains.py summary

`where_it_pays:rules` has other rules for what a teacher's merit, its departure where it is right
times its skill, makes of its weight. Departure's former one was chosen among them by the selection
part, with other seeds than the table's:

    python recipes/measured/ensembles.py where_it_pays:rules --seeds 100 110 120 \\
        --save recipes/measured/where_it_pays_rules.json

`where_it_pays:twenty` is AVER, AGRE and departure alone with one, two and all of five refitted, on
twenty ensembles that were fixed beforehand, since five do not tell the latter two apart; and on
ten more, fixed after departure's rule was settled with the former ones:

    python recipes/measured/ensembles.py where_it_pays:twenty --seeds $(seq 300 10 490) \\
        --save recipes/measured/where_it_pays_twenty.json
    python recipes/measured/gains.py differences --of where_it_pays_twenty
    python recipes/measured/ensembles.py where_it_pays:twenty --seeds $(seq 500 10 590) \\
        --save recipes/measured/where_it_pays_fresh.json
    python recipes/measured/gains.py differences --of where_it_pays_fresh

`where_it_pays:colored_mnist` is the same on coloured MNIST, 98 % aligned, with three shares:

    python recipes/measured/ensembles.py where_it_pays:colored_mnist --seeds 30 40 50 \\
        --root FOLDER --save recipes/measured/where_it_pays_colored_mnist.json
    python recipes/measured/gains.py summary --of where_it_pays_colored_mnist

`where_it_pays:colored_mnist_fresh` is AVER, AGRE and departure alone there, with two of five
refitted, on ensembles fixed after departure's rule was settled:

    python recipes/measured/ensembles.py where_it_pays:colored_mnist_fresh --seeds 60 70 \\
        --root FOLDER --save recipes/measured/where_it_pays_colored_mnist_fresh.json
    python recipes/measured/gains.py differences --of where_it_pays_colored_mnist_fresh
"""

from dataclasses import replace

import torch
from colored_mnist import recipe as colored_mnist
from digits import recipe as digits

from grokd import Batch, Distill, Ensemble, Eval, agre_weights

SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def proportional(student: torch.Tensor, ensemble: Ensemble, batch: Batch) -> torch.Tensor:
    """Weights in proportion to merit."""
    assert ensemble.departures is not None
    merit = ensemble.departures.merit.to(student.device)
    return merit[:, None].expand(ensemble.teachers.shape[:2])


def root(student: torch.Tensor, ensemble: Ensemble, batch: Batch) -> torch.Tensor:
    """The root of merit, of those that departure keeps."""
    assert ensemble.departures is not None
    merit, kept = ensemble.departures.merit, ensemble.departures.weights > 0
    return (merit.sqrt() * kept).to(student.device)[:, None].expand(ensemble.teachers.shape[:2])


def then_agre(student: torch.Tensor, ensemble: Ensemble, batch: Batch) -> torch.Tensor:
    """AGRE, half shrunk to equal weights, of those that departure keeps."""
    assert ensemble.departures is not None and ensemble.biased is not None
    kept = (ensemble.departures.weights > 0).to(student.device)
    agre = agre_weights(student, ensemble.teachers, ensemble.biased, batch.settings.tau)
    return kept[:, None] * (0.5 * agre + 0.5)


def students(student: Distill, shares: tuple[float, ...]) -> dict[str, Distill]:
    """One-hot, and every weighting with every share of refitted teachers; under both heads."""
    weightings = {
        "average": replace(student, weighting="average"),
        "agre": student,
        "agre-shrink0.5": replace(student, shrink=0.5),
        "departure": replace(student, weighting="departure"),
        "ca-mkd": replace(student, weighting="ca-mkd"),
        "ae-kd": replace(student, weighting="ae-kd"),
    }
    plain = {"one-hot": replace(student, weighting="one-hot")}
    for share in shares:
        for name, weighted in weightings.items():
            plain[f"{name}-{share}"] = replace(weighted, dfr_share=share)
    refitted = {f"{name}-dfr": replace(each, head="dfr") for name, each in plain.items()}
    return plain | refitted


def rules(student: Distill) -> dict[str, Distill]:
    """Rules to choose among, with some shares of refitted teachers."""
    weightings = {
        "average": replace(student, weighting="average"),
        "agre": student,
        "departure": replace(student, weighting="departure"),
        "proportional": replace(student, weighting=proportional),
        "root": replace(student, weighting=root),
        "then-agre": replace(student, weighting=then_agre),
    }
    return {
        f"{name}-{share}": replace(weighted, dfr_share=share)
        for share in (0.2, 0.4, 0.6, 1.0) for name, weighted in weightings.items()
    }


def three(student: Distill, shares: tuple[float, ...]) -> dict[str, Distill]:
    """AVER, AGRE and departure alone, with the heads they learn."""
    every = students(student, shares)
    names = [f"{name}-{share}" for share in shares for name in ("average", "agre", "departure")]
    return {name: every[name] for name in names}


recipe = replace(
    digits,
    students=students(digits.students["agre"], SHARES),
    eval=Eval(baseline="average-1.0"),
)
of_colored_mnist = replace(
    colored_mnist,
    students=students(colored_mnist.students["agre"], (0.0, 0.4, 1.0)),
    eval=Eval(baseline="average-1.0"),
)
recipes = {
    "digits": recipe,
    "rules": replace(
        recipe, students=rules(digits.students["agre"]), eval=Eval("selection", "average-1.0")
    ),
    "twenty": replace(recipe, students=three(digits.students["agre"], (0.2, 0.4, 1.0))),
    "bad-teacher": replace(recipe, students=students(digits.students["agre"], (1.0,))),
    "colored_mnist": of_colored_mnist,
    "colored_mnist_fresh": replace(
        of_colored_mnist,
        students=three(colored_mnist.students["agre"], (0.4,)),
        eval=Eval(baseline="average-0.4"),
    ),
}

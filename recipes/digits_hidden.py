"""The digits without any group label: heads refitted on inferred groups, by AFR, or by class.

    python grokd.py run digits_hidden           # groups: is the biased model right?
    python grokd.py run digits_hidden:eiil      # groups: EIIL's split of its logits

The data, teachers and students of recipes/digits.py; the colour of the background is hidden from
everything but the eye and `known`. Heads of the teachers and of the student `one-hot-dfr` are
refitted in the way that the variant's name says: `inferred` (also without a name), `eiil`, `afr`,
`classes` (only classes are balanced), or `known` (colours are known, and balanced: DFR). The report
scores students over inferred groups, of `known` over the true ones, and recommends one by them. How
the others do on the true groups is measured by

    python recipes/measured/inferred.py
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from digits import read
from digits import recipe as digits

from grokd import DFR, Recipe, Row

HEADS = {
    "inferred": DFR(groups="inferred"),
    "eiil": DFR(groups="eiil"),
    "afr": DFR(method="afr"),
    "classes": DFR(),
    "known": DFR(),
}


def read_hidden(root: Path) -> Sequence[Row]:
    """The digits' rows, all of one attribute."""
    return [row._replace(attribute=0) for row in read(root)]


def refitted(head: str) -> Recipe:
    """The recipe whose heads are refitted in one way."""
    dfr = HEADS[head]
    data = replace(digits.data, reader=read_hidden, attribute_names=())
    names = ("one-hot", "one-hot-dfr", "average")
    return replace(
        digits,
        data=digits.data if head == "known" else data,
        teachers=replace(digits.teachers, dfr=dfr),
        students={name: replace(digits.students[name], dfr=dfr) for name in names},
    )


recipes = {head: refitted(head) for head in HEADS}
recipe = recipes["inferred"]

"""The source as a stranger meets it: order, sizes, and settings that explain themselves."""

import ast
import importlib.util
import re
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

import grokd

SOURCE = (ROOT / "grokd.py").read_text()
TREE = ast.parse(SOURCE)
RULER = re.compile(r"# ---- (.+?) -+")
SECTIONS = {
    number: match[1]
    for number, line in enumerate(SOURCE.splitlines(), 1)
    if (match := RULER.fullmatch(line))
}


def section_at(line: int) -> int:
    """Place of the section that a line stands in; -1 above the first."""
    return sum(start <= line for start in SECTIONS) - 1


def definitions() -> dict[str, int]:
    """The section of every name that the file defines."""
    places = {}
    for node in TREE.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            places[node.name] = section_at(node.lineno)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                places |= {n.id: section_at(n.lineno) for n in ast.walk(target)
                           if isinstance(n, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            places[node.target.id] = section_at(node.lineno)
    return places


class Uses(ast.NodeVisitor):
    """Names that code uses, those of a function's own and annotations aside."""

    def __init__(self) -> None:
        self.found: list[tuple[str, int]] = []
        self.local: list[set[str]] = []

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for default in [*node.args.defaults, *node.args.kw_defaults, *node.decorator_list]:
            if default:
                self.visit(default)
        names = {argument.arg for argument in node.args.args}
        names |= {n.id for n in ast.walk(node)
                  if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        self.local.append(names)
        for statement in node.body:
            self.visit(statement)
        self.local.pop()

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value:
            self.visit(node.value)

    def visit_Name(self, node: ast.Name) -> None:
        if not any(node.id in names for names in self.local):
            self.found.append((node.id, node.lineno))


def functions() -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef))


def test_docstring_is_a_map_of_the_file() -> None:
    _, _, lines = (grokd.__doc__ or "").partition("Map of this file")
    shown = re.findall(r"^    (\S.*?)  +\S", lines, re.MULTILINE)
    assert shown == list(SECTIONS.values())


def test_no_section_uses_a_later_one() -> None:
    places, uses = definitions(), Uses()
    uses.visit(TREE)
    back = {f"{name}, line {line}" for name, line in uses.found
            if name in places and section_at(line) < places[name]}
    assert not back
    assert len([name for name, _ in uses.found if name in places]) > 500  # it sees something


def test_heart_of_the_method_stands_in_the_first_sixth() -> None:
    node = next(node for node in functions() if node.name == "agre_weights")
    assert node.end_lineno and node.end_lineno < len(SOURCE.splitlines()) / 6


def test_functions_are_short_and_take_few_parameters() -> None:
    for node in functions():
        assert node.end_lineno
        assert node.end_lineno - node.lineno < 90, node.name
        arguments = [a.arg for a in [*node.args.args, *node.args.kwonlyargs]]
        assert len([a for a in arguments if a != "self"]) <= 7, node.name


def test_weights_are_three_calls_from_a_students_job() -> None:
    """student_job, distillation, a weighting of the table, agre_weights."""
    called = {
        node.name: {n.func.id for n in ast.walk(node)
                    if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        for node in functions()
    }
    assert "student_job" in called["distill"]
    assert "distillation" in called["student_job"]
    assert "weigh" in called["distillation"]
    assert grokd.WEIGHTINGS["agre"] is grokd.agre
    assert "agre_weights" in called["agre"]


def test_no_document_is_named_that_is_not_here() -> None:
    for path in [ROOT / "grokd.py", *(ROOT / "recipes").rglob("*.py"), *ROOT.glob("tests/*.py")]:
        if path.name != Path(__file__).name:
            assert not re.search(r"METHODS|DESIGN\.md|STYLE\.md", path.read_text()), path


# A field says itself when it matters


@pytest.fixture
def extended() -> Iterator[types.ModuleType]:
    """grokd with three more fields in Distill, and nothing else changed."""
    field = "    # Head of the finished student:"
    assert SOURCE.count(field) == 1
    more = (
        "    # agre: how sharp its weights are.\n"
        '    sharpness: Annotated[Positive, When(weighting="agre"), Mark.CURVE] = 1.0\n'
        "    # Workers that sharpen, which change nothing.\n"
        "    sharpeners: Annotated[Count, Mark.INERT] = 1\n"
        "    # Sharpening of features, of squared distances alone.\n"
        "    feature_sharpness: Annotated[\n"
        '        NotNegative, When(gamma=any), Needs(feature_loss="mse")\n'
        "    ] = 0.0\n"
    )
    spec = importlib.util.spec_from_loader("grokd_extended", loader=None)
    assert spec
    module = importlib.util.module_from_spec(spec)
    module.__file__ = str(ROOT / "grokd.py")
    sys.modules["grokd_extended"] = module
    kept = sys.modules["grokd"]
    exec(compile(SOURCE.replace(field, more + field), "grokd.py", "exec"), module.__dict__)
    sys.modules["grokd"] = module  # recipes import the extended one
    yield module
    sys.modules["grokd"] = kept
    del sys.modules["grokd_extended"]
    for name in [name for name in sys.modules if name in ("digits", "recipe_digits")]:
        del sys.modules[name]


def flagged(module: Any, *args: str) -> tuple[Any, dict[str, Any]]:
    """The recipe digits with flags of distill, and its students."""
    recipe = module.load_recipe("digits")
    changed, _, _ = module.apply_flags("distill", recipe, "digits", args)
    return changed, changed.students


def test_new_field_enters_fingerprints_only_where_it_matters(extended: Any) -> None:
    agre = extended.Distill()
    assert extended.settings_of(agre)["sharpness"] == 1.0
    assert "sharpness" not in extended.settings_of(replace(agre, weighting="average"))
    assert "sharpeners" not in extended.settings_of(agre)
    assert "feature_sharpness" not in extended.settings_of(agre)
    features = replace(agre, gamma=(0.5,))
    assert extended.settings_of(features)["feature_sharpness"] == 0.0


def test_new_field_names_outputs_and_warns_where_it_has_no_effect(
    extended: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    _, students = flagged(extended, "--sharpness", "2", "--sharpeners", "4")
    assert list(students) == [
        "one-hot", "one-hot-dfr", "average", "agre+sharpness=2.0", "departure"]
    assert "warning" not in capsys.readouterr().out
    _, students = flagged(extended, "--student", "average", "--sharpness", "2")
    assert list(students) == ["average"]
    assert ("warning: sharpness has no effect on average: it belongs to weighting agre."
            in capsys.readouterr().out)


def test_new_field_is_refused_where_it_has_no_sense(extended: Any) -> None:
    told = r"students\['.*'\]: feature_sharpness belongs to feature_loss mse"
    args = ["--student", "agre", "--feature-sharpness", "1", "--feature-loss", "attention"]
    with pytest.raises(extended.Problem, match=told):
        flagged(extended, *args, "--gamma", "1", "--layers", "layer2")


def test_new_field_draws_curves(extended: Any) -> None:
    recipe = extended.load_recipe("digits")
    agre = recipe.students["agre"]
    students = {f"s{x}": replace(agre, sharpness=x) for x in (1.0, 2.0, 3.0)}
    lines = extended.curves(replace(recipe, students=students))
    assert [(line["field"], [x for x, _ in line["points"]]) for line in lines] == [
        ("sharpness", [1.0, 2.0, 3.0])]


def test_conditions_follow_from_each_other() -> None:
    """feature_space matters with feature_weights agre, these with gamma, that with teachers."""
    student = grokd.Distill(gamma=(0.5,), feature_weights="agre")
    assert grokd.matters(student, "feature_space")
    for change in ({"gamma": (0.0,)}, {"weighting": "one-hot"}, {"feature_weights": "uniform"},
                   {"feature_loss": "attention"}):
        assert not grokd.matters(replace(student, **change), "feature_space")


def test_weightings_of_the_table_are_those_of_the_recipe() -> None:
    import typing

    assert {*grokd.WEIGHTINGS, "one-hot"} == set(typing.get_args(grokd.WeightingName))

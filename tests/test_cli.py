"""The command line as a person meets it: help, and one line for every mistake."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import Run

import grokd
from grokd import Problem


def recipe(folder: Path, old: str, new: str) -> str:
    """tiny.py with a change; its path."""
    text = (folder / "tiny.py").read_text()
    assert old in text
    (folder / "changed.py").write_text(text.replace(old, new))
    return str(folder / "changed.py")


def test_help_shows_commands_and_recipes(grokd_process: Run, tmp_path: Path) -> None:
    printed = grokd_process("--help", cwd=tmp_path).stdout
    for word in ("teachers ", "bias-model ", "distill ", "eval ", "run ", "digits ", "folder "):
        assert f"\n  {word}" in printed


def test_command_help_shows_the_recipes_values_with_advice(
    grokd_process: Run, tmp_path: Path
) -> None:
    printed = grokd_process("distill", "digits", "--help", cwd=tmp_path).stdout
    text = " ".join(printed.replace("│", " ").split())
    assert "Its students: one-hot, one-hot-dfr, average, agre, departure." in text
    assert "Lower it if the loss jumps, raise it if it falls slowly. (default: 0.01)" in text
    assert "--arch STR Architecture" in text
    assert "(default: cnn2)" in text
    assert "--student" in text


@pytest.mark.parametrize("command", ["augment", "eval", "run"])  # run has the others' flags
def test_every_flag_has_advice(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = "digits_augment" if command == "augment" else "digits"
    with pytest.raises(SystemExit) as end:
        grokd.command_line([command, recipe, "--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    flags = [part for part in text.split(" --")[1:] if "(default:" in part or " STR" in part]
    assert len(flags) > (3 if command == "eval" else 15)
    for flag in flags:
        advice = flag.split("(default:")[0].split()
        assert len([word for word in advice if word.islower()]) >= 2, flag


def test_sources_are_parsed_once_for_all_students(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each class's comments are read from its source, which inspect parses anew each time."""
    parsed: list[str] = []
    parse = ast.parse

    def counted(source: str, *more: Any, **named: Any) -> ast.AST:
        parsed.append(source)
        return parse(source, *more, **named)

    monkeypatch.setattr(ast, "parse", counted)
    changed, _, _ = grokd.apply_flags("distill", grokd.load_recipe("digits"), "", ["--lr", "0.3"])
    assert len(changed.students) == 5
    assert parsed.count(Path(grokd.__file__).read_text()) == 1


def test_help_of_a_picked_student_shows_its_values(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        grokd.command_line(["distill", "digits", "--student", "average", "--help"])
    assert "(default: average)" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_flags_of_a_student_keep_the_other_students_values() -> None:
    given = grokd.load_recipe("digits")
    changed, _, _ = grokd.apply_flags("distill", given, "digits", ["--tau", "2"])
    assert [s.weighting for s in changed.students.values()] == [
        "one-hot", "one-hot", "average", "agre", "departure"
    ]
    assert list(changed.students) == [
        "one-hot", "one-hot-dfr", "average+tau=2.0", "agre+tau=2.0", "departure+tau=2.0"
    ]
    assert changed.students["agre+tau=2.0"].tau == 2.0


def test_run_takes_prefixed_flags_and_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    given = grokd.load_recipe("digits")
    args = ["--distill.alpha", "0.5", "--teachers.lr", "0.2", "--data.size", "20", "--seeds", "7"]
    changed, common, _ = grokd.apply_flags("run", given, "digits", [*args, "--student", "agre"])
    assert list(changed.students) == ["agre+alpha=0.5"]
    assert (changed.teachers.train.lr, changed.data.size, changed.seeds) == (0.2, 20, (7,))
    assert common.out == "runs/digits"
    printed = capsys.readouterr().out
    for told in ("distill.alpha 1.0 → 0.5", "teachers.lr 0.05 → 0.2", "data.size 16 → 20"):
        assert told in printed
    changed, _, _ = grokd.apply_flags("eval", given, "digits", ["--baseline", "agre+alpha=0.5"])
    assert changed.eval.baseline == "agre+alpha=0.5"
    with pytest.raises(Problem, match="--lr"):
        grokd.apply_flags("run", given, "digits", ["--lr", "1"])


MISTAKES = [
    (["distil"], r"Unknown command 'distil'; did you mean distill\?"),
    (["run", "digts"], r"Unknown recipe 'digts'; did you mean digits\?"),
    (["distill", "--alhpa", "1"], r"Unrecognized options: --alhpa, 1; did you mean --alpha\?"),
    (["teachers", "--teachers.seed", "1", "--dfr.num-refits", "2"],
     r"Unrecognized options: --teachers.seed, 1; did you mean --seed\?"),
    (["distill", "--distill.alpha=.5"], r"options: --distill.alpha.*; did you mean --alpha\?"),
    (["distill", "--teachers.seed", "1"], r"options: --teachers.seed, 1 \(see"),
    (["distill", "--alpha", "x"], r"--alpha: could not convert string to float: 'x'"),
    (["distill", "--alpha", "1.5"], r"alpha = 1.5: must be a number at least 0 and at most 1"),
    (["distill", "--weighting", "agree"], r"invalid choice 'agree' for argument '--weighting'"),
    (["distill", "--student", "agr"], r"Unknown student 'agr'; did you mean agre\?"),
    (["teachers", "--num-teachers", "0"], r"num_teachers = 0: must be a whole number at least 1"),
    (["teachers", "--epochs", "2.5"], r"--epochs: .*2.5"),
    (["run", "--data.crop", "99"], r"data.crop = 99 is larger than data.size = 16"),
    (["run", "--seeds"], r"at least one seed"),
    (["eval", "--models", "none.safetensors"], r"none.safetensors is not there"),
]


@pytest.mark.parametrize("args, told", MISTAKES, ids=[" ".join(args) for args, _ in MISTAKES])
def test_mistaken_command_lines_are_one_line(
    args: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Problem, match=told) as caught:
        grokd.command_line(args)
    assert "\n" not in str(caught.value)


VALUES = [
    ("lr=0.01", "lr='fast'", r"teachers.train.lr = 'fast': must be a number at least 0"),
    ("epochs=2", "epochs=2.5", r"train.epochs = 2.5: must be a whole number at least 0"),
    ("epochs=2", "epochs=True", r"epochs = True: must be a whole number"),
    ("lr=0.01", "lr=float('nan')", r"lr = nan: must be a number"),
    ("seeds=(0, 1)", "seeds=[0, 1]", r"seeds = \[0, 1\]: must be a tuple of a whole number"),
    ("seeds=(0, 1)", "seeds=(0, -1)", r"seeds\[1\] = -1: must be a whole number at least 0"),
    ("size=20", "size=20, reweighting=1.5", r"reweighting = 1.5: must be .* at most 1"),
    ("student = Distill(", "import grokd\nstudent = Distill("
     "input=grokd.Input(mean=(0.5, float('nan'), 0.5)), ", r"mean\[1\] = nan: must be a number"),
    ('"one-hot",', '"onehot",', r"weighting = 'onehot': must be one of agre, departure"),
    ('"agre": student', '"a/b": student', r"student 'a/b': letters, digits"),
    ('"agre": student', '"agre": 3', r"students\['agre'\] = 3: must be Distill"),
    ("epochs=2", "epocs=2", r"line \d+: TypeError: .*unexpected keyword argument 'epocs'"),
    ("train = Train(", "train = Train((", r"line \d+: SyntaxError"),
    ("recipe = Recipe", "recipes = Recipe", r"defines no `recipe = Recipe\(...\)`"),
    ("size=20", "size=20, reader=3", r"data.reader = 3: must be "),
    ("BiasModel(", "BiasModel(teacher=2, ", r"bias_model.teacher = 2, but there are 2 teachers"),
    ("seeds=(0, 1)", "eval=Eval(baseline='one-hto')", r"eval.baseline = 'one-hto' names no "
     "student; did you mean one-hot"),
    ("seeds=(0, 1)", "published={'agre': {'wga': 90, 'wga_sd': 1}}", r"published\['agre'\] has a "
     "column 'wga_sd'; did you mean wga"),
    ("size=20", "size=20, split_codes=('a', 'b')", r"split_codes = .* must be a tuple of 3 times"),
    ('("cnn2", "resnet8")', "()", r"teachers.arch = \(\): must be a tuple of a text, one or more"),
    ('("random",)', "()", r"teachers.weights = \(\): must be a tuple of a text, one or more"),
    ("penalties=(1.0,)", "penalties=()", r"dfr.penalties = \(\): must be .*1e-12, one or more"),
    ("data=Data", "diffusion=__import__('grokd').Diffusion(widths=()), data=Data",
     r"diffusion.widths = \(\): must be a tuple of .* at least 1, one or more"),
]


@pytest.mark.parametrize("old, new, told", VALUES, ids=[new for _, new, _ in VALUES])
def test_mistaken_recipes_are_one_line(images: Path, old: str, new: str, told: str) -> None:
    with pytest.raises(Problem, match=told) as caught:
        grokd.command_line(["run", recipe(images, old, new)])
    assert "\n" not in str(caught.value).strip()


@pytest.mark.parametrize("share", ["1.0", "0.9"])  # of 4 images in each group
@pytest.mark.parametrize("args, told", [
    (["distill", "--select", "best"], r"students\['one-hot\+select=best'\].select = 'best'"),
    (["run", "--teachers.select", "best"], "teachers.select = 'best'"),
    (["run", "--eval.split", "selection"], "eval.split = 'selection'"),
    (["run", "--eval.probes"], "eval.probes"),
])
def test_without_a_selection_part_what_needs_it_is_refused_before_any_work(
    images: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], told: str, share: str
) -> None:
    monkeypatch.chdir(images)
    command, *flags = args
    path = recipe(images, "size=20", f"size=20, reweighting={share}")
    told += rf" needs a selection part: of 16 validation images .* = {float(share):g} leaves none"
    with pytest.raises(Problem, match=told) as caught:
        grokd.command_line([command, path, *flags])
    assert "\n" not in str(caught.value)
    assert not list(images.glob("runs/**/*.partial"))


def test_groups_without_selection_images_are_named(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, loaded = images / "metadata.csv", grokd.load_recipe(str(images / "tiny.py"))
    grokd.check_selection(loaded, grokd.counted_store(loaded.data, str(images)))
    assert not capsys.readouterr().out
    lines = table.read_text().splitlines()
    table.write_text("\n".join(line for line in lines if not re.match("val11[123]", line)))
    grokd.check_selection(loaded, grokd.counted_store(loaded.data, str(images)))
    told = "warning: the selection part has no image of group class 1, attribute 1, so"
    assert told in capsys.readouterr().out


def test_problems_leave_by_exit_status_without_a_traceback(
    grokd_process: Run, tmp_path: Path
) -> None:
    done = grokd_process("run", "no-such-recipe", cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: Unknown recipe 'no-such-recipe'")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name, out", [
    ("digits", "digits"), ("colored_mnist:98", "colored_mnist-98"),
    ("colored_mnist:99", "colored_mnist-99"), ("colored_mnist:99.5", "colored_mnist-99.5"),
    ("recipes/rivals.py", "rivals"), ("recipes/rivals.py:digits", "rivals-digits"),
])
def test_every_variant_of_a_recipe_has_a_folder_of_its_own(name: str, out: str) -> None:
    assert grokd.default_out(name) == f"runs/{out}"


def test_recipe_finds_the_one_grokd_module(images: Path) -> None:
    assert type(grokd.load_recipe(str(images / "tiny.py"))) is grokd.Recipe


def test_recipes_may_build_on_each_other(images: Path) -> None:
    (images / "longer.py").write_text(
        "from dataclasses import replace\nfrom tiny import recipe\n"
        "recipe = replace(recipe, seeds=(5,))\n"
    )
    assert grokd.load_recipe(str(images / "longer.py")).seeds == (5,)

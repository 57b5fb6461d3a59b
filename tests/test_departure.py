"""Departure, several biased models, headroom, and which student to ship."""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_report import results_of
from torch import Tensor

import grokd
from grokd import Classifier, Departures, Problem, Runtime, Store, Targets


def measured(
    teachers: Tensor, biased: Tensor, labels: Tensor, skill: Tensor, size: int = 1000,
    departure_gap: float = 4.0,
) -> Departures:
    parts = range(0, len(labels), size)
    return grokd.measure_departures(
        ((teachers[:, i : i + size], biased[i : i + size], labels[i : i + size]) for i in parts),
        skill, departure_gap)


@pytest.mark.parametrize("classes", [2, 10])
def test_departure_equals_the_slow_formula(classes: int) -> None:
    torch.manual_seed(classes)
    teachers, biased = 3 * torch.randn(5, 50, classes), 3 * torch.randn(50, classes)
    labels = torch.randint(classes, (50,))
    teachers[0] += 9 * torch.nn.functional.one_hot(labels, classes)  # one who is good
    teachers[1] = biased + 0.1 * torch.randn(50, classes)  # one who is as biased
    skill = torch.tensor([0.9, 0.8, 0.5, 0.02, 0.0]).double()
    ours = measured(teachers, biased, labels, skill)
    merits, distances = [], []
    for t in range(5):
        counted = 0.0
        gaps, disputed = [], []
        for i in range(50):
            p_t, p_b = (z.double().softmax(-1) for z in (teachers[t, i], biased[i]))
            gap = float(((p_t - p_b) ** 2).sum())
            gaps.append(gap)
            if int(p_t.argmax()) == int(labels[i]):
                counted += gap / 50
            if int(p_t.argmax()) != int(p_b.argmax()):
                disputed.append(gap)
        merits.append(counted * float(skill[t]))
        distances.append(sum(gaps) / 50)
        if disputed:
            assert float(ours.disputed[t]) == pytest.approx(sum(disputed) / len(disputed))
    assert ours.distance.tolist() == pytest.approx(distances)
    kept = above_the_gap(distances, skill.tolist(), 4.0)
    assert kept[0] and not kept[1] and not kept[4]
    assert ours.merit.tolist() == pytest.approx(merits)
    assert ours.weights.tolist() == pytest.approx([each / sum(kept) for each in kept])
    blocks = measured(teachers, biased, labels, skill, size=7)
    for a, b in zip(ours, blocks, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@given(st.data())
def test_skill_is_recall_above_chance(data: st.DataObject) -> None:
    classes = data.draw(st.integers(2, 4))
    label = st.integers(0, classes - 1)
    labels = data.draw(st.lists(label, min_size=1, max_size=20).filter(lambda y: len({*y}) > 1))
    size = len(labels)
    predicted = data.draw(st.lists(label, min_size=size, max_size=size))
    skill = grokd.skill_of(torch.tensor([predicted, labels]), torch.tensor(labels))
    recalls = [
        sum(p == y == c for p, y in zip(predicted, labels, strict=True)) / labels.count(c)
        for c in {*labels}
    ]
    chance = 1 / len(recalls)
    expected = (sum(recalls) / len(recalls) - chance) / (1 - chance)
    assert skill.tolist() == pytest.approx([max(0, expected), 1])
    one_class = grokd.skill_of(torch.tensor([predicted, labels]), torch.zeros(size))
    assert one_class.tolist() == [1, 1]


def above_the_gap(departures: Sequence[float], skills: Sequence[float], gap: float) -> list[bool]:
    """Which teachers count, slowly: every division of the skilled ones is looked at."""
    left = [t for t, skill in enumerate(skills) if skill * 3 >= max(skills)]
    while True:
        best, kept = gap, left
        for bound in sorted({departures[t] for t in left}, reverse=True):
            above = [t for t in left if departures[t] >= bound]
            below = [t for t in left if departures[t] < bound]
            if below:
                fall = max(bound, 1e-3) / max(1e-3, *(departures[t] for t in below))
                if fall > best:
                    best, kept = fall, above
        rest = [skills[t] for t in left if t not in kept]
        own = math.fsum(skills[t] for t in kept) / len(kept)
        if not rest or own * 3 >= 2 * math.fsum(rest) / len(rest):
            return [t in kept for t in range(len(skills))]
        left = [t for t in left if t not in kept]


@given(st.data(), st.floats(1, 20))
def test_teachers_without_skill_or_below_a_gap_do_not_count(
    data: st.DataObject, gap: float
) -> None:
    count = data.draw(st.integers(1, 6))
    scales = data.draw(st.lists(st.floats(0, 3), min_size=count, max_size=count))
    skills = data.draw(st.lists(
        st.sampled_from([0, 0.1, 0.3, 0.5, 0.9]), min_size=count, max_size=count))
    biased, labels = torch.zeros(6, 2), torch.arange(6) % 2
    right = torch.nn.functional.one_hot(labels, 2).double()
    teachers = torch.stack([scale * right for scale in scales])
    skill = torch.tensor(skills, dtype=torch.float64)
    found = measured(teachers, biased, labels, skill, departure_gap=gap)
    kept = above_the_gap(found.distance.tolist(), skills, gap)
    assert found.weights.tolist() == [each / sum(kept) for each in kept]
    assert not (grokd.as_biased(found, gap) & torch.tensor(kept)).any()


def test_a_bad_teacher_alone_above_a_gap_is_left_out() -> None:
    """It departs most, by being wrong; four good ones stand below it, or one and a biased one."""
    assert grokd.departing([0.06, 0.05, 0.51, 0.07, 0.06], [0.9, 0.9, 0.5, 0.9, 0.9], 4.0) == [
        3, 0, 4, 1]
    assert grokd.departing([0.06, 0.51, 0.05], [0.9, 0.4, 0.9], 4.0) == [0, 2]
    # Held-out images as biased as training: refitted teachers look a little less skilled.
    assert grokd.departing([0.06, 0.001, 0.001], [0.7, 0.9, 0.9], 4.0) == [0]


def test_teachers_are_divided_at_the_greatest_gap() -> None:
    """A good teacher may depart three times as much as another; plain ones do by ten times less."""
    assert grokd.departing([0.056, 0.163, 0.002, 0.0017], [0.9] * 4, 2.5) == [1, 0]
    assert grokd.departing([0.0088, 0.0142, 0.0031, 0.0015], [0.9] * 4, 2.5) == [1, 0]
    assert grokd.departing([0.0023, 0.0, 0.0015], [0.6] * 3, 2.5) == [0, 2, 1]  # none of them


def test_teachers_that_are_the_biased_model_count_alike() -> None:
    biased, labels = torch.randn(20, 3), torch.arange(20) % 3
    same = measured(biased.expand(4, 20, 3), biased, labels, torch.ones(4))
    assert same.weights.tolist() == [0.25] * 4
    assert torch.isnan(same.disputed).all()  # they disagree nowhere


def made(name: str, *parents: grokd.Artefact, epochs: int = 3) -> grokd.Artefact:
    """An artefact of so many epochs and such parents."""
    settings = {} if name.startswith("augmented/") else {"epochs": epochs}
    return grokd.Artefact(name, Path(name), "", settings, {each.name: each for each in parents})


def digits_model(store: Store, labels: np.ndarray, seed: int, epochs: int) -> Classifier:
    """A small network trained on the digits with some labels."""
    model = grokd.build_model("cnn2", "random", 2, grokd.Input(), seed)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, 0.9)
    train = store.split("train")
    images = store.view(train, torch.device("cpu"))
    targets = torch.from_numpy(labels)
    for epoch in range(epochs):
        for batch in grokd.epoch_batches(len(train), 32, seed, epoch):
            optimizer.zero_grad()
            grokd.cross_entropy(model(images[batch]), targets[batch]).mean().backward()
            optimizer.step()
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Runtime, list[Classifier]]:
    """The digits; three refitted teachers, one of random weights, one of shuffled labels, and the
    biased model."""
    data = grokd.load_recipe("digits").data
    folder = str(tmp_path_factory.mktemp("digits"))
    store, runtime = grokd.open_store(replace(data, store=folder), "."), Runtime.start("float32")
    labels = store.labels[store.split("train")]
    shuffled = labels[grokd.permutation(len(labels), 5)]
    models = [digits_model(store, labels, seed, 10) for seed in range(3)]
    for model in models:
        grokd.refit_head(model, store, grokd.DFR(num_refits=5), grokd.Train(), 0, runtime)
    models.append(digits_model(store, labels, 3, 0))
    models.append(digits_model(store, shuffled, 4, 40))
    models.append(digits_model(store, labels, 5, 10))
    return store, runtime, models


def test_bad_teachers_and_biased_ones_are_left_out(
    ensemble: tuple[Store, Runtime, list[Classifier]]
) -> None:
    store, runtime, models = ensemble
    found = Targets(models, 5, store, {"of": "five"}, runtime, 0).measure(4.0)
    assert min(found.distance[3:]) > max(found.distance[:3])  # their answers are far from b's
    assert found.weights.tolist() == pytest.approx([1 / 3] * 3 + [0, 0])
    assert not grokd.as_biased(found, 4.0).any()
    plain = digits_model(store, store.labels[store.split("train")], 6, 10)  # as biased as it
    mixed = Targets([*models[:2], plain, models[5]], 3, store, {"of": "three"}, runtime, 0)
    found = mixed.measure(4.0)
    assert found.weights.tolist() == [0.5, 0.5, 0]
    assert grokd.as_biased(found, 4.0).tolist() == [False, False, True]


def test_notes_say_why_teachers_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    distance, weights = torch.tensor([0.4, 0.6, 0.01, 0.02]), torch.tensor([1.0, 0, 0, 0])
    some = torch.full((4,), 0.5)
    found = Departures(distance, some, some, torch.tensor([0.9, 0.1, 0.8, 0.2]), some, weights)
    targets = SimpleNamespace(measure=lambda gap: found)
    monkeypatch.setattr(grokd, "frozen_targets", lambda *_: targets)
    ctx: Any = SimpleNamespace(
        store=None, runtime=SimpleNamespace(together=lambda: None),
        ensemble=lambda _: [made(f"teachers/{i}/dfr") for i in range(4)])
    rows = grokd.teacher_rows(ctx, grokd.Distill())
    notes = ["too often wrong", *["as biased as the biased model"] * 2]
    results = results_of(["g"], ["a", "b"], ["cnn2"])
    results["ensembles"] = [{"students": ["a"], "teachers": rows}]
    for text in (grokd.departure_table(rows), grokd.report(results)):
        lines = [line for line in text.splitlines() if line.startswith("| teachers/")]
        assert [line.strip("| ").rpartition("|")[2].strip() for line in lines[1:]] == notes
        assert lines[0].strip("| ").endswith("1.000")


def test_teachers_departures_are_shown_once_the_biased_model_is_there(
    images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(images)
    text = (images / "tiny.py").read_text().replace("BiasModel(", 'BiasModel("erm", ')
    (images / "tiny.py").write_text(text)
    grokd.command_line(["teachers", "tiny.py"])
    printed = capsys.readouterr().out
    assert "| departure" not in printed and "\n`bias-model` makes the" in printed
    grokd.command_line(["bias-model", "tiny.py"])
    assert "| departure" in capsys.readouterr().out
    grokd.command_line(["teachers", "tiny.py"])
    printed = capsys.readouterr().out
    assert "| departure" in printed and "`bias-model` makes" not in printed


def test_cached_departure_is_that_of_the_networks_themselves(
    ensemble: tuple[Store, Runtime, list[Classifier]]
) -> None:
    store, runtime, models = ensemble
    targets = Targets(models, 5, store, {"of": "five"}, runtime, 0)
    cached = targets.measure(4.0)
    train = store.split("train")
    images = store.view(train, torch.device("cpu"), 0)
    logits = torch.stack([model(images) for model in models])
    selection = store.split("selection")
    held_out = store.view(selection, torch.device("cpu"))
    answers = torch.stack([model(held_out).argmax(-1) for model in models[:5]])
    skill = grokd.skill_of(answers, torch.from_numpy(store.labels[selection]))
    online = measured(logits[:5], logits[5], torch.from_numpy(store.labels[train]), skill)
    for a, b in zip(cached, online, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_several_biased_models_are_their_mean_logits(
    ensemble: tuple[Store, Runtime, list[Classifier]]
) -> None:
    store, runtime, models = ensemble
    targets = Targets(models, 3, store, {"of": "several"}, runtime, 0)  # three biased ones
    targets.prepare(0)
    settings = grokd.Distill()
    positions = np.array([3, 700, 12])
    batch = grokd.Batch(settings, models[0], torch.empty(0), torch.empty(0), positions, 3, 0, 0,
                        runtime)
    answer = targets.answer(batch)
    logits = targets.logits(positions)
    assert answer.teachers.shape[0] == 3
    assert answer.biased is not None
    torch.testing.assert_close(answer.biased, logits[3:].mean(0))


@pytest.mark.parametrize("shrink", [0.0, 0.5])
def test_labels_are_weighed_by_the_mean_weight_of_a_sample(shrink: float) -> None:
    torch.manual_seed(0)
    student, teachers = torch.randn(6, 3), torch.randn(4, 6, 3)
    biased, labels = torch.randn(6, 3), torch.arange(6) % 3
    settings = grokd.Distill(alpha=0.25, weigh_labels=True, shrink=shrink)
    answers = grokd.Ensemble(teachers, biased)
    runtime: Any = None
    batch = grokd.Batch(settings, torch.nn.Identity(), torch.empty(0), labels, np.arange(6), 6, 0,
                        0, runtime, student)
    value, figures = grokd.distillation(lambda _: answers)(batch)
    weights = (1 - shrink) * grokd.agre_weights(student, teachers, biased, 4.0) + shrink
    assert torch.equal(figures["weight"], weights)
    assert torch.equal(figures["cross_entropy"], grokd.cross_entropy(student, labels))
    shares = grokd.teacher_shares(weights)
    for i in range(6):
        distilled = sum(
            float(shares[t, i] * grokd.kd_losses(student[i], teachers[t, i], 4.0))
            for t in range(4))
        cross_entropy = grokd.cross_entropy(student[i : i + 1], labels[i : i + 1])
        labelled = float(weights[:, i].mean() * cross_entropy)
        assert float(value[i]) == pytest.approx(0.75 * labelled + 0.25 * distilled, rel=1e-5)


def test_weighing_labels_without_a_share_of_labels_is_warned_about(
    capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = grokd.load_recipe("digits")
    flags = ["--student", "agre", "--weigh-labels"]
    grokd.apply_flags("distill", recipe, "digits", flags)
    assert ("warning: weigh_labels has no effect on agre: it belongs to alpha other than 1.0."
            in capsys.readouterr().out)
    grokd.apply_flags("distill", recipe, "digits", [*flags, "--alpha", "0.9"])
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("num_attributes", [2, 1])
def test_headroom_needs_group_labels(num_attributes: int) -> None:
    teachers = [{"name": f"teachers/{i}/dfr", "weight": weight} for i, weight in enumerate((1, 0))]
    rows = {
        "teachers, DFR": [{"name": f"teachers/{i}/dfr", "wga": 90.0 - 40 * i} for i in range(2)],
        "a": [{"name": "students/a/seed0/model", "wga": 75.0}],
    }
    ctx: Any = SimpleNamespace(
        store=SimpleNamespace(num_attributes=num_attributes),
        students={"a": grokd.Distill("average")})
    room = grokd.headroom({"students": ["a"], "teachers": teachers}, rows, ctx)
    known = {"student": "a", "teachers": 90.0, "average": 75.0}
    assert room == (known if num_attributes > 1 else {})


# The student to ship


def rank(wga: Mapping[str, Sequence[float]], costs: dict[str, int]) -> tuple[str, str]:
    by_seed = {name: {f"seed{s}": v for s, v in enumerate(values)} for name, values in wga.items()}
    choice = grokd.rank_students(by_seed, costs, one_image=2.0)
    return choice["ship"], choice["runner_up"]


def test_best_on_selection_is_shipped_and_ties_go_to_fewer_networks() -> None:
    costs = {"one-hot-dfr": 0, "average": 5, "agre": 6}
    clear: dict[str, list[float]] = {
        "one-hot-dfr": [80, 81, 80], "average": [84, 85, 84.5], "agre": [90, 91, 90.5]}
    assert rank(clear, costs) == ("agre", "average")
    paired = {"one-hot-dfr": [80, 70, 60], "average": [81, 71, 61], "agre": [82, 72, 62]}
    assert rank(paired, costs) == ("agre", "average")  # wide spread, but every seed agrees
    noise = {"one-hot-dfr": [80, 86, 83], "average": [83, 83, 84], "agre": [82, 84, 83]}
    assert rank(noise, costs) == ("one-hot-dfr", "average")


def test_one_seed_ties_within_one_image() -> None:
    costs = {"one-hot-dfr": 0, "average": 5}
    assert rank({"one-hot-dfr": [80], "average": [81.9]}, costs)[0] == "one-hot-dfr"
    assert rank({"one-hot-dfr": [80], "average": [82.1]}, costs)[0] == "average"


def test_networks_behind_a_student_are_those_that_were_trained() -> None:
    trained, given = made("teachers/0/erm"), made("teachers/1/erm", epochs=0)
    refitted = [made("teachers/0/dfr", trained), made("teachers/1/dfr", given, epochs=0)]
    assert grokd.networks_behind(made("students/a/seed0/model", *refitted)) == {"teachers/0/erm"}
    helper = made("bias-model/model", trained)  # a copy of teacher 0
    assert grokd.networks_behind(made("students/b/seed0/model", helper)) == {"teachers/0/erm"}
    biased = made("bias-model/model")
    images = made("augmented/c/seed0/done", *refitted, made("students/a/seed0/model", *refitted),
                  made("generator/done"))
    assert grokd.networks_behind(made("students/c/seed0/model", images, biased)) == {
        "teachers/0/erm", "students/a/seed0/model", "generator/done", "bias-model/model"}


NOISE = {"a": [95, 90, 85], "b": [89, 84, 94], "c": [84, 94, 89]}
ONE_IMAGE = {"a": [90], "b": [89], "c": [88]}


@pytest.mark.parametrize("values, costs, told", [
    (NOISE, (5, 0, 5), "No more than one standard error below the best: b, a, c; of these it needs "
     "the fewest networks before it (0; a: 5)."),
    (ONE_IMAGE, (5, 5, 5), "No more than one image of the smallest group below the best: a, b, c; "
     "each needs as many networks before it (5), and it has the best mean."),
    (ONE_IMAGE, (2, 2, 5), "No more than one image of the smallest group below the best: a, b, c; "
     "of these it needs the fewest networks before it (2; c: 5), as many as b, and the best mean "
     "of those."),
])
def test_ties_are_told_with_what_decided_them(
    values: Mapping[str, Sequence[float]], costs: Sequence[int], told: str
) -> None:
    wga = {name: {f"seed{s}": x for s, x in enumerate(each)} for name, each in values.items()}
    choice = grokd.rank_students(wga, dict(zip("abc", costs, strict=True)), one_image=2.0)
    choice |= {"left_out": [], "images": 4}
    results = results_of(["g"], [*"abc"], ["cnn2"]) | {"choice": choice}
    assert grokd.choice_text(results).endswith(f"; never on test. {told}")


def found(**seeds: Sequence[int]) -> list[grokd.Scored]:
    """Students on disk, with their seeds."""
    names = [(row, f"students/{row}/seed{s}/model") for row, each in seeds.items() for s in each]
    return [grokd.Scored(row, name, Path(f"{name}.safetensors")) for row, name in names]


def chosen(
    monkeypatch: pytest.MonkeyPatch, models: list[grokd.Scored], seeds: tuple[int, ...],
    num_images: int = 4,
) -> dict[str, Any]:
    """The choice among students, of whom the later ones are better."""
    monkeypatch.setattr(grokd, "selection_wga", lambda students, groups, ctx: {
        row: {m.path.parent.name: 10.0 * i for m in students if m.row == row}
        for i, row in enumerate(dict.fromkeys(model.row for model in students))})
    monkeypatch.setattr(grokd, "selection_groups", lambda *_: (np.array([0, 0, 1, 1]), "known"))
    ctx: Any = SimpleNamespace(
        recipe=SimpleNamespace(seeds=seeds), described=made,
        store=SimpleNamespace(split=lambda part: np.arange(num_images)))
    return grokd.choose_student(models, grokd.Inferred("", {}), ctx)


def test_students_without_all_seeds_of_the_run_are_not_compared(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    models = found(a=(0, 1), b=(0, 1, 2), c=(1,), d=(7,))
    choice = chosen(monkeypatch, models, (0, 1))
    assert (choice["ship"], choice["runner_up"], choice["left_out"]) == ("b", "a", ["c", "d"])
    assert choice["seeds"] == ["seed0", "seed1"]
    results = results_of(["g"], ["a", "b", "c", "d"], ["cnn2"]) | {"choice": choice}
    assert "Not compared, since they lack some seed: c, d." in grokd.choice_text(results)
    assert chosen(monkeypatch, found(a=(0, 1)), (0, 1)) == {}


@pytest.mark.parametrize("seeds, num_images, why", [
    ((0, 1), 0, "no validation image is left that refitted no head (Data.reweighting)"),
    ((0, 9), 4, "fewer than two have all seeds of the run (0, 9); some are lacking of a, b"),
])
def test_missing_recommendation_is_said_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, seeds: tuple[int, ...], num_images: int, why: str
) -> None:
    choice = chosen(monkeypatch, found(a=(0, 1), b=(0, 1)), seeds, num_images)
    assert choice == {"why_none": why}
    results = results_of(["g"], ["a", "b"], ["cnn2"]) | {"choice": choice}
    for text in (grokd.report(results), grokd.terminal_summary(results)):
        assert f"No student is recommended: {why}." in " ".join(text.split())
        assert "Ship this one" not in text


STUDENTS = '''
from dataclasses import replace
recipe = replace(recipe, students={
    "one-hot": replace(student, weighting="one-hot"),
    "average": replace(student, weighting="average"),
    "departure": replace(student, weighting="departure"),
})
'''


def test_run_ends_with_the_student_to_ship_and_reports_the_teachers(
    images: Path, grokd_process: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(images)
    recipe = (images / "tiny.py").read_text() + STUDENTS
    (images / "tiny.py").write_text(recipe)
    printed = grokd_process("run", "tiny.py", cwd=images).stdout
    assert printed.index("Ship this one: ") > printed.rindex("| departure")
    assert "Teachers' departure from the biased model" in printed
    results = json.loads((images / "runs/tiny/results.json").read_text())
    choice = results["choice"]
    assert {choice["ship"], choice["runner_up"]} <= {"one-hot", "average", "departure"}
    assert choice["networks"] == {"one-hot": 0, "average": 2, "departure": 2}  # b is a teacher's
    of_one_seed = results | {"choice": choice | {"seeds": ["seed0"]}}
    assert " no head, seed 0; never on test" in grokd.choice_text(of_one_seed)
    report = (images / "runs/tiny/report.md").read_text()
    assert f"**{choice['ship']}** (selection WGA" in report
    ensemble, = results["ensembles"]
    assert ensemble["students"] == ["average", "departure"]
    wga = {row["name"]: [m["wga"] for m in row["members"]] for row in results["rows"]}
    shares = [teacher["weight"] for teacher in ensemble["teachers"]]
    expected = sum(w * x for w, x in zip(shares, wga["teachers, DFR"], strict=True))
    assert ensemble["headroom"]["teachers"] == pytest.approx(expected)
    assert ensemble["headroom"]["average"] == pytest.approx(np.mean(wga["average"]))
    assert "Headroom: the teachers' WGA, by the weights of departure, is" in report
    history = json.loads(
        (images / "runs/tiny/students/departure/seed0/model.history.json").read_text())
    weights = [teacher["weight"] for teacher in ensemble["teachers"]]
    for entry in history["epochs"]:  # one weight a teacher, from the first epoch to the last
        assert entry["weight"] == pytest.approx(weights)

    # The selection part alone decides: its figures are those of the saved models.
    store = grokd.open_store(grokd.load_recipe(str(images / "tiny.py")).data, str(images))
    indices = store.split("selection")
    for name, (mean, _) in choice["wga"].items():
        figures = []
        for seed in (0, 1):
            path = images / f"runs/tiny/students/{name}/seed{seed}/model.safetensors"
            scores = grokd.validate(grokd.load_model(path), store, Runtime.start("float32"))
            figures.append(scores["wga"])
        assert mean == pytest.approx(np.mean(figures))
    assert choice["images"] == len(indices)


def test_killed_departure_student_goes_on_with_the_same_bits(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (images / "tiny.py").read_text() + STUDENTS
    text = text.replace("epochs=2, batch_size=8", "epochs=3, batch_size=4, checkpoint_minutes=1e-9")
    (images / "tiny.py").write_text(text)
    monkeypatch.chdir(images)
    for stage in ("teachers", "bias-model"):
        grokd.command_line([stage, "tiny.py"])
    killed = shutil.copytree(images, tmp_path / "killed")
    distill = ["distill", "tiny.py", "--student", "departure", "--seeds", "0"]
    grokd.command_line(distill)
    monkeypatch.chdir(killed)
    save_checkpoint = grokd.save_checkpoint

    def interrupted(work: Path, step: int, state: dict[str, object]) -> None:
        save_checkpoint(work, step, state)
        if step == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(grokd, "save_checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        grokd.command_line(distill)
    monkeypatch.setattr(grokd, "save_checkpoint", save_checkpoint)
    shutil.rmtree(killed / "store" / "targets")  # the first view is asked for again
    grokd.command_line(distill)
    path = "runs/tiny/students/departure/seed0/model.safetensors"
    a, b = load_file(images / path), load_file(killed / path)
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_several_biased_models_are_parents_and_exclude_features(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(images)
    text = (images / "tiny.py").read_text().replace(
        'BiasModel(arch="cnn2"', 'BiasModel(teachers=(0, 1), arch="cnn2"')
    (images / "tiny.py").write_text(text)
    grokd.command_line(["teachers", "tiny.py"])
    grokd.command_line(["distill", "tiny.py", "--student", "agre", "--seeds", "0"])
    metadata = grokd.read_metadata(images / "runs/tiny/students/agre/seed0/model.safetensors")
    assert {"teachers/0/erm", "teachers/1/erm"} <= json.loads(metadata["parents"]).keys()
    with pytest.raises(Problem, match="several biased models do not share"):
        grokd.command_line(["distill", "tiny.py", "--student", "agre", "--gamma", "1",
                            "--feature-weights", "agre"])
    (images / "tiny.py").write_text(text.replace("teachers=(0, 1)", "teachers=(0, 2)"))
    with pytest.raises(Problem, match=r"bias_model.teacher = 2, but there are 2 teachers"):
        grokd.command_line(["distill", "tiny.py"])

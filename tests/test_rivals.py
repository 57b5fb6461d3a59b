"""Weights of samples (JTT, DeDiER, Group DRO) and SimKD, against slow and literal versions."""

import copy
import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, write_images
from kills import Herd
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import grokd
from grokd import Batch, Distill, Input, Problem, Teachers

ONE: Any = SimpleNamespace(world=1, rank=0, sum=lambda tensor: tensor, upload=torch.from_numpy)


def batch_of(places: list[int], settings: Any = None, logits: Tensor | None = None) -> Batch:
    """A batch of these places in the training set."""
    total = len(places)
    empty = torch.empty(total, 3, 4, 4)
    labels = torch.zeros(total, dtype=torch.long)
    output = torch.zeros(total, 2) if logits is None else logits
    return Batch(
        settings, nn.Identity(), empty, labels, np.array(places), total, 0, 0, ONE, output)


# Group DRO


def test_group_dro_equals_the_literal_loop() -> None:
    """Sagawa's algorithm 1 written out, groups that a batch lacks keeping their share."""
    groups = [0, 0, 0, 1, 1, 2, 4, 4]  # none of group 3
    shares = grokd.GroupShares(torch.tensor(groups), 5, eta=0.7).double()
    q = {0: 0.25, 1: 0.25, 2: 0.25, 3: 0.0, 4: 0.25}
    draw = np.random.default_rng(0)
    for places in ([0, 1, 3, 5, 6], [2, 4], [7], [0, 3, 4, 5, 6, 7]):
        losses = draw.random(len(places)) * 3
        weights = shares(batch_of(places), torch.tensor(losses))
        means = {
            g: float(np.mean([x for x, i in zip(losses, places, strict=True) if groups[i] == g]))
            for g in {groups[i] for i in places}
        }
        before = sum(q[g] for g in means)
        grown = {g: q[g] * math.exp(0.7 * mean) for g, mean in means.items()}
        q |= {g: before * value / sum(grown.values()) for g, value in grown.items()}
        torch.testing.assert_close(shares.q, torch.tensor([*q.values()]).double())
        loss = (weights * torch.tensor(losses)).mean()  # as training has it: sum over the batch / B
        assert float(loss) == pytest.approx(sum(q[g] * mean for g, mean in means.items()))
    assert float(shares.q.sum()) == pytest.approx(1)
    assert shares.q[3] == 0


def test_group_dro_leaves_out_an_image_that_is_shown_in_vain() -> None:
    """Of two processes the second has no share of a batch of one image."""
    sums: list[Tensor] = []

    def process(rank: int, others: Any) -> Any:
        def add(tensor: Tensor) -> Tensor:
            sums.append(tensor)
            return others(tensor)

        runtime: Any = SimpleNamespace(rank=rank, sum=add, upload=torch.from_numpy)
        return replace(batch_of([0]), runtime=runtime)

    shares = grokd.GroupShares(torch.tensor([0, 1]), 2, eta=1.0)
    shares(process(0, lambda tensor: tensor), torch.tensor([2.0]))
    shares(process(1, lambda tensor: sums[0]), torch.tensor([2.0]))
    assert sums[0].tolist() == [[1, 0], [2, 0]]
    assert not sums[1].any()


def test_huge_losses_leave_finite_shares() -> None:
    shares = grokd.GroupShares(torch.tensor([0, 1]), 2, eta=1.0)
    weights = shares(batch_of([0, 1]), torch.tensor([1e6, 0.0]))
    assert weights.tolist() == pytest.approx([2, 0]) and shares.q.tolist() == pytest.approx([1, 0])
    alone = shares(batch_of([1]), torch.tensor([2.0]))  # of the group that lost all but nothing
    assert torch.isfinite(alone).all() and torch.isfinite(shares.q).all()


# DeDiER's weights, and what weights multiply


def test_readout_weights_by_hand() -> None:
    """Two classes: m = |p_0 - p_1|; three: top-1 minus top-2."""
    two = torch.tensor([[0.0, math.log(3)], [math.log(3), 0.0], [0.0, 0.0]])
    weights = grokd.readout_weights(two, torch.tensor([0, 0, 1]), 0.05, 4.0)
    assert weights.tolist() == pytest.approx([math.exp(4 * 0.5**0.05), 1, 1])  # wrong, right, even
    three = torch.tensor([[5.0, 3.0, 1.0]]).log()
    weights = grokd.readout_weights(three, torch.tensor([2]), 2.0, 3.5)
    assert weights.tolist() == pytest.approx([math.exp(3.5 * (2 / 9) ** 2)])


def test_weights_multiply_the_distillation_loss_alone() -> None:
    torch.manual_seed(0)
    logits, teachers = torch.randn(4, 2), torch.randn(3, 4, 2)
    settings = Distill("average", alpha=0.7, tau=3.0)
    batch = batch_of([5, 0, 2, 1], settings, logits)
    weights = torch.tensor([1.0, 20.0, 3.0, 4.0, 5.0, 6.0])
    losses = grokd.distillation(
        lambda batch: grokd.Ensemble(teachers, None), None, grokd.SampleWeights(weights))
    found, figures = losses(batch)
    for i, place in enumerate(batch.positions):
        kd = sum(
            9 * float((p * (p / F.softmax(logits[i] / 3, 0)).log()).sum())
            for p in F.softmax(teachers[:, i] / 3, -1)) / 3
        ce = -float(F.log_softmax(logits[i], 0)[0])
        assert float(found[i]) == pytest.approx(0.3 * ce + 0.7 * float(weights[place]) * kd, 1e-5)
        assert float(figures["cross_entropy"][i]) == pytest.approx(ce)


# SimKD's loss and network


def test_simkd_is_the_mean_square_to_the_teachers_mean_map() -> None:
    torch.manual_seed(0)
    student = torch.rand(2, 3, 2, 2)
    maps = [torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)]
    frozen = grokd.FrozenFeatures(2, {}, lambda batch: {"layer3": [*maps, None]}, [], True)
    layer = grokd.Layer("", "projected", "layer3", 1.0)
    weights = grokd.SampleWeights(torch.tensor([50.0, 1.0]))
    losses, _ = grokd.simkd(layer, frozen, {"projected": student}, weights)(batch_of([0, 1]))
    for i, weight in enumerate((50, 1)):
        total = 0.0
        for c, y, x in np.ndindex(3, 2, 2):
            windows = [m[i, c, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean() for m in maps]
            total += float(student[i, c, y, x] - sum(windows) / 2) ** 2
        assert float(losses[i]) == pytest.approx(weight * total / 12, 1e-5)


@pytest.mark.parametrize("arch", ["cnn2", "resnet8_gn", "mobilenet_v2"])
def test_projector_stands_behind_the_last_map(arch: str) -> None:
    model = grokd.Classifier(arch, 2, Input())
    side = 32 if arch == "mobilenet_v2" else 16
    grokd.add_projector(model, side, torch.zeros(1, 8, 3, 3), seed=0)
    images = torch.rand(2, 3, side, side)
    model.eval()
    tap = grokd.Tap(model, [grokd.last_layer(model, side), "projected"], side)
    features = model.features(images)
    own, projected = tap.maps.values()
    assert model.projection and model.projection.side == min(3, own.shape[-1])
    torch.testing.assert_close(projected.mean((2, 3)), features)
    slow = F.adaptive_avg_pool2d(own, model.projection.side)
    for layer in list(model.projector)[1:10]:
        slow = layer(slow)
    torch.testing.assert_close(slow, projected)
    assert model.head.in_features == 8


def test_what_does_not_reach_the_last_map_is_not_trained() -> None:
    """Else processes that share batches would wait for its gradients."""
    model = grokd.Classifier("convnext_tiny", 2, Input())
    grokd.add_projector(model, 32, torch.zeros(1, 8, 1, 1), seed=0)
    frozen = [name for name, p in model.trunk.named_parameters() if not p.requires_grad]
    assert frozen == ["classifier.0.weight", "classifier.0.bias"]


def test_teacher_whose_head_does_not_multiply_a_mean_is_refused() -> None:
    artefact: Any = SimpleNamespace(name="teachers/0/dfr")
    with pytest.raises(Problem, match=r"teachers/0/dfr: the head of cnn2 multiplies something els"):
        grokd.pooled_map(grokd.Classifier("cnn2", 2, Input()), "layer2", 16, artefact)


# Real runs


STUDENTS = '''
import grokd
from grokd import replace

base = replace(student, weighting="average", arch="resnet8", train=replace(train, epochs=3))
plain = replace(base, arch="cnn2")
longer = replace(train, epochs=6, lr=0.05)
recipe = replace(
    recipe, seeds=(0,),
    bias_model=BiasModel("early-stopped", arch="cnn2", weights="random", train=train),
    teachers=Teachers(2, ("resnet8",), ("random",), dfr=dfr, train=replace(train, lr=0.1)),
    students={
        "average": base,
        "dedier-beta0": replace(base, sample_weights="dedier", readout_beta=0.0),
        "dedier": replace(base, sample_weights="dedier"),
        "simkd": replace(base, loss="simkd", train=longer),
        "simkd-dfr": replace(base, loss="simkd", train=longer, head="dfr"),
        "dett": replace(plain, loss="simkd", sample_weights="jtt", upweight=50.0),
        "shipped": replace(base, loss="simkd", arch="resnet18", train=replace(train, epochs=0)),
        "jtt-cnn2": replace(plain, sample_weights="jtt", upweight=3.0),
        "dedier-cnn2": replace(plain, sample_weights="dedier"),
        "dro-cnn2": replace(plain, sample_weights="group-dro", dro_step=1.0),
    },
)
'''
NO_NORM = ("jtt-cnn2", "dedier-cnn2", "dro-cnn2")  # without batch norm processes agree


class Made(NamedTuple):
    """A finished run in float64, and its trainings by name: before, and as they ended."""

    folder: Path
    jobs: dict[str, grokd.Job]
    before: dict[str, dict[str, Tensor]]
    readings: list[Tensor]  # DeDiER's weights after each epoch


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """Teachers, a biased model and all students of the recipe above."""
    folder = write_images(tmp_path_factory.mktemp("rivals"), per_group=5)
    with open(folder / "tiny.py", "a") as recipe:
        recipe.write(STUDENTS)
    jobs, before, fit = dict[str, grokd.Job](), dict[str, dict[str, Tensor]](), grokd.fit
    readings: list[Tensor] = []

    def spied(job: grokd.Job, runtime: grokd.Runtime) -> grokd.Progress:
        name = job.artefact.name.split("/")[1]
        jobs[name], before[name] = job, copy.deepcopy(job.model.state_dict())
        after_epoch = job.after_epoch

        def read(epoch: int) -> None:
            after_epoch(epoch)
            readings.append(job.model.samples.weights.clone())  # type: ignore

        if name == "dedier":
            job.after_epoch = read
        return fit(job, runtime)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(grokd, "fit", spied)
        patch.setattr(grokd, "BLOCK", 4)  # as a herd has it: several blocks of few images
        grokd.command_line(["run", "tiny.py", "--precision", "float64"])
        yield Made(folder, jobs, before, readings)


def weights_of(folder: Path, student: str) -> dict[str, Tensor]:
    return load_file(folder / f"runs/tiny/students/{student}/seed0/model.safetensors")


def test_dediers_readout_never_changes_the_student(made: Made) -> None:
    """With beta 0 every weight is 1: the bits are AVER's, batch norm statistics included."""
    one, other = (weights_of(made.folder, name) for name in ("average", "dedier-beta0"))
    assert one.keys() == other.keys() and any("running_mean" in key for key in one)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_dedier_weighs_anew_after_every_epoch_but_the_last(made: Made) -> None:
    first, second, last = made.readings
    for weights in (first, second):
        assert weights.shape == (20,) and ((weights == 1) | (weights > math.e)).all()
        assert 0 < (weights > 1).sum() < 20
    assert (second < first).any() and (second > first).any()  # neither kept nor a maximum
    assert torch.equal(last, second)


def test_dediers_readout_is_trained_as_literally(made: Made) -> None:
    """Batches of four in the seed's order, once; the weights of all images by what it then says."""
    job, runtime = made.jobs["dedier"], grokd.Runtime.start("float64")
    model: Any = job.model
    tap, train = grokd.Tap(model, ["layer1"], 16), job.store.split("train")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grokd, "BLOCK", 4)
        ours = grokd.weights_by_readout(job, tap, 3, runtime)
    torch.manual_seed(3)
    readout = grokd.Readout(tap.widths["layer1"], 2).double()
    optimizer = torch.optim.Adam(readout.parameters(), grokd.READOUT_LR)
    labels = torch.from_numpy(job.store.labels[train])
    with torch.no_grad():
        images = job.store.view(train, torch.device("cpu"))
        model.eval().features(images.double())
    maps = tap.maps["layer1"]
    for four in np.split(grokd.permutation(20, 3), 5):
        loss = torch.nn.functional.cross_entropy(readout(maps[four]), labels[four])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    literal = grokd.readout_weights(readout(maps).detach(), labels, 0.05, 4.0)
    torch.testing.assert_close(ours, literal)


def test_dedier_weighs_by_a_readout_that_learns(made: Made) -> None:
    job = made.jobs["dedier"]
    state = copy.deepcopy(job.model.state_dict())
    runtime = grokd.Runtime.start("float64")
    tap = grokd.Tap(job.model, ["layer1"], 16)  # type: ignore[arg-type]
    again = [grokd.weights_by_readout(job, tap, seed, runtime) for seed in (1, 1, 2)]
    assert torch.equal(again[0], again[1]) and not torch.equal(again[0], again[2])
    assert all(torch.equal(state[key], value) for key, value in job.model.state_dict().items())
    assert all(parameter.grad is None for parameter in job.model.parameters())


def test_jtt_weighs_what_the_biased_model_gets_wrong(made: Made) -> None:
    job = made.jobs["jtt-cnn2"]
    biased = grokd.load_model(made.folder / "runs/tiny/bias-model/model.safetensors")
    train = job.store.split("train")
    images = job.store.view(train, torch.device("cpu"), 0, 0)
    wrong = biased(images).argmax(-1) != torch.from_numpy(job.store.labels[train])
    assert 0 < wrong.sum() < 20
    samples: Any = job.model.samples
    assert torch.equal(samples.weights, torch.where(wrong, 3.0, 1.0).double())


def test_simkd_trains_trunk_and_projector_under_its_teachers_head(made: Made) -> None:
    before, after = made.before["simkd"], weights_of(made.folder, "simkd")
    teacher = load_file(made.folder / "runs/tiny/teachers/0/dfr.safetensors")
    refitted = weights_of(made.folder, "simkd-dfr")
    for key in ("fc.weight", "fc.bias"):
        assert torch.equal(after[key], teacher[key])
        assert not torch.equal(after[key], refitted[key])
    for key in ("projector.1.weight", "projector.4.weight", "projector.8.weight"):
        assert float((after[key].norm() - before[key].double().norm()).abs()) > 1e-3
    assert not torch.equal(after["stem.0.weight"], before["trunk.stem.0.weight"].double())
    path = made.folder / "runs/tiny/students/simkd/seed0/model.history.json"
    losses = [epoch["loss"] for epoch in json.loads(path.read_text())["epochs"]]
    assert losses[-1] < 0.7 * losses[0]


def test_simkd_of_teachers_that_began_alike_stands_under_their_mean_head(tmp_path: Path) -> None:
    folder = write_images(tmp_path, per_group=5)
    start = grokd.build_model("resnet8", "random", 2, grokd.Input(), 0)
    save_file(start.plain_state(), folder / "start.safetensors")
    with open(folder / "tiny.py", "a") as recipe:
        recipe.write(STUDENTS + """
given = replace(recipe.teachers, weights=("start.safetensors",))
both = {"simkd": recipe.students["simkd"]}
recipe = replace(recipe, teachers=given, students=both)
""")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for stage in ("teachers", "distill"):
            grokd.command_line([stage, "tiny.py"])
    after = weights_of(folder, "simkd")
    teachers = [load_file(folder / f"runs/tiny/teachers/{i}/dfr.safetensors") for i in (0, 1)]
    assert not torch.equal(teachers[0]["fc.weight"], teachers[1]["fc.weight"])
    for key in ("fc.weight", "fc.bias"):
        mean = (teachers[0][key].double() + teachers[1][key].double()) / 2
        torch.testing.assert_close(after[key].double(), mean, rtol=1e-6, atol=1e-7)


def test_simkd_student_loads_and_is_scored_like_any_other(made: Made) -> None:
    path = made.folder / "runs/tiny/students/dett/seed0/model.safetensors"
    model = grokd.load_model(path)
    images = torch.rand(3, 3, 16, 16).double()
    trained = made.jobs["dett"].model.eval()
    torch.testing.assert_close(model(images), trained(images), rtol=1e-9, atol=1e-9)
    results = json.loads((made.folder / "runs/tiny/results.json").read_text())
    assert {"simkd", "simkd-dfr", "dett"} <= {row["name"] for row in results["rows"]}
    sizes = {row["name"]: row["parameters"] for row in results["sizes"]["rows"]}
    projector: Any = made.jobs["simkd"].model.projector
    added = sum(each.numel() for each in projector.parameters())
    assert sizes["simkd"] == sizes["simkd-dfr"] == sizes["average"] + added
    assert not [key for key in load_file(path) if key.startswith(("samples", "adapters"))]


def test_simkd_student_runs_without_grokd_as_the_page_says(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = made.folder / "runs/tiny/students/shipped/seed0/model.safetensors"
    monkeypatch.chdir(path.parent)
    page = (ROOT / "recipes" / "README.md").read_text()
    code, = re.findall(r"```python\n(import json\n.*?)```", page, re.DOTALL)
    assert "grokd" not in code
    names: dict[str, Any] = {}
    exec(code, names)
    images = torch.rand(2, 3, 16, 16)
    reference = grokd.load_model(path).float()
    seen = (images - reference.mean) / reference.std
    torch.testing.assert_close(names["model"].float().eval()(seen), reference(images))


def test_student_goes_on_from_a_simkd_student(made: Made) -> None:
    path = made.folder / "runs/tiny/students/simkd/seed0/model.safetensors"
    model = grokd.build_model("resnet8", str(path), 2, Input(), 0)
    assert model.projection == grokd.load_model(path).projection
    kept = model.projector
    grokd.add_projector(model, 16, torch.zeros(1, 64, 4, 4), seed=1)
    assert model.projector is kept
    assert grokd.trunk_key(model) != grokd.trunk_key(grokd.Classifier("resnet8", 2, Input()))


def test_weights_survive_kills_and_are_those_of_one_process(made: Made, tmp_path: Path) -> None:
    """On two processes: the figures of one, and killed (kill -9) amid an epoch the same bits."""
    flags = ["--precision", "float64", "--parallel", "data", "--checkpoint-minutes", "1e-9"]
    herd = Herd()
    for name in ("whole", "killed"):
        write_images(tmp_path / name, per_group=5)
        shutil.copy(made.folder / "tiny.py", tmp_path / name)
        for part in ("teachers", "bias-model"):
            shutil.copytree(made.folder / "runs/tiny" / part, tmp_path / name / "runs/tiny" / part)
    ended = herd.run(tmp_path / "whole", 2, "distill", "tiny.py", *flags, "--student", *NO_NORM)
    assert ended.codes == [0, 0], ended.errors
    for rank, name in enumerate(("dedier-cnn2", "dro-cnn2")):
        command = ["distill", "tiny.py", *flags, "--student", name]
        herd.run(tmp_path / "killed", 2, *command, place="training", rank=rank)
        ended = herd.run(tmp_path / "killed", 2, *command)
        assert "goes on at step" in ended.printed[0], ended.errors
        killed, whole = (weights_of(tmp_path / folder, name) for folder in ("killed", "whole"))
        assert all(torch.equal(whole[key], killed[key]) for key in whole), name
    herd.close()
    for name in NO_NORM:
        one, two = weights_of(made.folder, name), weights_of(tmp_path / "whole", name)
        for key in one:
            torch.testing.assert_close(one[key], two[key], rtol=0, atol=1e-7)


# What has no effect, what has no sense


@pytest.mark.parametrize(("change", "told"), [
    ({"loss": "simkd", "weighting": "agre"}, "simkd' compares maps.* set weighting = 'average'"),
    ({"loss": "simkd", "weighting": "one-hot"}, "set weighting = 'average'"),
    ({"sample_weights": "jtt", "mix": "cutmix"}, "shows mixtures: set mix = 'none'"),
    ({"sample_weights": "group-dro", "augmented": "config"}, "needs the group of every image"),
    ({"sample_weights": "group-dro", "micro_batch": 4}, "group-dro work on whole batches"),
])
def test_combinations_without_sense_are_refused(change: dict[str, Any], told: str) -> None:
    train = {key: change.pop(key) for key in ("mix", "micro_batch") if key in change}
    student = replace(Distill("average"), **change)
    student = replace(student, train=replace(student.train, **train))
    with pytest.raises(Problem, match=told):
        grokd.check_student(student, "students['x']", Teachers(), grokd.BiasModel())


@pytest.mark.parametrize(("student", "idle"), [
    (Distill("average"), {"upweight", "readout_alpha", "readout_beta", "dro_step"}),
    (Distill("average", loss="simkd"), {"alpha", "tau", "combine", "gamma", "layers"}),
    (Distill("one-hot", sample_weights="jtt"), {"sample_weights", "upweight"}),
])
def test_options_without_effect_warn(student: Distill, idle: set[str]) -> None:
    inactive = {setting.name for setting in grokd.settings_in(student) if not setting.active}
    assert idle <= inactive


def test_students_without_them_are_what_they_were() -> None:
    settings = grokd.settings_of(Distill())
    assert not {"loss", "sample_weights", "upweight", "readout_alpha", "dro_step"} & {*settings}
    assert grokd.settings_of(Distill(sample_weights="jtt"))["upweight"] == 20
    assert Distill("average").has_biased is False
    assert Distill("average", sample_weights="jtt").has_biased is True


@pytest.mark.parametrize("hidden", ["all", "one"])
def test_group_dro_without_attributes_is_refused(hidden: str) -> None:
    recipe = grokd.load_recipe("digits")
    student = replace(recipe.students["average"], sample_weights="group-dro")
    recipe = replace(recipe, students={"dro": student})
    store: Any = SimpleNamespace(num_unknown=int(hidden == "one"), num_attributes=1)
    with pytest.raises(Problem, match=r"students\['dro'\].sample_weights = 'group-dro' needs the"):
        grokd.check_attributes(recipe, store)


def test_jtt_without_mistakes_warns(capsys: pytest.CaptureFixture[str]) -> None:
    store: Any = SimpleNamespace(split=lambda name: np.arange(3))
    artefact: Any = SimpleNamespace(name="students/jtt/seed0/model")
    settings = Distill("average", sample_weights="jtt")
    job = grokd.Job(
        artefact, nn.Module(), settings, settings.train, store, 0, grokd.label_losses)
    targets: Any = SimpleNamespace(wrong=lambda: torch.zeros(3, dtype=torch.bool))
    samples: Any = grokd.sample_weights(job, targets, ONE)
    assert samples.weights.tolist() == [1, 1, 1]
    assert "gets every training image right, so sample_weights" in capsys.readouterr().out

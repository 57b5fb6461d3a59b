"""Guided generation: gradients, acceptance, independence of batches, commands, rebalancing."""

import contextlib
import csv
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, SETS_OF_IMAGES, Run, write_images
from PIL import Image
from test_processes import TWO, processes
from torch import Tensor

import grokd
from grokd import Augment, Classifier, Data, Generator, Input, Judge, Problem, Runtime, Store


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return Runtime.start("float64")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    folder = write_images(tmp_path / "images", per_group=4)
    return grokd.open_store(Data(size=16, crop=12, attribute_column="place",
                                 store=str(folder / "store")), str(folder))


def network(seed: int) -> Classifier:
    model = grokd.build_model("cnn2", "random", 2, Input(), seed).double()
    with torch.no_grad():
        model.head.weight.mul_(20)  # sure of something
    return model.eval().requires_grad_(False)


SETTINGS = Augment(steps=2, iterations=5, realism=1.0, in_flight=3, min_teacher=0.6,
                   max_student=0.4)


def judge(store: Store, settings: Augment = SETTINGS) -> Judge:
    return Judge([network(0), network(1)], network(2), store, settings)


def make(source: str, settings: Augment, store: Store, runtime: Runtime) -> Generator:
    return Generator(source, settings, store.class_names, store.data.size, runtime)


@pytest.mark.parametrize("objective", ["power", "log", "margin"])
def test_terms_equal_the_formula(objective: Any) -> None:
    torch.manual_seed(0)
    teachers, student = torch.randn(3, 4, 5).double(), torch.randn(4, 5).double()
    labels = torch.tensor([0, 4, 2, 2])
    of_t, of_f = grokd.guidance(teachers, student, labels, objective, 2.0)
    for i, y in enumerate(labels.tolist()):
        t = float(np.mean([z[i].softmax(-1)[y] for z in teachers]))
        f = float(student[i].softmax(-1)[y])
        expected = {"power": (t**2, (1 - f) ** 2), "log": (np.log(t), np.log(1 - f))}
        if objective == "margin":
            def margin(z: Tensor, y: int = y) -> float:
                return float(z[y] - max(v for j, v in enumerate(z.tolist()) if j != y))

            expected["margin"] = (float(np.mean([margin(z[i]) for z in teachers])),
                                  -margin(student[i]))
        assert (float(of_t[i]), float(of_f[i])) == pytest.approx(expected[objective])


@pytest.mark.parametrize("objective", ["power", "log", "margin"])
@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler",
                                       "DPMSolverMultistepScheduler"])
def test_gradient_matches_finite_differences_and_models_do_not_change(
    pixels: str, store: Store, runtime: Runtime, objective: Any, strength: float, scheduler: str
) -> None:
    settings = replace(SETTINGS, objective=objective, strength=strength, scheduler=scheduler)
    generator, judges = make(pixels, settings, store, runtime), judge(store, settings)
    models = [*judges.teachers, judges.student, generator.unet]
    before = [[p.clone() for p in m.state_dict().values()] for m in models]
    labels, keys = torch.tensor([0, 1]), [11, 12]
    z = torch.cat([generator.begin(store.raw(np.array([i])), key) for i, key in
                   zip((0, 9), keys, strict=True)]).requires_grad_()

    def value(z: Tensor) -> Tensor:
        found = judges.logits(generator.images(z, labels, keys))
        return torch.stack(grokd.guidance(*found, labels, objective, settings.exponent)).sum()

    images = generator.images(z, labels, keys)
    upward, figures = judges.gradient(images, labels, keys, [0, 0])
    ours = torch.autograd.grad(images, z, upward)[0]
    assert ours.flatten(1).norm(dim=1).min() > 0
    assert all(figures[f"{who}_gradient"].min() > 0 for who in ("teacher", "student"))
    direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        slope = (value(z + 1e-6 * direction) - value(z - 1e-6 * direction)) / 2e-6
    if scheduler in ("DDIMScheduler", "DDPMScheduler"):  # the others round to float32
        torch.testing.assert_close((ours * direction).sum(), slope, rtol=1e-4, atol=1e-8)
    for model, states in zip(models, before, strict=True):
        assert all(p.grad is None for p in model.parameters())
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), states,
                                                     strict=True))


def records(source: str, store: Store, runtime: Runtime, settings: Augment,
            sources: list[int]) -> dict[int, dict[str, Any]]:
    made = make(source, settings, store, runtime)
    return {r["source"]: r for r in
            grokd.generate(made, judge(store, settings), store, sources, seed=3)}


@pytest.mark.parametrize("optimizer, step", [("normalised", 0.1), ("adam", 0.05),
                                             ("nesterov", 5.0)])
@pytest.mark.parametrize("more", [{}, {"cutouts": 2, "noise": 0.1, "norm": "regularise"}])
def test_result_does_not_depend_on_the_batch(
    pixels: str, store: Store, runtime: Runtime, optimizer: Any, step: float, more: Any
) -> None:
    settings = replace(SETTINGS, optimizer=optimizer, step_size=step, **more)
    sources = [0, 3, 5, 8, 12]
    together = records(pixels, store, runtime, replace(settings, in_flight=5), sources)
    for source in sources:
        alone = records(pixels, store, runtime, replace(settings, in_flight=1), [source])[source]
        assert alone["accepted"] == together[source]["accepted"]
        assert np.array_equal(alone["image"], together[source]["image"])
        for key in ("score", "teacher", "student", "teacher_before", "student_before"):
            assert alone[key] == pytest.approx(together[source][key], abs=1e-8)


def test_latents_of_a_batch_agree_to_eight_digits(
    pixels: str, store: Store, runtime: Runtime
) -> None:
    """Five iterations by hand, alone and together: images are rounded, latents are not."""
    generator, judges = make(pixels, SETTINGS, store, runtime), judge(store)
    found = []
    for group in ([0, 5, 9], [5]):
        labels = torch.from_numpy(store.labels[group])
        samples = [grokd.Sample(i, i, 0, z := generator.begin(store.raw(np.array([i])), i)[0],
                                float(z.norm()), [torch.zeros_like(z), torch.zeros_like(z)])
                   for i in group]
        for iteration in range(5):
            z = torch.stack([s.z for s in samples]).requires_grad_()
            images = generator.images(z, labels, group)
            upward, _ = judges.gradient(images, labels, group, [iteration] * len(group))
            gradient = torch.autograd.grad(images, z, upward)[0]
            for sample, own in zip(samples, gradient, strict=True):
                grokd.climb(sample, own, SETTINGS)
        found.append(samples[group.index(5)].z)
        assert float(found[-1].norm()) == pytest.approx(samples[group.index(5)].norm)  # kept
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-8)


def test_guidance_raises_j_and_first_passing_iterate_is_kept(
    pixels: str, store: Store, runtime: Runtime
) -> None:
    sources = [int(i) for i in store.split("train")]
    found = records(pixels, store, runtime, replace(SETTINGS, iterations=20), sources)
    accepted = [r for r in found.values() if r["accepted"]]
    assert accepted and len(found) == len(sources)
    for record in accepted:
        assert record["teacher"] >= 0.6 and record["student"] <= 0.4
        t, f, _, right = judge(store).scores(record["image"][None], torch.tensor([record["label"]]))
        assert bool(right)
        assert (float(t), float(f)) == pytest.approx((record["teacher"], record["student"]))
        if record["iterations"]:
            fewer = replace(SETTINGS, iterations=record["iterations"] - 1)
            again = records(pixels, store, runtime, fewer, [record["source"]])[record["source"]]
            assert not again["accepted"]
    for record in found.values():
        start = record["teacher_before"] + 1 - record["student_before"]
        assert record["score"] >= start - 1e-9 or record["accepted"]


def test_unguided_images_are_the_first_iterates(
    pixels: str, store: Store, runtime: Runtime
) -> None:
    plain = records(pixels, store, runtime, replace(SETTINGS, guided=False), [0, 5])
    first = records(pixels, store, runtime, replace(SETTINGS, iterations=0), [0, 5])
    for source in (0, 5):
        assert plain[source]["accepted"] and plain[source]["iterations"] == 0
        assert np.array_equal(plain[source]["image"], first[source]["image"])


@pytest.mark.parametrize("change", [
    {}, {"guidance_scale": 3.0}, {"steps": 1, "strength": 1.0, "scheduler": ""},
])
def test_stable_diffusion_is_guided_too(
    stable_diffusion: str, store: Store, runtime: Runtime, change: Any
) -> None:
    settings = replace(SETTINGS, prompt="a {}", **change)
    generator = make(stable_diffusion, settings, store, runtime)
    assert generator.side == 16 and generator.text is not None
    found = records(stable_diffusion, store, runtime, settings, [0, 9])
    assert all(r["image"].shape == (3, 16, 16) for r in found.values())
    z = generator.begin(store.raw(np.array([0])), 1).requires_grad_()
    images = generator.images(z, torch.tensor([0]), [1])
    assert torch.autograd.grad(images.sum(), z)[0].abs().max() > 0
    assert torch.isfinite(generator.realism(store.raw(np.array([0])), torch.tensor([0]))).all()


def test_generators_that_cannot_be_used_are_one_line(
    pixels: str, stable_diffusion: str, store: Store, runtime: Runtime, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(Problem, match="could not be loaded"):
        make(str(tmp_path / "nothing"), SETTINGS, store, runtime)
    index = Path(pixels) / "model_index.json"
    other = tmp_path / "other"
    other.mkdir()
    (other / "model_index.json").write_text(index.read_text().replace("DDPM", "Flux"))
    with pytest.raises(Problem, match="is a FluxPipeline: it must be"):
        make(str(other), SETTINGS, store, runtime)
    with pytest.raises(Problem, match="no scheduler 'Nonsense'"):
        make(pixels, replace(SETTINGS, scheduler="Nonsense"), store, runtime)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Problem, match="needs the package transformers"):
        make(stable_diffusion, SETTINGS, store, runtime)


@pytest.mark.parametrize("change, told", [
    ({"in_channels": 1, "out_channels": 1}, "takes 1 channels and gives 1, not 3 and 3"),
    ({"out_channels": 6}, "takes 3 channels and gives 6, not 3 and 3"),
    ({"class_embed_type": "timestep"}, r"an embedding of classes \(timestep\)"),
    ({"num_class_embeds": 1}, "knows 1 classes, the data have 2: take one"),
])
def test_networks_that_do_not_fit_the_data_are_one_line(
    pixels: str, store: Store, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, change: Any,
    told: str,
) -> None:
    from diffusers import UNet2DModel

    pipeline = grokd.load_pipeline(pixels)
    pipeline.unet = UNet2DModel.from_config({**pipeline.unet.config, **change})
    monkeypatch.setattr(grokd, "load_pipeline", lambda source: pipeline)
    with pytest.raises(Problem, match=told) as refusal:
        make(pixels, SETTINGS, store, runtime)
    assert "\n" not in str(refusal.value)


def test_images_that_look_unreal_are_rejected(
    pixels: str, store: Store, runtime: Runtime
) -> None:
    settings = replace(SETTINGS, realism=0.9, iterations=20)
    sources = [int(i) for i in store.split("train")]
    real = {}
    for threshold in (float("inf"), 0.0):
        judges = judge(store, settings)
        judges.threshold = threshold
        generator = make(pixels, settings, store, runtime)
        real[threshold] = list(grokd.generate(generator, judges, store, sources, seed=3))
    assert any(r["accepted"] for r in real[float("inf")])
    assert not any(r["accepted"] for r in real[0.0])
    assert sum(r["judged"] for r in real[0.0]) > sum(r["judged"] for r in real[float("inf")]) > 0


def test_realism_rejects_only_where_every_group_passes(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Losses:
        device = torch.device("cpu")
        rare = 0.0

        def realism(self, raw: np.ndarray, labels: Tensor) -> Tensor:
            first = bool(labels[0] == 0) and len(seen) == 0
            seen.append(1)
            return torch.arange(len(labels)).double() / 10 + (self.rare if first else 0)

    seen: list[int] = []
    losses: Any = Losses()
    assert grokd.calibrate(losses, store, 1.0) == pytest.approx(0.3)  # 4 images of each group
    seen.clear()
    losses.rare = 9.0
    assert grokd.calibrate(losses, store, 0.7) == float("inf")
    assert "under 80 % in a group, so it is reported" in capsys.readouterr().out


def test_sources_are_chosen_by_confidence() -> None:
    labels = np.array([0, 0, 1, 1])
    p = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.8, 0.2], [0.3, 0.7]])  # f_y .9 .6 .2 .7
    def pick(**change: Any) -> list[int]:
        return grokd.pick_sources(Augment(**change), p, labels).tolist()

    assert pick() == [2, 1]
    assert pick(sources="most-confident", count=3) == [0, 3, 1]
    assert pick(sources="least-certain", count=2) == [1, 3]
    assert pick(sources="misclassified", share=0.0) == [2]
    plain = Augment(guided=False)
    assert grokd.matters(plain, "share")
    assert not grokd.matters(replace(plain, sources="misclassified"), "share")
    assert sorted(pick(sources="all")) == [0, 1, 2, 3]
    assert pick(balanced=True) == [1, 2]


@pytest.mark.parametrize("change", [
    {"sources": "all"}, {"share": 0.3}, {"count": 3}, {"balanced": True},
])
def test_another_choice_of_sources_is_another_set(change: dict[str, Any]) -> None:
    """Of guided sets too; one image for each of another set's has no such choice."""
    alike = Augment(guided=False, like="config")
    for settings in (Augment(), Augment(guided=False)):
        assert grokd.settings_of(replace(settings, **change)) != grokd.settings_of(settings)
    assert grokd.settings_of(replace(alike, **change)) == grokd.settings_of(alike)


def test_processes_share_the_prediction_that_chooses_sources(
    store: Store, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Runtime] = []

    def predict(models: Any, store: Store, indices: np.ndarray, runtime: Runtime) -> Tensor:
        asked.append(runtime)
        return torch.zeros(1, len(indices), 2)

    monkeypatch.setattr(grokd, "predict", predict)
    ctx: Any = SimpleNamespace(store=store)
    together = replace(runtime, shared=True)
    assert len(grokd.sources_of(SETTINGS, 0, judge(store), ctx, together)) == 8
    assert asked == [together]


def test_rebalanced_training_shows_clusters_alike(store: Store) -> None:
    train = store.split("train")
    clusters = np.where(np.arange(len(train)) < 3, 1, 0)
    even = grokd.rebalanced(store, clusters, np.zeros(len(train), int))
    shown = np.bincount(np.isin(even.split("train"), train[:3]).astype(int))
    assert shown[0] == shown[1] == len(train) - 3
    assert even.fingerprint != store.fingerprint
    assert (even.counts("train") == store.counts("train")).all()


def test_tab_finds_the_samples_whose_loss_falls_late() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 30)
    late = np.tile(np.arange(30) < 5, 2)
    losses = np.where(late, 2.0, 0.2) + 0.05 * rng.normal(size=(6, 60))
    clusters = grokd.loss_clusters(losses, labels, 0)
    for y in (0, 1):
        members = labels == y
        assert len(set(clusters[members & late])) == len(set(clusters[members & ~late])) == 1
        assert set(clusters[members]) <= {2 * y, 2 * y + 1}
    alone = np.where(np.arange(60) == 7, 2, labels)  # a class of one image; a seed of more bits
    assert grokd.loss_clusters(losses, alone, 2**40)[7] == 4


def test_generated_images_join_the_training_set(store: Store) -> None:
    images = np.full((3, 3, 16, 16), 7, np.uint8)
    union = grokd.enlarge(store, images, np.array([0, 1, 1]), 0.0)
    train = union.split("train")
    assert len(train) == len(store.split("train")) + 3
    assert union.labels[train[-3:]].tolist() == [0, 1, 1]
    mixed = union.raw(train[[0, -1, 1]])
    assert (mixed[1] == 7).all()
    assert np.array_equal(mixed[[0, 2]], store.raw(train[:2]))
    half = grokd.enlarge(store, images, np.array([0, 1, 1]), 0.5)
    assert len(half.split("train")) == 1.5 * len(store.split("train"))
    many = np.arange(40).astype(np.uint8)[:, None, None, None] * np.ones((3, 16, 16), np.uint8)
    part = grokd.enlarge(store, many, np.zeros(40, int), 8 / len(store.split("train")))
    shown = part.raw(part.split("train")[-8:])[:, 0, 0, 0].tolist()
    assert len({*shown}) == 8 and max(shown) > 20  # not the first ones, in their sources' order
    assert (union.counts("test") == store.counts("test")).all()


SETS = SETS_OF_IMAGES + '''
recipe = grokd.replace(recipe, students={
    "kd-config": grokd.replace(kd, augmented="config", augmented_ratio=0.5),
    "kd-plain": grokd.replace(kd, augmented="plain", start="kd"),
    "helper": grokd.replace(kd, weighting="one-hot", augmented="config"),
    "both": grokd.replace(kd, augmented="config", rebalance="tab", helper="helper"),
    "tab": grokd.replace(kd, rebalance="tab"),
    "kd": kd,
})
'''


@pytest.mark.parametrize("change, told", [
    ({"augmented": "confg"}, r"augmented = 'confg' names nothing; did you mean config"),
    ({"start": "kdd"}, r"start = 'kdd' names nothing; did you mean kd"),
    ({"rebalance": "tab", "helper": "none"}, r"helper = 'none' names nothing"),
    ({"start": "kd"}, r"kd wait for each other"),
    ({"augmented": "config"}, r"config, kd wait for each other"),
])
def test_unknown_references_and_circles_are_refused_before_any_work(change: Any, told: str) -> None:
    recipe = grokd.load_recipe("digits_augment")
    students = {"kd": replace(recipe.students["kd"], **change)}
    with pytest.raises(Problem, match=told):
        grokd.check_recipe(replace(recipe, students=students, augments=recipe.augments), "mine")


@pytest.mark.parametrize("change", [
    {"augmented": ""}, {"augmented": "unguided"}, {"augmented_ratio": 0.5},
    {"rebalance": "classes"},
])
def test_a_helper_that_saw_other_images_is_refused_before_any_work(change: Any) -> None:
    recipe = grokd.load_recipe("digits_augment")
    students = {**recipe.students, "helper": replace(recipe.students["helper"], **change)}
    told = r"\['kd-config-tab'\].helper = 'helper' learns from other images.* augmented = 'config'"
    with pytest.raises(Problem, match=told):
        grokd.check_recipe(replace(recipe, students=students), "mine")


def test_a_missing_generator_is_told_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Problem, match="no folder runs/digits_augment/generator/pipeline: name one"):
        grokd.command_line(["run", "digits_augment_absent"])
    assert not list(tmp_path.iterdir())
    for name in ("config", "unguided"):  # finished sets need it no more
        done = tmp_path / f"runs/digits_augment_absent/augmented/{name}/seed0/done.json"
        done.parent.mkdir(parents=True)
        done.write_text("{}")
    monkeypatch.setattr(grokd.Runtime, "start", lambda precision: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        grokd.command_line(["run", "digits_augment_absent", "--seeds", "0"])


def context(folder: Path, file: str, *makes: str) -> grokd.Context:
    """A recipe at work in a folder."""
    recipe = grokd.load_recipe(str(folder / file))
    store = grokd.open_store(recipe.data, str(folder))
    return grokd.Context("", recipe, store, folder / "runs/tiny", Runtime.start("float32"),
                         grokd.Common(), makes, recipe.students, recipe.augments)


def command(*args: str) -> None:
    """A command with tiny.py in this process, without the seconds that a start takes."""
    grokd.command_line([args[0], "tiny.py", *args[1:]])


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*[0-9].png")}


def test_whole_command_makes_a_data_set_and_adds_nothing_when_repeated(
    tmp_path: Path, grokd_process: Run, store: Store, runtime: Runtime,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    folder = write_images(tmp_path)
    monkeypatch.chdir(folder)
    (folder / "tiny.py").write_text((folder / "tiny.py").read_text() + SETS)
    run = grokd_process("run", "tiny.py", cwd=folder).stdout
    assert run.index("memory: ") < run.index("augmented/config/seed0/done: ")
    made = folder / "runs/tiny/augmented/config/seed0"
    with open(made / "metadata.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows and {"label", "source", "seed", "iterations", "teacher_before", "student",
                     "realism", "generator", "settings"} <= rows[0].keys()
    model = grokd.load_model(folder / "runs/tiny/students/kd/seed0/model.safetensors")
    for row in rows:  # the confidence is that of the written file
        pixels = np.asarray(Image.open(made / row["image"])).transpose(2, 0, 1)
        logits = model(torch.tensor(pixels[None, :, 2:14, 2:14] / 255).float())
        p = float(logits.softmax(-1)[0, int(row["label"])])
        assert p == pytest.approx(float(row["student"]), abs=1e-4)
    assert (made / "sheet.png").is_file() and list((made / "tensorboard").rglob("events*"))
    report = (folder / "runs/tiny/report.md").read_text()
    assert all(name in report for name in ("kd-config", "kd-plain", "both", "tab"))
    plain = folder / "runs/tiny/augmented/plain/seed0"
    assert pictures(plain).keys() == {row["image"] for row in rows}
    alone = Augment(strength=1.0, steps=3)  # from noise alone: from the last noise level
    generator = make(str(folder / "runs/tiny/generator/pipeline"), alone, store, runtime)
    assert int(generator.scheduler.timesteps[0]) == len(generator.noising.timesteps) - 1

    before = pictures(made)
    flagged = folder / "runs/tiny/students/made-with-flags"  # of generated images, by its file
    shutil.copytree(flagged.with_name("kd-config"), flagged)
    rows_of = {model.row for model in grokd.find_models(context(folder, "tiny.py"))[0]}
    assert {"kd-config", "made-with-flags"} <= rows_of
    command("augment", "--set", "config")
    assert pictures(made) == before
    command("augment", "--set", "config", "--iterations", "2")
    assert (folder / "runs/tiny/augmented/config+iterations=2/seed0/metadata.csv").is_file()

    capsys.readouterr()
    command("augment", "--redo")
    printed = capsys.readouterr().out
    assert printed.count(" accepted, ") == 2 and printed.count("generator: UNet of ") == 1
    assert pictures(made) == before

    (made / "done.json").unlink()
    with pytest.raises(Problem, match="nothing that says from where"):
        command("augment", "--set", "config")
    assert pictures(made) == before
    shutil.rmtree(made)
    processes(TWO, "augment", "tiny.py", "--set", "config", cwd=folder)
    assert pictures(made).keys() == before.keys()

    for path in (made, folder / "runs/tiny/generator"):
        shutil.rmtree(path)
    with open(folder / "tiny.py", "a") as recipe:
        recipe.write("wild = grokd.replace(recipe.diffusion, lr=1e30)\n"
                     "recipe = grokd.replace(recipe, diffusion=wild)\n")
    with pytest.raises(Problem, match="generator/done: the loss is nan by step"):
        command("augment", "--set", "config")
    models, left_out = grokd.find_models(context(folder, "tiny.py"))
    assert {"kd", "kd-config", "made-with-flags"} & {model.row for model in models} == {"kd"}
    assert any("made-with-flags" in each and "parent augmented/config" in each for each in left_out)
    assert not (folder / "runs/tiny/generator/done.json").exists()


def test_killed_augmentation_goes_on_with_the_images_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_images(tmp_path, per_group=12)
    monkeypatch.chdir(folder)
    text = SETS.replace("iterations=3, min_teacher=0.0,", "iterations=20, min_teacher=0.9,")
    text = text.replace("max_student=1.0, in_flight=4", "max_student=0.9, in_flight=4, share=1.0")
    (folder / "tiny.py").write_text((folder / "tiny.py").read_text() + text)
    for stage in ("teachers", "bias-model"):
        command(stage)
    command("distill", "--student", "kd")
    augment = [sys.executable, str(ROOT / "grokd.py"), "augment", "tiny.py", "--set", "config"]
    process = subprocess.Popen(augment, cwd=folder, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    made = folder / "runs/tiny/augmented/config/seed0"
    for _ in range(600):
        if (made / "records-0.jsonl").is_file() and grokd.read_records(made):
            break
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    had = {r["source"]: r for r in grokd.read_records(made)}
    assert had and not (made / "done.json").exists()
    flight, = made.glob("done.partial/flight-*")
    state = grokd.read_state(flight)
    assert state["micro_batch"] == 4
    content = io.BytesIO()
    torch.save(state | {"micro_batch": 3}, content)  # as if there had been less memory
    flight.write_bytes(grokd.sealed(content.getvalue()))
    with contextlib.suppress(Problem):  # if none is accepted
        command("augment", "--set", "config")
    assert ", 3 of 4 in flight at a time: " in capsys.readouterr().out
    found = grokd.read_records(made)
    assert len(found) == len({r["source"] for r in found}) == 48
    assert all(r in found for r in had.values())


# Identities


def described(folder: Path, change: str = "") -> grokd.Context:
    """The context of augment for the tiny recipe with SETS and a change."""
    (folder / "sets.py").write_text((folder / "tiny.py").read_text() + SETS + change)
    return context(folder, "sets.py", "augment")


@pytest.mark.parametrize("change, guided, unguided", [
    ("step_size=0.2", True, False), ("noise=0.1", True, False), ("max_student=0.3", True, False),
    ("steps=3", True, True), ("in_flight=2", False, False),
])
def test_settings_of_guidance_do_not_concern_unguided_images(
    images: Path, monkeypatch: pytest.MonkeyPatch, change: str, guided: bool, unguided: bool
) -> None:
    monkeypatch.chdir(images)
    more = ("\nrecipe = grokd.replace(recipe, students={'kd': kd}, augments={"
            "'config': recipe.augments['config'], "
            "'free': grokd.Augment(student='kd', steps=2, guided=False)})\n")
    changed = more + ("recipe = grokd.replace(recipe, augments={k: grokd.replace(v, "
                      f"{change}) for k, v in recipe.augments.items()}})\n")
    before, after = described(images, more), described(images, changed)
    for name, differs in (("config", guided), ("free", unguided)):
        sets = [context.image_set(name, 0).fingerprint for context in (before, after)]
        assert (sets[0] != sets[1]) == differs, name


def test_a_set_is_known_by_what_its_generators_folder_contains(
    images: Path, pixels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(images)
    shutil.copytree(pixels, images / "pipeline")
    more = ("\nwith_folder = grokd.replace(recipe.augments['config'], generator="
            f"{str(images / 'pipeline')!r})\nrecipe = grokd.replace(recipe, students={{'kd': kd}}, "
            "augments={'config': with_folder})\n")
    first = described(images, more).image_set("config", 0)
    again = described(images, more).image_set("config", 0)
    assert first.fingerprint == again.fingerprint
    named = ("recipe = grokd.replace(recipe, data=grokd.replace(recipe.data, "
             "class_names=('cat', 'dog')))\n")  # a prompt names the class
    assert described(images, more + named).image_set("config", 0).fingerprint != first.fingerprint
    weights = next((images / "pipeline" / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    grokd.identify.cache_clear()
    changed = described(images, more).image_set("config", 0)
    assert changed.fingerprint != first.fingerprint
    assert "generator" not in changed.parents and "students/kd/seed0/model" in changed.parents


def generator_of(folder: Path, kill_at: int) -> None:
    """Train the generator alone, in a process that is killed at a checkpoint of that step."""
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import grokd\n"
            "grokd.run_augment = lambda ctx: grokd.train_generator(ctx, ctx.runtime.together())\n"
            "grokd.run_distill = lambda ctx: None\n"
            "sys.argv = ['grokd.py', 'augment', 'sets.py', *sys.argv[1:]]\n"
            "grokd.main()")
    (folder / "train.py").write_text(code)
    command = [sys.executable, "train.py", "--precision", "float64"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    for _ in range(60_000):
        found = (folder / "runs/sets/generator").glob("done.partial/[0-9]*")
        if any(int(p.name) >= kill_at for p in found if p.name.isdecimal()):
            os.kill(process.pid, signal.SIGKILL)
            break
        assert process.poll() is None
        time.sleep(0.001)
    process.wait()


@contextlib.contextmanager
def small_files(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within it, no file of a pipeline may have more than 20,000 bytes, as on a full disk."""
    from diffusers import DDPMPipeline

    save, (soft, hard) = DDPMPipeline.save_pretrained, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(self: Any, folder: Path) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        save(self, folder)

    patch.setattr(DDPMPipeline, "save_pretrained", limited)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def unet(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(next((folder / "runs/sets/generator/pipeline/unet").glob("*.safetensors")))


def test_generator_is_trained_by_the_one_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """TensorBoard, kill -9 and the same bits, a foreign checkpoint refused; two processes, which
    learn image by image, alike."""
    folder = write_images(tmp_path / "whole")
    text = (folder / "tiny.py").read_text() + SETS.replace(
        "num_timesteps=50", "num_timesteps=50, batch_size=4, checkpoint_minutes=1e-9")
    (folder / "sets.py").write_text(text)
    killed = shutil.copytree(folder, tmp_path / "killed")

    def train(where: Path, *flags: str) -> None:
        monkeypatch.chdir(where)
        grokd.command_line(["augment", "sets.py", "--precision", "float64", *flags])

    generator_of(killed, kill_at=3)
    monkeypatch.setattr(grokd, "run_augment",
                        lambda ctx: grokd.train_generator(ctx, ctx.runtime.together()))
    train(folder)
    made = folder / "runs/sets/generator"
    assert {path.name for path in made.iterdir()} == {
        "done.json", "pipeline", "tensorboard", ".lock"}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(made / "tensorboard"))
    events.Reload()
    assert len(events.Scalars("losses/loss")) == 2

    with pytest.raises(Problem, match=r"done.partial/begun.json was made with other"):
        train(killed, "--diffusion.lr", "0.5")
    with monkeypatch.context() as patch, small_files(patch), pytest.raises(
        Problem, match=r"generator/pipeline could not be written .*File too large.*: make room"
    ):
        train(killed)
    train(killed)
    assert "generator/done: goes on at step 8 of 8" in capsys.readouterr().out
    one, again = unet(folder), unet(killed)
    assert all(torch.equal(one[key], again[key]) for key in one)

    shutil.rmtree(killed / "runs/sets/generator")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc_per_node", "2", "train.py", "--precision", "float64",
                "--diffusion.micro-batch", "1"]
    done = subprocess.run(launcher, cwd=killed, capture_output=True, text=True,
                          env=os.environ | {"ACCELERATE_USE_CPU": "true"})
    assert done.returncode == 0, done.stderr
    two = unet(killed)
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-8

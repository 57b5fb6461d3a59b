"""Commands on a tiny data set of files: what they write, refuse and take up again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, Run, write_images
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import grokd
from grokd import Problem

Grokd = Callable[..., str]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Grokd:
    """A grokd command in this process and a given folder; returns what it printed."""

    def run(folder: Path, *args: str) -> str:
        monkeypatch.chdir(folder)
        name = [] if args[0] == "--help" else ["tiny.py"]
        grokd.command_line([args[0], *name, *args[1:]])
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, grokd_process: Run) -> Path:
    """The folder of a finished `run`, made by a real process; not to be changed."""
    folder = write_images(tmp_path_factory.mktemp("finished") / "images")
    (folder / "printed.txt").write_text(grokd_process("run", "tiny.py", cwd=folder).stdout)
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return shutil.copytree(finished, tmp_path / "copy")


def edit_recipe(folder: Path, old: str, new: str) -> None:
    text = (folder / "tiny.py").read_text()
    assert old in text
    (folder / "tiny.py").write_text(text.replace(old, new))


def results(folder: Path, file: str = "results.json") -> dict[str, list[dict[str, object]]]:
    rows = json.loads((folder / "runs" / "tiny" / file).read_text())["rows"]
    return {row["name"]: row["members"] for row in rows}


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "runs" / "tiny" / f"{name}.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_run_makes_every_stage_and_row(finished: Path) -> None:
    assert list(results(finished)) == [
        "teachers, ERM", "teachers, DFR", "teachers' vote, DFR", "biased model", "one-hot",
        "deep ensemble of one-hot", "one-hot-dfr", "deep ensemble of one-hot-dfr", "agre",
    ]
    assert [len(members) for members in results(finished).values()] == [2, 2, 1, 1, 2, 1, 2, 1, 2]
    report = (finished / "runs" / "tiny" / "report.md").read_text()
    assert "| class 1, attribute 1 |    4 |     4 |" in report
    printed = (finished / "printed.txt").read_text()
    assert "| students/agre/seed1/model" in report and "| students/agre" not in printed
    assert "\ntiny.py on cpu, float32, 1 thread; results in runs/tiny, images and " in printed
    chosen = printed.partition("\nShip this one: ")[2].partition("\n\n")[0]
    assert "paired over seeds 0, 1;" in " ".join(chosen.split()) and "  " not in chosen
    assert "report.html" in printed
    assert "| 1 resnet8 DFR |" in printed
    assert "Took " in printed and "GiB of memory" in printed


def test_report_says_what_matters_first_and_holds_its_pictures(finished: Path) -> None:
    out = finished / "runs" / "tiny"
    found = json.loads((out / "results.json").read_text())
    report = (out / "report.md").read_text()
    order = ["# tiny", "## Ship this one", "## Accuracy", "groups.png", "## Sizes", "## Training",
             "## Groups", "## Every model"]
    places = [report.index(each) for each in order]
    assert places == sorted(places)
    page = (out / "report.html").read_text()
    count = report.count("![")
    assert count >= 3 and page.count("data:image/png;base64,") == count and 'src=""' not in page
    sizes = {(row["name"], row["arch"]): row for row in found["sizes"]["rows"]}
    assert sizes["teachers, ERM", "resnet8"]["parameters"] == 77_522
    assert sizes["teachers, ERM", "cnn2"]["models"] == ["teachers/0/erm"]
    assert sizes["agre", "cnn2"]["models"] == [f"students/agre/seed{s}/model" for s in (0, 1)]
    assert (out / "mistakes.png").is_file() and "mistakes.png" in report
    plain, = (row["members"][0]["groups"] for row in found["rows"] if row["name"] == "one-hot")
    sizes_of = {group["name"]: group["images"] for group in found["groups"]}
    wrong = {name: round(size * (1 - accuracy / 100))
             for (name, size), accuracy in zip(sizes_of.items(), plain, strict=True)}
    shown = {group["name"]: group["images"] for group in found["mistakes"]["groups"]}
    assert {name: len(images) for name, images in shown.items()} == {
        name: min(3, count) for name, count in wrong.items() if count}
    assert [wrong[name] for name in shown] == sorted((wrong[n] for n in shown), reverse=True)


def test_damaged_history_leaves_its_curves_out(copy: Path, command: Grokd) -> None:
    path = copy / "runs/tiny/students/agre/seed0/model.history.json"
    path.write_text(path.read_text()[:-9])
    assert f"warning: {path.relative_to(copy)} cannot be read" in command(copy, "eval")
    curves = json.loads((copy / "runs/tiny/results.json").read_text())["training"]
    assert [len(row["loss"]) for row in curves if row["name"] == "agre"] == [2]  # of seed 1


def test_reported_figures_are_those_of_the_saved_models(finished: Path) -> None:
    """Recomputed from the files alone, with other code."""
    from PIL import Image

    member = results(finished)["agre"][1]
    path = finished / "runs" / "tiny" / f"{member['name']}.safetensors"
    model = grokd.load_model(path)
    accuracy = []
    for label in (0, 1):
        for place in (0, 1):
            files = sorted(finished.glob(f"test{label}{place}*.png"))
            hits = 0
            for file in files:
                square = Image.open(file).resize((20, 20), Image.Resampling.BILINEAR)
                pixels = np.asarray(square.crop((2, 2, 18, 18))).transpose(2, 0, 1) / 255
                hits += int(model(torch.from_numpy(pixels).float()[None]).argmax()) == label
            accuracy.append(100 * hits / len(files))
    assert member["groups"] == accuracy
    assert member["wga"] == min(accuracy)


def test_second_run_trains_nothing(copy: Path, command: Grokd) -> None:
    files = sorted((copy / "runs").rglob("*.safetensors"))
    before = [file.stat().st_mtime_ns for file in files]
    printed = command(copy, "run")
    assert [file.stat().st_mtime_ns for file in files] == before
    assert " epochs of " not in printed


def test_students_that_differ_in_the_head_share_a_trunk(finished: Path) -> None:
    own = weights(finished, "students/one-hot/seed0/model")
    dfr = weights(finished, "students/one-hot-dfr/seed0/model")
    differing = {k for k in own if not torch.equal(own[k], dfr[k])}
    assert differing == {"fc.weight", "fc.bias"}


def test_teachers_differ_before_and_share_after_their_trunk(finished: Path) -> None:
    erm, dfr = (weights(finished, f"teachers/1/{head}") for head in ("erm", "dfr"))
    differing = {k for k in erm if not torch.equal(erm[k], dfr[k])}
    assert differing == {"fc.weight", "fc.bias"}
    model = grokd.load_model(finished / "runs" / "tiny" / "teachers" / "1" / "dfr.safetensors")
    assert model.arch == "resnet8"


def test_per_sample_losses_are_recorded_in_training_order(images: Path, command: Grokd) -> None:
    """With learning rate 0 they are those of the initial network."""
    edit_recipe(images, "lr=0.01", "lr=0.0")
    edit_recipe(images, "crop=16", "crop=16, random_crop=False, flip=False")
    command(images, "bias-model", "--kind", "erm", "--weights", "random")
    losses = weights(images, "bias-model/model.losses")["losses"]
    assert losses.shape == (2, 16)
    assert torch.allclose(losses[0], losses[1], atol=1e-6)
    store = grokd.open_store(grokd.load_recipe("tiny.py").data, ".")
    model = grokd.load_model(images / "runs" / "tiny" / "bias-model" / "model.safetensors")
    view = store.view(store.split("train"), torch.device("cpu"))
    labels = torch.from_numpy(store.labels[store.split("train")])
    assert torch.allclose(grokd.cross_entropy(model(view), labels), losses[0], atol=1e-5)


def test_bias_model_may_be_a_teachers_parent(finished: Path) -> None:
    assert same(weights(finished, "bias-model/model"), weights(finished, "teachers/0/erm"))


def test_early_stopped_model_is_the_full_one_cut_short(images: Path, command: Grokd) -> None:
    more = ["--weights", "random", "--epochs", "6", "--schedule", "cosine"]
    command(images, "bias-model", "--kind", "erm", "--out", "runs/full", *more)
    printed = command(images, "bias-model", "--kind", "early-stopped", "--stop-after", "2", *more)
    assert "parameters, 2 epochs of 16 images" in printed
    whole = load_file(images / "runs" / "full" / "bias-model" / "model.losses.safetensors")
    short = weights(images, "bias-model/model.losses")
    assert len(whole["losses"]) == 6
    assert torch.equal(whole["losses"][:2], short["losses"])


def test_gce_is_trained_on_its_own_loss(images: Path, command: Grokd) -> None:
    command(images, "bias-model", "--kind", "gce", "--q", "0.5", "--weights", "random")
    losses = weights(images, "bias-model/model.losses")["losses"]
    assert losses.max() <= 2.0  # 1 / q
    assert losses.min() > 0


@pytest.mark.parametrize("change", [
    ["--space", "batch"], ["--no-normalise"], ["--zero", "drop"],
    ["--combine", "logits"], ["--shrink", "0.5"], ["--weighting", "random"],
    ["--weighting", "ae-kd"], ["--weighting", "eb-kd"], ["--weighting", "ca-mkd"],
    ["--weighting", "average"], ["--alpha", "0.5"], ["--dfr-share", "0.5"], ["--dfr-share", "0"],
    ["--num-teachers", "1"], ["--head", "dfr"], ["--optimizer", "adamw"], ["--select", "best"],
    ["--num-views", "1"], ["--warmup-epochs", "1"], ["--micro-batch", "3"], ["--tau", "1"],
])
def test_flags_change_students_and_show_in_their_names(
    copy: Path, command: Grokd, change: list[str]
) -> None:
    before = weights(copy, "students/agre/seed0/model")
    command(copy, "distill", "--student", "agre", "--seeds", "0", *change)
    names = {path.name for path in (copy / "runs" / "tiny" / "students").iterdir()}
    new = names - {"one-hot", "one-hot-dfr", "agre"}
    assert len(new) == 1
    flag = change[0].removeprefix("--no-").removeprefix("--").replace("-", "_")
    assert f"+{flag}=" in next(iter(new))
    after = weights(copy, f"students/{next(iter(new))}/seed0/model")
    assert all(torch.isfinite(v).all() for v in after.values())
    if change[0] not in ("--select", "--zero"):  # which may come out the same
        assert not same(before, after)


def test_all_parameters_and_logits_agree_on_two_classes(copy: Path, command: Grokd) -> None:
    command(copy, "distill", "--student", "agre", "--seeds", "0", "--space", "parameters")
    ours = weights(copy, "students/agre+space=parameters/seed0/model")
    assert same(ours, weights(copy, "students/agre/seed0/model"))


def test_flagged_students_have_rows_of_their_own(
    copy: Path, command: Grokd, monkeypatch: pytest.MonkeyPatch
) -> None:
    command(copy, "distill", "--student", "agre", "--tau", "2")
    rank, flagged = grokd.rank_students, {"ship": "agre+tau=2.0"}
    monkeypatch.setattr(grokd, "rank_students", lambda *args: rank(*args) | flagged)
    printed = command(copy, "eval")
    assert len(results(copy)["agre+tau=2.0"]) == 2
    assert "Left out" not in printed and "Ship this one: agre+tau=2.0" in printed
    found = json.loads((copy / "runs/tiny/results.json").read_text())
    assert found["mistakes"]["students"] == ["one-hot", "agre+tau=2.0"]


def test_flag_leaves_students_alone_that_do_not_use_it(copy: Path, command: Grokd) -> None:
    printed = command(copy, "distill", "--tau", "2")
    assert "students/agre+tau=2.0/seed0" in printed
    assert "one-hot" not in printed


def test_labels_alone_decide_at_alpha_zero(copy: Path, command: Grokd) -> None:
    command(copy, "distill", "--student", "agre", "--weighting", "average", "--alpha", "0",
            "--seeds", "0")
    names = [p.name for p in (copy / "runs" / "tiny" / "students").iterdir() if "alpha" in p.name]
    ours = weights(copy, f"students/{names[0]}/seed0/model")
    labels = weights(copy, "students/one-hot/seed0/model")
    assert all(torch.allclose(ours[k], labels[k], atol=1e-6) for k in ours)


def test_tensorboard_holds_losses_weights_groups_images_and_hyperparameters(finished: Path) -> None:
    folder = finished / "runs" / "tiny" / "students" / "agre" / "seed0" / "tensorboard"
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    assert {
        "losses/loss", "losses/distillation", "weights/teacher0", "weights/teacher1",
        "weights/zero_share", "validation/wga", "validation_groups/class 1, attribute 0",
        "charts/lr", "charts/images_per_second",
    } <= set(tags["scalars"])
    assert tags["images"] == ["images"]
    assert "settings/text_summary" in tags["tensors"]
    assert "_hparams_/session_start_info" in str(events.summary_metadata) or any(
        "hparams" in str(tag) for tag in tags["tensors"] + tags["scalars"]
    )
    steps = [event.step for event in events.Scalars("losses/loss")]
    history = json.loads((folder.parent / "model.history.json").read_text())
    assert steps == [entry["step"] for entry in history["epochs"]] == [2, 4]
    logged = [event.value for event in events.Scalars("validation/wga")]
    assert logged == pytest.approx([entry["wga"] for entry in history["epochs"]])


def test_given_models_are_scored_alone(copy: Path, command: Grokd) -> None:
    path = "runs/tiny/students/agre/seed1/model.safetensors"
    torch.save({"fc.weight": torch.ones(2, 3)}, copy / "mine.pth")
    with pytest.raises(Problem, match=r"mine.pth was not written by grokd") as refused:
        command(copy, "eval", "--models", "mine.pth")
    assert "delete" not in str(refused.value)
    assert "\nNext: " not in command(copy, "eval", "--models", path)
    alone = results(copy, "results-models.json")
    assert list(alone) == [path]
    assert alone[path][0]["groups"] == results(copy)["agre"][1]["groups"]


def test_model_of_other_classes_is_refused(
    copy: Path, command: Grokd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy)
    store = grokd.open_store(grokd.load_recipe("tiny.py").data, ".")
    store.num_classes = 3
    path = copy / "runs" / "tiny" / "teachers" / "0" / "dfr.safetensors"
    with pytest.raises(Problem, match=r"dfr.safetensors has 2 classes, the data have 3"):
        grokd.load_model(path, store=store)


# Fingerprints


def test_changed_teacher_is_refused_then_remade_with_all_that_follows(
    copy: Path, command: Grokd
) -> None:
    before = weights(copy, "students/agre/seed0/model")
    edit_recipe(copy, '("random",), dfr=dfr, train=train', '("random",), dfr=dfr, train=slow')
    edit_recipe(copy, "student =", "slow = Train(epochs=2, batch_size=8, lr=0.005)\nstudent =")
    for stage in ("teachers", "run"):
        with pytest.raises(Problem, match=r"erm.safetensors was .*: lr 0.01 → 0.005. .*--redo"):
            command(copy, stage)
    told = r"lr 0.01 → 0.005.* `python grokd.py teachers tiny.py --redo`"
    with pytest.raises(Problem, match=told):
        command(copy, "distill")
    printed = command(copy, "eval")
    assert "Left out: " in printed
    report = (copy / "runs/tiny/report.md").read_text()
    for name in ("teachers/0/erm", "teachers/1/dfr", "bias-model/model", "agre/seed1/model"):
        assert f"{name}.safetensors was made with other settings" in report
    assert next(iter(results(copy))) == "one-hot"
    command(copy, "teachers", "--redo")
    with pytest.raises(Problem, match=r"bias-model/model.safetensors was .* parent teachers/0"):
        command(copy, "bias-model")
    command(copy, "bias-model", "--redo")
    with pytest.raises(Problem, match=r"agre/seed0/model.safetensors was made .*parent teachers"):
        command(copy, "distill")
    command(copy, "distill", "--redo", "--student", "agre")
    assert not same(before, weights(copy, "students/agre/seed0/model"))
    assert "Left out" not in command(copy, "eval")


def test_stages_may_differ_in_precision(copy: Path, command: Grokd) -> None:
    """float64: as bfloat16 would be, but one process can change to it."""
    with pytest.raises(Problem, match=r"seed0/model.safetensors .*: precision float32 → float64"):
        command(copy, "distill", "--precision", "float64", "--student", "agre")
    command(copy, "distill", "--precision", "float64", "--student", "agre", "--redo")
    assert weights(copy, "students/agre/seed0/model")["fc.weight"].dtype == torch.float64
    assert "Left out" not in command(copy, "eval")
    assert len(results(copy)["agre"]) == 2


def test_bfloat16_trains_students_of_float32_teachers(copy: Path, grokd_process: Run) -> None:
    before = weights(copy, "students/agre/seed0/model")
    flags = ["--precision", "bfloat16", "--student", "agre", "--seeds", "0", "--redo"]
    grokd_process("distill", "tiny.py", *flags, cwd=copy)
    after = weights(copy, "students/agre/seed0/model")
    assert all(torch.isfinite(value).all() for value in after.values())
    assert after["fc.weight"].dtype == torch.float32
    assert not same(before, after)
    assert all(torch.allclose(before[k], after[k], atol=0.05) for k in before)


@pytest.mark.slow
def test_compiled_training_is_the_same_up_to_rounding(copy: Path, command: Grokd) -> None:
    command(copy, "distill", "--student", "agre", "--seeds", "0", "--compile")
    eager = weights(copy, "students/agre/seed0/model")
    compiled = weights(copy, "students/agre+compile=True/seed0/model")
    assert all(torch.allclose(eager[k], compiled[k], atol=1e-3) for k in eager)


def test_other_folder_keeps_both(copy: Path, command: Grokd) -> None:
    before = weights(copy, "teachers/0/erm")
    command(copy, "teachers", "--lr", "0.002", "--out", "runs/other")
    assert same(before, weights(copy, "teachers/0/erm"))
    assert (copy / "runs" / "other" / "teachers" / "1" / "dfr.safetensors").is_file()


def test_changed_image_makes_everything_stale(copy: Path, command: Grokd) -> None:
    shutil.copy(copy / "train100.png", copy / "train000.png")
    with pytest.raises(Problem, match=r"erm.safetensors was made with other settings .*: data "):
        command(copy, "teachers")


def test_checkpoint_frequency_does_not_make_anything_stale(copy: Path, command: Grokd) -> None:
    assert " epochs of " not in command(copy, "teachers", "--checkpoint-minutes", "1")


def test_missing_stage_is_named_with_its_command(images: Path, command: Grokd) -> None:
    with pytest.raises(Problem, match=r"teachers/0/dfr.safetensors is missing. Make it with `python"
                       r" grokd.py teachers tiny.py`"):
        command(images, "distill")
    with pytest.raises(Problem, match=r"teachers/0/erm.safetensors is missing"):
        command(images, "bias-model")
    with pytest.raises(Problem, match=r"holds no model of this recipe: .* grokd.py run tiny.py"):
        command(images, "eval")


def test_damaged_model_is_named(copy: Path, command: Grokd) -> None:
    path = copy / "runs" / "tiny" / "students" / "agre" / "seed0" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(Problem, match=r"agre/seed0/model.safetensors cannot be read"):
        command(copy, "eval")


# Kill and resume


def interrupt(folder: Path, artefact: str, *args: str) -> int:
    """Start a command, kill -9 it in the middle of an epoch, return the step of its checkpoint."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "grokd.py"), args[0], "tiny.py", *args[1:]], cwd=folder,
        stdout=subprocess.DEVNULL,
    )
    checkpoints = folder / "runs" / "tiny" / f"{artefact}.partial"
    for _ in range(60_000):
        steps = [int(p.name) for p in checkpoints.glob("*") if p.name.isdecimal()]
        if steps and max(steps) > 8 and max(steps) % 8:  # 16 images make 8 steps an epoch
            break
        assert process.poll() is None, f"finished before it could be killed: {steps}"
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return max(int(p.name) for p in checkpoints.glob("*") if p.name.isdecimal())


SLOW = "Train(epochs=3, batch_size=2, lr=0.01, checkpoint_minutes=1e-9, select='best')"


@pytest.mark.parametrize("stage, file, flags", [
    ("teachers", "teachers/1/erm", []),
    ("bias-model", "bias-model/model", ["--kind", "gce", "--arch", "resnet8"]),
    ("distill", "students/agre/seed0/model", ["--student", "agre"]),
])
def test_killed_command_goes_on_and_ends_with_the_same_bits(
    tmp_path: Path, command: Grokd, stage: str, file: str, flags: list[str]
) -> None:
    folder = write_images(tmp_path / "whole")
    edit_recipe(folder, 'Model(arch="cnn2", weights="random", train=train)',
                f'Model(arch="cnn2", weights="random", train={SLOW})')
    if stage == "distill":
        command(folder, "teachers")
        command(folder, "bias-model")
        edit_recipe(folder, 'student = Distill(arch="cnn2", weights="random", train=train',
                    f'student = Distill(arch="resnet8", weights="random", train={SLOW}')
    if stage == "bias-model":
        edit_recipe(folder, "size=20", "size=20, max_store_gb=0.0")
    if stage == "teachers":
        edit_recipe(folder, "train = Train(epochs=2, batch_size=8, lr=0.01)", f"train = {SLOW}")
    killed = shutil.copytree(folder, tmp_path / "killed")
    command(folder, stage, *flags)
    step = interrupt(killed, file, stage, *flags)
    assert step % 8
    printed = command(killed, stage, *flags)
    assert f"goes on at step {step} of 24" in printed
    assert same(weights(folder, file), weights(killed, file))
    losses = [weights(f, f"{file}.losses")["losses"] for f in (folder, killed)]
    assert torch.equal(*losses)
    histories = [(f / "runs" / "tiny" / f"{file}.history.json").read_text()
                 for f in (folder, killed)]
    assert histories[0] == histories[1]
    assert not list((killed / "runs").rglob("*.partial"))


def test_checkpoint_of_other_settings_is_refused(images: Path, command: Grokd) -> None:
    edit_recipe(images, "train = Train(epochs=2, batch_size=8, lr=0.01)", f"train = {SLOW}")
    interrupt(images, "teachers/0/erm", "teachers")
    edit_recipe(images, "lr=0.01", "lr=0.02")
    told = r"erm.partial/begun.json was made with .*: lr 0.01 → 0.02.*--redo"
    with pytest.raises(Problem, match=told):
        command(images, "teachers")
    assert "goes on" not in command(images, "teachers", "--redo")


def test_kill_between_two_heads_of_a_network_does_not_train_it_again(
    copy: Path, command: Grokd, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = weights(copy, "students/one-hot-dfr/seed0/model")
    for name in ("one-hot", "one-hot-dfr"):
        (copy / "runs" / "tiny" / "students" / name / "seed0" / "model.safetensors").unlink()
    save_model = grokd.save_model

    def killed(model: grokd.Classifier, artefact: grokd.Artefact, *more: object) -> None:
        if "one-hot-dfr" in str(artefact.path):
            raise KeyboardInterrupt
        save_model(model, artefact, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(grokd, "save_model", killed)
    with pytest.raises(KeyboardInterrupt):
        command(copy, "distill")
    monkeypatch.setattr(grokd, "save_model", save_model)
    assert "students/one-hot/seed0/model: goes on at step 4 of 4" in command(copy, "distill")
    assert same(before, weights(copy, "students/one-hot-dfr/seed0/model"))
    assert not list((copy / "runs").rglob("*.partial"))


def test_resume_without_a_checkpoint_is_refused(images: Path, command: Grokd) -> None:
    with pytest.raises(Problem, match=r"--resume: nothing of it was begun in runs/tiny"):
        command(images, "teachers", "--resume")


def test_incomplete_checkpoint_is_passed_over(tmp_path: Path) -> None:
    grokd.save_checkpoint(tmp_path, 3, {"step": 3})
    (tmp_path / "000000009.part").mkdir()
    (tmp_path / "000000009.part" / "state.pt").write_bytes(b"half")
    newest = grokd.newest_checkpoint(tmp_path)
    assert newest and grokd.load_checkpoint(newest) == {"step": 3}
    grokd.save_checkpoint(tmp_path, 12, {"step": 12})
    assert [path.name for path in tmp_path.iterdir()] == ["000000012"]


def test_artefact_being_written_is_left_alone(images: Path, command: Grokd) -> None:
    lock = images / "runs" / "tiny" / "teachers" / "1" / ".lock"
    told = f"teachers/1 is being written by another run .process {os.getpid()} on "
    part, others = (lock.with_name(name) for name in ("erm.safetensors.part123", "notes.partly"))
    with grokd.locked(lock), pytest.raises(Problem, match=told):
        part.touch()  # as that run writes it
        others.touch()
        command(images, "teachers")
    assert (images / "runs" / "tiny" / "teachers" / "0" / "dfr.safetensors").is_file()
    assert part.exists()
    command(images, "teachers")
    assert others.exists() and not part.exists()  # left by a kill, now that nobody writes


def test_full_disk_is_one_line_and_loses_nothing(images: Path) -> None:
    """Files may not grow beyond what the model needs: an error of the system's own."""
    code = f"""import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (80_000, 80_000))
sys.argv = ["grokd.py", "teachers", "tiny.py"]
runpy.run_path({str(ROOT / "grokd.py")!r}, run_name="__main__")"""
    done = subprocess.run([sys.executable, "-c", code], cwd=images, capture_output=True, text=True)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "could not be written (File too large): make room" in done.stderr
    assert not [path for path in (images / "runs").rglob("*.part*") if path.is_file()]


def test_loss_that_is_not_finite_stops_the_run(images: Path, command: Grokd) -> None:
    edit_recipe(images, "lr=0.01", "lr=1e30")
    with pytest.raises(Problem, match=r"teachers/0/erm: the loss is (nan|inf) by step \d"):
        command(images, "teachers")


# Defects of the time before artefacts had parents and fields markers


def test_student_named_with_an_equals_sign_is_the_only_one_trained(
    copy: Path, command: Grokd
) -> None:
    command(copy, "distill", "--student=agre", "--tau=2", "--seeds", "0")
    made = {path.name for path in (copy / "runs" / "tiny" / "students").iterdir()}
    assert made == {"one-hot", "one-hot-dfr", "agre", "agre+tau=2.0"}


def test_last_of_several_choices_counts_as_the_parser_has_it(copy: Path, command: Grokd) -> None:
    printed = command(copy, "distill", "--student", "one-hot", "--tau", "2", "--student", "agre",
                      "--seeds", "0")
    assert "students/agre+tau=2.0/seed0" in printed and "no effect" not in printed


def test_names_hold_only_what_the_user_set(copy: Path, command: Grokd) -> None:
    command(copy, "distill", "--student", "agre", "--seeds", "0", "--head", "dfr", "--gamma", "0.5")
    assert (copy / "runs/tiny/students/agre+gamma=0.5+head=dfr/seed0/model.safetensors").is_file()


def test_long_names_are_cut_and_stay_apart(images: Path) -> None:
    given = grokd.load_recipe(str(images / "tiny.py"))
    flags = ["--student", "agre", "--head", "dfr", "--dfr.penalties", *map(str, range(1, 60))]
    names = [next(iter(grokd.apply_flags("distill", given, "tiny", [*flags, last])[0].students))
             for last in ("70", "80")]
    assert names[0] != names[1]
    assert all(len(name) == grokd.LONGEST_NAME and name.startswith("agre+") for name in names)


def test_flag_without_effect_is_warned_about(copy: Path, command: Grokd) -> None:
    printed = command(copy, "distill", "--student", "one-hot", "--tau", "2", "--seeds", "0")
    told = "warning: tau has no effect on one-hot: it belongs to weighting other than one-hot."
    assert told in printed
    assert " epochs of " not in printed
    printed = command(copy, "bias-model", "--q", "0.5")
    assert "warning: q has no effect on bias_model: it belongs to kind gce." in printed


def test_flagged_student_is_stale_once_what_it_was_made_from_is(
    copy: Path, command: Grokd
) -> None:
    """One that goes on from another, and one whose training a helper rebalanced."""
    edit_recipe(copy, "recipe = Recipe(", "average = Distill('average', arch='cnn2', "
                "weights='random', train=train, dfr=dfr)\nrecipe = Recipe(")
    edit_recipe(copy, "students={", "students={'next': replace(average, start='agre'), "
                "'tab': replace(average, rebalance='tab', helper='one-hot'),")
    edit_recipe(copy, "from grokd", "from dataclasses import replace\nfrom grokd")
    command(copy, "distill", "--student", "next", "tab", "--tau", "2", "--seeds", "0")
    assert {"next+tau=2.0", "tab+tau=2.0"} <= results_after(copy, command).keys()
    edit_recipe(copy, '"one-hot": Distill("one-hot", arch="cnn2", weights="random", train=train, '
                "dfr=dfr)", '"one-hot": replace(average, weighting="one-hot", '
                "train=replace(train, epochs=1))")
    edit_recipe(copy, '"agre": student', '"agre": average')
    command(copy, "distill", "--student", "one-hot", "agre", "--redo")
    left = results_after(copy, command)
    assert not {"next+tau=2.0", "tab+tau=2.0"} & left.keys()
    report = (copy / "runs/tiny/report.md").read_text()
    assert "next+tau=2.0/seed0/model.safetensors was made with other settings" in report
    assert "parent students/one-hot/seed0/model" in report  # of the helper


def results_after(folder: Path, command: Grokd) -> dict[str, list[dict[str, object]]]:
    """Rows of a new eval."""
    command(folder, "eval")
    return results(folder)


def test_resume_goes_on_with_an_ensemble_killed_at_its_second_teacher(
    images: Path, command: Grokd
) -> None:
    edit_recipe(images, "train = Train(epochs=2, batch_size=8, lr=0.01)", f"train = {SLOW}")
    edit_recipe(images, 'Teachers(2, ("cnn2", "resnet8")', 'Teachers(3, ("cnn2", "resnet8")')
    interrupt(images, "teachers/1/erm", "teachers")
    printed = command(images, "teachers", "--resume")
    assert "teachers/1/erm: goes on at step" in printed
    assert (images / "runs/tiny/teachers/2/dfr.safetensors").is_file()


def test_redo_makes_everything_again_once(copy: Path, command: Grokd) -> None:
    printed = command(copy, "run", "--redo")
    assert printed.count("teachers/0/erm: cnn2") == 1
    assert printed.count(" epochs of ") == 2 + 4  # teachers; two students of two seeds


def test_checkpoint_does_not_carry_the_losses_of_earlier_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Grokd
) -> None:
    """They are appended to a file, which a kill between the two does not spoil."""
    folder = write_images(tmp_path / "images")
    edit_recipe(folder, "train = Train(epochs=2, batch_size=8, lr=0.01)",
                "train = Train(epochs=6, batch_size=8, lr=0.01, checkpoint_minutes=1e-9)")
    killed = shutil.copytree(folder, tmp_path / "killed")
    command(folder, "teachers")
    sizes: list[int] = []
    save_checkpoint = grokd.save_checkpoint

    def watched(work: Path, step: int, state: dict[str, object]) -> None:
        if step == 8 and "resnet8" not in str(work) and work.name == "erm.partial":
            raise KeyboardInterrupt  # four epochs' losses stand, the checkpoint knows three
        save_checkpoint(work, step, state)
        sizes.append((work / f"{step:09d}" / "state.pt").stat().st_size)
        progress = state["progress"]
        assert isinstance(progress, dict)
        tensors = [v for v in progress.values() if isinstance(v, torch.Tensor)]
        assert [list(v.shape) for v in tensors] == [[16]]

    monkeypatch.setattr(grokd, "save_checkpoint", watched)
    with pytest.raises(KeyboardInterrupt):
        command(killed, "teachers")
    work = killed / "runs/tiny/teachers/0/erm.partial"
    assert (work / grokd.LOSSES).stat().st_size == 4 * 16 * 4
    monkeypatch.setattr(grokd, "save_checkpoint", save_checkpoint)
    assert "goes on at step 7 of 12" in command(killed, "teachers")
    assert len(sizes) == 7
    losses = [weights(f, "teachers/0/erm.losses")["losses"] for f in (folder, killed)]
    assert losses[0].shape == (6, 16)
    assert torch.equal(*losses)


def test_losses_are_appended_cut_and_read(tmp_path: Path) -> None:
    for epoch in range(3):
        grokd.append_losses(tmp_path / "new", torch.full((2,), float(epoch)))
    assert grokd.read_losses(tmp_path / "new", 2).tolist() == [[0, 0], [1, 1], [2, 2]]
    grokd.cut_losses(tmp_path / "new", 1, 2)
    assert grokd.read_losses(tmp_path / "new", 2).tolist() == [[0, 0]]
    assert grokd.read_losses(tmp_path / "none", 2).shape == (0, 2)


def test_loss_scaler_is_saved_and_starts_anew_with_each_model(
    images: Path, monkeypatch: pytest.MonkeyPatch, command: Grokd
) -> None:
    """float16's, here on the CPU: torch has one there, accelerate only starts it on GPUs."""
    start = grokd.Runtime.start

    def with_scaler(precision: str) -> grokd.Runtime:
        runtime = start(precision)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
        runtime.accelerator.scaler = scaler
        return replace(runtime, new_scaler=scaler.state_dict())

    monkeypatch.setattr(grokd.Runtime, "start", staticmethod(with_scaler))
    edit_recipe(images, "train = Train(epochs=2, batch_size=8, lr=0.01)",
                "train = Train(epochs=2, batch_size=2, lr=0.01, checkpoint_minutes=1e-9)")
    states: list[dict[str, float]] = []
    save_checkpoint = grokd.save_checkpoint

    def watched(work: Path, step: int, state: dict[str, object]) -> None:
        scaler = state["scaler"]
        assert isinstance(scaler, dict)
        states.append({"step": step, **scaler})
        if len(states) == 5 and not resumed:
            raise KeyboardInterrupt
        save_checkpoint(work, step, state)

    monkeypatch.setattr(grokd, "save_checkpoint", watched)
    resumed = False
    with pytest.raises(KeyboardInterrupt):
        command(images, "teachers")
    resumed, first = True, states.copy()
    states.clear()
    command(images, "teachers")
    for state in [*first, *states]:  # 1024, doubled after every third step of a model's own
        assert state["scale"] == 1024 * 2 ** (state["step"] // 3)
        assert state["_growth_tracker"] == state["step"] % 3
    assert {state["step"] for state in states} == {*range(1, 17)}


MINE = '''
import torch
import grokd

def most_sure(student, ensemble, batch):
    """The surest teacher alone."""
    sure = ensemble.teachers.softmax(-1).amax(-1)
    assert ensemble.biased is not None and ensemble.biased.shape == student.shape
    return (sure == sure.amax(0)).double()

recipe = grokd.replace(recipe, seeds=(0,), students={
    "mine": grokd.replace(student, weighting=most_sure)})
'''


def test_recipe_may_bring_a_weighting_of_its_own(copy: Path, command: Grokd) -> None:
    recipe = (copy / "tiny.py").read_text() + MINE
    (copy / "tiny.py").write_text(recipe)
    command(copy, "distill")
    path = copy / "runs/tiny/students/mine/seed0/model.safetensors"
    assert "most_sure " in grokd.read_metadata(path)["settings"]
    history = json.loads(path.with_name("model.history.json").read_text())
    assert sum(history["epochs"][0]["weight"]) == pytest.approx(1)
    command(copy, "distill", "--tau", "2")
    assert (copy / "runs/tiny/students/mine+tau=2.0/seed0/model.safetensors").is_file()
    (copy / "tiny.py").write_text(recipe.replace("sure.amax(0)", "sure.amin(0)"))
    with pytest.raises(Problem, match=r"mine/seed0/model.* weighting most_sure \w+ → most_sure"):
        command(copy, "distill")


def test_frozen_networks_are_those_of_the_plain_data_whatever_a_student_sees(
    copy: Path, command: Grokd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is loaded once, and a set of images changes nobody's identity but the student's."""
    edit_recipe(copy, '"agre": student', '"agre": student, "groups": Distill(arch="cnn2", weights='
                '"random", train=train, dfr=dfr, rebalance="groups")')
    edit_recipe(copy, 'BiasModel(arch="cnn2", weights="random", train=train)',
                'BiasModel("gce", arch="cnn2", weights="random", train=train)')
    command(copy, "bias-model", "--redo")
    loaded: list[str] = []
    load_model = grokd.load_model

    def counted(path: Path, *more: object) -> grokd.Classifier:
        loaded.append(str(path.relative_to("runs/tiny")))
        return load_model(path, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(grokd, "load_model", counted)
    command(copy, "distill", "--student", "agre", "groups", "--redo")
    assert sorted(loaded) == ["bias-model/model.safetensors", "teachers/0/dfr.safetensors",
                              "teachers/1/dfr.safetensors"]

"""Networks of others: any state dict of torchvision's, timm's networks, mixed ensembles."""

import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision import models

import grokd
from grokd import Input, Problem

Grokd = Callable[..., str]

IMAGENET = Input()
PIXELS = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def plain_resnet(num_classes: int = 2) -> nn.Module:
    torch.manual_seed(5)
    return models.resnet18(num_classes=num_classes).eval()


def answers(network: nn.Module, input: Input = IMAGENET, images: Tensor = PIXELS) -> Tensor:
    """Logits of a plain network, which knows no normalisation."""
    mean, std = (torch.tensor(each)[:, None, None] for each in (input.mean, input.std))
    with torch.no_grad():
        return network.eval()((images - mean) / std)


def build(file: Path, arch: str = "resnet18", **more: Any) -> grokd.Classifier:
    return grokd.build_model(arch, str(file), 2, Input(), 0, **more).eval()


# Any state dict


def renamed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{key}": value for key, value in state.items()}


@pytest.mark.parametrize("prefix, key", [
    ("", "model"), ("module.", ""), ("model.", "state_dict"), ("backbone.", ""),
    ("module._orig_mod.", "model"),
])
def test_wrapped_state_dict_is_unwrapped(tmp_path: Path, prefix: str, key: str) -> None:
    plain, file = plain_resnet(), tmp_path / "a.pth"
    state: Any = renamed(plain.state_dict(), prefix)
    torch.save({key: state, "epoch": 3} if key else state, file)
    model = build(file)
    with torch.no_grad():
        torch.testing.assert_close(model(PIXELS), answers(plain))


def test_wrapped_safetensors_are_unwrapped(tmp_path: Path) -> None:
    plain, file = plain_resnet(), tmp_path / "a.safetensors"
    save_file(renamed(plain.state_dict(), "module."), file)
    with torch.no_grad():
        torch.testing.assert_close(build(file)(PIXELS), answers(plain))


def test_what_lies_beside_the_network_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, file = plain_resnet(), tmp_path / "a.pth"
    trunk = {k: v for k, v in plain.state_dict().items() if not k.startswith("fc.")}
    beside = {"head.fc.weight": torch.ones(5, 512), "loss.weight": torch.ones(5)}
    torch.save({"state_dict": renamed(trunk, "backbone.") | beside}, file)
    model = build(file)
    assert torch.equal(model.plain_state()["conv1.weight"], plain.state_dict()["conv1.weight"])
    told = capsys.readouterr().out
    assert "left out is what is not under backbone. (head.fc.weight, loss.weight)" in told
    assert "a.pth has no head for 2 classes: resnet18's is random" in told
    build(file)
    assert "has no head" not in capsys.readouterr().out  # once is enough


@pytest.mark.parametrize("head", ["other classes", "none", "of several layers"])
def test_head_is_replaced_or_refused_where_it_is_needed(
    tmp_path: Path, head: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, file = plain_resnet(1000), tmp_path / "a.pth"
    state = plain.state_dict()
    if head != "other classes":
        state = {k: v for k, v in state.items() if not k.startswith("fc.")}
    if head == "of several layers":
        state |= {"fc.0.weight": torch.ones(2, 512), "fc.0.bias": torch.ones(2)}
    torch.save(state, file)
    model = build(file)
    assert torch.equal(model.plain_state()["conv1.weight"], plain.state_dict()["conv1.weight"])
    assert "warning" in capsys.readouterr().out
    with pytest.raises(Problem, match=r"no head for 2 classes, and agre would use teacher 0 as it"):
        build(file, as_it_is="agre would use teacher 0")


def test_densenet_under_torchvisions_old_names(tmp_path: Path) -> None:
    """As torchvision's own files have them."""
    torch.manual_seed(0)
    plain, file = models.densenet121(num_classes=2), tmp_path / "a.pth"
    state = {}
    for key, value in plain.state_dict().items():
        for name in ("norm", "conv"):
            if "denselayer" in key:
                key = key.replace(f"{name}1.", f"{name}.1.").replace(f"{name}2.", f"{name}.2.")
        state[key] = value
    assert "features.denseblock1.denselayer1.norm.1.weight" in state
    torch.save(state, file)
    with torch.no_grad():
        model = build(file, "densenet121")
        torch.testing.assert_close(model(PIXELS), answers(plain))


class Innocent:
    """Something a weights file should not hold."""


@pytest.mark.parametrize("content, told", [
    ({"state_dict": Innocent()}, r"pickled code, which is not run\): it must .* state_dict"),
    ({"epoch": 3, "optimizer": {}}, r"no state dict, .* but epoch, optimizer\."),
    ([1, 2], r"no state dict, .* but something else\."),
])
def test_file_without_a_state_dict_is_one_line(tmp_path: Path, content: Any, told: str) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(Problem, match=told) as caught:
        build(tmp_path / "a.pth")
    assert "\n" not in str(caught.value)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Grokd:
    """A grokd command of a recipe in this process and a given folder; returns what it printed."""

    def run(folder: Path, name: str, recipe: str, *args: str) -> str:
        monkeypatch.chdir(folder)
        grokd.command_line([name, recipe, *args])
        return capsys.readouterr().out

    return run


def edited(images: Path, name: str, *changes: tuple[str, str]) -> str:
    """A copy of the tiny recipe with other words; returns its name."""
    text = (images / "tiny.py").read_text()
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    (images / name).write_text(text)
    return name


TWO_TEACHERS = 'Teachers(2, ("cnn2", "resnet8"), ("random",), '
BROUGHT = 'Teachers(2, ("resnet18", "resnet8"), ("mine.pth", "random"), finished=(0,), '


def test_finished_teacher_stands_beside_a_trained_one(images: Path, command: Grokd) -> None:
    """It is neither trained nor changed, its head is refitted, students learn from it as it is."""
    plain = plain_resnet()
    torch.save(renamed(plain.state_dict(), "module."), images / "mine.pth")
    recipe = edited(
        images, "brought.py", (TWO_TEACHERS, BROUGHT), ("epochs=2", "epochs=1"),
        ('"agre": student', '"erm": Distill(**{**vars(student), "dfr_share": 0.0})'),
    )
    told = command(images, "run", recipe, "--seeds", "0")
    assert "resnet18, 11,177,538 parameters, 0 epochs" in told
    out = images / "runs" / "brought"
    state = load_file(out / "teachers/0/erm.safetensors")
    assert all(torch.equal(state[key], value) for key, value in plain.state_dict().items())
    refitted = load_file(out / "teachers/0/dfr.safetensors")
    assert torch.equal(refitted["conv1.weight"], state["conv1.weight"])
    assert not torch.equal(refitted["fc.weight"], state["fc.weight"])
    rows = [row["name"] for row in json.loads((out / "results.json").read_text())["rows"]]
    assert {"erm", "teachers, ERM", "teachers, DFR"} <= {*rows}
    assert "parameters" not in command(images, "teachers", recipe)  # nothing is made twice
    torch.save(plain.state_dict() | {"fc.bias": torch.ones(2)}, images / "mine.pth")
    grokd.identify.cache_clear()  # as a new process would
    with pytest.raises(Problem, match=r"0/erm.safetensors was made with other settings .*weights"):
        command(images, "teachers", recipe)


def test_finished_teacher_as_biased_model_has_no_losses_for_tab(
    images: Path, command: Grokd
) -> None:
    torch.save(plain_resnet().state_dict(), images / "mine.pth")
    tab = '"tab": Distill(**{**vars(student), "weighting": "one-hot", "rebalance": "tab"})'
    recipe = edited(images, "brought.py", (TWO_TEACHERS, BROUGHT), ('"agre": student', tab),
                    ("epochs=2", "epochs=1"))
    with pytest.raises(Problem, match=r"bias-model/model.* was taken as it is, not trained, and"):
        command(images, "run", recipe, "--seeds", "0")


def test_finished_teacher_with_another_head_may_only_be_refitted(
    images: Path, command: Grokd
) -> None:
    torch.save(plain_resnet(1000).state_dict(), images / "mine.pth")
    recipe = edited(images, "brought.py", (TWO_TEACHERS, BROUGHT))
    told = "mine.pth has no head for 2 classes, and agre would use teacher 0 as it is"
    with pytest.raises(Problem, match=told):
        command(images, "teachers", recipe)
    other = ("BiasModel(", 'BiasModel("erm", ')
    recipe = edited(images, "refitted.py", (TWO_TEACHERS, BROUGHT), other)
    told = command(images, "teachers", recipe)
    assert "warning: mine.pth has no head for 2 classes: resnet18's is random" in told


def test_finished_names_a_teacher_that_is_there(images: Path) -> None:
    recipe = edited(images, "brought.py", (TWO_TEACHERS, BROUGHT.replace("(0,)", "(2,)")))
    with pytest.raises(Problem, match=r"teachers\.finished names 2, but there are 2 teachers"):
        grokd.load_recipe(str(images / recipe))


# timm's networks


@pytest.fixture
def timm() -> Any:
    return pytest.importorskip("timm", reason="timm is not installed: use --all-extras")


NORMALISED = {"test_vit": 0.5, "test_convnext2": 0.5, "test_efficientnet": 0.485}
NETWORKS = pytest.mark.parametrize("name", NORMALISED)


def timm_model(name: str, **more: Any) -> grokd.Classifier:
    return grokd.build_model(f"timm:{name}", "random", 3, Input(**more), seed=0).eval()


@NETWORKS
def test_timm_network_is_the_plain_one_and_loads_as_one(
    name: str, timm: Any, tmp_path: Path
) -> None:
    """Trunk and head, folded or not, and the saved file by timm's own loading code."""
    model, file = timm_model(name, input_size=160), tmp_path / "model.safetensors"
    save_file(model.plain_state(), file)
    plain = timm.create_model(name, num_classes=3, checkpoint_path=str(file))
    images = torch.rand(2, 3, 160, 160)
    expected = answers(plain, model.input, images)
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected)
        torch.testing.assert_close(grokd.fold(model)(images), expected, atol=1e-5, rtol=1e-4)


@NETWORKS
def test_pooled_features_of_timms_networks_are_its_pre_logits(name: str, timm: Any) -> None:
    model, images = timm_model(name, input_size=160), torch.rand(2, 3, 160, 160)
    plain = timm.create_model(name, num_classes=3).eval()
    plain.load_state_dict(model.plain_state())
    with torch.no_grad():
        trunk = plain.forward_features((images - model.mean) / model.std)
        expected = plain.forward_head(trunk, pre_logits=True)
        torch.testing.assert_close(model.features(images), expected)


@NETWORKS
def test_weights_bring_timms_normalisation_and_size(
    name: str, timm: Any, tmp_path: Path
) -> None:
    """Downloaded ones or a file; a size in the recipe, and what grokd wrote, come first."""
    torch.manual_seed(1)
    file = tmp_path / "a.pth"
    torch.save({"state_dict": timm.create_model(name, num_classes=2).state_dict()}, file)
    config = build(file, f"timm:{name}").input
    assert (config.input_size, config.mean[0]) == (160, NORMALISED[name])
    assert grokd.timm_input(f"timm:{name}", "DEFAULT", Input(96)).input_size == 96
    fixed = 160 if name == "test_vit" else 0  # a random one has no images that it knows
    assert timm_model(name).input == Input(input_size=fixed)


def test_timms_own_weights_by_its_own_code(
    timm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the hub's download cache filled beforehand; without, a line that says what to do."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(Problem, match=r"DEFAULT of timm:test_vit could not be fetched .* weights"):
        grokd.build_model("timm:test_vit", "DEFAULT", 2, Input(), 0)
    plain = timm.create_model("test_vit")
    hub = tmp_path / "models--timm--test_vit.r160_in1k"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text("0" * 40)
    (hub / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(plain.state_dict(), hub / "snapshots" / ("0" * 40) / "model.safetensors")
    model = grokd.build_model("timm:test_vit", "DEFAULT", 2, Input(), 0)
    state = model.plain_state()
    assert torch.equal(state["blocks.0.attn.qkv.weight"], plain.blocks[0].attn.qkv.weight)
    assert model.input == Input(160, (0.5,) * 3, (0.5,) * 3)
    assert model.head.weight.shape == (2, 64)


@pytest.mark.parametrize("arch, weights, told", [
    ("timm:convnextv2_tny", "random", r"timm has no 'convnextv2_tny'; did you mean timm:convn"),
    ("timm:resnet50.a1_in2k", "random", r"'resnet50.a1_in2k'; did you mean timm:resnet50.a\d_in1k"),
    ("timm:test_vit", "IMAGENET1K_V1", r"no weights 'IMAGENET1K_V1': give DEFAULT, random or a f"),
    ("timm:resnet10t", "r10", r"no weights 'r10'"),
    ("timm:deit_tiny_distilled_patch16_224", "random", "does not end in a linear layer"),
])
def test_what_timm_lacks_is_one_line(arch: str, weights: str, told: str, timm: Any) -> None:
    with pytest.raises(Problem, match=told) as caught:
        grokd.build_model(arch, weights, 2, Input(), 0)
    assert "\n" not in str(caught.value)


def test_missing_timm_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(Problem, match=r"timm:test_vit needs the package timm: .* --extra timm"):
        grokd.build_model("timm:test_vit", "random", 2, Input(), 0)


def test_network_of_one_size_says_which(timm: Any) -> None:
    with pytest.raises(Problem, match="timm:test_vit takes 160 pixels, not 64: set input_size = 1"):
        timm_model("test_vit", input_size=64)(PIXELS)


@pytest.mark.parametrize("name, sides, paths", [
    ("test_convnext2", [16, 8, 4, 2], [f"trunk.stages.{i}" for i in range(4)]),
    ("test_efficientnet", [16, 8, 4, 2], [f"trunk.blocks.{i}" for i in range(1, 5)]),
    ("test_resnet", [16, 8, 4, 2], [f"trunk.layer{i}" for i in range(1, 5)]),
    ("test_vit", [10] * 4, [f"trunk.blocks.{i}" for i in (1, 2, 4, 5)]),  # of six
])
def test_layers_of_timms_networks(name: str, sides: list[int], paths: list[str], timm: Any) -> None:
    """By the stride at what the network is fed, 64 pixels, though the crop has 32."""
    model = timm_model(name, input_size=160 if name == "test_vit" else 64)
    assert [*grokd.layer_paths(model, 32).values()] == [*paths, "trunk"]
    tap = grokd.Tap(model, [*grokd.LAYERS, "pooled"], 32)
    assert [tap.maps[layer].shape[-1] for layer in grokd.LAYERS] == sides
    assert tap.widths["pooled"] == model.head.in_features


def test_layers_by_stride_are_those_at_the_networks_size() -> None:
    """Of torchvision's networks too, the crop being a quarter of what it is enlarged to."""
    large = grokd.Classifier("mobilenet_v3_small", 2, Input())
    enlarged = grokd.Classifier("mobilenet_v3_small", 2, Input(input_size=64))
    assert grokd.layer_paths(enlarged, 16) == grokd.layer_paths(large, 64)


def test_synchronised_norms_keep_timms_activations(timm: Any) -> None:
    """timm's batch norm may hold the activation, which torch's own conversion drops."""
    model = timm_model("test_efficientnet")
    before = model(PIXELS)
    model = grokd.with_synchronised_norms(model).eval()  # type: ignore[assignment]
    norms = [type(m) for m in model.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert len(norms) > 5
    torch.testing.assert_close(model(PIXELS), before)


class Masked(nn.Module):
    """A constant of five dimensions, which tracing keeps as a buffer, as of Swin's attention."""

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, :, None, None, None] + torch.zeros(1, 1, 1, 7, 7)).mean((2, 3, 4))


class Counting(nn.Module):
    """Sizes as numbers, which cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, : int(x.shape[1])]


@pytest.mark.parametrize("layer", [Masked(), Counting()])
def test_network_that_cannot_be_folded_stays_as_it_is(layer: nn.Module) -> None:
    model = grokd.Classifier("cnn2", 2, Input()).eval()
    model.trunk = nn.Sequential(model.trunk, layer)
    expected = model(PIXELS)
    torch.testing.assert_close(grokd.fold(model)(PIXELS), expected)


# Ensembles of different networks


@pytest.fixture
def mixed(images: Path, timm: Any) -> tuple[Path, str]:
    """Folder and recipe: a transformer of 160 pixels, timm's normalisation at its own size, and
    ours at the crop's; every way in which students use such teachers."""
    torch.manual_seed(3)
    state = timm.create_model("test_efficientnet", num_classes=2).state_dict()
    torch.save(renamed(state, "module."), images / "efficient.pth")
    students = """
recipe = replace(recipe, seeds=(0,), students={
        "own": replace(student, arch="timm:test_convnext", input=Input(64)),
        "mixed": Distill(arch="resnet18", weights="random", train=replace(train, mix="cutmix")),
        "departure": replace(student, weighting="departure"),
        "features": replace(student, gamma=(0.1, 0.1), layers=("layer2=layer3", "pooled"),
                            feature_weights="agre"),
        "features-mixed": replace(student, gamma=(0.1, 0.1), layers=("layer1", "pooled"),
                                  train=replace(train, mix="mixup")),
        "parameters": replace(student, space="parameters", dfr_share=0.5),
})
"""
    arch = '("timm:test_vit", "timm:test_efficientnet", "resnet8")'
    recipe = edited(
        images, "mixed.py", ("epochs=2", "epochs=1"), ("Distill,", "Distill, Input,"),
        ("from grokd", "from dataclasses import replace\nfrom grokd"),
        (TWO_TEACHERS, f'Teachers(3, {arch}, ("random", "efficient.pth", "random"), '),
        ("BiasModel(arch=\"cnn2\"", 'BiasModel("erm", arch="timm:test_resnet"'),
    )
    with open(images / recipe, "a") as file:
        file.write(students)
    return images, recipe


def test_mixed_ensemble_goes_through_every_stage(
    mixed: tuple[Path, str], command: Grokd, timm: Any
) -> None:
    folder, recipe = mixed
    command(folder, "run", recipe)
    out = folder / "runs" / "mixed"
    rows = [row["name"] for row in json.loads((out / "results.json").read_text())["rows"]]
    assert {"own", "mixed", "departure", "features", "features-mixed", "parameters"} <= {*rows}
    inputs = [grokd.load_model(out / f"teachers/{i}/dfr.safetensors").input for i in range(3)]
    imagenet = (grokd.IMAGENET_MEAN, grokd.IMAGENET_STD)
    assert inputs == [Input(160), Input(160, *imagenet), Input()]
    assert_plain_students_agree(out, timm)


def assert_plain_students_agree(out: Path, timm: Any) -> None:
    """Finished students have the same logits in plain torchvision and timm, by their metadata."""
    for name in ("own", "mixed"):
        file = out / f"students/{name}/seed0/model.safetensors"
        ours = grokd.load_model(file)
        if name == "own":
            plain = timm.create_model("test_convnext", num_classes=2, checkpoint_path=str(file))
        else:
            plain = models.get_model("resnet18", num_classes=2)
            plain.load_state_dict(load_file(file))
        with safe_open(file, "pt") as opened:
            input = Input(**json.loads(opened.metadata()["input"]))
        side = input.input_size or 16
        images = torch.rand(2, 3, side, side)
        with torch.no_grad():
            torch.testing.assert_close(ours(images), answers(plain, input, images))


def test_every_teacher_is_shown_its_own_images(mixed: tuple[Path, str]) -> None:
    """From the cache and when mixed images are asked about: size and normalisation are its own."""
    folder, _ = mixed
    inputs = [Input(), Input(40), Input(40, (0.5,) * 3, (0.5,) * 3), Input(0, (0.5,) * 3)]
    teachers = [
        grokd.build_model("timm:test_resnet", "random", 2, input, 0).eval() for input in inputs
    ]
    data = grokd.Data(size=20, crop=16, attribute_column="place", store=str(folder / "store"))
    store, runtime = grokd.open_store(data, str(folder)), grokd.Runtime.start("float32")
    images = store.view(store.split("train"), torch.device("cpu"), 0, 0)
    with torch.no_grad():
        expected = torch.stack([teacher(images) for teacher in teachers])
    targets = grokd.Targets(teachers, 4, store, {"data": store.fingerprint}, runtime, 0)
    targets.prepare(0)
    torch.testing.assert_close(targets.logits(np.arange(16)), expected, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(targets.ask(images), expected, atol=1e-4, rtol=1e-3)
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.combinations(expected, 2))


def test_channels_correspond_where_teachers_began_alike() -> None:
    """DEFAULT names different weights where architectures differ."""
    teachers = grokd.Teachers(arch=("vit_b_16",))
    assert grokd.began_alike(teachers)
    assert not grokd.began_alike(replace(teachers, arch=("vit_b_16", "convnext_tiny")))
    assert not grokd.began_alike(replace(teachers, weights=("random",)))

"""Networks of others: any state dict of torchvision's, timm's networks, mixed ensembles."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision import models

import grokd
from grokd import Input, Problem

Grokd = Callable[..., str]

PIXELS = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def plain_resnet(num_classes: int = 2) -> nn.Module:
    torch.manual_seed(5)
    return models.resnet18(num_classes=num_classes).eval()


def answers(network: nn.Module, mean: Any = grokd.IMAGENET_MEAN, std: Any = grokd.IMAGENET_STD
            ) -> Tensor:
    """Logits of a plain network, which knows no normalisation."""
    mean, std = (torch.tensor(each)[:, None, None] for each in (mean, std))
    with torch.no_grad():
        return network.eval()((PIXELS - mean) / std)


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

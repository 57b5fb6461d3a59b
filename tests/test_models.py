"""Networks: building, initial weights, heads, saving; one prediction loop."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision import models

import grokd
from grokd import Classifier, Input, Problem

ARCHITECTURES = [
    "resnet18", "mobilenet_v2", "mobilenet_v3_small", "convnext_tiny", "vit_b_16", "swin_t",
    "densenet121", "efficientnet_b0", "shufflenet_v2_x0_5", "regnet_y_400mf", "googlenet",
]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_classifier_equals_the_plain_torchvision_network(arch: str) -> None:
    ours = grokd.build_model(arch, "random", 5, Input(), seed=0).eval()
    plain = models.get_model(arch, num_classes=5)
    plain.load_state_dict(ours.plain_state())
    images = torch.rand(2, 3, 224, 224)
    mean, std = torch.tensor(grokd.IMAGENET_MEAN), torch.tensor(grokd.IMAGENET_STD)
    normalised = (images - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        assert torch.allclose(ours(images), plain.eval()(normalised), atol=1e-5)


@pytest.mark.parametrize("arch", ["googlenet", "inception_v3"])
def test_auxiliary_heads_are_ignored_in_training(arch: str) -> None:
    model = grokd.build_model(arch, "random", 3, Input(), seed=0).train()
    logits = model(torch.rand(2, 3, 299, 299))
    assert logits.shape == (2, 3)
    logits.sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)


@pytest.mark.parametrize("arch", ["squeezenet1_0", "maxvit_t"])
def test_network_without_a_linear_head_is_refused(arch: str) -> None:
    with pytest.raises(Problem, match=f"{arch} does not end in a linear layer"):
        Classifier(arch, 2, Input())


def test_unknown_architecture_is_named_with_the_nearest() -> None:
    with pytest.raises(Problem, match=r"Unknown architecture 'resnet15'; did you mean resnet1"):
        Classifier("resnet15", 2, Input())


def test_seed_decides_initial_weights() -> None:
    a, b, c = (grokd.build_model("cnn2", "random", 2, Input(), seed) for seed in (0, 0, 1))
    assert torch.equal(a.head.weight, b.head.weight)
    assert not torch.equal(a.head.weight, c.head.weight)


def test_group_norm_network_has_no_batch_statistics() -> None:
    model = Classifier("resnet8_gn", 2, Input()).train()
    images = torch.rand(4, 3, 16, 16)
    assert torch.allclose(model(images)[:1], model(images[:1]), atol=1e-5)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_state_dict_file_keeps_its_trunk_and_gets_a_fresh_head(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(5)
    plain, file = models.resnet18(num_classes=1000), tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(plain.state_dict(), file)
    else:
        save_file(plain.state_dict(), file)
    model = grokd.build_model("resnet18", str(file), 2, Input(), seed=0)
    assert torch.equal(model.trunk.layer4[1].conv2.weight, plain.layer4[1].conv2.weight)  # type: ignore[union-attr,index]
    assert model.head.weight.shape == (2, 512)


def test_state_dict_with_as_many_classes_keeps_its_head(tmp_path: Path) -> None:
    plain = models.resnet18(num_classes=2)
    torch.save({"state_dict": plain.state_dict()}, tmp_path / "a.pth")
    model = grokd.build_model("resnet18", str(tmp_path / "a.pth"), 2, Input(), seed=0)
    assert torch.equal(model.head.weight, plain.fc.weight)


def test_real_imagenet_weights_load(data_folder: Path) -> None:
    file = data_folder / "weights" / "mobilenet_v2_imagenet.safetensors"
    half = Input(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    model = grokd.build_model("mobilenet_v2", str(file), 1000, half, seed=0).eval()
    photographs = sorted((data_folder / "waterbirds_mini").glob("002*/*.jpg"))[:16]
    pixels = [grokd.decode(path, 161, "squash") for path in photographs]
    images = torch.stack([torch.from_numpy(p.copy()) for p in pixels]) / 255
    with torch.no_grad():
        named = model(images).topk(5).indices
    assert (named == 146).any(1).float().mean() > 0.5  # ImageNet's albatross


def test_state_dict_of_another_network_is_refused_in_one_line(tmp_path: Path) -> None:
    torch.save(models.resnet18().state_dict(), tmp_path / "a.pth")
    with pytest.raises(Problem, match=r"a.pth does not fit resnet34: Missing key\(s\) .*layer1.2"):
        grokd.build_model("resnet34", str(tmp_path / "a.pth"), 2, Input(), 0)


class Innocent:
    """Something a weights file should not hold."""


def test_file_with_pickled_code_is_refused(tmp_path: Path) -> None:
    torch.save({"model": Innocent()}, tmp_path / "a.pth")
    with pytest.raises(Problem, match=r"a.pth cannot be read .* state_dict"):
        grokd.build_model("cnn2", str(tmp_path / "a.pth"), 2, Input(), 0)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    for name in ("none.pth", "none.safetensors"):
        with pytest.raises(Problem, match=f"{name} is not there"):
            grokd.build_model("cnn2", str(tmp_path / name), 2, Input(), 0)
    with pytest.raises(Problem, match=r"resnet18 has no weights 'IMAGENET1K_V3'; did you mean"):
        grokd.build_model("resnet18", "IMAGENET1K_V3", 2, Input(), 0)
    for arch in ("cnn2", "clip:width=64,layers=1,patch=8,size=16,dim=8"):
        with pytest.raises(Problem, match=rf"{arch} has no weights 'DEFAULT'"):
            grokd.build_model(arch, "DEFAULT", 2, Input(), 0)


@pytest.mark.parametrize("arch", ["resnet18", "inception_v3"])
def test_torchvision_weights_by_name(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real loading code, with torch's download cache filled beforehand."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = models.get_model_weights(arch)["DEFAULT"]
    plain = models.get_model(arch, weights=None, num_classes=1000, init_weights=False) if (
        arch == "inception_v3") else models.get_model(arch)
    name = weights.url.rsplit("/", 1)[1]
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(plain.state_dict(), tmp_path / "hub" / "checkpoints" / name)
    model = grokd.build_model(arch, "DEFAULT", 2, Input(), seed=0)
    key = next(k for k in plain.state_dict() if k.endswith("conv.weight") or k == "conv1.weight")
    assert torch.equal(model.plain_state()[key], plain.state_dict()[key])
    assert model.input.mean == ((0.5,) * 3 if arch == "inception_v3" else grokd.IMAGENET_MEAN)


def test_weights_that_cannot_be_fetched_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(Problem, match=r"DEFAULT of resnet18 could not be fetched .* weights"):
        grokd.build_model("resnet18", "DEFAULT", 2, Input(), 0)


def test_images_are_resized_to_the_networks_input() -> None:
    model = Classifier("vit_b_16", 2, Input(input_size=224)).eval()
    with torch.no_grad():
        assert model(torch.rand(1, 3, 64, 64)).shape == (1, 2)
    with pytest.raises(Problem, match="vit_b_16 takes 224 pixels, not 64: set input_size = 224"):
        Classifier("vit_b_16", 2, Input())(torch.rand(1, 3, 64, 64))


def test_float64_network_gives_float64_logits() -> None:
    assert Classifier("cnn2", 2, Input()).double()(torch.rand(1, 3, 16, 16)).dtype == torch.float64


def test_saved_student_loads_in_plain_torchvision(tmp_path: Path) -> None:
    """In three lines, in a process that cannot import grokd."""
    model = grokd.build_model("resnet18", "random", 3, Input(), 0).eval()
    metadata = {"arch": "resnet18", "class_names": json.dumps(["a", "b", "c"])}
    path = tmp_path / "model.safetensors"
    save_file(model.plain_state(), path, metadata)
    code = f"""
import torch
from safetensors.torch import load_file; from torchvision.models import get_model
model = get_model("resnet18", num_classes=3)
model.load_state_dict(load_file({str(path)!r}))
mean, std = torch.tensor({grokd.IMAGENET_MEAN}), torch.tensor({grokd.IMAGENET_STD})
image = torch.linspace(0, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
print(*model.eval()((image - mean[:, None, None]) / std[:, None, None])[0].tolist())
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    image = torch.linspace(0, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    expected = model(image)[0].tolist()
    assert [float(x) for x in done.stdout.split()] == pytest.approx(expected, abs=1e-5)
    assert not load_file(path).keys() - models.resnet18().state_dict().keys()

"""Feature distillation: losses, weightings, layers and adapters, against slow formulas."""

import contextlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Run, write_images
from safetensors.torch import load_file
from test_processes import TWO, processes
from torch import Tensor, nn

import grokd
from grokd import Batch, Classifier, Compared, Data, Distill, FeatureLoss, Input, Problem


def runtime(total: int = 1) -> Any:
    return SimpleNamespace(world=1, rank=0, sum=lambda tensor: tensor, upload=torch.from_numpy)


def build(settings: Distill, student: str, teachers: list[str], biased: str = "", side: int = 16,
          pretrained: bool = True, batch: int = 4, double: bool = True,
          ) -> tuple[FeatureLoss, Batch, dict[str, list[Tensor]]]:
    """A student after its forward pass, its loss, and every network's maps by layer."""
    torch.manual_seed(0)
    models = [Classifier(arch, 2, Input()) for arch in [*teachers, *([biased] if biased else [])]]
    models = [m.eval().requires_grad_(False) for m in models]
    model, images = Classifier(student, 2, Input()), torch.rand(batch, 3, side, side)
    if double:
        models, model, images = [m.double() for m in models], model.double(), images.double()
    pooled = [m.features(images)[:, :, None, None] for m in models]
    keys = [grokd.trunk_key(m) for m in models]
    targets: Any = SimpleNamespace(
        num_teachers=len(teachers), models=models, trunk_keys=keys,
        store=SimpleNamespace(data=Data(crop=side)), pooled=lambda positions: pooled,
        runtime=SimpleNamespace(autocast=contextlib.nullcontext),
    )
    active = [n for n, g in zip(settings.layers, settings.gamma, strict=True) if g]
    online = any(n.rpartition("=")[2] != "pooled" for n in active)
    networks = dict(zip(keys, models, strict=True)) if online else {}
    frozen = grokd.frozen_features(settings, targets, networks, pretrained)
    loss = FeatureLoss(settings, frozen, seed=0)
    tap = grokd.Tap(model, [layer.student for layer in loss.layers], side)
    loss.attach(model, tap.maps, tap.widths)
    model.to(images.dtype)
    logits = model(images)
    labels = torch.zeros(batch, dtype=torch.long)
    state = Batch(settings, model, images, labels, np.arange(batch), batch, 0, 0, runtime(), logits)
    maps: Any = frozen.maps(state)
    found = {layer.name: [tap.maps[layer.student], *maps[layer.teacher]] for layer in loss.layers}
    return loss, state, found


MSE = Distill(gamma=(0.5,), layers=("layer2",), adapters="shared")


def adapters(batch: Batch, layer: int = 0) -> list[Tensor]:
    return [a.weight for a in batch.model.adapters[layer]]  # type: ignore[index]


def test_squared_distance_by_hand() -> None:
    """Two channels, one position: A = [[1, 2], [0, 1]], f_s = (1, 1), teachers (1, 0), (3, 2)."""
    loss, batch, _ = build(MSE, "cnn2", ["cnn2", "cnn2"])
    adapter = nn.Conv2d(2, 2, 1, bias=False).double()
    with torch.no_grad():
        adapter.weight.copy_(torch.tensor([[1.0, 2.0], [0.0, 1.0]])[:, :, None, None])
    batch.model.adapters = nn.ModuleList([nn.ModuleList([adapter])])
    student = torch.ones(1, 2, 1, 1).double()
    teachers = [torch.tensor(f).double().view(1, 2, 1, 1) for f in ([1.0, 0.0], [3.0, 2.0])]
    value, _ = loss._loss(batch, 0, Compared(student, teachers, None))
    # A f_s = (3, 1), mean of the teachers (2, 1): ((3 - 2)^2 + 0) / 2
    torch.testing.assert_close(value, torch.tensor([0.5]).double())


def test_attention_transfer_by_hand() -> None:
    """Maps of two positions: mean squares (9, 16) / 2 and (1, 0) / 1, so Q (.36, .64)/|.|."""
    student = torch.tensor([[3.0, 4.0], [0.0, 0.0]]).double().view(1, 2, 1, 2)
    q = grokd.attention(student)
    norm = (4.5**2 + 8.0**2) ** 0.5
    torch.testing.assert_close(q, torch.tensor([[4.5 / norm, 8 / norm]]).double())
    settings = replace(MSE, feature_loss="attention")
    loss, batch, _ = build(settings, "cnn2", ["cnn2"])
    teacher = torch.tensor([[1.0, 0.0]]).double().view(1, 1, 1, 2)
    value, _ = loss._loss(batch, 0, Compared(student, [teacher], None))
    expected = ((4.5 / norm - 1) ** 2 + (8 / norm) ** 2) / 2
    torch.testing.assert_close(value, torch.tensor([expected]).double())
    assert not adapters(batch)


@pytest.mark.parametrize("kind", ["shared", "per-teacher"])
@pytest.mark.parametrize("weights", ["uniform", "agree", "disagree"])
def test_losses_equal_the_slow_formula_and_its_gradient(kind: Any, weights: Any) -> None:
    settings = replace(MSE, adapters=kind, feature_weights=weights, layers=("layer2", "pooled"),
                       gamma=(0.3, 0.7))
    loss, batch, maps = build(settings, "cnn2", ["cnn2", "cnn2", "cnn2"])
    value, _ = loss(batch)
    expected = torch.zeros(4).double()
    for layer, (name, gamma) in enumerate(zip(settings.layers, settings.gamma, strict=True)):
        student, *teachers = maps[name]
        used = adapters(batch, layer)
        assert len(used) == (1 if kind == "shared" else 3)
        spread = torch.stack([torch.stack(teachers)[:, i].var(0).mean() for i in range(4)])
        for i in range(4):
            variance = torch.stack([f[i] for f in teachers]).var(0)
            factor = torch.ones_like(variance)
            if weights == "agree":
                factor = 1 / (variance + 1e-6)
                factor = factor / factor.mean()
            elif weights == "disagree":
                factor = factor * variance.mean() / spread.mean()
            images = [torch.einsum("oc,chw->ohw", a[:, :, 0, 0], student[i]) for a in used]
            if kind == "shared":
                mean = sum(f[i] for f in teachers) / 3
                distance = (factor * (images[0] - mean) ** 2).mean()
            else:
                pairs = zip(images, teachers, strict=True)
                distance = sum((factor * (a - f[i]) ** 2).mean() for a, f in pairs) / 3  # type: ignore
            expected[i] = expected[i] + gamma * distance
    torch.testing.assert_close(value, expected)
    parameters = [p for p in batch.model.parameters() if p.requires_grad]
    ours = torch.autograd.grad(value.sum(), parameters, retain_graph=True, allow_unused=True)
    slow = torch.autograd.grad(expected.sum(), parameters, allow_unused=True)
    for a, b in zip(ours, slow, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("networks", [["cnn2", "cnn2"], ["cnn2", "resnet8"]])
@pytest.mark.parametrize("biased", ["cnn2", "resnet8"])
@pytest.mark.parametrize("layer", ["layer2", "pooled"])
def test_feature_weights_are_cosines_of_autograd_gradients(
    networks: list[str], biased: str, layer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Distill(gamma=(1.0,), layers=(layer,), feature_weights="agre",
                       feature_space="student")
    shared = len(set(networks)) == 1
    loss, batch, maps = build(settings, "cnn2", networks, biased, pretrained=shared)
    seen: list[Tensor] = []
    original = grokd.feature_agre

    def spied(*args: Any) -> Tensor:
        seen.append(original(*args))
        return seen[-1]

    monkeypatch.setattr(grokd, "feature_agre", spied)
    value, _ = loss(batch)
    side = min(f.shape[-1] for f in maps[layer])
    f_s, *others = (F.adaptive_avg_pool2d(f.detach(), side) for f in maps[layer])
    used = [a.detach() for a in adapters(batch)]
    assert len(used) == (1 if shared else 2) + (0 if shared and biased == "cnn2" else 1)
    own = [used[0], used[0]] if shared else used[:2]
    gradients = []
    for a, f in zip([*own, used[-1]], others, strict=True):
        x = f_s.clone().requires_grad_()
        (0.5 * (F.conv2d(x, a) - f).square().sum()).backward()
        assert x.grad is not None
        gradients.append(x.grad.flatten(1))
    weights = torch.stack([1 - F.cosine_similarity(g, gradients[-1]) for g in gradients[:-1]])
    torch.testing.assert_close(seen[0], weights, rtol=1e-6, atol=1e-9)
    shares = weights / weights.sum(0)
    distances = torch.stack([
        (F.conv2d(f_s, a) - f).square().mean((1, 2, 3)) for a, f in zip(own, others, strict=False)])
    if shared:
        mean = (shares[:, :, None, None, None] * torch.stack(others[:-1])).sum(0)
        distances = (F.conv2d(f_s, own[0]) - mean).square().mean((1, 2, 3))[None]
        shares = torch.ones(())
    total = (shares * distances).sum(0)
    if len(used) > (1 if shared else 2):
        total = total + (F.conv2d(f_s, used[-1]) - others[-1]).square().mean((1, 2, 3))
    torch.testing.assert_close(value.detach(), total)


def test_adapted_weights_are_cosines_with_respect_to_the_adapted_feature() -> None:
    torch.manual_seed(0)
    a, *f = (torch.randn(5, 6, 3, 3).double() for _ in range(4))
    weights = grokd.feature_agre([a], f[:2], a, f[2])
    gradients = []
    for target in f:
        x = a.clone().requires_grad_()
        (0.5 * (x - target).square().sum()).backward()
        assert x.grad is not None
        gradients.append(x.grad.flatten(1))
    expected = torch.stack([1 - F.cosine_similarity(g, gradients[2]) for g in gradients[:2]])
    torch.testing.assert_close(weights, expected)
    nil = grokd.feature_agre([f[0]], f[:2], f[0], f[2])  # the first teacher is already reached
    torch.testing.assert_close(nil[0], torch.ones(5).double())


def test_adapter_of_the_biased_model_learns_and_does_not_pull_the_student() -> None:
    settings = Distill(gamma=(1.0,), layers=("layer2",), feature_weights="agre")
    loss, batch, _ = build(settings, "cnn2", ["cnn2", "cnn2"], "resnet8", pretrained=False)
    value, _ = loss(batch)
    own = batch.model.adapters[0][2].weight  # type: ignore[union-attr, index]
    body = next(batch.model.trunk.parameters())  # type: ignore[union-attr]
    grad_own, grad_body = torch.autograd.grad(value.sum(), [own, body], retain_graph=True)
    assert grad_own.abs().max() > 0
    without = loss(batch)[1]["feature layer2"]
    torch.testing.assert_close(torch.autograd.grad(without.sum(), body)[0], grad_body)
    assert not torch.allclose(without, value)


def test_a_teachers_own_parent_as_biased_model_weighs_nothing() -> None:
    settings = Distill(gamma=(1.0,), layers=("layer2",), feature_weights="agre")
    loss, batch, maps = build(settings, "cnn2", ["cnn2", "cnn2"], "cnn2")
    loss.frozen = replace(loss.frozen, twins=[True, False])
    student, first, second, _ = maps["layer2"]
    value, _ = loss._loss(batch, 0, Compared(student, [first, second], first))
    expected = (F.conv2d(student, adapters(batch)[0]) - second).square().mean((1, 2, 3))
    torch.testing.assert_close(value, expected)


def test_contrastive_loss_equals_the_slow_formula() -> None:
    settings = Distill(gamma=(0.8,), feature_loss="contrastive")
    loss, batch, maps = build(settings, "cnn2", ["cnn2", "resnet8"])
    value, _ = loss(batch)
    student, *teachers = maps["pooled"]
    w_s, *w_t = (w[:, :, 0, 0] for w in adapters(batch))
    expected = torch.zeros(4).double()
    for w, f in zip(w_t, teachers, strict=True):
        for i in range(4):
            s = w_s @ student[i, :, 0, 0]
            t = [w @ f[j, :, 0, 0] for j in range(4)]
            scores = torch.stack([s @ v / s.norm() / v.norm() / 0.07 for v in t])
            expected[i] = expected[i] - 0.8 / 2 * (scores[i] - scores.exp().sum().log())
    torch.testing.assert_close(value, expected)
    assert w_s.shape == (128, 1024)


def test_dropped_channels_are_the_same_on_both_sides() -> None:
    loss, batch, maps = build(replace(MSE, gamma=(1.0,), feature_dropout=0.5), "cnn2", ["cnn2"])
    value, _ = loss(batch)
    student, teacher = maps["layer2"]
    difference = (F.conv2d(student, adapters(batch)[0]) - teacher).square()
    kept = torch.from_numpy(grokd.hash_uniform(0, 8, 0, 0, np.arange(64)) >= 0.5)
    assert 16 < kept.sum() < 48
    expected = 2 * difference[:, kept].sum((1, 2, 3)) / difference[0].numel()
    torch.testing.assert_close(value, expected)


def test_layer_without_weight_costs_nothing() -> None:
    settings = replace(MSE, layers=("layer1", "layer2"), gamma=(0.0, 1.0))
    _, batch, _ = build(settings, "cnn2", ["cnn2"])
    assert len(batch.model.adapters) == 1  # type: ignore[arg-type]
    hooked = [n for n, m in batch.model.named_modules() if m._forward_hooks]
    assert hooked == ["trunk.layer2"]
    assert "layers" not in grokd.settings_of(replace(settings, gamma=(0.0, 0.0)))


@pytest.mark.parametrize("arch, side, widths", [
    ("resnet18", 224, [64, 128, 256, 512]), ("resnet50", 224, [256, 512, 1024, 2048]),
    ("mobilenet_v3_large", 224, [24, 40, 112, 960]), ("convnext_tiny", 224, [96, 192, 384, 768]),
    ("vit_b_16", 224, [768] * 4), ("swin_t", 224, [96, 192, 384, 768]),
    ("efficientnet_b0", 224, [24, 40, 112, 1280]), ("densenet121", 64, [128, 256, 512, 1024]),
])
def test_layers_are_found_by_stride(arch: str, side: int, widths: list[int]) -> None:
    model = Classifier(arch, 2, Input())
    names = [f"layer{k}" for k in (1, 2, 3, 4)]
    tap = grokd.Tap(model, [*names, "pooled"], side)
    if arch.startswith("densenet"):  # its transitions end a stage half as wide
        assert [tap.maps[name].shape[-1] for name in names] == [16, 8, 4, 2]
        return
    assert [tap.widths[name] for name in names] == widths
    sides = [14] * 4 if arch == "vit_b_16" else [56, 28, 14, 7]
    assert [tap.maps[name].shape[-1] for name in names] == sides
    assert tap.maps["pooled"].shape[1:] == (model.head.in_features, 1, 1)


def test_modules_can_be_named_and_unknown_layers_are_refused() -> None:
    model = Classifier("resnet18", 2, Input())
    assert grokd.Tap(model, ["layer2.0.conv1"], 64).widths == {"layer2.0.conv1": 128}
    with pytest.raises(Problem, match=r"resnet18 has no layer 'layer5': it has layer1, layer2"):
        grokd.Tap(model, ["layer5"], 64)
    with pytest.raises(Problem, match=r"cnn2 has no layer 'layer3'"):
        grokd.Tap(Classifier("cnn2", 2, Input()), ["layer3"], 16)
    clip = Classifier("clip:width=64,layers=1,patch=8,size=16,dim=8", 2, Input())
    attention = next(n for n, m in clip.trunk.named_modules() if n.endswith("attn"))
    with pytest.raises(Problem, match=rf"{attention} gives no map that can be compared"):
        grokd.Tap(clip, [attention], 16)


LAYERS = ("layer2", "layer3", "layer4", "pooled")


@pytest.mark.parametrize("student, teachers, biased", [
    ("resnet18", ["resnet50"] * 5, "resnet50"),
    ("mobilenet_v3_large", ["vit_b_16"], "vit_b_16"),
    ("resnet18", ["convnext_tiny", "resnet50"], "resnet50"),
])
def test_training_step_of_any_pair_at_224_pixels(
    student: str, teachers: list[str], biased: str
) -> None:
    settings = Distill(gamma=(0.1,) * 4, layers=LAYERS, feature_weights="agre")
    loss, batch, _ = build(settings, student, teachers, biased, side=224, batch=2,
                           pretrained=len(set(teachers)) == 1, double=False)
    value, figures = loss(batch)
    value.sum().backward()
    assert torch.isfinite(value).all() and list(figures) == [f"feature {n}" for n in LAYERS]
    assert all(p.grad is not None for p in batch.model.adapters.parameters())  # type: ignore


def test_unequal_widths_are_refused_where_they_must_agree() -> None:
    for change in ({"adapters": "shared"}, {"feature_weights": "agree"}, {"feature_dropout": 0.5},
                   {"feature_weights": "agre", "feature_space": "adapted"}):
        with pytest.raises(Problem, match=r"layer layer2: the networks have 64, 32"):
            build(replace(Distill(gamma=(0.5,), layers=("layer2",)), **change),
                  "cnn2", ["cnn2", "resnet8"], "cnn2")
    attention = replace(MSE, feature_loss="attention")  # has no adapters that could be shared
    assert build(attention, "cnn2", ["cnn2", "resnet8"])[0].shared == [False]


STUDENTS = '''
import grokd

base = student
recipe = grokd.replace(recipe, seeds=(0,), eval=grokd.Eval(baseline="pooled", probes=True),
                       students={
    "plain": base,
    "more": grokd.replace(base, gamma=(1.0,), feature_weights="agre"),
    "pooled": grokd.replace(base, gamma=(0.5,), feature_weights="agre"),
    "maps": grokd.replace(base, gamma=(0.1, 0.2), layers=("layer2", "pooled")),
    "contrastive": grokd.replace(base, gamma=(0.8,), feature_loss="contrastive"),
    "disagree": grokd.replace(base, gamma=(0.5,), layers=("layer1=layer2",),
                              feature_weights="disagree", arch="resnet8"),
    "cutmix": grokd.replace(base, weighting="average",
                            train=grokd.replace(train, mix="cutmix")),
    "mixup": grokd.replace(base, gamma=(0.5,), train=grokd.replace(train, mix="mixup")),
})
'''


def test_students_with_features_train_alone_and_in_two_processes(
    tmp_path: Path, grokd_process: Run
) -> None:
    folder = write_images(tmp_path)
    recipe = (folder / "tiny.py").read_text().replace('("cnn2", "resnet8")', '("cnn2",)')
    (folder / "tiny.py").write_text(recipe + STUDENTS)
    grokd_process("run", "tiny.py", cwd=folder)
    results = json.loads((folder / "runs/tiny/results.json").read_text())
    report = (folder / "runs/tiny/report.md").read_text()
    wga = {row["name"]: row["members"][0]["wga"] for row in results["rows"]}
    line = next(line for line in report.splitlines() if line.startswith("| maps "))
    assert line.split("|")[-2].strip() == f"{wga['maps'] - wga['pooled']:.1f}"
    assert "WGA − pooled's" in report
    assert "One image of the smallest group is 25.000 points" in report
    assert {"field": "gamma", "label": "agre, features agre",
            "points": [[0.0, "plain"], [0.5, "pooled"], [1.0, "more"]]} in results["curves"]
    assert (folder / "runs/tiny/curves.png").is_file()
    probes = {row["name"]: row["scores"] for row in results["probes"]}
    names = {f"{layer}: {kind}" for layer in ("layer1", "layer2", "pooled")
             for kind in ("label", "attribute")}
    assert names <= probes["maps"].keys() == probes["teachers, ERM"].keys()
    assert probes["teachers, ERM"]["layer1: attribute"] == 100  # the colour, at first sight

    for made in ("teachers", "bias-model"):
        shutil.copytree(folder / "runs/tiny" / made, folder / "two" / made)
    processes(TWO, "distill", "tiny.py", "--out", "two", "--parallel", "data", cwd=folder)
    for name in ("pooled", "maps", "contrastive", "disagree", "mixup"):
        path = f"students/{name}/seed0/model.safetensors"
        one, two = (load_file(folder / out / path) for out in ("runs/tiny", "two"))
        assert one.keys() == two.keys() and not any(k.startswith("adapters") for k in one)
        if name in ("pooled", "maps", "contrastive"):  # no batch norm, no mixing: sums agree
            for key, value in one.items():
                torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-5)

"""Networks as files for others: what is written answers as grokd does, or is not written."""

import csv
import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, write_images
from safetensors.torch import load_file, save_file

import grokd

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

FEATURES = '''
import grokd

features = grokd.replace(student, gamma=(0.5, 0.5), layers=("layer2=layer2", "pooled"))
simkd = grokd.replace(features, weighting="average", loss="simkd", gamma=(0.0,))
more = {"features": features, "simkd": simkd}
teachers = grokd.replace(recipe.teachers, arch=("resnet8",))
recipe = grokd.replace(recipe, teachers=teachers, students={**recipe.students, **more})
'''


GROUPS = ["cat, indoors", "cat, outdoors", "dog, indoors", "dog, outdoors"]


def command(folder: Path, *args: str) -> None:
    """grokd in this process, in a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        grokd.command_line(args)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny data set, in words, with finished students: AGRE, a refitted head, and distilled
    features."""
    folder = write_images(tmp_path_factory.mktemp("export"))
    with open(folder / "metadata.csv", newline="") as file:
        header, *rows = csv.reader(file)
    words = [[name, ("cat", "dog")[int(y)], ("indoors", "outdoors")[int(a)], split]
             for name, y, a, split in rows]
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([header, *words])
    with open(folder / "tiny.py", "a") as file:
        file.write(FEATURES)
    for name in ("teachers", "bias-model"):
        command(folder, name, "tiny.py")
    command(folder, "distill", "tiny.py", "--student", "agre", "one-hot-dfr", "features",
            "simkd")
    return folder


def random_network(path: Path, arch: str, side: int = 0, projected: int = 0) -> None:
    """A weights file of grokd's of a random network that tells its images apart, of a SimKD student
    whose projector puts out so many channels."""
    input = grokd.Input(side)
    model = grokd.build_model(arch, "random", 2, input, 0)
    if projected:
        grokd.add_projector(model, side or 64, torch.zeros(1, projected, 2, 2), 0)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.momentum = None  # it takes the mean of what it sees
        torch.nn.init.normal_(model.head.weight)
        torch.nn.init.normal_(model.head.bias)
        model.train()(torch.rand(8, 3, side or 64, side or 64))
    about = {"arch": arch, "class_names": '["0", "1"]',
             "input": json.dumps(dataclasses.asdict(input))}
    if model.projection:
        about["projector"] = json.dumps(model.projection._asdict())
    save_file(model.plain_state(), path, about)


def shaped(folder: Path, size: int, crop: int, geometry: str = "squash") -> None:
    """A recipe for random networks: the tiny images at another size."""
    text = (folder / "tiny.py").read_text()
    data = f'Data(size={size}, crop={crop}, geometry="{geometry}", class_names=("land", "sea"),'
    (folder / "shaped.py").write_text(text.replace("Data(size=20, crop=16,", data))


# Runs image.png through every snippet of a card, where grokd cannot be imported; prints logits.
ELSEWHERE = '''
import json, re, sys
sys.modules["grokd"] = None
found = {}
text = open("README.md").read()
for name, code in re.findall(r"(model\\.\\w+):\\n\\n```python\\n(.*?)```", text, re.DOTALL):
    values = {}
    print("class", name, end=" ", flush=True)
    exec(code, values)
    found[name] = values["logits"].tolist()
if len(sys.argv) > 1:
    import timm, torch
    from PIL import Image
    network = timm.create_model("local-dir:.", pretrained=True).eval()
    config = timm.data.resolve_data_config({}, model=network)
    image = timm.data.create_transform(**config)(Image.open("image.png"))[None]
    found["timm"] = network(image).tolist()
print(json.dumps(found))
'''


def used_elsewhere(folder: Path, image: Path, *args: str) -> tuple[dict[str, Any], list[str]]:
    """Logits of every snippet and the classes they print, in a process without grokd."""
    (folder / "image.png").write_bytes(image.read_bytes())
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *args], cwd=folder, env=environment,
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *printed, found = done.stdout.strip().splitlines()
    return json.loads(found), printed


def logits_of(path: Path, image: Path, data: grokd.Data) -> torch.Tensor:
    """What grokd says of an image file."""
    stored = torch.from_numpy(grokd.decode(image, data.size, data.geometry).copy())
    start = (data.size - data.crop) // 2
    cut = stored[None, :, start : start + data.crop, start : start + data.crop].float() / 255
    return grokd.load_model(path)(cut)


def test_recommended_student_is_written_with_card_and_config(trained: Path) -> None:
    command(trained, "export", "tiny.py", "--int8", "--max-wga-loss", "100", "--calibration", "8")
    (folder,) = [path for path in (trained / "runs/tiny/export").iterdir() if path.is_dir()]
    assert {path.name for path in folder.iterdir()} == {
        *grokd.FILES.values(), "config.json", "README.md"}
    about = json.loads((folder / "config.json").read_text())
    seeds = (trained / "runs/tiny/students" / folder.name).glob("seed*/model.safetensors")
    scores = {path: grokd.read_metadata(path) for path in seeds}
    assert about["fingerprint"] in [each["fingerprint"] for each in scores.values()]
    assert about["checked_images"] == 16
    assert about["calibration_images"] == 8
    assert about["label_names"] == ["cat", "dog"]
    assert [group["name"] for group in about["groups"]] == GROUPS
    figures = about["formats"]
    assert set(figures) == {"grokd", *grokd.FILES}
    for kind in ("safetensors", "onnx", "pt2"):
        assert figures[kind]["agreement"] == 100
        assert figures[kind]["wga"] == figures["grokd"]["wga"]
        assert figures[kind]["ms"] > 0
    card = (folder / "README.md").read_text()
    assert grokd.format_table(about) in card
    assert f"**{figures['grokd']['wga']:.1f} %**" in card
    assert "calibrated on 8 validation images" in card
    assert f"one image at a time, on one thread of {grokd.processor_name()}." in card
    assert "cnn2 is a network of grokd's own" in card


def test_report_has_the_names_of_the_table(trained: Path) -> None:
    command(trained, "eval", "tiny.py")
    results = json.loads((trained / "runs/tiny/results.json").read_text())
    assert [group["name"] for group in results["groups"]] == GROUPS


def seen_gpu(device: str) -> dict[str, str]:
    """What `origin` says where a GPU is visible."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
        return grokd.origin(1, device)


def test_records_name_the_processor_that_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(sys, "argv", ["grokd.py", "run", "my recipe.py"])
    about = seen_gpu("")
    assert about["command"] == "python grokd.py run 'my recipe.py'"
    assert about["hardware"].startswith("a GPU, 1 process")
    assert seen_gpu("cpu")["hardware"].startswith(f"{grokd.processor_name()}, 1 process")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert seen_gpu("")["hardware"].startswith(grokd.processor_name())


def test_seed_is_the_best_on_the_selection_part(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named, origin = list[str](), grokd.origin

    def spied(processes: int, device: str) -> dict[str, str]:
        named.append(device)
        return origin(processes, device)

    monkeypatch.setattr(grokd, "origin", spied)
    command(trained, "export", "tiny.py", "--student", "agre", "--format", "safetensors")
    assert named == ["cpu"]  # where the files were timed
    about = json.loads((trained / "runs/tiny/export/agre/config.json").read_text())
    validated = {
        path: json.loads(grokd.read_metadata(path)["metrics"])["wga"]
        for path in sorted((trained / "runs/tiny/students/agre").glob("*/model.safetensors"))
    }
    best = max(validated, key=lambda path: validated[path])
    assert about["fingerprint"] == grokd.read_metadata(best)["fingerprint"]


@pytest.mark.parametrize("student", ["features", "one-hot-dfr", "simkd"])
def test_any_student_can_be_exported(trained: Path, student: str) -> None:
    out = trained / f"only-{student}"
    (out / "students").mkdir(parents=True)
    runs = trained / "runs/tiny"
    for name in ("teachers", "bias-model", f"students/{student}"):
        (out / name).symlink_to(runs / name)
    command(trained, "export", "tiny.py", "--student", student, "--out", str(out),
            "--seeds", "1")
    file = runs / f"students/{student}/seed1/model.safetensors"
    images = torch.rand(5, 3, 16, 16)
    expected = grokd.load_model(file)(images)
    session = onnxruntime.InferenceSession(out / "export" / student / "model.onnx")
    program = torch.export.load(out / "export" / student / "model.pt2").module()
    for part in (slice(0, 5), slice(2, 3)):
        (logits,) = session.run(None, {"images": images[part].numpy()})
        assert np.allclose(logits, expected[part], atol=1e-5)
        assert torch.allclose(program(images[part]), expected[part], atol=1e-5)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random ResNet-18, exported: the folder of the data, and that of the files."""
    folder = write_images(tmp_path_factory.mktemp("resnet"))
    shaped(folder, 48, 40, "shorter_side")
    random_network(folder / "net.safetensors", "resnet18")
    command(folder, "export", "shaped.py", "--model", "net.safetensors")
    return folder, folder / "runs/shaped/export/net"


def test_snippets_and_timm_answer_as_grokd_does(resnet: tuple[Path, Path]) -> None:
    pytest.importorskip("timm")
    folder, files = resnet
    image = folder / "test010.png"
    data = grokd.Data(size=48, crop=40, geometry="shorter_side")
    expected = logits_of(folder / "net.safetensors", image, data)
    found, printed = used_elsewhere(files, image, "timm")
    assert set(found) == {"model.safetensors", "model.onnx", "model.pt2", "timm"}
    for logits in found.values():
        assert np.allclose(logits, expected, atol=1e-4 * float(expected.abs().max()))
    name = ("land", "sea")[int(expected.argmax())]
    assert [line.split()[-1] for line in printed] == [name] * 3


def test_snippet_of_a_simkd_student_answers_as_grokd_does(tmp_path: Path) -> None:
    """Of a network that has layers between its last map and the head."""
    folder, network = write_images(tmp_path), tmp_path / "net.safetensors"
    shaped(folder, 72, 64)
    random_network(network, "mobilenet_v3_small", projected=32)
    command(folder, "export", "shaped.py", "--model", "net.safetensors", "--format", "safetensors")
    files, image = folder / "runs/shaped/export/net", folder / "test110.png"
    assert "needs grokd" not in (files / "README.md").read_text()
    expected = logits_of(network, image, grokd.Data(size=72, crop=64))
    found, _ = used_elsewhere(files, image)
    close = 1e-4 * float(expected.abs().max())
    assert np.allclose(found["model.safetensors"], expected, atol=close)


def test_header_of_the_card_is_yaml(resnet: tuple[Path, Path]) -> None:
    yaml = pytest.importorskip("yaml")
    _, header, text = (resnet[1] / "README.md").read_text().split("---\n", 2)
    about = yaml.safe_load(header)
    scores = json.loads((resnet[1] / "config.json").read_text())["formats"]["grokd"]
    (result,) = about["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == pytest.approx(scores["wga"], abs=0.01)
    assert about["library_name"] == "timm"
    assert "license" not in about
    assert "None is chosen here" in text


def test_weights_have_torchvisions_keys_and_graph_says_what_it_is(
    resnet: tuple[Path, Path],
) -> None:
    from torchvision.models import resnet18

    state = load_file(resnet[1] / "model.safetensors")
    resnet18(num_classes=2).load_state_dict(state)
    assert grokd.load_model(resnet[1] / "model.safetensors").arch == "resnet18"
    graph = onnx.load(resnet[1] / "model.onnx")
    assert {each.key: each.value for each in graph.metadata_props}["arch"] == "resnet18"
    assert [each.version for each in graph.opset_import if not each.domain] == [grokd.OPSET]
    (shape,) = [each.type.tensor_type.shape for each in graph.graph.input]
    assert [dim.dim_param or dim.dim_value for dim in shape.dim] == ["batch", 3, 40, 40]


# Nothing wrong is shipped


def shuffle_largest(graph: Any) -> None:
    """What a faulty exporter does: the channels of a weight in another order."""
    largest = max(graph.graph.initializer, key=lambda each: np.prod(each.dims))
    weight = onnx.numpy_helper.to_array(largest)
    largest.CopyFrom(onnx.numpy_helper.from_array(np.flip(weight, 1).copy(), largest.name))


def test_wrong_exporter_is_refused_and_what_stood_there_stays(
    resnet: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, files = resnet
    before = {path.name: path.read_bytes() for path in files.iterdir()}
    export: Any = torch.onnx.export

    class Faulty:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.model_proto = export(*args, **kwargs).model_proto
            shuffle_largest(self.model_proto)

    monkeypatch.setattr(torch.onnx, "export", Faulty)
    args = ["export", "shaped.py", "--model", "net.safetensors", "--format", "onnx", "--redo"]
    told = r"onnx: model\.onnx does not answer .* greatest difference of a logit [\d.e+]+ \(.*"
    with pytest.raises(grokd.Problem, match=told) as refused:
        command(folder, *args)
    assert "\n" not in str(refused.value)
    assert {path.name: path.read_bytes() for path in files.iterdir()} == before
    monkeypatch.undo()
    command(folder, *args)  # goes on, with a sound exporter
    assert {path.name for path in files.iterdir()} == {"model.onnx", "config.json", "README.md"}
    assert not list(files.parent.glob("*.partial"))


def figures_with(**changes: Any) -> dict[str, dict[str, Any]]:
    sound = {"wga": 90.0, "file": "f", "max_delta": 1e-6, "relative_delta": 1e-6, "changed": 0,
             "agreement": 100.0}
    return {"grokd": sound, "pt2": sound | changes, "int8": sound | changes}


@pytest.mark.parametrize("changes, num_images, refused", [
    ({}, 100, False),
    ({"relative_delta": 2e-3}, 100, True),
    ({"relative_delta": float("nan")}, 100, True),
    ({"changed": 1}, 100, False),
    ({"changed": 2}, 100, True),
    ({"changed": 5}, 5000, False),
    ({"changed": 6}, 5000, True),
])
def test_files_of_floats_must_agree(
    changes: dict[str, Any], num_images: int, refused: bool
) -> None:
    fault = grokd.fault_of("pt2", figures_with(**changes), num_images, grokd.Export())
    assert bool(fault) == refused


def test_int8_may_lose_so_many_points_of_wga() -> None:
    settings = grokd.Export(int8=True, max_wga_loss=2.0)
    assert not grokd.fault_of("int8", figures_with(wga=88.0, changed=9), 100, settings)
    fault = grokd.fault_of("int8", figures_with(wga=85.5), 100, settings)
    assert "fall by 4.5 points, from 90.0 to 85.5" in fault
    assert "--max-wga-loss 5" in fault
    assert not grokd.fault_of("int8", figures_with(wga=99.0), 100, settings)


def test_broken_int8_is_refused_unless_it_is_asked_for(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_file(kind: str, *args: Any, **kwargs: Any) -> grokd.Answer:
        answer = open_file(kind, *args, **kwargs)
        return (lambda images: -answer(images)) if kind == "int8" else answer

    open_file = grokd.open_file
    monkeypatch.setattr(grokd, "open_file", break_file)
    model = str(trained / "runs/tiny/students/one-hot-dfr/seed0/model.safetensors")
    args = ["export", "tiny.py", "--model", model, "--format", "onnx", "--int8"]
    with pytest.raises(grokd.Problem, match=r"int8: the worst group's accuracy would fall by"):
        command(trained, *args)
    assert not (trained / "runs/tiny/export/students-one-hot-dfr-seed0-model").exists()
    command(trained, *args, "--max-wga-loss", "100")
    folder = trained / "runs/tiny/export/students-one-hot-dfr-seed0-model"
    before = (folder / "config.json").stat().st_mtime_ns
    with pytest.raises(grokd.Problem, match=r"int8: the worst group's accuracy would fall by"):
        command(trained, *args, "--redo")
    command(trained, *args, "--max-wga-loss", "100")  # it stands, and its note
    assert (folder / "config.json").stat().st_mtime_ns == before


def test_missing_package_is_named_with_its_extra(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec",
        lambda name: None if name == "onnxscript" else find(name))
    with pytest.raises(grokd.Problem, match=r"packages onnxscript: .* --extra export"):
        command(trained, "export", "tiny.py", "--student", "agre")
    command(trained, "export", "tiny.py", "--student", "one-hot-dfr", "--out", "runs/tiny",
            "--format", "safetensors", "--redo")


@pytest.mark.parametrize("args, told", [
    (["--student", "agr"], r"no finished student 'agr' \(seeds 0, 1\); did you mean agre"),
    (["--student", "one-hot"], r"one-hot/seed0/model.safetensors is missing. Train it"),
    (["--seeds", "0", "7"], r"No student is recommended: fewer than two have .*--student"),
    (["--model", "absent.safetensors"], r"absent.safetensors is not there"),
    (["--format"], r"--format names no file"),
])
def test_mistakes_are_told_in_one_line(trained: Path, args: list[str], told: str) -> None:
    with pytest.raises(grokd.Problem, match=told):
        command(trained, "export", "tiny.py", *args)


def test_flags_without_effect_are_warned_about(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = grokd.load_recipe("digits")
    grokd.apply_flags("export", recipe, "digits", ["--calibration", "9"])
    assert "calibration has no effect on export: it belongs to int8 True" in capsys.readouterr().out
    grokd.apply_flags("export", recipe, "digits", ["--calibration", "9", "--int8"])
    assert "warning" not in capsys.readouterr().out


# A folder is whole or not there


def test_export_is_made_once_and_again_when_it_was_moved_away(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["export", "tiny.py", "--student", "features", "--format", "safetensors"]
    command(trained, *args)
    folder = trained / "runs/tiny/export/features"
    before = (folder / "config.json").stat().st_mtime_ns
    command(trained, *args)
    assert (folder / "config.json").stat().st_mtime_ns == before
    with pytest.raises(grokd.Problem, match=r"made with other settings .*num_images 0 → 4"):
        command(trained, *args, "--num-images", "4")
    folder.rename(tmp_path / "moved")
    command(trained, *args, "--num-images", "4")
    assert json.loads((folder / "config.json").read_text())["checked_images"] == 4
    (folder.parent / "features.json").unlink()
    with pytest.raises(grokd.Problem, match="nothing says from where"):
        command(trained, *args)
    command(trained, *args, "--redo")


@pytest.mark.parametrize("last", ["card", "write_file"])
def test_end_at_any_moment_leaves_no_half_folder(
    trained: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    """card: before the folder is moved; write_file: once the old one is out of its place."""
    args = ["export", "tiny.py", "--student", "agre", "--format", "safetensors", "--redo"]
    folder, function = trained / "runs/tiny/export/agre", getattr(grokd, last)
    command(trained, *args)

    def end(first: Any, *more: Any) -> Any:
        if last == "card" or first.name == "agre.json":
            raise KeyboardInterrupt
        return function(first, *more)

    monkeypatch.setattr(grokd, last, end)
    with pytest.raises(KeyboardInterrupt):
        command(trained, *args)
    assert not folder.exists() or len(list(folder.iterdir())) == 3
    monkeypatch.undo()
    command(trained, *args[:-1])
    assert len(list(folder.iterdir())) == 3
    assert {path.name for path in folder.parent.glob("agre*")} == {"agre", "agre.json"}


@pytest.mark.slow
def test_killed_export_leaves_no_folder_and_goes_on(trained: Path) -> None:
    out = trained / "runs/tiny/export"
    args = [sys.executable, str(ROOT / "grokd.py"), "export", "tiny.py", "--student", "agre",
            "--redo"]
    with subprocess.Popen(args, cwd=trained) as process:
        while process.poll() is None and not list(out.glob("agre.partial/new/model.pt2")):
            pass
        process.send_signal(signal.SIGKILL)
    assert not (out / "agre").exists() or (out / "agre/README.md").is_file()
    subprocess.run(args[:-1], cwd=trained, check=True)
    assert (out / "agre/model.onnx").is_file()


@pytest.mark.slow
def test_two_processes_export_once(trained: Path) -> None:
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*two, str(ROOT / "grokd.py"), "export", "tiny.py", "--redo"], cwd=trained,
        env=os.environ | {"ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("as files for others") == 1
    assert done.stdout.count("the network in PyTorch") == 1


# Networks


def test_calibration_is_balanced_by_group(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    store = grokd.open_store(grokd.load_recipe("tiny.py").data, ".")
    for count, each in ((8, 2), (12, 3), (400, 4), (1, 1)):
        images = grokd.calibration_images(grokd.Export(calibration=count), store)
        assert set(images) <= set(store.split("val"))
        assert np.bincount(store.cells[images]).tolist() == [each] * 4


SHAPES = {  # size and crop of images, side of the network
    "resnet8": (16, 16, 0), "resnet8_gn": (20, 16, 0), "resnet18": (72, 64, 48),
    "mobilenet_v3_small": (72, 64, 0), "efficientnet_b0": (72, 64, 0),
    "convnext_tiny": (72, 64, 0), "vit_b_16": (72, 64, 224), "densenet121": (72, 64, 0),
    "timm:convnextv2_atto": (72, 64, 0), "timm:vit_tiny_patch16_224": (72, 64, 224),
    "clip:width=64,layers=2,patch=16,size=64,dim=32": (72, 64, 0),
}


def exported(folder: Path, arch: str, *flags: str) -> Iterator[tuple[Path, Path]]:
    size, crop, side = SHAPES[arch]
    write_images(folder, per_group=4)
    shaped(folder, size, crop)
    random_network(folder / "net.safetensors", arch, side)
    command(folder, "export", "shaped.py", "--model", "net.safetensors", *flags)
    yield folder, folder / "runs/shaped/export/net"


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHAPES)
def test_snippets_of_every_network_answer_as_grokd_does(tmp_path: Path, arch: str) -> None:
    size, crop, _ = SHAPES[arch]
    own = arch in grokd.SMALL or arch.startswith("clip:")
    for folder, files in exported(tmp_path, arch, "--int8", "--max-wga-loss", "100"):
        image = folder / "test110.png"
        expected = logits_of(folder / "net.safetensors", image, grokd.Data(size=size, crop=crop))
        found, printed = used_elsewhere(files, image)
        assert set(found) == {"model.onnx", "model.pt2"} | (set() if own else {"model.safetensors"})
        for logits in found.values():
            assert np.allclose(logits, expected, atol=1e-4 * float(expected.abs().max()))
        name = ("land", "sea")[int(expected.argmax())]
        assert [line.split()[-1] for line in printed] == [name] * len(found)


@pytest.mark.slow
def test_networks_said_to_be_shared_with_timm_are() -> None:
    timm = pytest.importorskip("timm")
    from torchvision import models

    names = [name for name in models.list_models(module=models) if timm.is_model(name)]
    shared = {
        name for name in names
        if keys_of(models.get_model(name, num_classes=3)) == keys_of(
            timm.create_model(name, num_classes=3))
    }
    assert shared == {name for name in names if grokd.is_of_timm(name)}


def keys_of(network: torch.nn.Module) -> dict[str, Sequence[int]]:
    return {key: value.shape for key, value in network.state_dict().items()}

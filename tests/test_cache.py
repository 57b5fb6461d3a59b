"""The target cache, folded teachers, the encoded store, reading ahead."""

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image

import grokd
from grokd import Classifier, Data, Input, Problem, Row, Runtime, Store, Targets

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return Runtime.start("float32")


@pytest.fixture
def data(tmp_path: Path) -> Data:
    folder = write_images(tmp_path / "images", per_group=66)  # 264 training images: two blocks
    return Data(size=20, crop=16, attribute_column="place", store=str(folder / "store"))


@pytest.fixture
def store(data: Data) -> Store:
    return grokd.open_store(data, str(Path(data.store).parent))


def network(seed: int, arch: str = "resnet8") -> Classifier:
    """A frozen network with batch statistics of its own."""
    model = grokd.build_model(arch, "random", 2, Input(), seed)
    with torch.no_grad():
        model.train()(torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(seed)))
    return model.eval().requires_grad_(False)


def with_head(model: Classifier, seed: int) -> Classifier:
    """The same trunk under another head."""
    twin = network(0)
    twin.load_state_dict(model.state_dict())
    torch.manual_seed(seed)
    torch.nn.init.normal_(twin.head.weight)
    return twin


Make = Callable[..., Targets]


@pytest.fixture
def make(store: Store, runtime: Runtime) -> Make:
    """Targets of models in the store's cache."""

    def targets(*models: Classifier, folder: str = "", seed: int = 0, gb: float = 1.0) -> Targets:
        where = replace(store.data, store=folder or store.data.store, cache_gb=gb)
        return Targets(models, len(models), replace(store, data=where), {"data": store.fingerprint},
                       runtime, seed)

    return targets


def files(targets: Targets) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in targets.folder.glob("*-*")}


def test_cached_targets_are_the_teachers_own_logits(store: Store, make: Make) -> None:
    plain = [network(0), network(1, "cnn2")]
    targets = make(network(0), network(1, "cnn2"))
    targets.prepare(3)
    images = store.view(store.split("train"), CPU, 3, 0)
    places = np.array([5, 200, 263, 0])
    for model, cached in zip(plain, targets.logits(places), strict=True):
        with torch.no_grad():
            assert torch.allclose(model(images[places]), cached, atol=1e-4)


def test_first_gradient_is_that_of_uncached_teachers(store: Store, make: Make) -> None:
    targets = make(network(0), network(1))
    targets.prepare(0)
    places = np.arange(32)
    images = store.view(store.split("train")[places], CPU, 0, 0)
    with torch.no_grad():
        online = torch.stack([network(0)(images), network(1)(images)])
    biased = online.flip(0)[0]
    student = grokd.build_model("cnn2", "random", 2, Input(), 3)
    gradients = []
    for logits in (online, targets.logits(places)):
        output = student(images)
        shares = grokd.teacher_shares(grokd.agre_weights(output, logits, biased, 4.0))
        loss = grokd.weighted_kd(output, logits, shares, 4.0).mean()
        gradients.append(torch.autograd.grad(loss, list(student.parameters())))
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(*gradients, strict=True))


def test_pooled_features_are_those_of_each_trunk_in_half_precision(
    store: Store, runtime: Runtime
) -> None:
    first, second = network(0), network(1, "cnn2")
    models = [first, with_head(first, 5), second]
    plain = [first.features, first.features, second.features]
    indices = store.split("train")
    images = store.view(indices, CPU, 2)
    expected = [features(images)[:, :, None, None] for features in plain]
    targets = Targets(models, 3, store, {}, runtime, 0, pooled=True)
    targets.prepare(2)
    assert len(files(targets)) == 3 + 2  # logits of each model, features of each trunk
    places = np.array([260, 3, 0])
    for found, features in zip(targets.pooled(places), expected, strict=True):
        torch.testing.assert_close(found, features[places], rtol=2e-3, atol=1e-3)


def test_mixed_images_are_shown_to_each_teacher(store: Store, runtime: Runtime) -> None:
    models = [network(0), with_head(network(0), 5), network(1, "cnn2")]
    images = torch.rand(4, 3, 16, 16)
    expected = torch.stack([model(images) for model in models])
    found = Targets(models, 3, store, {}, runtime, 0).ask(images)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_second_student_does_not_run_the_teachers(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make(network(0))
    first.prepare(0)
    second = make(network(0))
    monkeypatch.setattr(Classifier, "features", lambda *_: pytest.fail("the teacher was run"))
    second.prepare(0)
    assert np.array_equal(first.current[0], second.current[0])


def test_cache_does_not_depend_on_who_asked_first(make: Make, tmp_path: Path) -> None:
    a, b = network(0), network(1)
    one = make(a, with_head(a, 5), folder=str(tmp_path / "one"))
    one.prepare(0)
    make(network(1), folder=str(tmp_path / "one")).prepare(0)
    a, b = network(0), network(1)
    other = make(b, folder=str(tmp_path / "other"))
    other.prepare(0)
    make(with_head(network(0), 5), network(1), folder=str(tmp_path / "other")).prepare(0)
    make(network(0), folder=str(tmp_path / "other")).prepare(0)
    assert files(one) == files(other)
    assert len(files(one)) == 3


def test_heads_on_one_trunk_share_its_pass(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(0)
    targets = make(model, with_head(model, 5))
    calls: list[int] = []
    features = Classifier.features

    def counted(self: Classifier, images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        return features(self, images)

    monkeypatch.setattr(Classifier, "features", counted)
    targets.prepare(0)
    assert calls == [256, 8]
    assert not np.array_equal(targets.current[0], targets.current[1])


def test_views_seeds_and_heads_have_files_of_their_own(make: Make) -> None:
    model = network(0)
    targets = make(model)
    targets.prepare(0)
    first = targets.current[0].copy()
    targets.prepare(1)
    assert not np.array_equal(first, targets.current[0])
    make(network(0), seed=1).prepare(0)
    make(with_head(network(0), 7)).prepare(0)
    assert len(files(targets)) == 4


def test_interrupted_or_damaged_blocks_are_computed_again(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make(network(0))
    whole.prepare(0)
    before = files(whole)
    path = next(whole.folder.glob("*-0"))
    content = bytearray(before[path.name])
    content[4:8] = bytes(4)  # the second block was never finished
    content[-3] ^= 255
    path.write_bytes(content)
    blocks: list[int] = []
    read = Store.read

    def counted(self: Store, indices: np.ndarray, *more: Any) -> grokd.Stored:
        blocks.append(len(indices))
        return read(self, indices, *more)

    monkeypatch.setattr(Store, "read", counted)
    make(network(0)).prepare(0)
    assert blocks == [8]
    assert files(whole) == before


def test_oldest_views_are_dropped_beyond_the_limit(make: Make) -> None:
    targets = make(network(0), gb=6e-6)  # 6 kB: two files of 2.1 kB
    for view in range(4):
        targets.prepare(view)
        time.sleep(0.02)
    assert sorted(name.split("-")[1] for name in files(targets)) == ["2", "3"]
    none = make(network(0), gb=0.0)
    none.prepare(0)
    assert [name.split("-")[1] for name in files(none)] == ["0"]


ARCHITECTURES = ["resnet18", "mobilenet_v2", "densenet121", "googlenet", "vit_b_16", "swin_t"]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_folded_network_is_the_same_function(arch: str) -> None:
    model = grokd.build_model(arch, "random", 3, Input(), 0)
    images = torch.rand(4, 3, 224, 224)
    with torch.no_grad():
        model.train()(images)
        expected = model.eval()(images)
        folded = grokd.fold(model)
        assert torch.allclose(folded(images), expected, atol=1e-4)
    left = [m for m in folded.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert not left or arch == "densenet121"  # whose norms come before their convolutions


# Encoded store


def test_encoded_store_gives_the_decoded_images(store: Store, data: Data) -> None:
    packed = grokd.open_store(replace(data, max_store_gb=0.0), str(Path(data.store).parent))
    indices = np.array([700, 3, 3, 264])
    assert packed.offsets
    assert np.array_equal(store.raw(indices), packed.raw(indices))
    again = grokd.open_store(replace(data, max_store_gb=0.0), str(Path(data.store).parent))
    assert again.fingerprint == packed.fingerprint


def test_encoded_store_serves_any_size(data: Data) -> None:
    """Nothing is decoded beforehand, so size and geometry may change."""
    root = str(Path(data.store).parent)
    small = grokd.open_store(replace(data, max_store_gb=0.0), root)
    large = grokd.open_store(
        replace(data, max_store_gb=0.0, size=40, geometry="shorter_side"), root
    )
    assert small.folder == large.folder
    assert large.raw(np.array([0])).shape == (1, 3, 40, 40)


def test_arrays_are_encoded_without_loss(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    rows = [
        Row(random.integers(0, 255, (8, 8, 3), dtype=np.uint8), k % 2, k // 2 % 2, split)
        for split in grokd.SPLITS for k in range(8)
    ]
    data = Data(reader=lambda _: rows, size=8, crop=8, store=str(tmp_path), max_store_gb=0.0)
    raw = grokd.open_store(data, "").raw(np.arange(24))
    assert all(np.array_equal(a, r.image.transpose(2, 0, 1))  # type: ignore[union-attr]
               for a, r in zip(raw, rows, strict=True))


def test_damage_in_an_encoded_store_is_noticed(data: Data) -> None:
    packed = grokd.open_store(replace(data, max_store_gb=0.0), str(Path(data.store).parent))
    file = packed.folder / "images.u8"
    content = bytearray(file.read_bytes())
    content[packed.offsets[9] + 40] ^= 1
    file.write_bytes(content)
    packed = grokd.open_store(packed.data, str(Path(data.store).parent))
    packed.raw(np.array([8, 10]))
    with pytest.raises(Problem, match=r"is damaged \(block 9\)"):
        packed.raw(np.array([9]))


def test_unreadable_image_is_named_before_packing(data: Data) -> None:
    root = Path(data.store).parent
    (root / "train000.png").write_bytes(b"no image")
    with pytest.raises(Problem, match=r"1 images cannot be read: .*train000.png"):
        grokd.open_store(replace(data, max_store_gb=0.0), str(root))


def test_training_from_either_store_has_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = []
    for gb in ("50.0", "0.0"):
        folder = write_images(tmp_path / gb)
        text = (folder / "tiny.py").read_text()
        (folder / "tiny.py").write_text(text.replace("size=20", f"size=20, max_store_gb={gb}"))
        monkeypatch.chdir(folder)
        grokd.command_line(["teachers", "tiny.py"])
        model = grokd.load_model(folder / "runs" / "tiny" / "teachers" / "1" / "dfr.safetensors")
        states.append(model.state_dict())
        shutil.rmtree(folder)
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_batches_are_read_ahead_in_order() -> None:
    loaded: list[int] = []

    def load(item: int) -> int:
        loaded.append(item)
        return -item

    seen = []
    for item, value in grokd.prefetch(list(range(6)), load):
        seen.append((item, value))
        time.sleep(0.02)
        assert len(loaded) == min(6, item + 3)
    assert seen == [(i, -i) for i in range(6)]


def test_error_while_reading_ahead_reaches_the_reader() -> None:
    def load(item: int) -> int:
        raise Problem(f"image {item}")

    with pytest.raises(Problem, match="image 0"):
        list(grokd.prefetch([0, 1, 2], load))


def test_photographs_of_any_shape_fit_one_batch(tmp_path: Path) -> None:
    rows = []
    for k in range(12):
        path = tmp_path / f"{k}.jpg"
        Image.new("RGB", (30 + k, 50 - k), (k, 20, 30)).save(path)
        rows.append(Row(path, k % 2, k // 2 % 2, grokd.SPLITS[k // 4]))
    data = Data(reader=lambda _: rows, size=16, crop=16, store=str(tmp_path), max_store_gb=0.0)
    assert grokd.open_store(data, "").raw(np.arange(12)).shape == (12, 3, 16, 16)

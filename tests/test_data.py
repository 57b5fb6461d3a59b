"""Reading, storing, cropping and ordering images."""

import csv
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from conftest import write_images
from hypothesis import given, settings
from PIL import Image
from torchvision.transforms import RandomResizedCrop

import grokd
from grokd import Data, Problem, Row

CPU = torch.device("cpu")


def tiny(folder: Path, **changes: object) -> Data:
    data = Data(size=20, crop=16, attribute_column="place", store=str(folder / "store"))
    return replace(data, **changes)  # type: ignore[arg-type]


def edit(folder: Path, change: Callable[[list[dict[str, str]]], object]) -> None:
    """Rewrite metadata.csv."""
    with open(folder / "metadata.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    change(rows)
    with open(folder / "metadata.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_squash_stores_the_whole_image_resized(images: Path) -> None:
    store = grokd.open_store(tiny(images), str(images))
    with Image.open(images / "train000.png") as file:
        expected = np.asarray(file.convert("RGB").resize((20, 20), Image.Resampling.BILINEAR))
    assert np.array_equal(store.raw(np.array([0]))[0], expected.transpose(2, 0, 1))


def test_shorter_side_equals_torchvision_resize_and_centre_crop(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 64, 3), dtype=np.uint8)
    ours = grokd.decode(pixels, 20, "shorter_side")
    theirs = TF.center_crop(TF.resize(Image.fromarray(pixels), [20]), [20])
    assert np.abs(ours.astype(int) - np.asarray(theirs).transpose(2, 0, 1)).max() <= 1


def test_rotated_photographs_are_stored_upright(tmp_path: Path) -> None:
    pixels = np.zeros((10, 20, 3), np.uint8)
    pixels[:, :10] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: left is up
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    stored = grokd.decode(tmp_path / "a.png", 8, "squash")
    assert stored[0, 0].mean() > 200
    assert stored[0, -1].mean() < 50


def test_store_is_built_once_and_found_again(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = grokd.open_store(tiny(images), str(images))
    monkeypatch.setattr(grokd, "build_store", lambda *_: pytest.fail("built twice"))
    again = grokd.open_store(tiny(images), str(images))
    assert np.array_equal(first.images, again.images)
    assert first.fingerprint == again.fingerprint


def test_changed_image_file_is_decoded_again(images: Path) -> None:
    first = grokd.open_store(tiny(images), str(images))
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(images / "train000.png")
    again = grokd.open_store(tiny(images), str(images))
    assert again.raw(np.array([0])).max() == 0
    assert first.fingerprint != again.fingerprint


def test_moved_data_keep_their_fingerprint(images: Path, tmp_path: Path) -> None:
    first = grokd.open_store(tiny(images), str(images))
    shutil.copytree(images, tmp_path / "elsewhere")
    moved = grokd.open_store(tiny(images), str(tmp_path / "elsewhere"))
    assert first.fingerprint == moved.fingerprint


def test_damaged_store_is_noticed_at_first_touch(images: Path) -> None:
    store = grokd.open_store(tiny(images), str(images))
    file = store.folder / "images.u8"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    store = grokd.open_store(tiny(images), str(images))
    with pytest.raises(Problem, match=r"is damaged \(block 0\)"):
        store.view(np.array([3]), CPU)


def test_interrupted_build_leaves_no_store(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = grokd.decode

    def interrupted(source: Path, size: int, geometry: str) -> np.ndarray:
        if source.name == "test003.png":
            raise KeyboardInterrupt
        return decode(source, size, geometry)

    monkeypatch.setattr(grokd, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        grokd.open_store(tiny(images), str(images))
    monkeypatch.undo()
    store = grokd.open_store(tiny(images), str(images))
    assert store.raw(np.array([47])).max() > 0


def test_words_and_numbers_are_read_alike(images: Path) -> None:
    numbers = grokd.open_store(tiny(images), str(images))

    def to_words(rows: list[dict[str, str]]) -> None:
        for row in rows:
            row["label"] = ["zebra", "ant"][int(row["label"])]

    edit(images, to_words)
    ordered = grokd.open_store(tiny(images, class_names=("zebra", "ant")), str(images))
    assert np.array_equal(ordered.labels, numbers.labels)
    assert ordered.fingerprint == numbers.fingerprint
    for find_store in (grokd.open_store, grokd.counted_store):
        store = find_store(tiny(images), str(images))
        assert np.array_equal(store.labels, 1 - numbers.labels)
        assert store.class_names == ("ant", "zebra")  # the words themselves, sorted
        assert store.group_names[1] == "ant, attribute 1"


def test_released_waterbirds_table_is_read_without_a_reader(data_folder: Path) -> None:
    data = Data(
        image_column="img_filename", label_column="y", attribute_column="place",
        split_codes=("0", "1", "2"),
    )
    rows = grokd.read_rows(data, str(data_folder / "waterbirds_mini"))
    counts = np.zeros((3, 2, 2), int)
    for row in rows:
        counts[grokd.SPLITS.index(row.split), row.label, row.attribute] += 1
    assert counts[0].flatten().tolist() == [804, 44, 16, 350]
    assert counts[2].flatten().tolist() == [490, 514, 202, 183]


def test_real_photographs_are_stored_and_cropped(data_folder: Path, tmp_path: Path) -> None:
    folder = data_folder / "waterbirds_mini"
    files = sorted(folder.glob("001*/*.jpg"))[:12]
    rows = [
        Row(file, i % 2, i // 2 % 2, ("train", "val", "test")[i // 4])
        for i, file in enumerate(files)
    ]
    data = Data(reader=lambda root: rows, size=129, crop=113, store=str(tmp_path))
    view = grokd.open_store(data, "").view(np.array([2]), CPU)
    with Image.open(files[2]) as file:
        expected = TF.pil_to_tensor(TF.center_crop(TF.resize(file, [129, 129]), [113]))
    assert (view[0] * 255 - expected).abs().max() <= 1


# Views and order


def boxes(view: int, count: int, data: Data, seed: int = 0) -> np.ndarray:
    return grokd.random_boxes(seed, view, np.arange(count), data)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**40), view=st.integers(0, 10_000),
    indices=st.lists(st.integers(0, 10**7), min_size=1, max_size=20),
)
def test_view_of_an_image_does_not_depend_on_its_batch(
    seed: int, view: int, indices: list[int]
) -> None:
    data = Data(size=256)
    together = grokd.random_boxes(seed, view, np.array(indices), data)
    alone = [grokd.random_boxes(seed, view, np.array([i]), data)[0] for i in indices]
    assert np.array_equal(together, alone)
    left, top, width, height = together.T
    assert (left >= 0).all() and (left + width <= 256).all()
    assert (top >= 0).all() and (top + height <= 256).all()


def test_boxes_have_torchvisions_distribution() -> None:
    data = Data(size=256)
    ours = boxes(0, 4000, data)
    torch.manual_seed(0)
    image = torch.zeros(3, 256, 256)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, [0.7, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]
    )[:, [1, 0, 3, 2]]
    for column in range(4):
        quantiles = np.linspace(0.05, 0.95, 19)
        gap = np.quantile(ours[:, column], quantiles) - np.quantile(theirs[:, column], quantiles)
        assert np.abs(gap).max() <= 4  # pixels of 256


def test_views_and_seeds_differ() -> None:
    data = Data(size=256)
    assert not np.array_equal(boxes(0, 50, data), boxes(1, 50, data))
    assert not np.array_equal(boxes(0, 50, data), boxes(0, 50, data, seed=1))


def test_crop_and_flip_equal_cutting_and_resizing(images: Path) -> None:
    data = tiny(images, size=64, crop=24)
    store = grokd.open_store(data, str(images))
    indices = np.arange(48)
    got = store.view(indices, CPU, view=3, seed=9)
    flips = grokd.hash_uniform(9, 3, indices, 99) < 0.5
    assert 10 < flips.sum() < 38
    for i, (left, top, width, height) in enumerate(grokd.random_boxes(9, 3, indices, data)):
        cut = torch.from_numpy(store.raw(indices[i : i + 1])).float() / 255
        cut = cut[:, :, top : top + height, left : left + width]
        expected = torch.nn.functional.interpolate(cut, (24, 24), mode="bilinear")[0]
        expected = expected.flip(2) if flips[i] else expected
        inner = (slice(None), slice(1, -1), slice(1, -1))  # at its rim ours sees beyond the box
        assert (got[i][inner] - expected[inner]).abs().max() < 1e-4


def test_evaluation_view_is_the_centre(images: Path) -> None:
    store = grokd.open_store(tiny(images), str(images))
    view = store.view(np.array([5]), CPU)
    assert torch.equal(view[0], torch.from_numpy(store.raw(np.array([5]))[0, :, 2:18, 2:18]) / 255)


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 200), size=st.integers(1, 64), seed=st.integers(0, 99))
def test_epoch_visits_every_image_once_in_a_new_order(n: int, size: int, seed: int) -> None:
    batches = grokd.epoch_batches(n, size, seed, 0)
    assert sorted(np.concatenate(batches)) == list(range(n))
    assert all(len(b) == size for b in batches[:-1])
    assert len(batches[-1]) > 1 or n == 1 or size == 1
    again, other = grokd.epoch_batches(n, size, seed, 0), grokd.epoch_batches(n, size, seed, 1)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))
    assert n < 20 or not np.array_equal(np.concatenate(batches), np.concatenate(other))


def test_hash_is_the_published_splitmix64_stream() -> None:
    """First outputs of splitmix64 seeded with 0 and 1234567 (Vigna's reference code)."""
    assert int(grokd.hash_bits(0)[0]) == 0xE220A8397B1DCDAF
    assert int(grokd.hash_bits(1234567)[0]) == 6457827717110365317


def test_hash_uniform_is_uniform_and_uncorrelated() -> None:
    u = grokd.hash_uniform(1, 2, np.arange(100_000))
    assert abs(u.mean() - 0.5) < 0.005
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.01
    assert np.abs(np.histogram(u, 20, (0, 1))[0] / 5000 - 1).max() < 0.06


def test_parts_of_validation_are_disjoint_and_stratified(images: Path, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "more", per_group=6)
    store = grokd.open_store(tiny(folder, reweighting=0.5), str(folder))
    first, second = store.split("reweighting"), store.split("selection")
    assert sorted([*first, *second]) == store.split("val").tolist()
    assert store.counts("reweighting").tolist() == [3, 3, 3, 3]


# What is wrong with the data, in one line


def test_missing_column_is_named(images: Path) -> None:
    with pytest.raises(Problem, match=r"no column 'kind'; it has 'image', 'label'"):
        grokd.open_store(tiny(images, label_column="kind"), str(images))


def test_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(Problem, match=r"metadata.csv does not exist: .*--root"):
        grokd.open_store(tiny(tmp_path), str(tmp_path))


def test_all_missing_images_are_named(images: Path) -> None:
    (images / "train000.png").unlink()
    (images / "test111.png").unlink()
    with pytest.raises(Problem, match=r"2 of the 48 .*train000.png.*test111.png"):
        grokd.open_store(tiny(images), str(images))


def test_all_unreadable_images_are_named(images: Path) -> None:
    (images / "train000.png").write_bytes(b"not an image")
    whole = (images / "test111.png").read_bytes()
    (images / "test111.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Problem, match=r"(?s)2 images cannot be read.*test111.png.*train000.png"):
        grokd.open_store(tiny(images), str(images))
    assert not list((images / "store").glob("*/manifest.json"))


def test_unknown_split_code_is_named(images: Path) -> None:
    with pytest.raises(Problem, match=r"line 2: column 'split' holds 'train', but .* are 0, 1, 2"):
        grokd.open_store(tiny(images, split_codes=("0", "1", "2")), str(images))


def test_class_absent_from_train_is_named(images: Path) -> None:
    edit(images, lambda rows: [r.update(label="0") for r in rows if r["split"] == "train"])
    with pytest.raises(Problem, match="No training image of class 1"):
        grokd.open_store(tiny(images), str(images))


def test_group_absent_from_the_reweighting_part_is_named(images: Path) -> None:
    def empty(rows: list[dict[str, str]]) -> None:
        for row in rows:
            if row["split"] == "val" and row["label"] == "1":
                row["place"] = "0"

    edit(images, empty)
    with pytest.raises(Problem, match="No image of group class 1, attribute 1"):
        grokd.open_store(tiny(images), str(images))


def test_without_attributes_groups_are_classes(images: Path) -> None:
    for names in ((), ("land", "water")):  # those of the attributes that a recipe had before
        data = tiny(images, attribute_column="", attribute_names=names)
        store = grokd.open_store(data, str(images))
        assert store.group_names == ["class 0", "class 1"]
        assert store.counts("train").tolist() == [8, 8]
    with pytest.raises(Problem, match="groups = aligned tells by the attributes"):
        grokd.open_store(tiny(images, attribute_column="", groups="aligned"), str(images))


def test_data_of_one_class_are_refused(images: Path) -> None:
    edit(images, lambda rows: [r.update(label="0") for r in rows])
    with pytest.raises(Problem, match="All images are of one class, class 0"):
        grokd.open_store(tiny(images), str(images))


def test_full_disk_is_said_before_decoding(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(images)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(Problem, match=r"needs 0.0 GB, 0.0 are free: make room"):
        grokd.open_store(tiny(images), str(images))

"""Images: the same pixels whatever the process, worker, or resume; every odd file named or defined."""

import errno
import inspect
import os
import pickle
import struct
import threading
import time
import zlib
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from torch.utils.data import DataLoader

from pipelines import images
from pipelines.config import plain
from pipelines.images import AugmentationStream, DataConfig, load_images
from pipelines.preprocessing import BadImageError, preprocess_image
from pipelines.runs import check_held_out, save_config

AUGMENTED = {"crop_padding": 2, "horizontal_flip": True, "binarize": "stochastic"}


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, dtype=np.uint8)).save(path, **options)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape)


def folder(root, **options):
    options = {"split": "train", "validation_fraction": 0.0, **options}
    split = options.pop("split")
    return load_images(DataConfig(name="folder", root=str(root), **options), split)


def folder_of_all(root, **options):
    """A training folder that gives nothing away to the test part."""
    (root / "train").mkdir()
    for path in [path for path in root.iterdir() if path.is_file()]:
        path.rename(root / "train" / path.name)
    (root / "test").mkdir()
    return folder(root, **options)


def single(tmp_path, image, name="a.png", **options):
    """The only training image of a folder of one file."""
    tmp_path.mkdir(exist_ok=True)
    image.save(tmp_path / name, **options)
    return folder(tmp_path)


@pytest.fixture
def classes(tmp_path):
    """Three classes of 4, 5 and 6 images of 6x8 pixels, in folders with spaces and umlauts."""
    root = tmp_path / "ä b"
    for label, name in enumerate(("zebra", "ant", "bär")):
        for i in range(4 + label):
            save(root / name / f"bild {i}.png", noise(6, 8, 3, seed=10 * label + i))
    return root


# --- digits ---


def test_digits_are_divided_into_fixed_parts():
    parts = {split: load_images(DataConfig(), split) for split in ("train", "validation", "test")}
    assert {split: len(part) for split, part in parts.items()} == {"train": 1437, "validation": 180, "test": 180}
    assert {part.image_shape for part in parts.values()} == {(1, 8, 8)}
    assert set().union(*(part._indices.tolist() for part in parts.values())) == set(range(1797))
    assert parts["train"].class_names == [str(i) for i in range(10)]


def test_test_part_does_not_depend_on_the_configuration():
    other = load_images(DataConfig(split_seed=3, validation_fraction=0.3), "test")
    assert other.fingerprint != ""
    assert np.array_equal(other._indices, load_images(DataConfig(), "test")._indices)


def test_digits_are_scaled_to_8_bits():
    from sklearn.datasets import load_digits

    dataset = load_images(DataConfig(), "train")
    row = dataset._indices[5]
    expected = np.rint(load_digits().images[row] * 255 / 16) / 255
    assert np.allclose(dataset[5]["image"][0], expected, atol=1e-7)
    assert dataset[5]["label"] == load_digits().target[row]


# --- views, keys, batches ---


@pytest.mark.parametrize("options", [{}, AUGMENTED, {"binarize": "fixed"}, {"crop": "random", "image_size": (5, 4)}])
@pytest.mark.parametrize("cache_bytes", [1 << 20, 0])
def test_items_batches_and_workers_give_the_same_pixels(options, cache_bytes):
    dataset = load_images(DataConfig(max_images=20, cache_bytes=cache_bytes, **options), "train")
    keys = [3, (3, 0), (3, 1), 17, (0, 1 << 20)]
    expected = torch.stack([dataset[key]["image"] for key in keys])
    assert expected.dtype == torch.float32
    assert 0 <= expected.min() <= expected.max() <= 1
    assert torch.equal(dataset.__getitems__(keys)["image"], expected)
    assert torch.equal(dataset.collate([dataset[key] for key in keys])["label"], dataset.__getitems__(keys)["label"])
    assert torch.equal(pickle.loads(pickle.dumps(dataset)).__getitems__(keys)["image"], expected)
    loader = DataLoader(dataset, batch_sampler=[keys, keys[::-1]], collate_fn=dataset.collate, num_workers=2)
    first, second = (batch["image"] for batch in loader)
    assert torch.equal(first, expected)
    assert torch.equal(second, expected.flip(0))


@pytest.mark.parametrize("options", [{"binarize": "stochastic"}, AUGMENTED, {"horizontal_flip": True}])
@pytest.mark.parametrize("cache_bytes", [1 << 20, 0])
def test_a_training_batch_is_its_items(options, cache_bytes):
    dataset = load_images(DataConfig(max_images=20, cache_bytes=cache_bytes, **options), "train")
    keys = [(3, 0), (3, 1), (17, 0), (0, 1 << 20), (3, 0)]
    expected = dataset.collate([dataset[key] for key in keys])
    batch = dataset.__getitems__(keys)
    assert torch.equal(batch["image"], expected["image"])
    assert torch.equal(batch["label"], expected["label"])
    assert batch["image"].dtype == torch.float32


def test_files_of_a_batch_are_decoded_at_the_same_time_except_in_a_loaders_processes(classes, monkeypatch):
    dataset = folder(classes, cache_bytes=0, **AUGMENTED)
    keys = [(row, epoch) for row in range(4) for epoch in range(2)]
    expected = dataset.collate([dataset[key] for key in keys])["image"]
    both, read = threading.Barrier(2, timeout=20), dataset.source.read

    def read_with_another(index):
        both.wait()
        return read(index)

    monkeypatch.setattr(images, "num_usable_cores", lambda: 2)
    monkeypatch.setattr(dataset.source, "read", read_with_another)
    assert torch.equal(dataset.__getitems__(keys)["image"], expected)
    with monkeypatch.context() as context:
        context.setattr(images, "get_worker_info", lambda: object())
        both.abort()  # who waits here for another thread fails
        with pytest.raises(threading.BrokenBarrierError):
            dataset.__getitems__(keys)
        context.setattr(dataset.source, "read", read)
        assert torch.equal(dataset.__getitems__(keys)["image"], expected)


@pytest.mark.parametrize("options", [{"crop_padding": 2}, {"horizontal_flip": True}, {"binarize": "stochastic"}])
def test_epochs_and_seeds_differ_and_the_deterministic_view_does_not(options):
    dataset = load_images(DataConfig(**options), "train")
    other = load_images(DataConfig(augmentation_seed=1, **options), "train")
    rows = list(range(100))

    def view(dataset, epoch):
        return dataset.__getitems__([(row, epoch) for row in rows])["image"]

    assert torch.equal(view(dataset, 4), view(dataset, 4))
    assert not torch.equal(view(dataset, 4), view(dataset, 5))
    assert not torch.equal(view(dataset, 4), view(other, 4))
    assert torch.equal(dataset.__getitems__(rows)["image"], other.__getitems__(rows)["image"])


def test_random_numbers_do_not_depend_on_what_was_drawn_before():
    stream = AugmentationStream(7)
    expected = np.random.Generator(np.random.Philox(key=np.array([7, 2 << 40 | 3], dtype=np.uint64)))
    stream.at(9, 9).integers(5, size=3)
    first = stream.at(2, 3).integers(100, size=4)
    assert first.tolist() == stream.at(2, 3).integers(100, size=4).tolist()
    assert first.tolist() == expected.integers(100, size=4).tolist()


def test_flip_mirrors_about_half_of_the_images():
    dataset = load_images(DataConfig(horizontal_flip=True), "train")
    plain = dataset.__getitems__(list(range(400)))["image"]
    flipped = dataset.__getitems__([(i, 0) for i in range(400)])["image"]
    changed = (flipped != plain).flatten(1).any(1)
    assert torch.equal(flipped[changed], plain[changed].flip(3))
    assert 160 < changed.sum() < 240  # 200 +- 4 standard deviations


def test_padding_shifts_by_at_most_its_width_and_fills_with_black():
    dataset = load_images(DataConfig(crop_padding=1), "train")
    padded = torch.nn.functional.pad(dataset[0]["image"], (1, 1, 1, 1))
    crops = [padded[:, y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
    found = {next(i for i, crop in enumerate(crops) if torch.equal(crop, dataset[0, e]["image"])) for e in range(99)}
    assert found == set(range(9))


def test_random_crop_is_a_part_of_the_image_and_the_other_view_its_centre(tmp_path):
    array = noise(6, 10)
    save(tmp_path / "a.png", array)
    dataset = folder(tmp_path, image_size=(6, 6), crop="random")
    crops = [torch.tensor(array[:, x : x + 6] / 255, dtype=torch.float32)[None] for x in range(5)]
    found = {next(i for i, c in enumerate(crops) if torch.equal(c, dataset[0, e]["image"])) for e in range(60)}
    assert found == set(range(5))
    assert torch.equal(dataset[0]["image"], crops[2])


@pytest.mark.parametrize("index", [-1, 180])
def test_key_outside_is_an_index_error(index):
    with pytest.raises(IndexError, match="of a data set of 180"):
        load_images(DataConfig(), "test")[index]


def test_batches_come_quickly():
    dataset = load_images(DataConfig(image_size=(28, 28)), "train")
    rows = np.random.default_rng(0).integers(0, len(dataset), (50, 128)).tolist()
    durations = []
    for batch in rows:
        start = time.perf_counter()
        dataset.__getitems__(batch)
        durations.append(time.perf_counter() - start)
    assert np.median(durations) < 1e-3


def test_a_system_that_does_not_say_which_cores_may_be_used_has_data_too(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # macOS
    assert len(load_images(DataConfig(), "test")) == 180


# --- binarisation ---


@pytest.mark.parametrize("kind", ["threshold", "fixed", "stochastic"])
def test_binarised_pixels_are_zero_or_one(kind):
    dataset = load_images(DataConfig(binarize=kind), "validation")
    for keys in (list(range(50)), [(i, 0) for i in range(50)]):
        assert set(dataset.__getitems__(keys)["image"].unique().tolist()) == {0.0, 1.0}


def test_threshold_is_at_one_half(tmp_path):
    save(tmp_path / "a.png", [[0, 127, 128, 255]])
    assert folder(tmp_path, binarize="threshold")[0]["image"].flatten().tolist() == [0, 0, 1, 1]


def test_stochastic_draws_have_the_grey_value_as_mean(tmp_path):
    save(tmp_path / "a.png", [[0, 51, 128, 255]])
    dataset = folder(tmp_path, binarize="stochastic")
    mean = dataset.__getitems__([(0, epoch) for epoch in range(4000)])["image"].mean(0).flatten()
    # four standard deviations of 4000 draws are 0.032; black and white are certain
    assert torch.allclose(mean, torch.tensor([0, 0.2, 128 / 255, 1]), atol=0.032)
    assert mean[0] == 0
    assert mean[3] == 1


def test_fixed_draw_is_the_same_each_epoch_and_another_for_another_seed():
    dataset = load_images(DataConfig(binarize="fixed"), "train")
    assert torch.equal(dataset[3, 0]["image"], dataset[3, 1]["image"])
    other = load_images(DataConfig(binarize="fixed", binarize_seed=1), "train")
    rows = list(range(50))
    assert not torch.equal(dataset.__getitems__(rows)["image"], other.__getitems__(rows)["image"])
    assert dataset.fingerprint != other.fingerprint


# --- what users' images become ---


@pytest.mark.parametrize("binarize", ["none", "threshold", "fixed", "stochastic"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_users_image_is_treated_as_the_data_set_treats_it(classes, binarize, channels):
    dataset = folder(classes, binarize=binarize, channels=channels, image_size=(4, 4), crop_padding=1)
    preprocessing = pickle.loads(pickle.dumps(dataset.preprocessing))
    for row in range(len(dataset)):
        with Image.open(dataset.source.name(dataset._indices[row])) as image:
            assert torch.equal(preprocess_image(image, preprocessing), dataset[row]["image"])


def test_preprocessing_that_was_not_saved_is_reported():
    with pytest.raises(ValueError, match="preprocessing lacks binarize, channels, crop, image_size, resize_filter"):
        preprocess_image(Image.new("L", (2, 2)), {})


def test_shorter_side_is_resized_and_the_longer_cut(tmp_path):
    array = np.zeros((10, 40))
    array[:, 14:24] = 255  # resized to 5x20, of which columns 7 to 11 are kept
    save(tmp_path / "a.png", array)
    image = folder(tmp_path, image_size=(5, 5), resize_filter="box")[0]["image"]
    assert torch.equal(image, torch.ones(1, 5, 5))


# --- modes ---

MODES = {
    "1": (Image.new("1", (2, 2), 1), (1, 255)),
    "L": (Image.new("L", (2, 2), 77), (1, 77)),
    "LA": (Image.new("LA", (2, 2), (0, 51)), (1, 204)),
    "I;16": (Image.fromarray(np.full((2, 2), 63000, np.uint16)), (1, 245)),
    "I;16 max": (Image.fromarray(np.full((2, 2), 65535, np.uint16)), (1, 255)),
    "RGB": (Image.new("RGB", (2, 2), (1, 2, 3)), (3, (1, 2, 3))),
    "RGBA": (Image.new("RGBA", (2, 2), (255, 0, 0, 0)), (3, (255, 255, 255))),
    "P": (Image.new("RGB", (2, 2), (9, 8, 7)).convert("P", palette=Image.Palette.ADAPTIVE), (3, (9, 8, 7))),
}


@pytest.mark.parametrize("mode", MODES)
def test_mode_has_a_defined_result(tmp_path, mode):
    image, (channels, value) = MODES[mode]
    dataset = single(tmp_path, image)
    assert dataset.image_shape[0] == channels
    assert (dataset[0]["image"][:, 0, 0] * 255).round().int().tolist() == np.atleast_1d(value).tolist()
    other = folder(tmp_path, channels=4 - channels)[0]["image"]
    assert other.shape == (4 - channels, 2, 2)


def test_transparent_palette_shows_white(tmp_path):
    image = Image.new("P", (2, 2), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    assert torch.equal(single(tmp_path, image, transparency=0)[0]["image"], torch.ones(3, 2, 2))


def test_cmyk_becomes_rgb_or_grey(tmp_path):
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = single(tmp_path, image, "a.tif")[0]["image"][:, 0, 0]
    assert red.tolist() == [1, 0, 0]
    assert folder(tmp_path, channels=1)[0]["image"][0, 0, 0] == pytest.approx(0.299, abs=2e-3)


@pytest.mark.parametrize(
    ("name", "format_options"), [("a.png", {}), ("a.jpg", {"quality": 100}), ("a.tif", {"compression": "tiff_lzw"})]
)
def test_exif_orientation_is_applied(tmp_path, name, format_options):
    array = np.zeros((8, 16), dtype=np.uint8)
    array[:, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise to be seen upright
    dataset = single(tmp_path, Image.fromarray(array), name, exif=exif, **format_options)
    assert dataset.image_shape == (1, 16, 8)
    assert torch.allclose(dataset[0]["image"][0, :, 0], torch.tensor([1.0] * 8 + [0.0] * 8), atol=0.02)
    with Image.open(tmp_path / name) as image:
        assert torch.equal(preprocess_image(image, dataset.preprocessing), dataset[0]["image"])


def test_tiff_that_pillow_scrambles_is_refused(tmp_path):
    """If this fails, Pillow was mended: drop the check in `_load`."""
    exif = Image.Exif()
    exif[0x0112] = 6
    with pytest.raises(BadImageError, match=r"a\.tif.*sideways"):
        single(tmp_path, Image.fromarray(noise(8, 16).astype(np.uint8)), "a.tif", exif=exif)


def test_one_coloured_image_makes_all_of_them_rgb(tmp_path):
    save(tmp_path / "a.png", noise(4, 4))
    save(tmp_path / "b.png", noise(4, 4, 3))
    assert folder_of_all(tmp_path).image_shape == (3, 4, 4)


def test_floating_point_image_is_refused(tmp_path):
    with pytest.raises(BadImageError, match=r"a\.tif.*floating point"):
        single(tmp_path, Image.new("F", (2, 2)), "a.tif")


# --- bad files ---


def spoil_empty(path):
    path.write_bytes(b"")


def spoil_text(path):
    path.write_text("this is no image")


def spoil_truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def spoil_flipped(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def spoil_postscript(path):
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 8\n%%EndComments\nshowpage\n")


def spoil_bomb(path):
    chunks = Image.new("1", (1, 1))
    chunks.save(path)
    data = path.read_bytes()
    header = b"IHDR" + struct.pack(">II", 20000, 20000) + data[24:29]
    path.write_bytes(data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:])


SPOILERS = [spoil_empty, spoil_text, spoil_truncated, spoil_flipped, spoil_postscript, spoil_bomb]


@pytest.mark.parametrize("spoil", SPOILERS)
@pytest.mark.parametrize("cache_bytes", [1 << 20, 0])
def test_bad_file_is_named(classes, spoil, cache_bytes):
    bad = classes / "zebra" / "bild 2.png"
    spoil(bad)
    with pytest.raises(
        BadImageError, match=r"zebra/bild 2\.png: [^;]*; mend or remove it, or set on_bad_image to skip$"
    ):
        list(folder(classes, cache_bytes=cache_bytes))


@pytest.mark.parametrize("spoil", SPOILERS)
@pytest.mark.parametrize("cache_bytes", [1 << 20, 0])
def test_bad_file_is_skipped_before_the_length_is_known(classes, spoil, cache_bytes):
    whole = folder(classes)
    bad = classes / "zebra" / "bild 2.png"
    spoil(bad)
    dataset = folder(classes, on_bad_image="skip", cache_bytes=cache_bytes)
    assert dataset.skipped == [bad]
    assert len(dataset) == len(whole) - 1 == len(list(dataset))
    assert dataset.fingerprint != whole.fingerprint
    images = dict(zip(map(whole.source.name, whole._indices), whole))
    for index, item in zip(dataset._indices, dataset):
        assert torch.equal(item["image"], images[dataset.source.name(index)]["image"])
        assert item["label"] == images[dataset.source.name(index)]["label"]


def test_nothing_but_bad_files_is_an_error(tmp_path):
    (tmp_path / "a.png").write_text("no")
    with pytest.raises(ValueError, match="none of the 1 images"):
        folder(tmp_path, on_bad_image="skip")


@pytest.mark.parametrize(("on_bad_image", "or_skip"), [("raise", ", or set on_bad_image to skip"), ("skip", "")])
def test_file_that_went_bad_later_is_named_by_the_loader(classes, on_bad_image, or_skip):
    dataset = folder(classes, cache_bytes=0, on_bad_image=on_bad_image)
    spoil_truncated(classes / "ant" / "bild 0.png")
    with pytest.raises(BadImageError, match=rf"ant/bild 0\.png: [^;]*; mend or remove it{or_skip}$"):
        list(DataLoader(dataset, batch_sampler=[range(len(dataset))], collate_fn=dataset.collate))


# --- held-out parts ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split_seed": 3}, "data.split_seed is 3, but .*run was trained with 0: .*; leave --data.split_seed out"),
        ({"validation_fraction": 0.6}, "data.validation_fraction is 0.6, but .*run was trained with 0.1: the valid"),
    ],
)
def test_validation_images_chosen_otherwise_than_for_the_training_are_refused(options, message, tmp_path):
    trained_on = set(load_images(DataConfig(), "train")._indices)
    run, chosen = tmp_path / "run", load_images(DataConfig(**options), "validation")
    save_config(run / "stage_one" / "config.yaml", {"data": plain(asdict(DataConfig()))})
    assert trained_on & set(chosen._indices)  # why they are refused
    with pytest.raises(ValueError, match=message):
        check_held_out(run, chosen)
    fewer = load_images(DataConfig(max_images=50), "validation")
    assert not trained_on & set(fewer._indices)
    check_held_out(run, fewer)
    check_held_out(run, load_images(DataConfig(**options), "test"))
    save_config(run / "stage_one" / "config.yaml", {"data": plain(asdict(DataConfig(name="MNIST")))})
    check_held_out(run, chosen)


# --- folders ---


def names(dataset):
    return {dataset.source.name(index) for index in dataset._indices}


def test_class_folders_become_sorted_labels(classes):
    dataset = folder(classes)
    assert (dataset.num_classes, dataset.class_names) == (3, ["ant", "bär", "zebra"])
    for row, index in enumerate(dataset._indices):
        assert dataset.class_names[dataset[row]["label"]] == os.path.basename(
            os.path.dirname(dataset.source.name(index))
        )


def test_images_without_class_folders_are_unlabelled(tmp_path):
    save(tmp_path / "a.png", noise(4, 4))
    save(tmp_path / "b.JPG", noise(4, 4))
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".cache").mkdir()
    dataset = folder(tmp_path, split="train")
    assert dataset.num_classes == 0
    assert dataset[0]["label"] == 0
    assert len(names(dataset) | names(folder(tmp_path, split="test"))) == 2


def test_held_out_parts_are_disjoint_and_cover_the_folder(classes):
    parts = [folder(classes, split=split, validation_fraction=0.2) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [10, 3, 2]
    assert len(set().union(*map(names, parts))) == 15
    again = folder(classes, split="validation", validation_fraction=0.2)
    assert names(again) == names(parts[1])
    other = folder(classes, split="validation", validation_fraction=0.2, split_seed=1)
    assert names(other) != names(parts[1])


@pytest.mark.parametrize("validation", ["validation", "val", "valid"])
def test_given_split_folders_are_used_as_they_are(tmp_path, validation):
    for part, count in (("train", 4), (validation, 2), ("test", 3)):
        for i in range(count):
            save(tmp_path / part / "b" / f"{i}.png", noise(4, 4))
    save(tmp_path / "train" / "a" / "0.png", noise(4, 4))
    sizes = [len(folder(tmp_path, split=split)) for split in ("train", "validation", "test")]
    assert sizes == [5, 2, 3]
    assert folder(tmp_path, split="test")[0]["label"] == 1  # numbered as in training, where there is a class more


def test_class_unknown_to_training_is_refused(tmp_path):
    save(tmp_path / "train" / "a" / "0.png", noise(4, 4))
    save(tmp_path / "test" / "b" / "0.png", noise(4, 4))
    with pytest.raises(ValueError, match=r"classes \['b'\] do not match those of training, \['a'\]"):
        folder(tmp_path, split="test")


@pytest.mark.parametrize("name", ["bus", "Test", "testing"])
def test_a_class_that_is_called_train_does_not_hide_others(tmp_path, name):
    for part in ("train", "test", name):
        save(tmp_path / part / "0.png", noise(4, 4))
    with pytest.raises(ValueError, match=rf"has images in {name}/ beside train/; if train is a class like these, move"):
        folder(tmp_path)


def test_what_holds_no_images_may_lie_beside_the_splits(tmp_path):
    save(tmp_path / "train" / "0.png", noise(4, 4))
    save(tmp_path / ".thumbnails" / "0.png", noise(4, 4))
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "0.xml").write_text("<a/>")
    (tmp_path / "LICENSE").write_text("free")
    (tmp_path / "val").symlink_to("train")
    assert [len(folder(tmp_path, split=split)) for split in ("train", "validation")] == [1, 1]


@pytest.mark.parametrize("names", [("Test", "Train"), ("testing", "training"), ("Test", "val"), ("TRAIN", "valid")])
def test_splits_that_would_be_taken_for_classes_are_refused(tmp_path, names):
    for name in names:
        save(tmp_path / name / "cat" / "0.png", noise(4, 4))
    with pytest.raises(ValueError, match=rf"named as splits \({names[0]}/, {names[1]}/\), .* rename the one .* train/"):
        folder(tmp_path)


@pytest.mark.parametrize("held_out", [["test"], ["validation"], ["test", "val"]])
def test_folders_of_held_out_images_alone_are_the_splits_that_they_are_called(tmp_path, held_out):
    for name in held_out:
        for number in range(3):
            save(tmp_path / name / "cat" / f"{number}.png", noise(4, 4))
    for split in ("train", "validation", "test"):
        if any(name.startswith(split[:3]) for name in held_out):
            dataset = folder(tmp_path, split=split)
            assert (len(dataset), dataset.class_names) == (3, ["cat"])
        else:
            with pytest.raises(ValueError, match=rf"holds {held_out[0]}/.* alone, and no images of the {split} split"):
                folder(tmp_path, split=split)


def test_all_images_of_a_folder_can_be_had(classes):
    dataset = folder(classes, split="all", validation_fraction=0.1)
    assert (len(dataset), dataset.class_names) == (15, ["ant", "bär", "zebra"])
    assert dataset.identity["split"] == "all"
    save(classes / "test" / "0.png", noise(6, 8))
    assert len(folder(classes, split="all")) == 16  # a class, as long as there are others
    for name in ("ant", "bär", "zebra"):
        (classes / name).rename(classes.parent / name)
    with pytest.raises(ValueError, match="test/; name a split, or one of these folders as the root"):
        folder(classes, split="all")
    with pytest.raises(ValueError, match="all images are to be had of a folder only, not of digits; name a split"):
        load_images(DataConfig(), "all")


def test_a_single_class_may_be_called_as_a_split_is(tmp_path):
    for name in ("test", "exam"):
        save(tmp_path / name / "0.png", noise(4, 4))
    assert folder(tmp_path).class_names == ["exam", "test"]


def test_folders_that_are_links_are_followed_and_each_is_seen_once(classes, tmp_path):
    linked = tmp_path / "linked"
    for name in ("ant", "zebra"):
        (linked / name / "inner").mkdir(parents=True)
        (linked / name / "inner" / "link").symlink_to(classes / name)
        (linked / name / "again").symlink_to(classes / name)
        (linked / name / "up").symlink_to(linked / name)  # a loop
    dataset = folder(linked, split="all")
    assert Counter(dataset[i]["label"].item() for i in range(len(dataset))) == {0: 5, 1: 4}


def test_a_folder_that_cannot_be_read_is_named(classes, monkeypatch):
    (classes / "ant" / "locked").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="locked"):
        folder(classes)


def test_empty_class_folder_is_named(classes):
    (classes / "empty").mkdir()
    with pytest.raises(ValueError, match=r"class folder .*empty holds no images"):
        folder(classes)


def test_folder_without_images_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds no images; known extensions are .*\.png"):
        folder(tmp_path)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        folder(tmp_path / "nowhere")


def test_loose_images_beside_class_folders_are_refused(classes):
    save(classes / "loose.png", noise(6, 8))
    with pytest.raises(ValueError, match=r"both class folders \(ant/.*loose\.png"):
        folder(classes)


def test_single_image_trains_but_leaves_nothing_to_hold_out(tmp_path):
    save(tmp_path / "a.png", noise(4, 4))
    assert len(folder(tmp_path)) == 1
    with pytest.raises(ValueError, match=r"validation split .* is empty"):
        folder(tmp_path, split="validation", validation_fraction=0.1)


@pytest.mark.parametrize(
    ("count", "fraction", "advice"),
    [
        (1, 0.1, "put images into train/ and validation/ folders; for a trial, the same ones will do"),
        (2, 0.1, "put images into train/ and validation/ folders; for a trial, the same ones will do"),
        (3, 0.0, "use a larger fraction"),
    ],
)
def test_an_empty_validation_split_is_refused_with_what_helps(tmp_path, count, fraction, advice):
    for number in range(count):
        save(tmp_path / f"{number}.png", noise(4, 4))
    with pytest.raises(ValueError, match=f"it is carved out of {count} images with .*; {advice}$"):
        folder(tmp_path, split="validation", validation_fraction=fraction)


def test_different_sizes_need_an_image_size(tmp_path):
    save(tmp_path / "a.png", noise(4, 4))
    save(tmp_path / "b.png", noise(5, 6))
    save(tmp_path / "c.png", noise(4, 4))
    with pytest.raises(ValueError, match=r"a\.png is 4x4, .*b\.png is 5x6; set image_size"):
        folder_of_all(tmp_path)
    assert folder(tmp_path, image_size=(4, 4)).image_shape == (1, 4, 4)


# --- identity ---


def test_identity_follows_content_not_place_or_cache(classes, tmp_path):
    original = folder(classes).fingerprint
    assert folder(classes, cache_bytes=0).fingerprint == original
    classes.rename(tmp_path / "moved")
    assert folder(tmp_path / "moved").fingerprint == original
    save(tmp_path / "moved" / "ant" / "bild 0.png", noise(6, 8, 3, seed=99))
    assert folder(tmp_path / "moved").fingerprint != original


def test_max_images_takes_a_fixed_choice(classes):
    dataset = folder(classes, max_images=5)
    assert len(dataset) == 5
    assert names(dataset) == names(folder(classes, max_images=5))


def test_resolved_configuration_gives_the_same_data(classes):
    dataset = folder(classes)
    assert dataset.config.image_size == (6, 8)
    assert load_images(dataset.config, "train").fingerprint == dataset.fingerprint


# --- torchvision ---


def write_mnist(root, count=20, test_count=5):
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, n in (("train", count), ("t10k", test_count)):
        pixels, labels = noise(n, 28, 28, seed=n).astype(np.uint8), np.arange(n, dtype=np.uint8) % 10
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, n, 28, 28) + pixels.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, n) + labels.tobytes())


def test_torchvision_set_keeps_its_test_part_and_gives_validation_from_training(tmp_path):
    write_mnist(tmp_path)
    config = DataConfig(name="MNIST", root=str(tmp_path), download=False)
    train, validation, test = (load_images(config, split) for split in ("train", "validation", "test"))
    assert [len(part) for part in (train, validation, test)] == [18, 2, 5]
    assert sorted([*train._indices, *validation._indices]) == list(range(20))
    assert (test.image_shape, test.num_classes) == ((1, 28, 28), 10)
    expected = torch.tensor(noise(5, 28, 28, seed=5)[3] / 255, dtype=torch.float32)
    assert torch.equal(test[3]["image"][0], expected)
    assert test[3]["label"] == 3


@pytest.mark.parametrize("reason", [errno.EACCES, errno.EROFS])
def test_torchvision_set_in_a_folder_that_cannot_be_written_is_read(tmp_path, monkeypatch, reason):
    def acquire(self):
        raise OSError(reason, os.strerror(reason))  # a test that runs as root may write anywhere

    monkeypatch.setattr(FileLock, "acquire", acquire)
    write_mnist(tmp_path)
    config = DataConfig(name="MNIST", root=str(tmp_path), download=False)
    assert len(load_images(config, "test")) == 5


def test_torchvision_set_with_a_split_argument(tmp_path):
    for split in ("train", "val"):  # Imagenette calls its only held-out part "val"
        for label, name in enumerate(("n01440764", "n02102040")):
            for i in range(10):
                path = tmp_path / "imagenette2" / split / name / f"{i}.JPEG"
                save(path, np.full((4, 4, 3), 100 * label), format="JPEG")
    config = DataConfig(name="Imagenette", root=str(tmp_path), download=False)
    sizes = [len(load_images(config, split)) for split in ("train", "validation", "test")]
    assert sizes == [18, 2, 20]


def test_torchvision_set_without_a_test_part_is_divided(tmp_path):
    config = DataConfig(name="FakeData", root=str(tmp_path), image_size=(8, 8), max_images=3)
    state = torch.get_rng_state()
    parts = [load_images(config, split) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [3, 3, 3]
    assert not set.intersection(*({*part._indices.tolist()} for part in parts))
    assert torch.equal(torch.get_rng_state(), state)
    assert parts[0].num_classes == 10


def test_missing_torchvision_set_says_where_its_files_belong(tmp_path):
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte\.gz into .*MNIST/raw"):
        load_images(DataConfig(name="MNIST", root=str(tmp_path), download=False), "train")


@pytest.mark.parametrize(("name", "near"), [("MNSIT", "MNIST"), ("cifar10", "CIFAR10"), ("digit", "digits")])
def test_unknown_name_is_answered_with_the_nearest(name, near):
    with pytest.raises(ValueError, match=rf"unknown data set '{name}'; did you mean .*{near}"):
        load_images(DataConfig(name=name), "train")


# --- configuration ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": (0, 4)}, "image_size must be"),
        ({"channels": 2}, "channels must be 1"),
        ({"validation_fraction": 1.0}, r"validation_fraction must lie in \[0, 1\)"),
        ({"max_images": 0}, "max_images must be at least 1"),
        ({"crop_padding": -1}, "crop_padding must be at least 0"),
        ({"crop": "middle"}, "unknown crop 'middle'; choose from center, random"),
        ({"binarize": "yes"}, "unknown binarize 'yes'"),
    ],
)
def test_wrong_option_is_refused_where_it_is_given(options, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="unknown split 'val'; choose from train, validation, test"):
        load_images(DataConfig(), "val")


def test_every_option_is_documented():
    documented = inspect.getdoc(DataConfig)
    assert all(f"    {name}: " in documented for name in DataConfig.__dataclass_fields__)

"""Scenes: every caption is true, every digit is a scan of its split, and the same numbers give the same scene."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelines.image_sources import digit_scans
from pipelines.images import DataConfig, ImageDataset, load_images
from pipelines.scenes import NAMES, NUM_SCENES, SIDE, SPLITS, ScenesSource, draw_scene


def holds(relation, one, other):
    """Whether a digit's 8x8 square lies wholly on that side of the other's."""
    axis, sign = {"above": (1, 1), "below": (1, -1), "left of": (2, 1), "right of": (2, -1)}[relation]
    return sign * (other[axis] - one[axis]) >= SIDE


def check_truth(scene):
    """Parses the caption by itself and compares with the places of the digits."""
    names = [word for word in scene.caption.replace(",", "").split() if word in NAMES]
    assert [NAMES[digit.number] for digit in scene.digits] == names
    assert ("an eight" in scene.caption) == ("eight" in names)
    assert scene.caption.count("an ") == names.count("eight")
    first, *rest = scene.caption.split(", both ")
    if len(names) > 1:
        assert holds(" ".join(first.split()[2:-2]), *scene.digits[:2])
    if len(names) > 2:
        relation = " ".join(rest[0].split()[:-2])
        assert all(holds(relation, digit, scene.digits[2]) for digit in scene.digits[:2])
    return len(names)


@given(st.integers(0, 2**32), st.integers(16, 40), st.integers(16, 40))
def test_captions_are_true_and_digits_lie_on_the_canvas_without_overlap(seed, height, width):
    scene = draw_scene(np.random.default_rng(seed), (height, width))
    assert check_truth(scene) == len(scene.digits)
    for digit in scene.digits:
        assert 0 <= digit.top <= height - SIDE
        assert 0 <= digit.left <= width - SIDE


def test_scenes_show_scans_of_their_split_where_the_caption_says():
    pixels, labels = digit_scans()
    seen = {}
    for split in SPLITS:
        source, seen[split] = ScenesSource(split, (16, 24), seed=0), set()
        for index in range(40):
            picture = np.array(source.read(index)[0])
            rest = picture.copy()
            for digit in source.scene(index).digits:
                square = slice(digit.top, digit.top + SIDE), slice(digit.left, digit.left + SIDE)
                (match,) = np.flatnonzero((pixels == picture[square]).all((1, 2)))
                assert labels[match] == digit.number
                seen[split].add(int(match))
                rest[square] = 0
            assert not rest.any()
            assert check_truth(source.scene(index)) == len(source.scene(index).digits)
    assert not seen["train"] & seen["validation"]
    assert not seen["train"] & seen["test"]
    assert not seen["validation"] & seen["test"]


def test_the_splits_share_out_all_scans():
    scans = [np.concatenate(ScenesSource(split, None, 0)._scans) for split in ("validation", "test")]
    train_scans = np.concatenate(ScenesSource("train", None, 0)._scans)
    assert sorted(np.concatenate([train_scans, *scans])) == list(range(1797))
    assert [len(part) for part in scans] == [pytest.approx(180, abs=6)] * 2


def test_a_scene_is_a_function_of_seed_split_and_index():
    few, more = (load_images(DataConfig(name="scenes", max_images=n), "validation") for n in (20, None))
    assert len(more) == NUM_SCENES["validation"]
    places = {caption: i for i, caption in enumerate(more.captions)}
    rows = [int(np.flatnonzero(more._indices == index)[0]) for index in few._indices]
    assert len(places) > 500
    assert few.captions == [more.captions[row] for row in rows]
    assert torch.equal(few.__getitems__(range(20))["image"], more.__getitems__(rows)["image"])
    other = load_images(DataConfig(name="scenes", max_images=20, split_seed=1), "validation")
    assert not set(other.captions) <= set(few.captions)
    assert other.fingerprint != few.fingerprint
    assert few.captions != load_images(DataConfig(name="scenes", max_images=20), "test").captions


def test_scenes_are_grey_images_with_captions_and_without_labels():
    scenes = load_images(DataConfig(name="scenes", image_size=(24, 20), max_images=5), "test")
    assert scenes.image_shape == (1, 24, 20)
    assert scenes.num_classes == 0
    assert scenes[0]["label"] == 0
    assert len(scenes.captions) == len(scenes) == 5
    assert load_images(DataConfig(max_images=5), "test").captions is None


class Reworded(ScenesSource):
    def caption(self, index):
        return super().caption(index).replace("left of", "to the left of")


def test_other_captions_make_other_data():
    config = DataConfig(name="scenes")
    one, same, other = (
        ImageDataset(source("test", None, 0), np.arange(20), config, "test")
        for source in (ScenesSource, ScenesSource, Reworded)
    )
    assert torch.equal(one.__getitems__(range(20))["image"], other.__getitems__(range(20))["image"])
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_every_relation_and_digit_occurs_about_as_often():
    words = " ".join(load_images(DataConfig(name="scenes"), "validation").captions).split()
    counts = [words.count(word) for word in ("left", "right", "above", "below")]
    assert min(counts) > 0.85 * max(counts)
    counts = [words.count(name) for name in NAMES]
    assert min(counts) > 0.8 * max(counts)


def test_a_canvas_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match=r"image_size must be at least \[16, 16\] for scenes.*got \[8, 16\]"):
        load_images(DataConfig(name="scenes", image_size=(8, 16)), "train")

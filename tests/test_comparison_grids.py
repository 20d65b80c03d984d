"""The pictures of a comparison: how many images are computed at a time, which, and what is said meanwhile."""

import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.comparison.findings import Findings
from pipelines.comparison.grids import KINDS, Grids, draw_all
from pipelines.comparison.running import Member
from pipelines.images import DataConfig, load_images
from pipelines.runs import save_config
from tests.test_evaluation import add_image, record_run, save_folder
from tests.test_pipeline import make


def save_run(folder, config: DataConfig) -> Member:
    """A run folder of an untrained pipeline."""
    images = load_images(config, "train")
    implied = {"image_shape": images.image_shape, "preprocessing": images.preprocessing}
    make("dvaepp", prior=None, **implied).save_pretrained(folder)
    save_config(folder / "stage_one" / "config.yaml", {"data": {"name": config.name, "root": config.root}})
    return Member(folder.name, folder.name, folder, None)


def make_grids(folder, **options) -> Grids:
    return Grids(folder, split="test", seed=0, device=torch.device("cpu"), **options)


def test_pictures_are_computed_a_batch_at_a_time_and_are_the_same_in_any(tmp_path):
    member, sizes, pixels = save_run(tmp_path / "run", DataConfig()), set(), []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: sizes.add(len(inputs[0])) if isinstance(module, torch.nn.Linear) else None
    )
    try:
        for batch_size in (64, 3):
            sizes.clear()
            grids = make_grids(tmp_path / str(batch_size), batch_size=batch_size)
            grids.draw(member)
            pixels.append([np.asarray(Image.open(grids.path(member, kind))).astype(int) for kind in KINDS])
    finally:
        hook.remove()
    assert max(sizes) == 3
    for one, other in zip(*pixels):
        assert np.abs(one - other).max() <= 1  # sums in another order are rounded to another of 256 values at most


def test_images_shown_are_those_that_the_member_was_evaluated_on(tmp_path):
    member = save_run(tmp_path / "run", DataConfig())
    grids = make_grids(tmp_path / "grids")
    few = load_images(DataConfig(max_images=30), "test").identity
    grids.draw(member, few)
    originals = np.asarray(Image.open(grids.path(member, "reconstructions")))
    grids.draw(member, load_images(DataConfig(), "test").identity)
    assert not np.array_equal(np.asarray(Image.open(grids.path(member, "reconstructions"))), originals)
    grids.draw(member, few)
    assert np.array_equal(np.asarray(Image.open(grids.path(member, "reconstructions"))), originals)
    with pytest.raises(ValueError, match=r"run was evaluated on other images \(digits test\) than those of its run"):
        grids.draw(member, few | {"content": "0" * 64})
    assert not grids.path(member, "reconstructions").exists()


def test_no_images_that_a_run_was_trained_on_are_shown_as_held_out(tmp_path):
    config = DataConfig(name="folder", root=str(save_folder(tmp_path / "pictures")))
    members = [save_run(tmp_path / name, config) for name in ("earlier", "first", "second")]
    for member in members[1:]:
        record_run(member.folder, config, where="state")
    add_image(tmp_path / "pictures")
    grids = make_grids(tmp_path / "grids")
    grids.draw(members[0])  # which does not know what it was trained on
    for member in members[1:]:
        with pytest.raises(ValueError, match=f"not those that .*{member.name} was trained on: the test split"):
            grids.draw(member)


def test_a_terminal_shows_how_many_models_are_drawn(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    members = [save_run(tmp_path / name, DataConfig()) for name in "ab"]
    pictures = draw_all(make_grids(tmp_path / "grids"), Findings(members, [{}, {}], {}, {}))
    assert "drawing pictures: 100%" in sys.stderr.getvalue()
    assert "2/2" in sys.stderr.getvalue()
    assert {name: tuple(of_model) for name, of_model in pictures.items()} == {"a": KINDS, "b": KINDS}

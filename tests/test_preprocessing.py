"""Pictures of extreme shapes, wherever they come from."""

import pytest
import torch
from PIL import Image

from pipelines.images import DataConfig, load_images
from pipelines.preprocessing import BadImageError, covering_size, preprocess_image
from tests.test_pipeline import PREPROCESSING, make

# A line of few bytes that would be 6,400,000 x 32 pixels where images are 32 x 32
THIN = (200_000, 1)
LARGER = {**PREPROCESSING, "image_size": [32, 32]}
MESSAGE = "to cover 32 x 32 pixels, its 200000 x 1 would be enlarged to 6400000 x 32, of which at most .* crop it"


@pytest.mark.parametrize("size", [THIN, THIN[::-1]])
def test_a_line_is_refused_before_it_is_enlarged(size):
    with pytest.raises(BadImageError, match=f"the image: .* its {size[0]} x {size[1]} would be enlarged to"):
        preprocess_image(Image.new("L", size), LARGER)


def test_pictures_are_enlarged_as_far_as_pillow_reads_them(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32 * 320)
    assert covering_size((10, 1), LARGER) == (320, 32)
    with pytest.raises(BadImageError, match="its 11 x 1 would be enlarged to 352 x 32, of which at most 10240"):
        covering_size((11, 1), LARGER)
    assert covering_size((500, 320), LARGER) == (50, 32)  # of any size where it is made smaller
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert covering_size((11, 1), LARGER) == (352, 32)


@pytest.mark.parametrize("kind", ["image", "mask"])
def test_a_pipeline_refuses_lines(kind):
    pipeline = make(image_shape=(3, 32, 32), preprocessing=LARGER)
    images, mask = Image.new("L", THIN), torch.ones(32, 32, dtype=torch.bool)
    if kind == "mask":
        images, mask = torch.rand(1, 3, 32, 32), Image.new("L", THIN, "white")
    with pytest.raises(ValueError, match=f"the {kind}: .*{MESSAGE}"):
        pipeline.complete(images, mask)


def test_a_line_among_training_images_is_a_bad_image(tmp_path):
    for number in range(20):
        Image.new("L", (32, 32), number).save(tmp_path / f"{number:02}.png")
    Image.new("L", THIN).save(tmp_path / "07.png")
    options = {"name": "folder", "root": str(tmp_path), "image_size": (32, 32)}
    sets = [load_images(DataConfig(**options, on_bad_image="skip"), split) for split in ("train", "validation", "test")]
    assert sum(map(len, sets)) == 19
    with pytest.raises(BadImageError, match=rf"07\.png: .*{MESSAGE}.* or set on_bad_image to skip"):
        [load_images(DataConfig(**options), split) for split in ("train", "validation", "test")]

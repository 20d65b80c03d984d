"""Pictures and masks that a user names by their file."""

import pytest
from PIL import Image

from pipelines.masks import named_mask, open_image
from tests.test_images import spoil_postscript
from tests.test_pipeline import make_tokenizer


@pytest.mark.parametrize("read", [open_image, lambda path: named_mask(path, make_tokenizer("vqvae"))])
def test_a_picture_from_a_file_starts_no_other_program(read, tmp_path):
    path = tmp_path / "photo.png"
    spoil_postscript(path)  # which Pillow's reader would hand to Ghostscript
    with pytest.raises(ValueError, match=r"photo[.]png: cannot be read as an image: cannot identify image file"):
        read(str(path))


@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "ppm", "tiff"])
def test_a_picture_is_read_whatever_its_format(extension, tmp_path):
    path = tmp_path / f"photo.{extension}"
    Image.new("L", (6, 4), 255).save(path)
    assert open_image(str(path)).size == (6, 4)

"""Encoding after training: in batches that fit into memory, of which the codes know nothing."""

import pytest
import torch

from pipelines.checkpoint import fingerprint
from pipelines.code_writing import BATCH_SIZE, fitting_batch_size, write_codes
from pipelines.images import DataConfig, load_images
from tests import tiny
from tests.test_tokenizers import make
from tokenizer.quantizers import QUANTIZERS

DATA = DataConfig(max_images=60)


def write(folder, tokenizer, **options):
    images = load_images(DATA, "train")
    options |= {"tokenizer_folder": folder, "fingerprint": fingerprint(tokenizer), "progress": False}
    return write_codes(folder, tokenizer, images, split="train", **options)


def test_codes_are_written_in_batches_no_larger_than_those_of_training():
    vqvae, dvaepp = make("vqvae"), make("dvaepp")
    assert [fitting_batch_size(vqvae, size) for size in (1, 8, 256, 4096)] == [1, 8, 256, BATCH_SIZE]
    # draws depend on the batch, and those of a run are not to
    assert [fitting_batch_size(dvaepp, size) for size in (1, 8, 256, 4096)] == [BATCH_SIZE] * 4


@pytest.mark.parametrize("name", sorted(name for name, kind in QUANTIZERS.items() if not kind.is_stochastic))
def test_the_codes_of_a_deterministic_encoder_do_not_depend_on_the_batch(name, tmp_path):
    tokenizer = make("vqvae", image_shape=(1, 8, 8), quantizer={"type": name, **tiny.QUANTIZERS[name]})
    stores = [write(tmp_path / str(size), tokenizer, batch_size=size) for size in (BATCH_SIZE, 7, 1)]
    whole, *others = (store.__getitems__(range(len(store)))["codes"] for store in stores)
    for codes in others:
        assert all(torch.equal(a, b) for a, b in zip(codes, whole))


def test_a_batch_that_does_not_fit_into_memory_is_said_with_the_mend(tmp_path):
    tokenizer = make("vqvae", image_shape=(1, 8, 8))
    tokenizer.encode = lambda images, sample=False: torch.empty(2**50)
    with pytest.raises(MemoryError, match=r"encoding 8 images at a time; run scripts/extract_codes.py .*train.* 4 \("):
        write(tmp_path / "codes", tokenizer, batch_size=8)

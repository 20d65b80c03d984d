"""Numbers that models are compared by, against closed forms and NumPy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelines.checkpoint import build_tokenizer
from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.report import format_table
from pipelines.images import DataConfig, load_images
from pipelines.metrics import CodeCounts, bits_per_dim, codebook_usage, has_collapsed, perplexity, psnr
from pipelines.objectives import unigram_nats_per_code
from pipelines.two_stage import Pipeline
from prior.base import CodeSpec
from tests import tiny

COUNTS = st.lists(st.integers(0, 1000), min_size=1, max_size=20)


def random_codes(spec, batch=7):
    return tuple(torch.randint(k, (batch, *shape)) for shape, k in zip(spec.shapes, spec.vocab_sizes))


@pytest.mark.parametrize("error", [0.5, 0.1, 1e-3])
def test_psnr_of_a_constant_error_is_minus_20_log10_of_it(error):
    images = torch.full((2, 3, 4, 4), 0.5, dtype=torch.float64)
    images[1] += error
    values = psnr(images, torch.full_like(images, 0.5))
    torch.testing.assert_close(values, torch.tensor([100.0, -20 * math.log10(error)], dtype=torch.float64))


def test_psnr_does_not_mix_images():
    images, targets = torch.rand(4, 1, 5, 5), torch.rand(4, 1, 5, 5)
    alone = torch.cat([psnr(images[i : i + 1], targets[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(psnr(images, targets), alone)


@given(COUNTS)
def test_perplexity_and_usage_agree_with_numpy(counts):
    array = np.array(counts, dtype=np.float64)
    assert codebook_usage(torch.tensor(counts)) == pytest.approx(np.count_nonzero(array) / len(array))
    if array.sum() == 0:
        assert math.isnan(perplexity(torch.tensor(counts)))
        return
    p = array[array > 0] / array.sum()
    assert perplexity(torch.tensor(counts)) == pytest.approx(np.prod(p**-p))
    assert 1 - 1e-9 <= perplexity(torch.tensor(counts)) <= np.count_nonzero(array) * (1 + 1e-9)


def test_perplexity_of_equally_frequent_codes_is_their_number():
    assert perplexity(torch.tensor([5, 0, 5, 5, 0, 5])) == pytest.approx(4)


@pytest.mark.parametrize("space", sorted(tiny.SPECS))
def test_counts_over_batches_are_the_counts_of_all_at_once(space):
    spec = tiny.SPECS[space]
    codes = random_codes(spec)
    in_batches, at_once = CodeCounts(spec), CodeCounts(spec)
    for part in (slice(0, 3), slice(3, 4), slice(4, 7)):
        in_batches.add(tuple(code[part] for code in codes))
        in_batches.merge()
    at_once.add(codes)
    at_once.merge()
    assert in_batches.summary() == at_once.summary()
    for level, (code, k) in enumerate(zip(codes, spec.vocab_sizes)):
        expected = np.bincount(code.numpy().ravel(), minlength=k)
        np.testing.assert_array_equal(in_batches.get_buffer(f"total_{level}").numpy(), expected)


def test_vocabularies_too_large_for_a_table_are_not_counted():
    counts = CodeCounts(CodeSpec(((2, 2), (1,)), (2**40, 3)))
    counts.add((torch.full((5, 2, 2), 2**40 - 1), torch.tensor([[0], [0], [1], [1], [1]])))
    counts.merge()
    assert counts.summary().keys() == {"codebook_usage", "perplexity"}
    assert counts.summary()["codebook_usage"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(("bits", "why"), [(30, "more than 67,108,864 codes are not counted"), (None, "real numbers")])
def test_an_evaluation_says_why_a_codebook_is_not_measured(bits, why):
    config = {"type": "gaussian_vae", **tiny.TOKENIZERS["gaussian_vae"], "likelihood": {"type": "normal"}}
    if bits:
        config = {"type": "vqvae", **tiny.TOKENIZERS["vqvae"], "quantizer": {"type": "lfq", "num_bits": bits}}
    pipeline = Pipeline(build_tokenizer({**config, "image_shape": (1, 8, 8)}))
    with pytest.raises(ValueError, match=f"nothing could be measured: .*{why}"):
        evaluate(pipeline, load_images(DataConfig(max_images=5), "test"), metrics=["codebook"])


class Store:
    """The least of a code store: the codes of one level of 2^40 values."""

    spec = CodeSpec(((2,),), (2**40,))

    def __init__(self, *codes):
        self.codes = torch.tensor(codes)

    def __len__(self):
        return len(self.codes)

    def __getitems__(self, rows):
        return {"codes": (self.codes[list(rows)],)}


def test_a_unigram_table_needs_no_memory_for_codes_that_do_not_occur():
    nats = unigram_nats_per_code(Store([0, 5], [5, 2**40 - 1]), Store([5, 5], [7, 2**40 - 1]))
    # 2, 0 and 1 occurrences in training, and one more each, of 4 + 2^40
    assert nats == pytest.approx(math.log(4 + 2**40) - (2 * math.log(3) + math.log(1) + math.log(2)) / 4)


@pytest.mark.parametrize(("size", "count", "collapsed"), [(64, 255, False), (64, 256, True), (15, 1000, False)])
def test_a_codebook_has_collapsed_only_once_enough_codes_were_counted(size, count, collapsed):
    counts = torch.zeros(size, dtype=torch.int64)
    counts[3] = count
    assert has_collapsed(counts) == collapsed


def test_reset_forgets_what_was_counted():
    counts = CodeCounts(tiny.SPECS["map"])
    counts.add(random_codes(tiny.SPECS["map"]))
    counts.merge()
    counts.reset()
    assert counts.summary()["codebook_usage"] == 0


def test_one_bit_per_dim_is_log_two_nats_for_each():
    assert bits_per_dim(12 * math.log(2), 12) == pytest.approx(1)


def test_a_table_has_a_line_for_each_number():
    assert format_table({"psnr": 20.123456, "num_images": 3}) == "psnr        20.123\nnum_images  3"


def test_a_spread_stands_behind_its_value():
    assert format_table({"nats": 2.0, "nats_se": 0.123, "n_std": 1.0}) == "nats   2 ± 0.12\nn_std  1"

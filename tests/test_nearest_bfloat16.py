"""The search that bfloat16 products precede: its codes are those of float32 alone, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizer.quantizers import EMAVQ, nearest_bfloat16
from tokenizer.quantizers.nearest import nearest
from tokenizer.quantizers.nearest_bfloat16 import Screening

pytestmark = pytest.mark.skipif(
    not nearest_bfloat16.cpu_multiplies_bfloat16(), reason="needs a CPU with instructions for bfloat16"
)


def codes_of_both(vectors: torch.Tensor, codebook: torch.Tensor, **sizes) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes with bfloat16's products, whatever the sizes, and those without."""
    found = []
    for pays in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tokenizer.quantizers.nearest.screening_pays", lambda vectors, codebook, pays=pays: pays)
            for name, size in sizes.items():
                patch.setattr(nearest_bfloat16, name, size)
            found.append(nearest(vectors, codebook))
    return tuple(found)


def undecided(vectors: torch.Tensor, codebook: torch.Tensor) -> int:
    return len(Screening(codebook)(vectors, torch.empty(len(vectors), dtype=torch.int64)))


@settings(max_examples=100)
@given(
    num_vectors=st.integers(0, 70),
    codebook_size=st.integers(1, 70),
    dim=st.integers(1, 40),
    largest=st.sampled_from([1, 100, 1000]),
    columns=st.sampled_from([16, 100]),
    candidates=st.sampled_from([2, 100]),
    seed=st.integers(0, 2**32 - 1),
)
def test_whole_numbers_have_the_codes_of_float32_ties_included(
    num_vectors, codebook_size, dim, largest, columns, candidates, seed
):
    generator = torch.Generator().manual_seed(seed)
    # exact in float32, in any order; the small ones tie often
    vectors = torch.randint(-largest, largest + 1, (num_vectors, dim), generator=generator).float()
    codebook = torch.randint(-largest, largest + 1, (codebook_size, dim), generator=generator).float()
    with_it, without = codes_of_both(vectors, codebook, COLUMNS=columns, TILE=400, CANDIDATES=candidates)
    assert torch.equal(with_it, without)


@pytest.mark.parametrize("scale", [1e-30, 1e-21, 1e-19, 1e-6, 1.0, 1e6, 1e18])
@pytest.mark.parametrize("offset", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("spread", [1.0, 0.1, 3e-3, 1e-6])
def test_codes_are_those_of_float32_however_close_the_entries(scale, offset, spread):
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(1, 48, generator=generator) + spread * torch.randn(300, 48, generator=generator)
    vectors = codebook[torch.arange(500) % 300] + 0.5 * spread * torch.randn(500, 48, generator=generator)
    with_it, without = codes_of_both(scale * (vectors + offset), scale * (codebook + offset), CANDIDATES=300)
    assert torch.equal(with_it, without)


@pytest.mark.parametrize("exact", ["neither", "vectors", "codebook"])
@pytest.mark.parametrize("distance", [0, 3, 10, 30, 100])
@pytest.mark.parametrize("spread", [0.02, 0.1, 0.3, 1.0])
def test_codes_are_those_of_float32_wherever_rounding_takes_from(exact, distance, spread):
    generator = torch.Generator().manual_seed(0)
    vectors, codebook = (100 * (1 + spread * torch.randn(n, 4, generator=generator)) for n in (5000, 150))
    vectors += distance * spread * 100 * torch.randn(4, generator=generator)
    if exact == "vectors":
        vectors = vectors.bfloat16().float()
    elif exact == "codebook":
        codebook = codebook.bfloat16().float()
    codebook = torch.cat([codebook, -codebook])  # centred already
    with_it, without = codes_of_both(vectors, codebook, CANDIDATES=300)
    assert torch.equal(with_it, without)


def test_a_vector_that_rounding_moves_towards_the_farther_entry():
    signs = torch.ones(64)
    signs[::2] = -1
    near, far = (1 + 26 / 128) * signs, (1 - 51 / 256) * signs
    codebook = torch.stack([far, near, -far, -near])  # as it is in bfloat16, and centred
    vectors = (1 + 0.9 / 256) * signs[None]
    rounded = vectors.bfloat16().float()
    assert (near - vectors).norm() < (far - vectors).norm()
    assert (near - rounded).norm() > (far - rounded).norm()
    with_it, _ = codes_of_both(vectors, codebook)
    assert with_it.tolist() == [1]


@pytest.mark.parametrize("dim", [128, 256])
def test_hardly_a_vector_is_left_to_float32(dim):
    vectors, codebook = torch.randn(1000, dim), torch.randn(4096, dim)
    assert undecided(vectors, codebook) < 50
    assert undecided(vectors + 3, codebook + 3) < 100
    with_it, without = codes_of_both(vectors, codebook)
    assert torch.equal(with_it, without)


@pytest.mark.parametrize("few", [True, False])
def test_vectors_much_nearer_than_those_that_tell_how_far_they_are(few):
    generator = torch.Generator().manual_seed(0)
    # two far clusters: next to one of them are many more entries than in the middle
    codebook = torch.randn(400, 64, generator=generator) + 3 * torch.tensor([-1, 1]).repeat(200)[:, None]
    vectors = torch.randn(3000, 64, generator=generator)
    near = torch.arange(3000) % (300 if few else 2) == 1
    near[:: 3000 // nearest_bfloat16.SAMPLE] = False
    vectors[near] += 3
    assert undecided(vectors, codebook) < 100
    with_it, without = codes_of_both(vectors, codebook)
    assert torch.equal(with_it, without)


def test_a_collapsed_codebook_is_searched_in_float32():
    vectors, codebook = torch.randn(40, 8), torch.randn(1, 8).repeat(50, 1)
    assert undecided(vectors, codebook) == 40
    with_it, _ = codes_of_both(vectors, codebook)
    assert not with_it.any()


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf, 1e38])
@pytest.mark.parametrize("candidates", [2, 100])
def test_numbers_that_are_none_change_no_other_code(number, candidates):
    vectors, codebook = torch.randn(40, 3), torch.randn(67, 3)
    vectors[::2, 0] = number
    with_it, without = codes_of_both(vectors, codebook, CANDIDATES=candidates)
    assert torch.equal(with_it[1::2], without[1::2])
    codebook[::2] = number
    with_it, _ = codes_of_both(vectors, codebook, CANDIDATES=candidates)
    assert with_it.min() >= 0
    assert with_it.max() < 67


def test_the_default_device_is_of_no_account():
    vectors, codebook = torch.randn(2048, 128), torch.randn(4096, 128)
    with torch.device("meta"):
        codes = nearest(vectors, codebook)
    assert torch.equal(codes, nearest(vectors, codebook))


def test_training_is_what_it_is_without(monkeypatch):
    features = torch.randn(8, 128, 16, 16)
    outputs = []
    for fast in (True, False):
        monkeypatch.setattr(nearest_bfloat16, "cpu_multiplies_bfloat16", lambda fast=fast: fast)
        torch.manual_seed(0)
        quantizer = EMAVQ(4096, 128, init="normal")
        output = quantizer(features)
        quantizer.after_step()
        outputs.append((output.codes[0], output.losses["commitment"], quantizer.codebook))
    assert all(torch.equal(one, other) for one, other in zip(*outputs))

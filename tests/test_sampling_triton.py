"""A draw as one kernel: on a GPU where there is one, else in Triton's interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prior import sampling
from prior.sampling import check_totals, draw

pytest.importorskip("triton", reason="Triton is not installed; torch's GPU builds bring it, else it takes 1 GB")
from prior.sampling_triton import MOST_CODES, fused_draw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # conftest.py turns the interpreter on
# for `int` of an array in the interpreter of Triton 3.6
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")


@settings(max_examples=60)
@given(
    batch=st.integers(1, 5),
    num_codes=st.sampled_from([1, 2, 7, 64, 1000]),  # few, since each is compiled anew
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    impossible=st.floats(0, 0.9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_code_is_that_where_the_distribution_reaches_the_noise(batch, num_codes, scale, impossible, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(batch, num_codes, generator=generator)
    hidden = torch.rand(logits.shape, generator=generator) < impossible
    hidden[torch.arange(batch), torch.randint(num_codes, (batch,), generator=generator)] = False
    logits = logits.masked_fill(hidden, -torch.inf).to(dtype)
    uniform = torch.rand(batch, 3, generator=generator)[:, 1]  # a column, as it is in the loop over codes
    codes, totals = (result.cpu() for result in fused_draw(logits.to(DEVICE), uniform.to(DEVICE)))
    assert codes.dtype == torch.int64
    assert not hidden[torch.arange(batch), codes].any()
    torch.testing.assert_close(totals, torch.ones(batch, 1), rtol=0, atol=num_codes * 2**-23)
    cumulative = logits.double().softmax(dim=1).cumsum(dim=1)
    reached = cumulative.gather(1, codes[:, None])[:, 0]
    before = reached - logits.double().softmax(dim=1).gather(1, codes[:, None])[:, 0]
    error = (num_codes + 8) * 2**-23  # of sums of numbers up to 1 in float32
    assert (reached >= uniform - error).all()
    assert (before <= uniform + error).all()


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-24])
def test_the_noise_at_either_end_takes_the_first_and_the_last_possible_code(uniform):
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]], device=DEVICE)
    codes, _ = fused_draw(logits, torch.tensor([uniform], device=DEVICE))
    assert codes.item() == (1 if uniform < 0.5 else 3)


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_what_is_no_distribution_is_found_out_afterwards(number):
    logits = torch.zeros(2, 9, device=DEVICE)
    logits[1, 4] = number
    codes, totals = fused_draw(logits, torch.tensor([0.5, 0.5], device=DEVICE))
    assert 0 <= codes.min() <= codes.max() < 9
    with pytest.raises(ValueError, match="are not numbers"):
        check_totals([totals])


def test_draws_are_this_kernel_unless_codes_are_too_many_for_it(monkeypatch):
    monkeypatch.setattr(sampling, "FUSED_DEVICE", DEVICE)
    logits, uniform = torch.randn(3, 9, device=DEVICE), torch.rand(3, device=DEVICE)
    for result, expected in zip(draw(logits, uniform), fused_draw(logits, uniform), strict=True):
        assert torch.equal(result, expected)
    monkeypatch.setattr(sampling, "has_kernels", lambda: True)
    assert sampling._fused_draw(MOST_CODES) is fused_draw
    assert sampling._fused_draw(MOST_CODES + 1) is None


@pytest.mark.parametrize("compiler", ["gcc", None])
def test_without_a_c_compiler_there_are_no_kernels(compiler, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(sampling.shutil, "which", lambda name: compiler if name == compiler else None)
    assert sampling.has_kernels.__wrapped__() is (compiler is not None)

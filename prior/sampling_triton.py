"""A draw from logits as one kernel for GPUs, where a dozen of torch's operations take longer to start than to run."""

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_CODES = 2**15  # that the registers of a program hold


def fused_draw(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (B,) int64, and sums of the probabilities (B, 1); see `sampling.draw`, whose arguments these are.

    The codes are in range whatever the numbers.
    """
    batch, num_codes = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    codes = torch.empty(batch, dtype=torch.int64, device=logits.device)
    totals = torch.empty(batch, 1, dtype=torch.float32, device=logits.device)
    padded = triton.next_power_of_2(num_codes)
    with torch.cuda.device_of(logits):  # a kernel starts on the current device, not on that of its arguments
        _draw[(batch,)](
            logits, uniform, codes, totals, logits.stride(0), uniform.stride(0), num_codes, padded,
            num_warps=min(16, max(1, padded // 1024)), enable_fp_fusion=True,
        )  # fmt: skip
    return codes, totals


@triton.jit(do_not_specialize=["uniform_stride"])
def _draw(logits, uniform, codes, totals, logits_stride, uniform_stride, num_codes: tl.constexpr, padded: tl.constexpr):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, padded)
    logit = tl.load(logits + row * logits_stride + places, mask=places < num_codes, other=-float("inf")).to(tl.float32)
    weights = tl.exp(logit - tl.max(logit, axis=0))
    probabilities = weights / tl.sum(weights, axis=0)
    # impossible codes stay at 0, so that none is drawn
    cumulative = tl.where(probabilities == 0, 0.0, tl.cumsum(probabilities, axis=0))
    total = tl.max(cumulative, axis=0)
    target = total * tl.load(uniform + row * uniform_stride)
    code = tl.min(tl.where(cumulative > target, places, num_codes - 1), axis=0)
    tl.store(codes + row, code.to(tl.int64))
    tl.store(totals + row, total)

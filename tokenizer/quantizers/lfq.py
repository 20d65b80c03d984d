"""Quantization to the signs of the channels."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from prior.base import Codes
from tokenizer.distributed import is_distributed
from tokenizer.quantizers.base import Quantized, Quantizer, straight_through

# Bits whose joint distribution is formed: 2^18 numbers, and the largest vocabulary of the paper.
JOINT_BITS = 18


class LFQ(Quantizer):
    """Lookup-free quantization (Yu et al. 2023, arXiv:2310.05737, section 3.1: MAGVIT-v2).

    Each of num_bits channels becomes its sign, -1 or 1; the code is the binary number of the signs, the first channel's
    bit the least significant. The entropy loss E[H(q(c|h))] - H(E[q(c|h)]) makes each position sure of its code and
    the codes equally frequent, with q(c|h) = softmax(-|h - c|^2 / temperature) over all 2^num_bits sign vectors c.

    The bits are independent given h, so the first entropy is a sum over bits. The average of such distributions is not
    independent, but is a product of two thin matrices (see `_mean_joint`), so that the second is exact too without an
    N x 2^num_bits matrix. Beyond JOINT_BITS bits it is the sum over groups of bits: an upper bound, exact for
    independent groups. On several processes the average is over all of them, in each forward pass; with accumulated
    micro-batches it is that of the micro-batch.

    Args:
        num_bits: number of channels; K is 2^num_bits.
        entropy_weight: weight of the entropy loss; 0.1 is that of the authors' code.
        diversity_weight: weight of the second entropy against the first.
        temperature: of q(c|h). The authors' code has 0.01, of which only channels within 0.02 of zero feel a gradient;
            1 reaches all that the commitment loss keeps near the signs.
        commitment_weight: weight of |h - sg[sign(h)]|^2; 0.25 is that of VQ-VAE, the paper has no such term.
    Raises:
        ValueError: an argument out of range; features of another shape, or not finite when evaluating.
    """

    def __init__(
        self,
        num_bits: int = 10,
        entropy_weight: float = 0.1,
        diversity_weight: float = 1.0,
        temperature: float = 1.0,
        commitment_weight: float = 0.25,
    ):
        super().__init__()
        if not 1 <= num_bits <= 62:
            raise ValueError(f"num_bits must lie in [1, 62], because codes are int64, got {num_bits}")
        for name, value in (
            ("entropy_weight", entropy_weight),
            ("diversity_weight", diversity_weight),
            ("commitment_weight", commitment_weight),
        ):
            if not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if not temperature > 0:
            raise ValueError(f"temperature must be greater than 0, got {temperature}")
        self.in_channels = self.out_channels = num_bits
        self.vocab_sizes = (2**num_bits,)
        self.entropy_weight, self.diversity_weight = entropy_weight, diversity_weight
        self.temperature, self.commitment_weight = temperature, commitment_weight
        self.register_buffer("place_values", 2 ** torch.arange(num_bits), persistent=False)

    def forward(self, h: Tensor, step: int | None = None) -> Quantized:
        with torch.autocast(h.device.type, enabled=False):  # signs, probabilities and losses in float32
            self.check_features(h)
            vectors = rearrange(h.float(), "b d h w -> b h w d")
            bits = (vectors > 0).long()  # zero is -1, as in Eq. 3
            codes = (bits * self.place_values).sum(dim=-1)
            signs = 2.0 * bits - 1
            losses = {
                "entropy": self.entropy_weight * self._entropy_loss(vectors.flatten(0, 2)),
                "commitment": self.commitment_weight * F.mse_loss(vectors, signs),
            }
            z = rearrange(straight_through(vectors, signs), "b h w d -> b d h w")
            return Quantized(z.to(h.dtype), (codes,), losses)

    def embed(self, codes: Codes) -> Tensor:
        (codes,) = codes
        bits = codes[..., None] // self.place_values % 2
        return rearrange(2.0 * bits - 1, "b h w d -> b d h w")

    def _entropy_loss(self, vectors: Tensor) -> Tensor:
        """Eq. 5 in nats, from the positions' vectors (N, num_bits)."""
        # -|h - c|^2 / t of a channel differs by 4 h / t between c = 1 and c = -1
        logits = 4 * vectors / self.temperature
        # H(p) = softplus(a) - a p for p = sigmoid(a); no logarithm of a probability that may be zero
        per_sample = (F.softplus(logits) - logits * logits.sigmoid()).sum(dim=1).mean()
        groups = logits.split(JOINT_BITS, dim=1)
        of_average = sum(_entropy(self._over_processes(_mean_joint(group))) for group in groups)
        return per_sample - self.diversity_weight * of_average

    def _over_processes(self, probabilities: Tensor) -> Tensor:
        """The average over all processes, of which DDP's average of the gradients makes the exact gradient.

        For that each process keeps its own gradient, undivided. Evaluation stays local: there the processes may make
        different numbers of passes.
        """
        if not (self.training and is_distributed()):
            return probabilities
        average = probabilities.detach().clone()
        dist.all_reduce(average)
        return probabilities + (average / dist.get_world_size() - probabilities).detach()


def _entropy(probabilities: Tensor) -> Tensor:
    """In nats. A probability that has underflowed to zero gets no gradient: its own would be infinite."""
    return torch.special.entr(probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny)).sum()


def _mean_joint(logits: Tensor) -> Tensor:
    """(2^n,): the average over N positions of the joint distribution of n independent bits with logits (N, n).

    The joint distribution of a position is the outer product of those of its lower and upper bits; the sum of N outer
    products is one product of an N x 2^(n/2) matrix with another.
    """
    lower, upper = (_joint(half) for half in logits.tensor_split([logits.shape[1] // 2], dim=1))
    return (upper.T @ lower / len(logits)).flatten()


def _joint(logits: Tensor) -> Tensor:
    """(N, 2^n): the joint distribution of n independent bits with logits (N, n), the first the least significant."""
    joint = logits.new_ones(len(logits), 1)
    for bit in logits.unbind(dim=1):
        joint = torch.cat([joint * (-bit).sigmoid()[:, None], joint * bit.sigmoid()[:, None]], dim=1)
    return joint

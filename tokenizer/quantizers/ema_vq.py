"""Vector quantization whose codebook follows running averages of the vectors assigned to it."""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tokenizer.distributed import is_distributed
from tokenizer.quantizers.base import Quantized
from tokenizer.quantizers.codebook import CodebookQuantizer, Init, Statistics

# Vectors that one process keeps of a step's images, more than any step has: beyond that nobody calls `after_step`
MOST_CANDIDATES = 2**17


class EMAVQ(CodebookQuantizer):
    """Vector quantization with moving averages (van den Oord et al. 2017, arXiv:1711.00937, appendix A.1).

    As used by VQ-VAE-2 (Razavi et al. 2019, arXiv:1906.00446).
    Entry i is m_i / N_i, with N_i and m_i the running averages of how many vectors took it and of their sum. The
    forward pass only gathers these statistics; `after_step` applies them, once per optimizer step, so that accumulated
    batches and several processes give what one big batch gives. They are gathered when training with gradients on.

    Entries that hardly any vector takes are replaced by encoder outputs of the same step, which the papers do not do:
    without it a part of the codebook is lost for good.

    Args:
        codebook_size: number of entries K.
        code_dim: width D of an entry, and of the feature map.
        commitment_weight: beta, the weight of |z_e - sg[e]|^2; 0.25 is the paper's.
        decay: gamma of the running averages; 0.99 is the paper's.
        epsilon: Laplace smoothing of the counts, which keeps an unused entry from a division by zero.
        init: where the codebook starts: "kmeans" centres of the first batch, vectors of it ("data"), or N(0, 1).
        revive_below: an entry is replaced when its running count falls below this fraction of the uniform share, the
            vectors of a step / K, of this step or of those before if that is less; 0 never replaces.
    Raises:
        ValueError: an argument out of range; features of another shape, or not finite when evaluating.
        RuntimeError: training passes over 131,072 images without `after_step`, unless revive_below is 0.
    """

    def __init__(
        self,
        codebook_size: int = 512,
        code_dim: int = 64,
        commitment_weight: float = 0.25,
        decay: float = 0.99,
        epsilon: float = 1e-5,
        init: Init = "kmeans",
        revive_below: float = 0.03,
    ):
        super().__init__(codebook_size, code_dim, commitment_weight, init)
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        if not epsilon > 0:
            raise ValueError(f"epsilon must be greater than 0, got {epsilon}")
        if not 0 <= revive_below < 1:
            raise ValueError(f"revive_below must lie in [0, 1), got {revive_below}")
        self.decay, self.epsilon, self.revive_below = decay, epsilon, revive_below
        # an entry that no vector takes is replaced once decay^steps falls below revive_below
        self.settling_steps = math.ceil(math.log(revive_below) / math.log(decay)) if revive_below and decay else 0
        self.register_buffer("codebook", torch.randn(codebook_size, code_dim))
        self.register_buffer("cluster_size", torch.ones(codebook_size))  # N_i
        self.register_buffer("cluster_sum", self.codebook.clone())  # m_i
        self.register_buffer("num_updates", torch.tensor(0))
        self._known_updates: int | None = 0  # a copy that costs no look at the device; None means "look"
        self.register_load_state_dict_post_hook(_forget_updates)
        # No buffer: DDP broadcasts buffers of rank 0 and would overwrite what the other processes gathered.
        self._pending: Statistics | None = None
        # (n, D): vectors that dead entries may become; after several passes of this step (n, D + 1), with the number of
        # the pass that each comes from
        self._candidates: Tensor | None = None
        self.passes_per_batch = 1  # more where a codebook serves several depths

    def forward(self, h: Tensor, step: int | None = None) -> Quantized:
        with torch.autocast(h.device.type, enabled=False):  # distances, averages and losses in float32
            self.check_features(h)
            gathers = self.training and torch.is_grad_enabled()
            z, codes, commitment_loss, _ = self._assign(h.float(), self._gather(h) if gathers else None)
            return Quantized(z.to(h.dtype), codes, {"commitment": self.commitment_weight * commitment_loss})

    def _initialize(self, codebook: Tensor) -> None:
        super()._initialize(codebook)
        self.cluster_size.fill_(1)
        self.cluster_sum.copy_(self.codebook)

    @torch.no_grad()
    def _gather(self, h: Tensor) -> Statistics:
        """Notes would-be entries; returns where the vectors of h (B, D, h, w) are to be counted."""
        if self._pending is None:
            self._pending = Statistics.like(self.codebook)
        if self.revive_below > 0:
            # one vector per image
            maps = h.flatten(2)
            if torch.compiler.is_compiling():  # the graph would be made anew for each number
                position = _position(self.num_updates, maps.shape[2])
                candidates = maps.index_select(2, position.view(1)).squeeze(2)
            else:
                candidates = maps.select(2, _position(self._updates(), maps.shape[2])).clone()
            # one tensor, not a list: torch.compile would compile anew for each length
            if self._candidates is None:
                self._candidates = candidates
            elif len(self._candidates) >= MOST_CANDIDATES:
                raise RuntimeError(
                    f"training passes over {MOST_CANDIDATES:,} images without after_step, which moves the codebook: "
                    "call it after each optimizer step, or eval() where the codebook is not to learn"
                )
            else:
                before = self._numbered(self._candidates)
                number = (before[-1:, -1:] + 1).expand(len(candidates), 1)
                self._candidates = torch.cat([before, torch.cat([candidates, number], dim=1)])
        return self._pending

    @torch.no_grad()
    def after_step(self) -> None:
        if self._pending is None and not is_distributed():
            return
        pending, self._pending = self._pending or Statistics.like(self.codebook), None
        candidates, self._candidates = self._candidates, None
        counts, sums = _sum_over_processes(pending.counts, pending.sums)
        share = counts.sum() / len(counts)
        # Under fp16 a step whose features overflow is left out by the optimizer, and so it must be here. What is not
        # finite is not a number once it is multiplied by 0, and is exceeded by none
        if not share > sums.sum() * 0:
            return
        total = self._update_averages(counts, sums, share)
        # A step of more vectors than those before makes no entry dead that has its share of these
        self._revive(torch.minimum(share, total / len(counts)), candidates)

    def _updates(self) -> int:
        """How often the codebook was moved."""
        if self._known_updates is None:
            self._known_updates = self.num_updates.item()
        return self._known_updates

    def _update_averages(self, counts: Tensor, sums: Tensor, share: Tensor) -> Tensor:
        """The update of appendix A.1, with N_i and m_i starting as if every entry had always had its uniform share.

        Starting from zero instead, an entry unused at the first step becomes m_i / ~0, far from everything. Returns the
        sum of all N_i.
        """
        kept = self.decay * share if self._updates() == 0 else self.decay
        self.cluster_size.mul_(kept).add_(counts, alpha=1 - self.decay)
        self.cluster_sum.mul_(kept).add_(sums, alpha=1 - self.decay)
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + self.epsilon) / (total + len(counts) * self.epsilon) * total
        torch.div(self.cluster_sum, smoothed[:, None], out=self.codebook)
        self._known_updates = self._updates() + 1
        self.num_updates += 1
        return total

    def _revive(self, share: Tensor, candidates: Tensor | None) -> None:
        """Replaces dead entries. Every process comes to the same result: the counts were summed over all of them."""
        dead = (self.cluster_size < self.revive_below * share).nonzero().flatten()
        if len(dead) == 0:
            return
        vectors = self._in_order(self._numbered(self.codebook[:0] if candidates is None else candidates))
        num_revived = min(len(dead), len(vectors))
        generator = torch.Generator().manual_seed(self._updates())
        chosen, taken = (torch.randperm(len(x), generator=generator, device="cpu") for x in (dead, vectors))
        dead = dead[chosen[:num_revived].to(dead.device)]
        vectors = vectors[taken[:num_revived].to(dead.device)]
        vectors, share = vectors.to(self.codebook.dtype), share.to(self.codebook.dtype)
        self.codebook[dead] = vectors
        self.cluster_size[dead] = share
        self.cluster_sum[dead] = vectors * share

    def _numbered(self, candidates: Tensor) -> Tensor:
        """(n, D + 1), of the first pass where they have no number yet."""
        return F.pad(candidates, (0, 1)) if candidates.shape[1] == self.codebook.shape[1] else candidates

    def _in_order(self, candidates: Tensor) -> Tensor:
        """The vectors of all processes (n, D) by depth, micro-batch and process: in the order of one big batch."""
        rows = _rows_of_processes(candidates)
        number = rows[:, -1].long()
        micro_batch, depth = number // self.passes_per_batch, number % self.passes_per_batch
        return rows[torch.argsort(depth * len(rows) + micro_batch, stable=True), :-1]


def _position(number: int | Tensor, num_positions: int) -> int | Tensor:
    """That of the step with this number: multiples of the golden ratio visit all positions evenly, step after step."""
    return (number * 2654435769 % 2**32) * num_positions // 2**32


def _forget_updates(module: EMAVQ, incompatible_keys) -> None:
    module._known_updates = None


def _sum_over_processes(counts: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    if not is_distributed():
        return counts, sums
    flat = torch.cat([counts[:, None], sums], dim=1)  # one message
    dist.all_reduce(flat)
    return flat[:, 0], flat[:, 1:]


def _rows_of_processes(rows: Tensor) -> Tensor:
    """The rows (n, D) of all processes in the order of their ranks; n may differ between them (a short last batch)."""
    if not is_distributed():
        return rows
    sizes = [torch.tensor(0, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor(len(rows), device=rows.device))
    sizes = [size.item() for size in sizes]
    padded = F.pad(rows, (0, 0, 0, max(sizes) - len(rows)))
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded)
    return torch.cat([part[:size] for part, size in zip(gathered, sizes)])

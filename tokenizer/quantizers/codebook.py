"""What VQ and EMAVQ share: a table of code vectors, the search in it, and its initialisation from data."""

from typing import Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from prior.base import Codes
from tokenizer.quantizers.base import Quantized, Quantizer, check_finite, straight_through
from tokenizer.quantizers.nearest import nearest

Init = Literal["kmeans", "data", "normal"]


class CodebookQuantizer(Quantizer):
    """A quantizer with a codebook (K, D) searched by euclidean distance. A subclass sets `codebook`.

    Until the first training pass has initialised it from data, the codebook is a draw from N(0, 1).

    Raises:
        ValueError: a size below 1, a negative weight, or an unknown init.
    """

    codebook: Tensor

    def __init__(self, codebook_size: int, code_dim: int, commitment_weight: float, init: Init):
        super().__init__()
        if codebook_size < 1 or code_dim < 1:
            raise ValueError(f"codebook_size and code_dim must be at least 1, got {codebook_size} and {code_dim}")
        if not commitment_weight >= 0:
            raise ValueError(f"commitment_weight must be at least 0, got {commitment_weight}")
        if init not in get_args(Init):
            raise ValueError(f"init must be one of {', '.join(get_args(Init))}, got '{init}'")
        self.in_channels = self.out_channels = code_dim
        self.vocab_sizes = (codebook_size,)
        self.commitment_weight = commitment_weight
        self.init = init
        self.register_buffer("initialized", torch.tensor(init == "normal"))
        # A copy of `initialized` that costs no device synchronisation; False means "look at the buffer".
        self._known_initialized = False
        self.register_load_state_dict_post_hook(_forget_initialized)

    def embed(self, codes: Codes) -> Tensor:
        (codes,) = codes
        return rearrange(F.embedding(codes, self.codebook), "b h w d -> b d h w")

    def _search(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """The positions of h as float32 vectors (B*h*w, D) and their codes (B*h*w,). Call with autocast off."""
        vectors = rearrange(h.float(), "b d h w -> (b h w) d")
        if self.training:
            self._initialize_once(vectors)
        else:
            check_finite(vectors)
        return vectors, nearest(vectors, self.codebook)

    def _quantized(self, h: Tensor, vectors: Tensor, entries: Tensor, codes: Tensor, losses: dict) -> Quantized:
        batch, _, height, width = h.shape
        z = rearrange(straight_through(vectors, entries), "(b h w) d -> b d h w", b=batch, h=height, w=width)
        return Quantized(z.to(h.dtype), (codes.view(batch, height, width),), losses)

    def _initialize_once(self, vectors: Tensor) -> None:
        if self._known_initialized:
            return
        if not self.initialized:
            self._initialize(initial_codebook(vectors, len(self.codebook), self.init))
            self.initialized.fill_(True)
        self._known_initialized = True

    @torch.no_grad()
    def _initialize(self, codebook: Tensor) -> None:
        if is_distributed():
            dist.broadcast(codebook, src=0)  # processes may have seen different images
        self.codebook.copy_(codebook)


def _forget_initialized(module: CodebookQuantizer, incompatible_keys) -> None:
    module._known_initialized = False


def is_distributed() -> bool:
    """Whether there are other processes to agree with."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@torch.no_grad()
def initial_codebook(vectors: Tensor, codebook_size: int, init: Init) -> Tensor:
    """K entries (K, D) from vectors (N, D): a random choice of them, moved to cluster centres if init is "kmeans".

    The choice is a function of the vectors alone. With fewer vectors than entries, the rest are copies plus noise.

    Raises:
        ValueError: a vector is not finite.
    """
    check_finite(vectors)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(vectors), generator=generator)[: 64 * codebook_size]  # enough vectors per centre
    vectors = vectors[order.to(vectors.device)]
    repeats = torch.arange(codebook_size, device=vectors.device) % len(vectors)
    codebook = vectors[repeats]
    noise = torch.randn(codebook.shape, generator=generator).to(codebook)
    noise[: len(vectors)] = 0
    codebook += 0.01 * vectors.std(dim=0, correction=0) * noise
    if init == "kmeans":
        for _ in range(10):
            codebook = _lloyd(vectors, codebook)
    return codebook


def _lloyd(vectors: Tensor, codebook: Tensor) -> Tensor:
    """One k-means iteration; a centre without vectors stays where it is."""
    counts, sums = torch.zeros(len(codebook), device=codebook.device), torch.zeros_like(codebook)
    add_statistics(counts, sums, vectors, nearest(vectors, codebook))
    return torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], codebook)


def add_statistics(counts: Tensor, sums: Tensor, vectors: Tensor, codes: Tensor) -> None:
    """Adds to counts (K,) and sums (K, D), in place, what the vectors (N, D) contribute to their codes (N,)."""
    counts.index_add_(0, codes, torch.ones_like(codes, dtype=counts.dtype))
    sums.index_add_(0, codes, vectors)

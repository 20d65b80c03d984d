"""Exact nearest-neighbour search in a codebook, in tiles: the N x K distances never exist all at once.

Exact is the arithmetic of float32: |w|^2 / 2 - x.w is compared as computed, so that entries whose distances differ by
less than its rounding error count as equal. That error is relative to |x| |w|, not to the distance: vectors far from
the origin, and all on one side of it, are told apart the worse the further they are.
"""

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from prior.sampling import has_kernels
from tokenizer.quantizers.nearest_bfloat16 import Screening, screening_pays

# Vectors x entries of a tile of distances. On the CPU 1 MB of each thread's stays in the cache between the product and
# the argmin, and both sides are long enough for the product to run at full rate.
# Elsewhere launches dominate, all entries come at once, and 64 MB is still nothing.
CPU_TILE, CPU_COLUMNS = 2**18, 1024
DEVICE_TILE = 2**24
# Where the search is one kernel instead, and whether it can be had; asked here, since torch.compile's graph cannot
FUSED_DEVICE, HAS_KERNELS = "cuda", has_kernels()


def nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index of the euclidean nearest codebook entry of each vector, up to float32's rounding.

    Of entries with one and the same computed distance it is the lowest index. Equal entries may have distances that
    differ in the last bit, since products of matrices sum in an order that depends on the place in them.

    Args:
        vectors: (N, D), searched in float32 whatever the dtype and autocast.
        codebook: (K, D).
    Returns:
        (N,) int64. Not-a-number gives a meaningless index: see `check_finite`.
    """
    return Search(codebook)(vectors)


class Search:
    """`nearest` for several lots of vectors, which share what depends on the codebook (K, D) alone."""

    def __init__(self, codebook: Tensor):
        codebook = codebook.detach().float()
        # |x - w|^2 / 2 = |x|^2 / 2 + (|w|^2 / 2 - x.w), and the first term is the same for every entry w.
        self.codebook = codebook.contiguous(), codebook.square().sum(dim=1) / 2
        self.fused = _fused_search() if codebook.device.type == FUSED_DEVICE else None
        if self.fused is not None:
            return
        self.on_cpu = codebook.device.type == "cpu"
        self.columns = min(CPU_COLUMNS, len(codebook)) if self.on_cpu else len(codebook)
        self.rows = max(1, (CPU_TILE * torch.get_num_threads() if self.on_cpu else DEVICE_TILE) // self.columns)
        if self.on_cpu:
            self.vectors = codebook.new_empty(0, codebook.shape[1] + 1)
        self.tile = codebook.new_empty(0)

    def __call__(self, vectors: Tensor) -> Tensor:
        """(N,) int64 from (N, D)."""
        # not as decorators: torch.compile cannot look through those
        with torch.no_grad(), torch.autocast(vectors.device.type, enabled=False):
            if self.fused is not None:
                return self.fused(vectors.float().contiguous(), *self.codebook)
            codes = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
            if screening_pays(vectors, self.codebook[0]):
                # with others, since the sums of few rows may be taken, and rounded, in another order than those of all
                others = torch.arange(min(32, len(vectors)), device=codes.device)
                undecided = torch.cat([self.screening(vectors.float(), codes), others])
                found = torch.empty_like(undecided)
                self._search_tiles(vectors[undecided].float(), found)
                codes[undecided] = found
            else:
                self._search_tiles(vectors.float(), codes)
            return codes

    def _search_tiles(self, vectors: Tensor, codes: Tensor) -> None:
        """Writes the codes of vectors, in float32, as many at a time as a tile has rows."""
        rows = min(self.rows, len(vectors))
        if self.tile.numel() < rows * self.columns:
            self.tile = self.tile.new_empty(rows * self.columns)
            if self.on_cpu:
                self.vectors = self.vectors.new_ones(rows, self.vectors.shape[1])
        search = self._search_on_cpu if self.on_cpu else self._search
        for part, found in zip(vectors.split(self.rows), codes.split(self.rows)):
            search(part, found)

    @cached_property
    def screening(self) -> Screening:
        """What finds most codes on some CPUs."""
        return Screening(self.codebook[0])

    @cached_property
    def blocks(self) -> tuple[Tensor, ...]:
        """What vectors are multiplied by on the CPU: (-w, |w|^2 / 2) of each entry w, in blocks of `columns` of them.

        The second term joins the product as one more channel, in which vectors are 1: to add it takes a pass more.
        """
        codebook, half_squares = self.codebook
        entries = codebook.new_empty(len(codebook), codebook.shape[1] + 1)
        torch.neg(codebook, out=entries[:, :-1])
        entries[:, -1] = half_squares
        return entries.split(self.columns)

    def _search(self, vectors: Tensor, codes: Tensor) -> None:
        """Writes the codes of at most `rows` vectors."""
        entries, half_squares = self.codebook
        distances = self._distances(vectors, entries)
        torch.addmm(half_squares, vectors, entries.T, alpha=-1, out=distances)
        codes.copy_(distances.min(dim=1).indices)

    def _search_on_cpu(self, vectors: Tensor, codes: Tensor) -> None:
        """The same, going over the codebook block by block."""
        self.vectors[: len(vectors), :-1] = vectors
        vectors = self.vectors[: len(vectors)]
        minima, places = [], []
        for entries in self.blocks:
            distances = torch.mm(vectors, entries.T, out=self._distances(vectors, entries))
            # torch's argmin reads 4 GB/s on the CPU, NumPy's 50 from the cache
            places.append(torch.from_numpy(distances.numpy().argmin(axis=1, keepdims=True)))
            if len(self.blocks) > 1:
                minima.append(distances.gather(1, places[-1]))
        if len(self.blocks) == 1:
            codes.copy_(places[0][:, 0])
            return
        block = torch.cat(minima, dim=1).argmin(dim=1, keepdim=True)  # of equal ones the first
        codes.copy_((torch.cat(places, dim=1).gather(1, block) + block * self.columns)[:, 0])

    def _distances(self, vectors: Tensor, entries: Tensor) -> Tensor:
        """Where those from `vectors` to `entries` are to be written."""
        return self.tile[: len(vectors) * len(entries)].view(len(vectors), len(entries))


def _fused_search() -> Callable | None:
    if not HAS_KERNELS:
        return None
    import tokenizer.quantizers.nearest_triton  # noqa: F401  here, since it imports Triton

    return torch.ops.tessera.nearest

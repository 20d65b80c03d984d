"""What VQ and EMAVQ share: a table of code vectors, the search in it, and its initialisation from data."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from prior.base import Codes
from tokenizer.distributed import is_distributed
from tokenizer.quantizers.base import Quantizer, check_finite
from tokenizer.quantizers.nearest import Search, nearest

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
        # Settled before the first training step where it can be: torch.compile would break its graph there to look.
        self._known_initialized = init == "normal"
        self.register_load_state_dict_post_hook(_look_whether_initialized)

    def embed(self, codes: Codes) -> Tensor:
        (codes,) = codes
        return rearrange(F.embedding(codes, self.codebook), "b h w d -> b d h w")

    def encode(self, h: Tensor, sample: bool = False) -> Codes:
        with torch.autocast(h.device.type, enabled=False):
            self.check_features(h)
            h = h.float()
            self._start_from(h)
            search = Search(self.codebook)
            return (torch.cat([search(vectors) for vectors in _rows(h)]).view(_map_shape(h)),)

    def _assign(self, h: Tensor, statistics: "Statistics | None" = None) -> "Assignment":
        """The entries nearest to the positions of h, float32 (B, D, h, w), to which gradients are passed on.

        Adds what the vectors contribute to their codes to `statistics`. Call with autocast off.
        """
        self._start_from(h)
        # Piece by piece, so that the passes over vectors and entries find them in the cache
        shape, squares = (*_map_shape(h), h.shape[1]), []
        entries = h.new_empty(shape).flatten(0, 2)
        needs_gradient = torch.is_grad_enabled() and (h.requires_grad or self.codebook.requires_grad)
        differences = torch.empty_like(entries) if needs_gradient else None
        with torch.no_grad():
            codebook = self.codebook.float()  # half, perhaps, when evaluating
            start, search, found = 0, Search(codebook), []
            for vectors in _rows(h):
                part = slice(start, start := start + len(vectors))
                found.append(search(vectors))
                entry = torch.index_select(codebook, 0, found[-1], out=entries[part])
                difference = torch.sub(vectors, entry, out=differences[part] if needs_gradient else None).flatten()
                squares.append(torch.dot(difference, difference))
                if statistics is not None:
                    statistics.add(vectors, found[-1])
        codes = (torch.cat(found) if len(found) > 1 else found[0]).view(_map_shape(h))
        z, distance = entries.view(shape).movedim(-1, 1), sum(squares[1:], squares[0]) / h.numel()
        if needs_gradient:
            differences = differences.view(shape).movedim(-1, 1)
            z, *losses = _Assign.apply(h, self.codebook, z, differences, codes, distance)
            return Assignment(z, (codes,), *losses)
        return Assignment(z, (codes,), distance, distance)

    def _start_from(self, h: Tensor) -> None:
        """At the first training pass, takes the codebook from the vectors of h, float32 (B, D, h, w)."""
        if self.training and not self._known_initialized:
            if not self.initialized:
                vectors = torch.cat(list(_rows(h.detach())))
                self._initialize(initial_codebook(vectors, len(self.codebook), self.init))
                self.initialized.fill_(True)
            self._known_initialized = True

    @torch.no_grad()
    def _initialize(self, codebook: Tensor) -> None:
        if is_distributed():
            dist.broadcast(codebook, src=0)  # processes may have seen different images
        self.codebook.copy_(codebook)


class Assignment(NamedTuple):
    """Which entries were nearest.

    z: (B, D, h, w) entries, whose gradient goes to the features; codes: one (B, h, w); commitment_loss and
    codebook_loss: both the mean of |z_e - e|^2 over positions and channels, the first with a gradient for the features
    z_e alone, the second for the entries e alone.
    """

    z: Tensor
    codes: Codes
    commitment_loss: Tensor
    codebook_loss: Tensor


class _Assign(torch.autograd.Function):
    """The gradients of an `Assignment`, each one pass over what the search left.

    z is exactly the entries: the usual `z_e + (e - z_e).detach()` is off by a rounding error.
    """

    @staticmethod
    def forward(ctx, h, codebook, z, differences, codes, distance):
        ctx.save_for_backward(differences, codes)
        ctx.codebook_size = len(codebook)
        ctx.set_materialize_grads(False)
        return z, distance, distance.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_z, grad_commitment_loss, grad_codebook_loss):
        differences, codes = ctx.saved_tensors
        scale, grad_h, grad_codebook = 2 / differences.numel(), grad_z, None
        if grad_commitment_loss is not None and grad_z is not None:
            grad_h = torch.addcmul(grad_z, differences, scale * grad_commitment_loss)
        elif grad_commitment_loss is not None:
            grad_h = differences * (scale * grad_commitment_loss)
        if grad_codebook_loss is not None and ctx.needs_input_grad[1]:
            rows = differences.movedim(1, -1).flatten(0, 2)
            sums = rows.new_zeros(ctx.codebook_size, rows.shape[1]).index_add_(0, codes.flatten(), rows)
            grad_codebook = sums.mul_(-scale * grad_codebook_loss)
        return grad_h, grad_codebook, None, None, None, None


# Numbers in the vectors of a piece: few pieces for their overhead, small ones for the cache
PIECE = 2**20


def _rows(h: Tensor) -> Iterator[Tensor]:
    """The positions of h (B, D, h, w) as vectors (n, D), a few images at a time; all at once off the CPU."""
    images = max(1, PIECE // h.shape[1:].numel()) if h.device.type == "cpu" else len(h)
    for part in h.detach().split(images):
        # of one image reshape makes a view, over whose strides each pass would go
        yield part.movedim(1, -1).reshape(-1, h.shape[1]).contiguous()


def _map_shape(h: Tensor) -> tuple[int, int, int]:
    return h.shape[0], *h.shape[2:]


def _look_whether_initialized(module: CodebookQuantizer, incompatible_keys) -> None:
    module._known_initialized = not module.initialized.is_meta and bool(module.initialized)


@torch.no_grad()
def initial_codebook(vectors: Tensor, codebook_size: int, init: Init) -> Tensor:
    """K entries (K, D) from vectors (N, D): a random choice of them, moved to cluster centres if init is "kmeans".

    The choice is a function of the vectors alone. With fewer vectors than entries, the rest are copies plus noise.

    Raises:
        ValueError: a vector is not finite.
    """
    check_finite(vectors)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(vectors), generator=generator, device="cpu")
    order = order[: 64 * codebook_size]  # enough vectors per centre
    vectors = vectors[order.to(vectors.device)]
    repeats = torch.arange(codebook_size, device=vectors.device) % len(vectors)
    codebook = vectors[repeats]
    noise = torch.randn(codebook.shape, generator=generator, device="cpu").to(codebook)
    noise[: len(vectors)] = 0
    codebook += 0.01 * vectors.std(dim=0, correction=0) * noise
    if init == "kmeans":
        for _ in range(10):
            codebook = _lloyd(vectors, codebook)
    return codebook


def _lloyd(vectors: Tensor, codebook: Tensor) -> Tensor:
    """One k-means iteration; a centre without vectors stays where it is."""
    statistics = Statistics.like(codebook)
    statistics.add(vectors, nearest(vectors, codebook))
    counts = statistics.counts[:, None]
    return torch.where(counts > 0, statistics.sums / counts.clamp(min=1), codebook)


@dataclass
class Statistics:
    """What vectors tell of the entries they take, in float32: how many take each, counts (K,), their sums (K, D)."""

    counts: Tensor
    sums: Tensor

    @classmethod
    def like(cls, codebook: Tensor) -> "Statistics":
        sums = torch.zeros_like(codebook, dtype=torch.float32)
        return cls(sums[:, 0].clone(), sums)

    def add(self, vectors: Tensor, codes: Tensor) -> None:
        """Counts in the vectors (N, D), which take the codes (N,)."""
        self.counts.index_add_(0, codes, torch.ones_like(codes, dtype=self.counts.dtype))
        self.sums.index_add_(0, codes, vectors)

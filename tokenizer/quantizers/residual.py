"""Several codes per position, each for what the ones before it left."""

import torch
from torch import Tensor, nn

from prior.base import Codes
from tokenizer.quantizers.base import Quantized, Quantizer, straight_through
from tokenizer.quantizers.codebook import Init
from tokenizer.quantizers.ema_vq import EMAVQ


class Residual(Quantizer):
    """Residual quantization (Lee et al. 2022, arXiv:2203.01941, section 3.1: RQ-VAE).

    Code d is the nearest entry to the residual r_d = r_{d-1} - e(k_d), starting from r_0 = h; the code vector is the
    sum of the entries. The levels of codes are the depths, coarse to fine, all of the same shape. The commitment loss
    holds h to every partial sum, not only to the last. Codebooks follow running averages (`EMAVQ`).

    Args:
        depth: number of codes D of each position.
        codebook_size: number of entries K of a codebook.
        code_dim: width of an entry, and of the feature map.
        shared_codebook: one codebook for all depths, as in the paper, whose statistics are those of all depths and
            whose start is that of the first. By default each depth has its own, which starts from its own residuals.
        commitment_weight: beta, the weight of the commitment loss summed over depths; 0.25 is the paper's.
        decay: of the running averages, see `EMAVQ`.
        init: where codebooks start, see `EMAVQ`.
        revive_below: when an entry is replaced, see `EMAVQ`.
    Raises:
        ValueError: an argument out of range; features of another shape, or not finite when evaluating.
        RuntimeError: see `EMAVQ`.
    """

    def __init__(
        self,
        depth: int = 4,
        codebook_size: int = 512,
        code_dim: int = 64,
        shared_codebook: bool = False,
        commitment_weight: float = 0.25,
        decay: float = 0.99,
        init: Init = "kmeans",
        revive_below: float = 0.03,
    ):
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        self.in_channels = self.out_channels = code_dim
        self.vocab_sizes = (codebook_size,) * depth
        self.depth = depth
        self.codebooks = nn.ModuleList(
            EMAVQ(
                codebook_size,
                code_dim,
                commitment_weight=commitment_weight,
                decay=decay,
                init=init,
                revive_below=revive_below,
            )
            for _ in range(1 if shared_codebook else depth)
        )
        if shared_codebook:
            self.codebooks[0].passes_per_batch = depth

    @property
    def stages(self) -> list[EMAVQ]:
        """The quantizer of each depth; all the same one if the codebook is shared."""
        return [self.codebooks[i % len(self.codebooks)] for i in range(self.depth)]

    def forward(self, h: Tensor, step: int | None = None) -> Quantized:
        with torch.autocast(h.device.type, enabled=False):  # residuals and sums in float32
            vectors = residual = h.float()
            entries, codes, commitments = torch.zeros_like(vectors), [], []
            for stage in self.stages:
                quantized = stage(residual, step)
                entry = quantized.z.detach()
                residual, entries = residual - entry, entries + entry
                codes += quantized.codes
                # |r_d|^2 is the distance of h to the partial sum, with the gradient of h alone
                commitments.append(quantized.losses["commitment"])
            losses = {"commitment": torch.stack(commitments).sum()}
            return Quantized(straight_through(vectors, entries).to(h.dtype), tuple(codes), losses)

    def embed(self, codes: Codes) -> Tensor:
        # in the order and precision of `forward`, for equality to the last bit
        return sum(stage.embed((level,)).float() for stage, level in zip(self.stages, codes, strict=True))

    def after_step(self) -> None:
        for codebook in self.codebooks:
            codebook.after_step()

"""Vector quantization with a codebook trained by gradient."""

import torch
from torch import Tensor, nn

from tokenizer.quantizers.base import Quantized
from tokenizer.quantizers.codebook import CodebookQuantizer, Init


class VQ(CodebookQuantizer):
    """Vector quantization (van den Oord et al. 2017, arXiv:1711.00937, Eq. 3).

    Each position takes the nearest codebook entry. The codebook loss |sg[z_e] - e|^2 moves entries to the encoder's
    outputs, the commitment loss beta |z_e - sg[e]|^2 keeps the encoder near its entries. As in the authors' code, both
    are means over positions and channels, where the paper's equation sums over channels.

    Args:
        codebook_size: number of entries K.
        code_dim: width D of an entry, and of the feature map.
        commitment_weight: beta; 0.25 is the paper's.
        init: where the codebook starts: "kmeans" centres of the first batch, vectors of it ("data"), or N(0, 1).
    Raises:
        ValueError: an argument out of range; features of another shape, or not finite when evaluating.
    """

    def __init__(
        self,
        codebook_size: int = 512,
        code_dim: int = 64,
        commitment_weight: float = 0.25,
        init: Init = "kmeans",
    ):
        super().__init__(codebook_size, code_dim, commitment_weight, init)
        self.codebook = nn.Parameter(torch.randn(codebook_size, code_dim))

    def forward(self, h: Tensor, step: int | None = None) -> Quantized:
        with torch.autocast(h.device.type, enabled=False):  # distances and losses in float32
            self.check_features(h)
            z, codes, commitment_loss, codebook_loss = self._assign(h.float())
            losses = {"codebook": codebook_loss, "commitment": self.commitment_weight * commitment_loss}
            return Quantized(z.to(h.dtype), codes, losses)

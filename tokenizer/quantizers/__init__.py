"""Quantizers by name. A new one is one file, and one line here."""

from tokenizer.quantizers.base import Quantized, Quantizer
from tokenizer.quantizers.ema_vq import EMAVQ
from tokenizer.quantizers.fsq import FSQ
from tokenizer.quantizers.gumbel import Gumbel
from tokenizer.quantizers.lfq import LFQ
from tokenizer.quantizers.residual import Residual
from tokenizer.quantizers.vq import VQ

QUANTIZERS: dict[str, type[Quantizer]] = {
    "ema_vq": EMAVQ,
    "fsq": FSQ,
    "gumbel": Gumbel,
    "lfq": LFQ,
    "residual": Residual,
    "vq": VQ,
}

__all__ = ["EMAVQ", "FSQ", "LFQ", "QUANTIZERS", "VQ", "Gumbel", "Quantized", "Quantizer", "Residual"]

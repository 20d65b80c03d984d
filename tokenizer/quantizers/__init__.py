"""Quantizers by name. A new one is one file, and one line here."""

from tokenizer.quantizers.base import Quantized, Quantizer
from tokenizer.quantizers.ema_vq import EMAVQ
from tokenizer.quantizers.vq import VQ

QUANTIZERS: dict[str, type[Quantizer]] = {
    "ema_vq": EMAVQ,
    "vq": VQ,
}

__all__ = ["EMAVQ", "QUANTIZERS", "VQ", "Quantized", "Quantizer"]

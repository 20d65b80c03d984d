"""A Llama-style transformer over all levels of codes as one sequence, with a key/value cache."""

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prior.autoregressive import AutoregressiveConfig, AutoregressivePrior, structure
from prior.base import PADDING, Codes, CodeSpec, check_fraction, check_positive
from prior.gpt_cuda_decoder import GraphDecoder
from prior.gpt_decoder import Decoder

NORM_EPS = 1e-6
# What takes over from `Transformer.forward` after the prefix, where it serves the device, dtype and mode at hand. These
# read weights in place of calling layers, which hence must be as they were built
DECODERS = (Decoder, GraphDecoder)


@dataclass(frozen=True, kw_only=True)
class GPTConfig(AutoregressiveConfig):
    """Configuration of `GPT`.

    Args:
        num_layers: transformer blocks.
        num_heads: attention heads.
        hidden_dim: width of the residual stream.
        ffn_dim: width of the feed-forward layers; by default 8/3 of hidden_dim, rounded up to a multiple of 64.
        dropout: probability of dropping embedded tokens' and residual branches' values, in training.
        positions: "rotary" by place in the sequence (as Llama), "rotary_2d" by row and column, or "learned" vectors.
        rope_theta: base of the rotary wavelengths.
    Raises:
        ValueError: a size or probability out of range, an unknown kind of positions, or heads that do not fit.
    """

    num_layers: int = 4
    num_heads: int = 4
    hidden_dim: int = 128
    ffn_dim: int | None = None
    dropout: float = 0.1
    positions: Literal["rotary", "rotary_2d", "learned"] = "learned"
    rope_theta: float = 10_000.0

    def __post_init__(self):
        super().__post_init__()
        if self.ffn_dim is None:
            object.__setattr__(self, "ffn_dim", 64 * math.ceil(self.hidden_dim * 8 / 3 / 64))
        check_positive(self, "num_layers", "num_heads", "hidden_dim", "ffn_dim", "rope_theta")
        check_fraction(self, "dropout")
        divisors = {"rotary": 2, "rotary_2d": 4, "learned": 1}  # of a head: rotations take pairs of channels
        if self.positions not in divisors:
            raise ValueError(f"unknown positions {self.positions!r}; choose from {', '.join(divisors)}")
        multiple = self.num_heads * divisors[self.positions]
        if self.hidden_dim % multiple != 0:
            raise ValueError(
                f"hidden_dim must be a multiple of {multiple} for num_heads = {self.num_heads} and "
                f"positions = {self.positions!r}, got {self.hidden_dim}"
            )
        if self.positions == "rotary_2d" and any(len(shape) > 2 for shape in self.spec.shapes):
            raise ValueError(f"rotary_2d needs maps (h, w) or vectors (N,), got shapes {self.spec.shapes}")


class GPT(AutoregressivePrior):
    """Llama-style transformer (Touvron et al. 2023, arXiv:2302.13971) over codes, as in LlamaGen (arXiv:2406.06525).

    The sequence is one prefix token, the class or the null class, and then all levels, coarse to fine, each in raster
    order. Every level has its own part of the vocabulary; a code's logits are computed for its level's part only, so an
    impossible token has no probability. Parameters are named as in `transformers`: with positions = "rotary", the
    state dict is that of `LlamaForCausalLM` (see `llama_config`).

    Captions stand before the prefix token, as in DALL-E (Ramesh et al. 2021, arXiv:2102.12092): token ids in a part of
    the vocabulary of their own, padded to max_text_length by a padding token of its own for each place. The empty
    caption, nothing but padding, is what guidance compares with. Unlike there, captions are a condition alone: the
    prior is p(codes | caption), without a loss on the caption's tokens.

    Args:
        config: sizes and code space.
    """

    Config = GPTConfig
    takes_text = True

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        # tokens: the codes of each level, side by side, then the classes and the null class, then the captions' ids and
        # padding tokens
        self.offsets = [sum(self.spec.vocab_sizes[:level]) for level in range(self.spec.num_levels)]
        self.class_offset = sum(self.spec.vocab_sizes)
        self.text_offset = self.class_offset + config.num_classes + 1
        vocab_size = self.text_offset + config.text_vocab_size + config.max_text_length
        self.model = Transformer(config, vocab_size)
        self.lm_head = nn.Linear(config.hidden_dim, vocab_size, bias=False)
        self.built = structure(self.model, self.lm_head)
        self._initialize()

    def logits(self, codes: Codes, classes: Tensor) -> tuple[Tensor, ...]:
        tokens = [code.flatten(1) + offset for code, offset in zip(codes, self.offsets)]
        # the prefix's end predicts the first code; nothing is left for the last one to predict
        sequence = torch.cat([self.prefix(classes), *tokens], dim=1)[:, :-1]
        hidden = self.model(sequence, rotary_table(self.config, classes.device))
        hidden = hidden[:, self.config.max_text_length :].split(self.spec.lengths, dim=1)
        return tuple(self._head(h, level) for level, h in enumerate(hidden))

    def steps(self, classes: Tensor) -> Generator[Tensor, Tensor, None]:
        caches = [Cache(self.config.max_text_length + self.spec.length) for _ in self.model.layers]
        rotation = rotary_table(self.config, classes.device)
        tokens, decoder = self.prefix(classes), None
        kinds = DECODERS if structure(self.model, self.lm_head) == self.built else ()
        # once for all steps: parametrizations compute it anew each time, and decoders know a head by its address
        head = self.lm_head.weight
        for level, length in enumerate(self.spec.lengths):
            level_head, offset = head[self._tokens(level)] if kinds else None, self.offsets[level]
            for _ in range(length):
                if decoder is None and (caches[0].length > 0 or tokens.shape[1] == 1):
                    serving = [kind for kind in kinds if kind.serves(self.model)]
                    if serving and (caches[0].length > 0 or serving[0].takes_the_first):
                        decoder = serving[0](self.model, self._begun(caches, len(tokens)), rotation)
                if decoder is None:
                    logits = self._head(self.model(tokens, rotation, caches)[:, -1], level)
                else:
                    logits = decoder(tokens, level_head)
                codes = yield logits
                tokens = (offset + codes if offset else codes)[:, None]

    def _begun(self, caches: list["Cache"], batch: int) -> list["Cache"]:
        """The caches; where they have seen nothing, of the dtype that keys and values will have."""
        device, num_heads = self.lm_head.weight.device, self.config.num_heads
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else self.lm_head.weight.dtype
        for cache in caches:
            if cache.length == 0:
                shape = (batch, num_heads, 0, self.config.hidden_dim // num_heads)
                cache.keys = cache.values = torch.empty(shape, dtype=dtype, device=device)
        return caches

    def prefix(self, classes: Tensor) -> Tensor:
        """(B, P) tokens that begin the sequence: the class or null class, with the padded caption before it.

        Args:
            classes: (B,) in [0, num_classes], or token ids of captions (B, max_text_length).
        """
        if not self.conditional_on_text:
            return self.class_offset + classes[:, None]
        padding = self.config.text_vocab_size + torch.arange(self.config.max_text_length, device=classes.device)
        text = self.text_offset + torch.where(classes == PADDING, padding, classes)
        return torch.cat([text, torch.full_like(text[:, :1], self.class_offset)], dim=1)

    def llama_config(self) -> dict:
        """Arguments of `transformers.LlamaConfig` for a `LlamaForCausalLM` that loads this model's state dict.

        Token k of level l is sum(vocab_sizes[:l]) + k; after all levels come the classes and the null class, then the
        ids of captions and their padding. `prefix` gives the tokens that begin each sequence.

        Raises:
            ValueError: positions other than "rotary", which Llama does not have.
        """
        config = self.config
        if config.positions != "rotary":
            raise ValueError(f"Llama has rotary positions only, this prior has positions = {config.positions!r}")
        return {
            "vocab_size": self.lm_head.out_features,
            "hidden_size": config.hidden_dim,
            "intermediate_size": config.ffn_dim,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_heads,
            "max_position_embeddings": config.max_text_length + 1 + self.spec.length,
            "rms_norm_eps": NORM_EPS,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }

    def _head(self, hidden: Tensor, level: int) -> Tensor:
        if structure(self.lm_head) != self.built[-1:]:  # it computes more than its weight tells
            return self.lm_head(hidden)[..., self._tokens(level)]
        return F.linear(hidden, self.lm_head.weight[self._tokens(level)])

    def _tokens(self, level: int) -> slice:
        """The level's part of the vocabulary."""
        return slice(self.offsets[level], self.offsets[level] + self.spec.vocab_sizes[level])

    def _initialize(self) -> None:
        """GPT-2's: standard deviation 0.02, smaller where 2 num_layers branches add up in the residual stream."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                is_branch_end = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = 1 / math.sqrt(2 * self.config.num_layers) if is_branch_end else 1.0
                nn.init.normal_(parameter, std=0.02 * scale)


class Transformer(nn.Module):
    """Tokens (B, T) to hidden states (B, T, D); with caches, the tokens follow those that the caches have seen.

    Several tokens at once need new caches.
    """

    def __init__(self, config: GPTConfig, vocab_size: int):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(vocab_size, config.hidden_dim)
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.max_text_length + config.spec.length, config.hidden_dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_dim, eps=NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor, rotation: Tensor | None, caches: list["Cache"] | None = None) -> Tensor:
        start = caches[0].length if caches else 0
        stop = start + tokens.shape[1]
        x = self.embed_tokens(tokens)
        if self.config.positions == "learned":
            x = x + self.embed_positions(torch.arange(start, stop, device=tokens.device))
        else:
            rotation = rotation[:, start:stop]
        x = self.dropout(x)
        for i, layer in enumerate(self.layers):
            x = layer(x, rotation, caches[i] if caches else None)
        return self.norm(x)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_dim, eps=NORM_EPS)
        self.self_attn = Attention(config.hidden_dim, config.num_heads)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_dim, eps=NORM_EPS)
        self.mlp = SwiGLU(config.hidden_dim, config.ffn_dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotation: Tensor | None, cache: "Cache | None") -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rotation, cache))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Attention(nn.Module):
    """Causal self-attention within a whole sequence or prefix, or of the newest token to all those in the cache."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, rotation: Tensor | None, cache: "Cache | None") -> Tensor:
        projections = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        query, key, value = (p.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in projections)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        if cache is not None:
            key, value = cache.append(key, value)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=query.shape[2] > 1)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, dim: int, ffn_dim: int):
        super().__init__()
        self.gate_proj = nn.Linear(dim, ffn_dim, bias=False)
        self.up_proj = nn.Linear(dim, ffn_dim, bias=False)
        self.down_proj = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Cache:
    """Keys and values (B, heads, T, head_dim) of one layer; from the second lot on in memory for the whole sequence."""

    def __init__(self, max_length: int):
        self.max_length = max_length
        self.length = 0

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the keys and values of the next tokens; returns those of all tokens so far."""
        start, self.length = self.length, self.length + key.shape[2]
        if start == 0:
            self.keys, self.values = key, value  # a decoder may take them from here and lay out its own memory
            return key, value
        self.reserve()
        self.keys[:, :, start : self.length] = key
        self.values[:, :, start : self.length] = value
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def reserve(self) -> None:
        """Makes room for the whole sequence after the first tokens."""
        self.keys, self.values = self._with_room(self.keys), self._with_room(self.values)

    def _with_room(self, stored: Tensor) -> Tensor:
        length = stored.shape[2]
        if length == self.max_length:
            return stored
        room = stored.new_empty(*stored.shape[:2], self.max_length, stored.shape[3])
        room[:, :, :length] = stored
        return room


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotates the channel pairs (i, i + head_dim / 2) of x (B, heads, T, head_dim), Llama's layout.

    In float32, the dtype of the table; half precision could not tell large angles apart.
    """
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).type_as(x)


def rotary_table(config: GPTConfig, device: torch.device) -> Tensor | None:
    """Cosine and sine (2, P, head_dim / 2) of every place's angles (Su et al. 2021, arXiv:2104.09864), in float32.

    The P places are those of the captions' tokens, where there are any, and one that predicts each of the N codes.
    None for learned positions. Not a buffer, which would lose its precision in `model.bfloat16()`.
    """
    if config.positions == "learned":
        return None
    num_pairs, text_length = config.hidden_dim // config.num_heads // 2, config.max_text_length
    if config.positions == "rotary":
        places = torch.arange(text_length + config.spec.length, device=device)
        angles = rotary_angles(places, num_pairs, config.rope_theta)
    else:
        # captions lie on the diagonal that ends before the first code: M-RoPE (Wang et al. 2024, arXiv:2409.12191)
        text = torch.arange(-text_length, 0, device=device).expand(2, -1)
        rows, columns = torch.cat([text, coordinates(config.spec, device)], dim=1)
        halves = [rotary_angles(axis, num_pairs // 2, config.rope_theta) for axis in (rows, columns)]
        angles = torch.cat(halves, dim=-1)
    return torch.stack([angles.cos(), angles.sin()])


def rotary_angles(positions: Tensor, num_pairs: int, theta: float) -> Tensor:
    """(N, num_pairs) radians: wavelengths from 2 pi to 2 pi theta, in a geometric series."""
    exponents = torch.arange(num_pairs, device=positions.device, dtype=torch.float32) / num_pairs
    return positions[:, None].float() / theta**exponents


def coordinates(spec: CodeSpec, device: torch.device) -> Tensor:
    """Row and column (2, N) that each place of the sequence *predicts*, in units of the finest map.

    Place i reads code i - 1 and predicts code i. What it reads is known from the token, but where the answer goes is
    not, at the end of a row or of a level: hence the coordinates of code i. The levels share a scale, so that a coarse
    code lies at the middle of the fine ones it stands for. Levels of one shape have equal coordinates; their
    vocabularies tell them apart.
    """
    sizes = [(1, *shape)[-2:] for shape in spec.shapes]
    finest = [max(size[axis] for size in sizes) for axis in (0, 1)]
    levels = []
    for size in sizes:
        axes = [(torch.arange(n, device=device) + 0.5) * full / n - 0.5 for n, full in zip(size, finest)]
        levels.append(torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1))
    return torch.cat(levels, dim=1)

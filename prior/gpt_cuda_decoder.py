"""One token at a time through a GPT's transformer on a GPU, where sampling is bound by starting its many kernels."""

import functools
from contextlib import suppress
from itertools import count
from threading import Lock, local

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prior.sampling import has_kernels


class Layer:
    """One `Block` with its cache: the residual stream and what a norm made of it (B, D), both after the next token.

    The norm belongs to what follows: it is that of the next block, or the model's last. What lies between the products
    is left to those that derive from this.
    """

    def __init__(self, block: nn.Module, next_norm: nn.RMSNorm, cache, rotations: Tensor | None):
        attention, mlp = block.self_attn, block.mlp
        self.keys, self.values = cache.keys, cache.values  # (B, heads, P, head_dim)
        self.rotations = rotations
        self.norm, self.mlp_norm, self.next_norm = block.input_layernorm, block.post_attention_layernorm, next_norm
        self.queries_keys_values = self._joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = self._joined(attention.o_proj)
        self.gate_up, self.down = self._joined(mlp.gate_proj, mlp.up_proj), self._joined(mlp.down_proj)

    @classmethod
    def through(cls, layers: list["Layer"], x: Tensor, place: Tensor, head: Tensor) -> Tensor:
        """Logits (B, K): a head's weight (K, D) times what the last norm makes of the residual stream of all layers."""
        normalised = layers[0].norm(x).to(layers[0].keys.dtype)
        for layer in layers:
            x, normalised = layer(x, normalised, place)
        return F.linear(normalised, head)

    def __call__(self, x: Tensor, normalised: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        mixed = self.attend(F.linear(normalised, self.queries_keys_values), place)
        x, normalised = self.add_norm(x, F.linear(mixed, self.out), self.mlp_norm)
        gated = self.silu_mul(F.linear(normalised, self.gate_up))
        return self.add_norm(x, F.linear(gated, self.down), self.next_norm)

    def _joined(self, *projections: nn.Linear) -> Tensor:
        weights = [projection.weight for projection in projections]
        return (torch.cat(weights) if len(weights) > 1 else weights[0]).to(self.keys.dtype).contiguous()


class TorchLayer(Layer):
    """A `Layer` of torch's operations, about 19 kernels, for where Triton's kernels cannot be had.

    Attention goes over places that are not filled yet, with a weight of 0.
    """

    def __init__(self, block: nn.Module, next_norm: nn.RMSNorm, cache, rotations: Tensor | None):
        super().__init__(block, next_norm, cache, rotations)
        # new memory may hold anything, and a weight of 0 does not undo a NaN
        self.keys[:, :, cache.length :] = 0
        self.values[:, :, cache.length :] = 0
        self.mask = self.keys.new_zeros(cache.max_length)  # added to the scores
        self.mask[cache.length :] = -torch.inf

    def attend(self, projected: Tensor, place: Tensor) -> Tensor:
        batch, num_heads, _, head_dim = self.keys.shape
        queries_keys, value = projected.view(batch, 3, num_heads, head_dim).split([2, 1], dim=1)
        if self.rotations is not None:
            queries_keys = rotated(queries_keys, self.rotations.index_select(0, place)[0])
        query, key, value = (part[:, :, None] for part in (*queries_keys.unbind(1), value[:, 0]))
        self.keys.index_copy_(2, place, key)
        self.values.index_copy_(2, place, value)
        self.mask.index_fill_(0, place, 0)
        mixed = F.scaled_dot_product_attention(query, self.keys, self.values, attn_mask=self.mask[None, None, None])
        return mixed.reshape(batch, -1)

    def add_norm(self, x: Tensor, branch: Tensor, norm: nn.RMSNorm) -> tuple[Tensor, Tensor]:
        x = x + branch
        return x, norm(x).to(branch.dtype)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up


class StaticDecoder:
    """`Transformer.forward` of the newest tokens, with the same result up to rounding, for a batch of fixed size.

    Shapes and addresses are those of the step before: the place is a number on the device. Products are computed in the
    dtype of the caches, which is autocast's where it is on; weights are joined and cast once.

    Args:
        model: a `Transformer` in evaluation mode: see `serves`.
        caches: of the tokens that the model has seen, one `Cache` per layer, which go on to be filled.
        rotation: the rotary table of all places (2, P, head_dim / 2), or None.
    """

    takes_the_first = True  # token of a sequence, where it stands alone

    def __init__(self, model: nn.Module, caches: list, rotation: Tensor | None, layer: type[Layer] = TorchLayer):
        for cache in caches:
            cache.reserve()
        keys = caches[0].keys
        self.device, self.dtype = keys.device, keys.dtype
        self.embed, self.positions = model.embed_tokens, None if rotation is not None else model.embed_positions.weight
        next_norms = [*(block.input_layernorm for block in model.layers[1:]), model.norm]
        rotations = None if rotation is None else _by_place(rotation)
        self.layers = [
            layer(block, next_norm, cache, rotations)
            for block, next_norm, cache in zip(model.layers, next_norms, caches)
        ]
        self.tokens = torch.zeros(len(keys), dtype=torch.int64, device=self.device)
        self.place = torch.full((1,), caches[0].length, device=self.device)
        self.heads: dict[int, Tensor] = {}

    @staticmethod
    def serves(model: nn.Module) -> bool:
        """Whether this is the place for it; elsewhere `Transformer.forward` does the same in any mode."""
        return not model.training and not torch.is_grad_enabled()

    def __call__(self, tokens: Tensor, head: Tensor) -> Tensor:
        """Logits (B, K) after the next tokens (B, 1), for a head's weight (K, D); overwritten by the next call's."""
        self.tokens.copy_(tokens[:, 0])
        if head.data_ptr() not in self.heads:
            self.heads[head.data_ptr()] = head.to(self.dtype).contiguous()
        return self.logits(head.data_ptr())

    def logits(self, head: int) -> Tensor:
        """After `tokens` at `place`, which goes on to the next."""
        with torch.autocast(self.device.type, enabled=False):
            x = self.embed(self.tokens)
            if self.positions is not None:
                x = x + self.positions.index_select(0, self.place)
            logits = type(self.layers[0]).through(self.layers, x, self.place, self.heads[head])
            self.place += 1
            return logits


class GraphDecoder(StaticDecoder):
    """A `StaticDecoder` on a GPU whose step is a CUDA graph: the processor starts one thing in place of a hundred."""

    def __init__(self, model: nn.Module, caches: list, rotation: Tensor | None):
        super().__init__(model, caches, rotation, layer_for(caches[0].keys))
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}  # for each head
        block = model.layers[0]
        sizes = (len(self.layers), *self.layers[0].keys.shape, *block.mlp.up_proj.weight.shape)
        dtypes = (self.dtype, self.embed.weight.dtype, model.norm.weight.dtype)
        way = (type(self.layers[0]), rotation is None, torch.are_deterministic_algorithms_enabled())
        self.like = (self.device, *dtypes, *sizes, *way)

    @staticmethod
    def serves(model: nn.Module) -> bool:
        return StaticDecoder.serves(model) and model.embed_tokens.weight.device.type == "cuda"

    def logits(self, head: int) -> Tensor:
        logits = None if head in self.graphs else self._first(head)
        if logits is None:
            graph, logits = self.graphs[head]
            graph.replay()
        return logits

    def _first(self, head: int) -> Tensor | None:
        """Records the step for a head, which computes nothing. Where none like it was ever made, it is made before, and
        its logits returned, since what libraries set up at their first call cannot be recorded.

        Not by `torch.cuda.graph`, which collects garbage and empties torch's cache of memory each time.
        """
        current, logits = torch.cuda.current_stream(self.device), None
        like = (*self.like, *self.heads[head].shape)
        with _RECORDING:
            stream = _recording_stream(self.device)
            stream.wait_stream(current)
            try:
                with torch.cuda.stream(stream):
                    if like in _MADE.steps:
                        self._record(head)
                    if head not in self.graphs:
                        logits = super().logits(head)
                        _MADE.steps.add(like)
                        self._record(head)
            finally:
                current.wait_stream(stream)
        if logits is not None:
            logits.record_stream(current)  # else a later step on the other stream may overwrite it before it is read
        return logits

    def _record(self, head: int) -> None:
        """On the current stream. Where memory is short, nothing is recorded, and the next step tries again."""
        if next(_RECORDED) % MOST_GRAPHS == 0:
            torch.cuda.empty_cache()  # memory of graphs that are no more is given back at no other time
        graph = torch.cuda.CUDAGraph()
        # "thread_local": threads that fetch batches may go on meanwhile
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            logits = super().logits(head)
        except BaseException as error:
            with suppress(RuntimeError):  # of a recording that failed
                graph.capture_end()
            if not isinstance(error, torch.OutOfMemoryError):
                raise
            torch.cuda.empty_cache()
        else:
            graph.capture_end()
            self.graphs[head] = graph, logits


# One stream for all decoders, since cuBLAS keeps 32 MiB for each that it has ever seen. Whatever another thread did on
# it would be recorded too.
_recording_stream = functools.cache(torch.cuda.Stream)
_RECORDING, _RECORDED = Lock(), count(1)
MOST_GRAPHS = 64  # some MB each


class _Made(local):
    """Of each thread, since cuBLAS has a handle for each: the steps that it has made once."""

    def __init__(self):
        self.steps: set[tuple] = set()


_MADE = _Made()


def layer_for(keys: Tensor) -> type[Layer]:
    """The kind of layer for caches like this one, (B, heads, P, head_dim)."""
    if keys.dtype == torch.float64 or not has_kernels():  # the kernels compute in float32
        return TorchLayer
    from prior.gpt_triton import FEW_ROWS, FewRowsLayer, FusedLayer  # here, since it imports Triton

    return FewRowsLayer if len(keys) <= FEW_ROWS else FusedLayer


def _by_place(rotation: Tensor) -> Tensor:
    """(P, 2, head_dim) from (2, P, head_dim / 2): cosines and signed sines for both halves of the channels."""
    cos, sin = rotation
    return torch.stack([torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)], dim=1)


def rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """`gpt.rotate` in half the kernels, for one place's rotation (2, head_dim); also in float32."""
    cos, sin = rotation
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1).type_as(cos), sin).type_as(x)

"""One token at a time through a GPT's transformer on a GPU, where sampling is bound by starting its many kernels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Attention reads the cache up to a multiple of this many places, since what a graph does is fixed: each multiple has a
# graph of its own. Not tuned on a device.
PLACES = 64


class StaticDecoder:
    """`Transformer.forward` of the newest tokens, with the same result up to rounding, for a batch of fixed size.

    Shapes and addresses are those of the step before: the place is a number on the device, and attention goes over
    places that are not filled yet, with a weight of 0. Products are computed in the dtype of the caches, which is
    autocast's where it is on; weights are joined and cast once.

    Args:
        model: a `Transformer` in evaluation mode: see `serves`.
        caches: of the tokens that the model has seen, one `Cache` per layer, which go on to be filled.
        rotation: the rotary table of all places (2, P, head_dim / 2), or None.
    """

    def __init__(self, model: nn.Module, caches: list, rotation: Tensor | None):
        self.embed, self.norm = model.embed_tokens, model.norm
        self.length = caches[0].length
        self.rotary = rotation is not None
        # (P, 2, head_dim), for `rotated`, or (P, D)
        self.places = _by_place(rotation) if self.rotary else model.embed_positions.weight
        self.layers = [StaticLayer(block, cache) for block, cache in zip(model.layers, caches)]
        keys = caches[0].keys
        self.device, self.dtype = keys.device, keys.dtype
        self.tokens = torch.zeros(len(keys), 1, dtype=torch.int64, device=self.device)
        self.place = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.order = torch.arange(caches[0].max_length, device=self.device)
        self.heads: dict[int, Tensor] = {}

    @staticmethod
    def serves(model: nn.Module) -> bool:
        """Whether this is the place for it; elsewhere `Transformer.forward` does the same in any mode."""
        return not model.training and not torch.is_grad_enabled()

    def __call__(self, tokens: Tensor, head: Tensor) -> Tensor:
        """Logits (B, K) after the next tokens (B, 1), for a head's weight (K, D)."""
        self.tokens.copy_(tokens)
        self.place.fill_(self.length)
        self.length += 1
        if head.data_ptr() not in self.heads:
            self.heads[head.data_ptr()] = head.to(self.dtype)
        with torch.autocast(self.device.type, enabled=False):
            hidden = self.hidden(-(-self.length // PLACES) * PLACES)
            return F.linear(hidden.to(self.dtype), self.heads[head.data_ptr()])

    def hidden(self, num_places: int) -> Tensor:
        """The hidden states (B, D) after `tokens` at `place`, which attend to the first `num_places` places at most."""
        place = self.places.index_select(0, self.place)
        x = self.embed(self.tokens)[:, 0]
        x, rotation = (x, place[0]) if self.rotary else (x + place, None)
        order = self.order[:num_places]
        # added to the scores; made once, where each layer would turn a boolean mask into this
        mask = torch.zeros_like(order, dtype=self.dtype).masked_fill(order > self.place, -torch.inf)
        for layer in self.layers:
            x = layer(x, rotation, self.place, mask)
        return self.norm(x)


class GraphDecoder(StaticDecoder):
    """A `StaticDecoder` on a GPU whose steps are CUDA graphs: the processor starts one thing in place of hundreds."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        # graphs run one after the other, so one's memory does for all; it is shared within a stream
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.device)

    @staticmethod
    def serves(model: nn.Module) -> bool:
        return StaticDecoder.serves(model) and model.embed_tokens.weight.device.type == "cuda"

    def hidden(self, num_places: int) -> Tensor:
        if num_places not in self.graphs:
            self.graphs[num_places] = self._capture(num_places)
        graph, hidden = self.graphs[num_places]
        graph.replay()
        return hidden

    def _capture(self, num_places: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """A graph of a step, and the tensor in which each replay leaves its result."""
        # What libraries set up at their first call cannot be recorded. This one stores what the first replay will.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            super().hidden(num_places)
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        # "thread_local": threads that fetch batches may go on meanwhile
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            hidden = super().hidden(num_places)
        return graph, hidden


class StaticLayer:
    """One `Block` with its cache."""

    def __init__(self, block: nn.Module, cache):
        attention, mlp = block.self_attn, block.mlp
        self.keys, self.values = cache.keys, cache.values  # (B, heads, P, head_dim)
        # new memory may hold anything, and a weight of 0 does not undo a NaN
        self.keys[:, :, cache.length :] = 0
        self.values[:, :, cache.length :] = 0
        self.norm, self.mlp_norm = block.input_layernorm, block.post_attention_layernorm
        self.queries_keys_values = self._joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = self._joined(attention.o_proj)
        self.gate_up, self.down = self._joined(mlp.gate_proj, mlp.up_proj), self._joined(mlp.down_proj)

    def __call__(self, x: Tensor, rotation: Tensor | None, place: Tensor, mask: Tensor) -> Tensor:
        batch, num_heads, _, head_dim = self.keys.shape
        projected = F.linear(self.norm(x).to(self.keys.dtype), self.queries_keys_values)
        queries_keys, value = projected.view(batch, 3, num_heads, head_dim).split([2, 1], dim=1)
        if rotation is not None:
            queries_keys = rotated(queries_keys, rotation)
        query, key, value = (part[:, :, None] for part in (*queries_keys.unbind(1), value[:, 0]))
        self.keys.index_copy_(2, place, key)
        self.values.index_copy_(2, place, value)
        keys, values = (past[:, :, : len(mask)] for past in (self.keys, self.values))
        mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask[None, None, None])
        x = x + F.linear(mixed.reshape(batch, -1), self.out)
        gate, up = F.linear(self.mlp_norm(x).to(self.keys.dtype), self.gate_up).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, self.down)

    def _joined(self, *projections: nn.Linear) -> Tensor:
        return torch.cat([projection.weight for projection in projections]).to(self.keys.dtype)


def _by_place(rotation: Tensor) -> Tensor:
    """(P, 2, head_dim) from (2, P, head_dim / 2): cosines and signed sines for both halves of the channels."""
    cos, sin = rotation
    return torch.stack([torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)], dim=1)


def rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """`gpt.rotate` in half the kernels, for one place's rotation (2, head_dim); also in float32."""
    cos, sin = rotation
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1).type_as(cos), sin).type_as(x)

"""One token at a time through a GPT's transformer on a CPU, where sampling is bound by reading the weights."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Blocks(NamedTuple):
    """How keys and values are split into blocks of places where the rows (batch x heads) are many."""

    rows: int  # from how many on
    longest_whole: int  # places that stay in one block all the same
    places: int
    padding: int  # floats between places: those that lie a multiple of 4 KB apart compete for a cache's lines


# A block has no more places than a processor fetches ahead for.
INTEL_BLOCKS = Blocks(rows=192, longest_whole=64, places=32, padding=0)
OTHER_BLOCKS = Blocks(rows=32, longest_whole=12, places=12, padding=64)

# Keys and values lie place by place, for the newest are written at once then, where rows are many or places are few.
FEW_PLACES = 64

# With so many rows on Intel's processors, and with so few on others, products with transposed weights are so much
# faster that they win back the time that transposing takes.
MANY_ROWS, FEW_ROWS = 32, 2


class Decoder:
    """`Transformer.forward` of the newest tokens, with the same result up to rounding, for a batch of fixed size.

    What differs is the work around the arithmetic. Weights are copied once into the layout in which products with few
    rows are fastest; queries, keys and values come from one product; a rotation is one complex multiplication.

    Args:
        model: a `Transformer` in evaluation mode, in float32, on the CPU: see `serves`.
        caches: of the tokens that the model has seen, one `Cache` per layer; what they hold is taken out of them.
        rotation: the rotary table of all places (2, P, head_dim / 2), or None.
    """

    takes_the_first = False  # token of a sequence

    def __init__(self, model: nn.Module, caches: list, rotation: Tensor | None):
        self.embed = model.embed_tokens
        self.rotary = rotation is not None
        self.places = torch.complex(*rotation) if self.rotary else model.embed_positions.weight
        self.norm = Norm(model.norm)
        self.batch, self.place = len(caches[0].keys), caches[0].length
        self.layers = [Layer(block, cache, self.rotary) for block, cache in zip(model.layers, caches)]
        self.heads: dict[int, Product] = {}

    @staticmethod
    def serves(model: nn.Module) -> bool:
        """Whether this is the place for it; elsewhere `Transformer.forward` does the same with any device and dtype."""
        weight = model.embed_tokens.weight
        plain = weight.device.type == "cpu" and weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        return plain and not model.training and not torch.is_grad_enabled()

    def __call__(self, tokens: Tensor, head: Tensor) -> Tensor:
        """Logits (B, K) after the next tokens (B, 1), for a head's weight (K, D)."""
        x, place = self.embed(tokens)[:, 0], self.places[self.place]
        if not self.rotary:
            x, place = x + place, None
        for layer in self.layers:
            x = layer(x, place)
        self.place += 1
        if head.data_ptr() not in self.heads:
            self.heads[head.data_ptr()] = product([head], self.batch)
        return self.heads[head.data_ptr()].times(self.norm(x))


class Layer:
    """One `Block` with its cache."""

    def __init__(self, block: nn.Module, cache, rotary: bool):
        attention, mlp = block.self_attn, block.mlp
        batch, self.num_heads, _, self.head_dim = cache.keys.shape
        self.dim = self.num_heads * self.head_dim
        # channels that rotate together stand side by side, in queries and keys alike
        order = torch.arange(self.head_dim, device=cache.keys.device)
        order = order.unflatten(0, (2, -1)).T.flatten() if rotary else order
        query, key = (
            projection.weight.unflatten(0, (self.num_heads, -1))[:, order].flatten(0, 1)
            for projection in (attention.q_proj, attention.k_proj)
        )
        query *= 1 / math.sqrt(self.head_dim)
        self.norm, self.mlp_norm = Norm(block.input_layernorm), Norm(block.post_attention_layernorm)
        self.queries_keys_values = product([query, key, attention.v_proj.weight], batch)
        self.out = product([attention.o_proj.weight], batch)
        self.gate, self.up, self.down = (
            product([p.weight], batch) for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        )
        self.past = Past(cache)
        for place in range(cache.length):
            self.past.append(torch.stack([cache.keys[:, :, place, order], cache.values[:, :, place]]))
        del cache.keys, cache.values

    def __call__(self, x: Tensor, rotation: Tensor | None) -> Tensor:
        projected = self.queries_keys_values.times(self.norm(x))
        if rotation is not None:
            pairs = projected.view(len(x), 3 * self.num_heads, -1, 2)[:, : 2 * self.num_heads]
            torch.view_as_complex(pairs).mul_(rotation)
        keys_values = projected[:, self.dim :].view(len(x), 2, self.num_heads, self.head_dim)
        self.past.append(keys_values.transpose(0, 1))
        queries = projected[:, : self.dim].reshape(-1, 1, self.head_dim)
        x = self.out.times_plus(self.past.attend(queries).view(-1, self.dim), x)
        normed = self.mlp_norm(x)
        return self.down.times_plus(self.up.times_multiplied(normed, self.gate.swish_times(normed)), x)


class Past:
    """Keys and values of a layer's tokens, in blocks (2, B, heads, places, head_dim): one copy then stores both."""

    def __init__(self, cache):
        self.max_length, self.length = cache.max_length, 0
        split = INTEL_BLOCKS if on_intel() else OTHER_BLOCKS
        many = cache.keys.shape[0] * cache.keys.shape[1] >= split.rows
        self.by_place = many or self.max_length <= FEW_PLACES
        self.block_places = split.places if many and self.max_length > split.longest_whole else self.max_length
        self.padding = split.padding if many else 0
        self.blocks: list[Tensor] = []

    def append(self, keys_values: Tensor) -> None:
        """Stores what (2, B, heads, head_dim) belongs to the next token."""
        place = self.length % self.block_places
        if place == 0:
            self.blocks.append(self._block(keys_values, min(self.block_places, self.max_length - self.length)))
        self.blocks[-1][:, :, :, place] = keys_values
        self.length += 1

    def _block(self, keys_values: Tensor, places: int) -> Tensor:
        two, batch, heads, head_dim = keys_values.shape
        if not self.by_place:
            return keys_values.new_empty(two, batch, heads, places, head_dim)
        width = batch * heads * head_dim
        block = keys_values.new_empty(two, places, width + self.padding)[:, :, :width]
        return block.unflatten(2, (batch, heads, head_dim)).permute(0, 2, 3, 1, 4)

    def attend(self, queries: Tensor) -> Tensor:
        """The mean of all values so far, weighted for each of the queries (rows, 1, head_dim).

        For one query per row two batched products beat scaled_dot_product_attention.
        """
        blocks = [block.flatten(1, 2) for block in self.blocks]
        blocks[-1] = blocks[-1][:, :, : self.length - self.block_places * (len(blocks) - 1)]
        scores = [torch.bmm(queries, keys.mT) for keys, _ in blocks]
        if len(blocks) == 1:
            return torch.bmm(scores[0].softmax(dim=-1), blocks[0][1])
        weights = torch.cat(scores, dim=-1).softmax(dim=-1).split(self.block_places, dim=-1)
        mean = torch.bmm(weights[0], blocks[0][1])
        for part, (_, values) in zip(weights[1:], blocks[1:]):
            mean.baddbmm_(part, values)
        return mean


class Norm:
    """RMSNorm in four operations, where torch's own takes six on the CPU."""

    def __init__(self, norm: nn.RMSNorm):
        dim = norm.normalized_shape[0]
        self.gain = norm.weight * math.sqrt(dim)
        self.root_eps = self.gain.new_tensor(math.sqrt(norm.eps * dim))

    def __call__(self, x: Tensor) -> Tensor:
        # x / sqrt(mean(x^2) + eps) = x sqrt(D) / sqrt(|x|^2 + D eps)
        return (x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot(self.root_eps)).mul_(self.gain)


class Product:
    """x W^T of x (B, in) and W (out, in): the plain form."""

    def __init__(self, weight: Tensor):
        self.weight = weight.T  # F.linear turns it anew each time

    def times(self, x: Tensor) -> Tensor:
        return torch.mm(x, self.weight)

    def times_plus(self, x: Tensor, other: Tensor) -> Tensor:
        """May write over `other`."""
        return self.times(x).add_(other)

    def times_multiplied(self, x: Tensor, other: Tensor) -> Tensor:
        return self.times(x).mul_(other)

    def swish_times(self, x: Tensor) -> Tensor:
        return F.silu(self.times(x), inplace=True)


class Transposed(Product):
    """The weight is read in the order of the output."""

    def __init__(self, weights: list[Tensor]):
        sizes = [len(weight) for weight in weights]
        # rows that lie a multiple of some KB apart compete for the same places of a processor's cache
        padding = 16 if sum(sizes) % 256 == 0 else 0
        transposed = weights[0].new_empty(weights[0].shape[1], sum(sizes) + padding)[:, : sum(sizes)]
        for part, weight in zip(transposed.split(sizes, dim=1), weights):
            part.copy_(weight.T)
        super().__init__(transposed.T)

    def times_plus(self, x: Tensor, other: Tensor) -> Tensor:
        return other.addmm_(x, self.weight)


class Packed(Product):
    """oneDNN's own layout, and what follows is fused."""

    def __init__(self, weights: list[Tensor], rows: int):
        self.weight = torch.ops.mkldnn._reorder_linear_weight(_joined(weights), rows)

    def times(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")

    def times_plus(self, x: Tensor, other: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, None, "add")

    def times_multiplied(self, x: Tensor, other: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, None, "mul")

    def swish_times(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "swish", [], "")


def product(weights: list[Tensor], rows: int) -> Product:
    """The fastest form of a product of `rows` rows with the weights (out, in), joined along out.

    Where torch's own products are MKL's at its best, on Intel's processors, other forms are hardly worth the copy.
    """
    if on_intel():
        return Transposed(weights) if rows >= MANY_ROWS else Product(_joined(weights))
    if rows <= FEW_ROWS:
        return Transposed(weights)
    # what torch.compile packs weights with; not every build has it
    packs = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return Packed(weights, rows) if packs else Product(_joined(weights))


def on_intel() -> bool:
    """Whether this is one of Intel's processors; False where torch is too old to tell."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return "Intel" in capabilities.get("cpu_name", "")


def _joined(weights: list[Tensor]) -> Tensor:
    return torch.cat(weights) if len(weights) > 1 else weights[0].contiguous()

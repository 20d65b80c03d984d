"""PixelSNAIL over codes: causal convolutions for what is near, attention for what is far (Chen et al. 2017)."""

from collections.abc import Generator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prior.base import check_fraction, check_positive
from prior.levelwise import LevelNetwork, LevelwiseConfig, LevelwisePrior, Pointwise, product


@dataclass(frozen=True, kw_only=True)
class PixelSNAILConfig(LevelwiseConfig):
    """Configuration of `PixelSNAIL`.

    Args:
        num_blocks: blocks of residual layers and one attention layer per level (paper: 12).
        num_residual_blocks: gated residual layers of a block (paper: 4).
        kernel_size: width and height, odd, of the square from which a convolution takes the upper left quarter, its
            centre included (paper: 3, so 2 x 2; VQ-VAE-2: 5).
        num_heads: attention heads (paper: 1; VQ-VAE-2: 8).
        attention_dim: channels of queries, keys and values, over all heads.
        dropout: probability of dropping a channel's value inside each residual layer, in training (paper: 0.5).
    Raises:
        ValueError: a size or probability out of range, or heads that do not fit.
    """

    num_blocks: int = 4
    num_residual_blocks: int = 2
    kernel_size: int = 3
    num_heads: int = 4
    attention_dim: int = 64
    dropout: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "num_blocks", "num_residual_blocks", "num_heads", "attention_dim")
        check_fraction(self, "dropout")
        if self.kernel_size < 3 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and at least 3, got {self.kernel_size}")
        if self.attention_dim % self.num_heads != 0:
            raise ValueError(
                f"attention_dim must be a multiple of num_heads = {self.num_heads}, got {self.attention_dim}"
            )


class PixelSNAILNetwork(LevelNetwork):
    """Logits of each code of a map from all codes before it in raster order.

    The features of a position begin with the codes above it and those to its left; after that a convolution may see
    its own position. Convolutions alone have a blind spot, far to the right in the rows above; attention has none.
    """

    def __init__(self, config: LevelwiseConfig, vocab_size: int):
        super().__init__()
        dim, reach = config.hidden_dim, config.kernel_size // 2
        self.reach = reach
        self.embedding = nn.Embedding(vocab_size, dim)
        self.above = nn.Conv2d(dim, dim, (reach, 2 * reach + 1))
        self.left = nn.Conv2d(dim, dim, (reach + 1, reach))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_blocks))
        self.head = nn.Sequential(nn.ELU(), nn.Conv2d(dim, dim, 1), nn.ELU(), nn.Conv2d(dim, vocab_size, 1))

    def forward(self, codes: Tensor, condition: Tensor) -> Tensor:
        reach = self.reach
        embedded = self.embedding(codes).movedim(-1, 1)
        x = self.above(F.pad(embedded, (reach, reach, reach, -1))) + self.left(F.pad(embedded, (reach, -1, reach, 0)))
        place = background(condition)
        for block in self.blocks:
            x = block(x, block.contexts(condition), place, embedded)
        return self.head(x)

    def steps(self, condition: Tensor) -> Generator[Tensor, Tensor, Tensor]:
        """Computes what hangs on the rows above once per row, and everything else once per code."""
        batch, dim, height, width = condition.shape
        reach = self.reach
        codes = torch.zeros(batch, height, width, dtype=torch.int64, device=condition.device)
        embedded = condition.new_zeros(batch, dim, reach + height, reach + width + reach)  # of the codes, padded
        place = background(condition)
        memory = {conv: Window(conv, width) for conv in self.modules() if isinstance(conv, CausalConv)}
        memory |= {block.attention: KeysValues(block.attention, height * width) for block in self.blocks}
        left, head = product(self.left), Pointwise(*self.head)
        for row in range(height):
            above = self.above(embedded[:, :, row : row + reach])
            contexts = [block.contexts(condition[:, :, row, None]) for block in self.blocks]
            for column in range(width):
                window = embedded[:, :, row : row + reach + 1, column : column + reach].flatten(1)
                x = left(window)[..., None, None] + above[..., column, None]
                here = place[:, :, row, column, None, None]
                for block, maps in zip(self.blocks, contexts):
                    x = block.step(x, [context[..., column, None] for context in maps], here, memory)
                codes[:, row, column] = yield head(x.flatten(1))
                code = self.embedding(codes[:, row, column])[..., None, None]
                embedded[:, :, reach + row, reach + column] = code[..., 0, 0]
                for block in self.blocks:
                    block.attention.append(code, here, memory[block.attention])
        return codes


class Block(nn.Module):
    """Gated residual layers, then attention to all earlier codes, which one more residual layer takes in."""

    def __init__(self, config: LevelwiseConfig):
        super().__init__()
        dim, reach, dropout = config.hidden_dim, config.kernel_size // 2, config.dropout
        self.residuals = nn.ModuleList(
            GatedResidual(dim, dim, reach, dropout) for _ in range(config.num_residual_blocks)
        )
        self.attention = CausalAttention(dim, config.attention_dim, config.num_heads)
        self.merge = GatedResidual(dim + config.attention_dim, dim, 0, dropout)

    def contexts(self, condition: Tensor) -> list[Tensor]:
        """What each residual layer makes of the condition map."""
        return [layer.condition(condition) for layer in (*self.residuals, self.merge)]

    def forward(self, x: Tensor, contexts: list[Tensor], place: Tensor, embedded: Tensor) -> Tensor:
        for layer, context in zip(self.residuals, contexts):
            x = layer(x, x, context)
        return self.merge(x, torch.cat([x, self.attention(x, place, embedded)], dim=1), contexts[-1])

    def step(self, x: Tensor, contexts: list[Tensor], place: Tensor, memory: "Memory") -> Tensor:
        for layer, context in zip(self.residuals, contexts):
            x = layer(x, x, context, memory)
        mixed = self.attention.step(x, place, memory[self.attention])
        return self.merge(x, torch.cat([x, mixed], dim=1), contexts[-1], memory)


class GatedResidual(nn.Module):
    """x + a sigmoid(b), with a and b from two causal convolutions over the inputs, and the condition.

    The authors' code doubles the inputs of every convolution (concatenated ELU) and normalises its weights; plain ELU
    and weights do here, at half the cost.
    """

    def __init__(self, in_dim: int, dim: int, reach: int, dropout: float):
        super().__init__()
        self.first = CausalConv(in_dim, dim, reach)
        self.second = CausalConv(dim, 2 * dim, reach)
        self.condition = nn.Conv2d(dim, 2 * dim, 1, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, inputs: Tensor, context: Tensor, memory: "Memory | None" = None) -> Tensor:
        hidden = self.first(F.elu(inputs), memory)
        hidden = self.second(self.dropout(F.elu(hidden)), memory) + context
        values, gates = hidden.chunk(2, dim=1)
        return x + values * gates.sigmoid()


class CausalConv(nn.Conv2d):
    """A convolution over a position and those up to `reach` rows above it and `reach` columns to its left."""

    def __init__(self, in_dim: int, out_dim: int, reach: int):
        super().__init__(in_dim, out_dim, reach + 1)
        self.reach = reach

    def forward(self, x: Tensor, memory: "Memory | None" = None) -> Tensor:
        """Of a whole map, or with a memory of its next position (B, in_dim, 1, 1)."""
        if memory is None:
            return super().forward(F.pad(x, (self.reach, 0, self.reach, 0)))
        past = memory[self]
        return past.product(past.append(x).flatten(1))[..., None, None]


class CausalAttention(nn.Module):
    """Attention of each position to those strictly before it in raster order.

    A key and its value know a position's features, what could be foreseen there, and its code, what came; the query
    knows the features alone. Keys and values are moved on by one position, so that position i meets those of 0 to
    i - 1, and before them a zero key and value, which stand for nothing: the first position has nothing else.
    The authors' residual layers before the projections are layers of one hidden activation here.
    """

    def __init__(self, dim: int, attention_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Sequential(nn.Conv2d(dim + 2, dim, 1), nn.ELU(), nn.Conv2d(dim, attention_dim, 1))
        self.key_value = nn.Sequential(
            nn.Conv2d(2 * dim + 2, dim, 1), nn.ELU(), nn.Conv2d(dim, 2 * attention_dim, 1, bias=False)
        )

    def forward(self, x: Tensor, place: Tensor, embedded: Tensor) -> Tensor:
        query = self._heads(self.query(torch.cat([x, place], dim=1)))
        key_value = self.key_value(torch.cat([x, embedded, place], dim=1))
        key, value = (F.pad(self._heads(part), (0, 0, 1, -1)) for part in key_value.chunk(2, dim=1))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return mixed.mT.flatten(1, 2).unflatten(-1, x.shape[2:])

    def step(self, x: Tensor, place: Tensor, past: "KeysValues") -> Tensor:
        """For the next position, whose code comes later by `append`."""
        past.features = x
        query = self._heads(past.query(torch.cat([x, place], dim=1).flatten(1))[..., None])
        return F.scaled_dot_product_attention(query, *past.so_far(query)).mT.flatten(1, 2)[..., None]

    def append(self, code: Tensor, place: Tensor, past: "KeysValues") -> None:
        key_value = past.key_value(torch.cat([past.features, code, place], dim=1).flatten(1))
        past.append(*(self._heads(part[..., None]) for part in key_value.chunk(2, dim=1)))

    def _heads(self, x: Tensor) -> Tensor:
        """(B, heads, h * w, head_dim)"""
        return x.flatten(2).unflatten(1, (self.num_heads, -1)).mT


class Window:
    """The rows of a convolution's input that its next output needs: zeros where the map has not begun."""

    def __init__(self, conv: CausalConv, width: int):
        self.product, self.reach, self.width = product(conv), conv.reach, width
        self.column = 0
        self.rows: Tensor | None = None

    def append(self, x: Tensor) -> Tensor:
        """Stores the next position (B, C, 1, 1); returns the window (B, C, reach + 1, reach + 1) that ends there."""
        reach = self.reach
        if reach == 0:
            return x
        if self.rows is None:
            # here, because neither channels nor dtype are known before: autocast may have changed it
            self.rows = x.new_zeros(*x.shape[:2], reach + 1, reach + self.width)
        elif self.column == self.width:
            self.rows[:, :, :-1] = self.rows[:, :, 1:].clone()
            self.column = 0
        # of the newest row no column is read before it is written
        self.rows[:, :, -1, reach + self.column] = x[..., 0, 0]
        self.column += 1
        return self.rows[..., self.column - 1 : self.column + reach]


class KeysValues:
    """Keys and values (B, heads, N, head_dim) of an attention layer, allocated once for the whole map."""

    def __init__(self, attention: CausalAttention, max_length: int):
        self.query, self.key_value = Pointwise(*attention.query), Pointwise(*attention.key_value)
        self.max_length = max_length
        self.length = 1  # the zero key and value
        self.keys: Tensor | None = None
        self.features: Tensor  # of the position whose code is to come

    def so_far(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all positions that the query (B, heads, 1, head_dim) may see."""
        if self.keys is None:
            batch, num_heads, _, head_dim = query.shape
            self.keys, self.values = query.new_zeros(2, batch, num_heads, self.max_length + 1, head_dim)
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def append(self, key: Tensor, value: Tensor) -> None:
        self.keys[:, :, self.length] = key[:, :, 0]
        self.values[:, :, self.length] = value[:, :, 0]
        self.length += 1


Memory = dict[nn.Module, Window | KeysValues]


def background(condition: Tensor) -> Tensor:
    """(B, 2, h, w): row and column of each position, from -0.5 to 0.5, as the authors give them to attention."""
    batch, _, height, width = condition.shape
    axes = [(torch.arange(n, device=condition.device, dtype=condition.dtype) + 0.5) / n - 0.5 for n in (height, width)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).expand(batch, -1, -1, -1)


class PixelSNAIL(LevelwisePrior):
    """PixelSNAIL, one per level (Chen et al. 2017, arXiv:1712.09763); the top prior of VQ-VAE-2 (arXiv:1906.00446).

    Blocks of gated residual layers of causal convolutions, each block ending in attention over all codes before. The
    class and the coarser levels reach every residual layer as a condition map, as in VQ-VAE-2.

    Args:
        config: sizes and code space.
    """

    Config = PixelSNAILConfig
    Network = PixelSNAILNetwork

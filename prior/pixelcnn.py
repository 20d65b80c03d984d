"""Gated PixelCNN over codes (van den Oord et al. 2016, arXiv:1606.05328)."""

from collections.abc import Generator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prior.base import check_fraction, check_positive
from prior.levelwise import LevelNetwork, LevelwiseConfig, LevelwisePrior
from prior.pixelcnn_steps import Steps


@dataclass(frozen=True, kw_only=True)
class PixelCNNConfig(LevelwiseConfig):
    """Configuration of `PixelCNN`.

    Args:
        num_layers: gated layers per level.
        kernel_size: width and height of the receptive field that a layer adds, odd (paper: 5, first layer 7).
        dropout: probability of dropping a channel's value after each gate, in training.
    Raises:
        ValueError: a size or probability out of range.
    """

    num_layers: int = 12
    kernel_size: int = 5
    dropout: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "num_layers")
        check_fraction(self, "dropout")
        if self.kernel_size < 3 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and at least 3, got {self.kernel_size}")


def gate(x: Tensor) -> Tensor:
    """Eq. 2: tanh of one half of the channels times the sigmoid of the other."""
    filters, gates = x.chunk(2, dim=1)
    return filters.tanh() * gates.sigmoid()


class GatedLayer(nn.Module):
    """One layer of Fig. 2: a vertical stack that sees the rows above, a horizontal one that also sees the left.

    Both convolutions expect padded inputs. `prior.pixelcnn_steps` computes the same window by window.
    """

    def __init__(self, dim: int, kernel_size: int, dropout: float):
        super().__init__()
        reach = kernel_size // 2
        self.vertical = nn.Conv2d(dim, 2 * dim, (reach + 1, kernel_size))
        self.horizontal = nn.Conv2d(dim, 2 * dim, (1, reach + 1))
        self.vertical_to_horizontal = nn.Conv2d(2 * dim, 2 * dim, 1)
        self.condition = nn.Conv2d(dim, 4 * dim, 1, bias=False)  # V h of Eq. 4, for each of the stacks
        self.residual = nn.Conv2d(dim, dim, 1)
        self.dropout = nn.Dropout(dropout)

    def vertical_step(self, padded: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """The next vertical features (B, D, h, w), and what the horizontal stack hears of them (B, 2 D, h, w)."""
        vertical_condition, horizontal_condition = condition.chunk(2, dim=1)
        x = self.vertical(padded) + vertical_condition
        return gate(x), self.vertical_to_horizontal(x) + horizontal_condition

    def horizontal_step(self, x: Tensor, padded: Tensor, context: Tensor) -> Tensor:
        """The next horizontal features, from the present ones, the same padded, and `vertical_step`'s context."""
        return x + self.residual(self.dropout(gate(self.horizontal(padded) + context)))


class GatedPixelCNN(LevelNetwork):
    """Logits of each code of a map from the codes above and to the left, without a blind spot.

    The two stacks begin with the embedded codes moved down by one row and right by one column. After that every layer
    may see its own position, so no convolution needs a mask; the paper masks the first layer instead (mask A) and so
    cannot have a residual connection there.
    """

    def __init__(self, config: LevelwiseConfig, vocab_size: int):
        super().__init__()
        dim = config.hidden_dim
        self.reach = config.kernel_size // 2
        self.embedding = nn.Embedding(vocab_size, dim)
        self.layers = nn.ModuleList(
            GatedLayer(dim, config.kernel_size, config.dropout) for _ in range(config.num_layers)
        )
        self.head = nn.Sequential(nn.ReLU(), nn.Conv2d(dim, dim, 1), nn.ReLU(), nn.Conv2d(dim, vocab_size, 1))

    def forward(self, codes: Tensor, condition: Tensor) -> Tensor:
        embedded = self.embedding(codes).movedim(-1, 1)
        vertical = F.pad(embedded, (0, 0, 1, -1))  # down by one row
        horizontal = F.pad(embedded, (1, -1))  # right by one column
        for layer in self.layers:
            padded = F.pad(vertical, (self.reach, self.reach, self.reach, 0))
            vertical, context = layer.vertical_step(padded, layer.condition(condition))
            horizontal = layer.horizontal_step(horizontal, F.pad(horizontal, (self.reach, 0)), context)
        return self.head(horizontal)

    def steps(self, condition: Tensor) -> Generator[Tensor, Tensor, Tensor]:
        codes = Steps(self, condition).codes
        # to keep gradients off costs every step, also where they are off
        return torch.no_grad()(codes)() if torch.is_grad_enabled() else codes()


class PixelCNN(LevelwisePrior):
    """Gated PixelCNN, one per level (van den Oord et al. 2016, arXiv:1606.05328).

    Codes are embedded: they are names, not brightnesses. The class and the coarser levels reach every gate as a
    condition map (Eq. 4, in the location-dependent form).

    Args:
        config: sizes and code space.
    """

    Config = PixelCNNConfig
    Network = GatedPixelCNN

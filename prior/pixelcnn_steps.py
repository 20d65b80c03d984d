"""`GatedPixelCNN` one code at a time: the windows that its convolutions need of the past, as rows of a matrix."""

from collections.abc import Generator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prior.levelwise import pointwise


class Steps:
    """The state of sampling maps from a `GatedPixelCNN`.

    The vertical stacks are computed once per row, the horizontal ones once per code. All that a layer needs of the past
    is its convolutions' windows: the padded rows above, the columns to the left. Features stand channels last, so that
    a window is a row of a matrix; as a product it takes a fifth of the time that a convolution of one position takes.

    Args:
        network: a `GatedPixelCNN`.
        condition: (B, D, h, w), for each of the maps.
    """

    def __init__(self, network: nn.Module, condition: Tensor):
        self.network, self.reach = network, network.reach
        self.batch, self.dim, self.height, self.width = condition.shape
        self.layers = [Layer(layer) for layer in network.layers]
        self.condition = condition.permute(2, 3, 0, 1)  # (h, w, B, D)
        self.condition_weight = torch.cat([layer.condition.weight.flatten(1) for layer in network.layers])
        self.nothing = torch.zeros(1, self.batch, self.dim).to(condition)  # above the first row, left of each row
        for layer in self.layers:
            layer.allocate(self.nothing.expand(self.width, -1, -1))

    @torch.no_grad()
    def codes(self) -> Generator[Tensor, Tensor, Tensor]:
        """Yields the logits (B, K) of each code in raster order, is sent the codes (B,), returns the map (B, h, w)."""
        codes = []
        embedded = self.nothing.expand(self.width, -1, -1)  # of the row above (w, B, D)
        for row in range(self.height):
            contexts = self._vertical(embedded, self.condition[row])
            features, found = self.nothing[0], []
            for column in range(self.width):
                for layer, context in zip(self.layers, contexts):
                    features = layer.horizontal(features, context[column], column)
                code = yield pointwise(self.network.head, features)
                codes.append(code)
                found.append(features := self.network.embedding(code))
            embedded = torch.stack(found)
        return torch.stack(codes, dim=1).unflatten(1, (self.height, self.width))

    def _vertical(self, features: Tensor, condition: Tensor) -> list[Tensor]:
        """What each layer's horizontal stack hears of the rows above: (w, B, 2 D), with everything that is added there.

        Args:
            features: (w, B, D) of the row above.
            condition: (w, B, D) of this row.
        """
        conditions = F.linear(condition, self.condition_weight).chunk(len(self.layers), dim=-1)
        contexts = []
        for layer, added in zip(self.layers, conditions):
            features, context = layer.vertical(features, added)
            contexts.append(context)
        return contexts


class Layer:
    """A `GatedLayer` with the windows of its convolutions."""

    def __init__(self, layer: nn.Module):
        self.dropout = layer.dropout if layer.training else None
        self.reach, self.num_columns = layer.vertical.kernel_size[0] - 1, layer.vertical.kernel_size[1]
        self.vertical_weight = layer.vertical.weight.permute(0, 2, 3, 1).flatten(1)  # (2 D, rows * columns * D)
        self.vertical_bias = layer.vertical.bias
        self.across_weight = layer.vertical_to_horizontal.weight.flatten(1)
        # all that is added to the horizontal convolution's products
        self.across_bias = layer.vertical_to_horizontal.bias + layer.horizontal.bias
        self.horizontal_weight = layer.horizontal.weight.permute(3, 2, 1, 0).flatten(0, 2)  # (columns * D, 2 D)
        self.residual_weight = layer.residual.weight.flatten(1).T.contiguous()
        self.residual_bias = layer.residual.bias

    def allocate(self, row: Tensor) -> None:
        """Room for the windows of maps whose rows of features are like `row`, (w, B, D)."""
        width, batch, dim = row.shape
        self.above = row.new_zeros(self.reach + 1, width + 2 * self.reach, batch, dim)  # the newest row last
        left = row.new_zeros(batch, self.reach + width, dim)
        # of a row of the map: where each column's features are put, and the window that ends there
        self.places = [left[:, self.reach + column] for column in range(width)]
        self.windows = [left[:, column : column + self.reach + 1].flatten(1) for column in range(width)]

    def vertical(self, features: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """The next vertical features (w, B, D) of a row, and what the horizontal stack hears of it (w, B, 2 D)."""
        self.above[:-1] = self.above[1:].clone()
        self.above[-1, self.reach : self.reach + len(features)] = features
        windows = self.above.unfold(1, self.num_columns, 1)  # (rows, w, B, D, columns)
        windows = windows.permute(1, 2, 0, 4, 3).flatten(2)
        for_vertical, for_horizontal = condition.chunk(2, dim=-1)
        x = F.linear(windows, self.vertical_weight, self.vertical_bias) + for_vertical
        context = F.linear(x, self.across_weight, self.across_bias) + for_horizontal
        return gate_(x), context

    def horizontal(self, x: Tensor, context: Tensor, column: int) -> Tensor:
        """The next horizontal features (B, D) from the present ones; columns come in order."""
        self.places[column].copy_(x)
        hidden = gate_(torch.addmm(context, self.windows[column], self.horizontal_weight))
        if self.dropout is not None:
            hidden = self.dropout(hidden)
        return torch.addmm(x, hidden, self.residual_weight).add_(self.residual_bias)


def gate_(x: Tensor) -> Tensor:
    """Eq. 2 of the paper, with the channels last; changes x."""
    x[..., : x.shape[-1] // 2].tanh_()
    return F.glu(x, dim=-1)

"""`GatedPixelCNN` one code at a time: the windows that its convolutions need of the past, as rows of a matrix."""

from collections.abc import Generator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from prior.levelwise import pointwise


class Steps:
    """The state of sampling maps from a `GatedPixelCNN`.

    The vertical stacks are computed once per row, the horizontal ones once per code. All that a layer needs of the past
    is its convolutions' windows: the padded rows above, the columns to the left. Features stand channels last, so that
    a window is a row of a matrix; as a product it takes a fifth of the time that a convolution of one position takes.
    For few maps most of what is left is the cost of calling operations: results go where the next one wants them, and
    no view is made twice.

    Args:
        network: a `GatedPixelCNN`.
        condition: (B, D, h, w), for each of the maps.
    """

    def __init__(self, network: nn.Module, condition: Tensor):
        self.network, (batch, _, self.height, self.width) = network, condition.shape
        self.condition = condition.permute(2, 3, 0, 1).flatten(1, 2)  # (h, w B, D)
        self.layers = [Layer(layer, self.width, batch) for layer in network.layers]
        self.features = self.condition.new_zeros(batch, condition.shape[1])  # of the last layer
        self.outputs = [*(layer.places for layer in self.layers[1:]), [self.features] * self.width]

    @torch.no_grad()
    def codes(self) -> Generator[Tensor, Tensor, Tensor]:
        """Yields the logits (B, K) of each code in raster order, is sent the codes (B,), returns the map (B, h, w)."""
        codes, (_, *embedded) = [], self.layers[0].places
        for row in range(self.height):
            features = self.layers[0].row
            for layer in self.layers:
                features = layer.vertical(features, self.condition[row])
            for column in range(self.width):
                for layer, outputs in zip(self.layers, self.outputs):
                    layer.horizontal(column, out=outputs[column])
                code = yield pointwise(self.network.head, self.features)
                codes.append(code)
                embedded[column].copy_(self.network.embedding(code))
        return torch.stack(codes, dim=1).unflatten(1, (self.height, self.width))


class Layer:
    """A `GatedLayer` with the windows of its convolutions, for B maps of width w.

    Attributes:
        places: for each column (B, D), where the horizontal features are put; one more for the first layer, whose
            features are the embedded codes moved right by one.
        row: the places but for the first, (w, B, D): in the first layer the embedded codes of the last row.
    """

    def __init__(self, layer: nn.Module, width: int, batch: int):
        self.dropout = layer.dropout if layer.training else None
        dim, num_rows, num_columns = layer.vertical.weight.shape[1:]
        reach = num_rows - 1
        # as inputs x outputs; of a window the columns come first, then the rows
        self.vertical_weight = layer.vertical.weight.permute(3, 2, 1, 0).flatten(0, 2)
        self.across_weight = layer.vertical_to_horizontal.weight.flatten(1).T.contiguous()
        self.condition_weight = layer.condition.weight.flatten(1).T.contiguous()
        self.horizontal_weight = layer.horizontal.weight.permute(3, 2, 1, 0).flatten(0, 2)
        self.residual_weight = layer.residual.weight.flatten(1).T.contiguous()
        self.residual_bias = layer.residual.bias
        # all that is added to the products of the vertical convolution, and to those of the horizontal one
        across_bias = layer.vertical_to_horizontal.bias + layer.horizontal.bias
        self.biases = torch.cat([layer.vertical.bias, across_bias])

        new = layer.vertical.weight.new_zeros
        # features of the rows above, the newest last
        above = new(batch, reach + width + reach, num_rows, dim)
        self.older, self.newer = above[:, :, :-1], above[:, :, 1:]
        self.newest = above[:, reach : reach + width, -1].transpose(0, 1)  # (w, B, D)
        self.windows_above = above.as_strided(
            (width, batch, num_columns * num_rows * dim), (above.stride(1), above.stride(0), 1)
        )
        # what a row's convolutions are added to, the vertical one and what the horizontal one hears of it
        self.sums = new(width * batch, 4 * dim)
        self.vertical_sum, self.context = self.sums.chunk(2, dim=-1)
        self.gated_row = Gated(self.vertical_sum, *self.vertical_sum.chunk(2, dim=-1))
        channels = self.context.unflatten(0, (width, batch))
        self.gated = list(map(Gated, channels, *(half for half in channels.chunk(2, dim=-1))))
        # features of this row, and for each column the window that ends there
        left = new(batch, reach + width + 1, dim)
        self.places, self.row = left[:, reach:].unbind(1), left[:, reach + 1 :].transpose(0, 1)
        self.windows = left.as_strided((width, batch, (reach + 1) * dim), (dim, left.stride(0), 1)).unbind(0)

    def vertical(self, features: Tensor, condition: Tensor) -> Tensor:
        """The next vertical features (w B, D) of a row, given those of the rows so far; prepares the horizontal ones.

        Args:
            features: (w, B, D) or (w B, D) of the newest row above.
            condition: (w B, D) of this row.
        """
        self.older.copy_(self.newer.clone())
        self.newest.copy_(features.view(self.newest.shape))
        torch.addmm(self.biases, condition, self.condition_weight, out=self.sums)
        self.vertical_sum.addmm_(self.windows_above.flatten(0, 1), self.vertical_weight)
        self.context.addmm_(self.vertical_sum, self.across_weight)
        return self.gated_row.gate()

    def horizontal(self, column: int, out: Tensor) -> None:
        """The next horizontal features (B, D) from the present ones in their place; columns come in order."""
        gated = self.gated[column]
        gated.channels.addmm_(self.windows[column], self.horizontal_weight)
        hidden = gated.gate()
        if self.dropout is not None:
            hidden = self.dropout(hidden)
        torch.addmm(self.places[column], hidden, self.residual_weight, out=out).add_(self.residual_bias)


class Gated(NamedTuple):
    """Channels (B, 2 D) and both halves of them."""

    channels: Tensor
    filters: Tensor
    gates: Tensor

    def gate(self) -> Tensor:
        """Eq. 2 of the paper (B, D), in the place of the first half."""
        return self.filters.tanh_().mul_(self.gates.sigmoid_())

"""`GatedPixelCNN` one code at a time: the windows that its convolutions need of the past, as rows of a matrix."""

from collections.abc import Callable, Generator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prior.levelwise import Pointwise


class Steps:
    """The state of sampling maps from a `GatedPixelCNN`.

    The vertical stacks are computed once per row, the horizontal ones once per code. All that a layer needs of the past
    is its convolutions' windows: the padded rows above, the columns to the left. Features stand channels last, so that
    a window is a row of a matrix; as a product it takes a fifth of the time that a convolution of one position takes.
    For few maps most of what is left is the cost of calling operations: what layers can do together they do at once,
    results go where the next one wants them, and no view is made twice.

    Args:
        network: a `GatedPixelCNN`.
        condition: (B, D, h, w), for each of the maps.
    """

    def __init__(self, network: nn.Module, condition: Tensor):
        batch, dim, self.height, self.width = condition.shape
        self.condition = condition.permute(2, 3, 0, 1).flatten(1, 2)  # (h, w B, D)
        layers, reach, new = network.layers, network.reach, condition.new_zeros
        # features of the rows above, the newest last
        above = new(len(layers), batch, reach + self.width + reach, reach + 1, dim)
        self.older, self.newer = above[..., :-1, :], above[..., 1:, :]
        # what a row's convolutions are added to, the vertical one and what the horizontal one hears of it
        self.sums = new(len(layers), self.width * batch, 4 * dim)
        self.layers, self.shift = [], new(dim)
        for layer, *views in zip(layers, above, self.sums):
            self.layers.append(Layer(layer, self.shift, *views))
            self.shift = self.shift + layer.residual.bias
        self.biases = torch.stack([layer.biases for layer in self.layers])[:, None]
        self.condition_weights = torch.stack([layer.condition.weight.flatten(1).T for layer in layers])
        self.features = new(batch, dim)  # of the last layer
        outputs = [*(layer.places for layer in self.layers[1:]), [self.features] * self.width]
        self.embedding = network.embedding.weight
        self.head = Pointwise(*network.head)
        self.columns = list(zip(*(layer.columns(places) for layer, places in zip(self.layers, outputs))))

    def codes(self) -> Generator[Tensor, Tensor, Tensor]:
        """Yields the logits (B, K) of each code in raster order, is sent the codes (B,), returns the map (B, h, w).

        Without gradients, which what is written in place cannot have.
        """
        codes, (first, *later) = [], self.layers
        for condition in self.condition:
            self.older.copy_(self.newer.clone())
            conditions = condition.expand(len(self.layers), -1, -1)
            torch.baddbmm(self.biases, conditions, self.condition_weights, out=self.sums)
            first.newest.copy_(first.embedded)
            for layer, above in zip(self.layers, later):
                layer.vertical(out=above.newest)
            self.layers[-1].vertical()
            for column, place in zip(self.columns, first.embedded):
                for take in column:
                    take()
                code = yield self.head(self.features + self.shift)
                codes.append(code)
                torch.index_select(self.embedding, 0, code, out=place)
        return torch.stack(codes, dim=1).unflatten(1, (self.height, self.width))


class Layer:
    """A `GatedLayer` with the windows of its convolutions, for B maps of width w.

    The horizontal features are kept without the biases of the residual connections, which would be one more operation
    for each code: `shift` is their sum so far, and what sees the features has it in its own bias.

    Args:
        layer: the `GatedLayer`.
        shift: (D,).
        above: (B, reach + w + reach, reach + 1, D), where the features of the rows above are kept.
        sums: (w B, 4 D), what the convolutions are added to.
    Attributes:
        biases: (4 D,), all that is added to the products of the vertical convolution and to those of the horizontal.
        newest: (w, B, D), where the features of the row above are put.
        places: for each column (B, D), where the horizontal features are put; one more for the first layer, whose
            features are the embedded codes moved right by one.
        embedded: the places but for the first, (w, B, D): in the first layer the embedded codes of the last row.
    """

    def __init__(self, layer: nn.Module, shift: Tensor, above: Tensor, sums: Tensor):
        self.dropout = layer.dropout.p if layer.training else 0.0
        batch, padded_width, num_rows, dim = above.shape
        reach = num_rows - 1
        width = padded_width - 2 * reach
        # as inputs x outputs; of a window the columns come first, then the rows
        self.vertical_weight = layer.vertical.weight.permute(3, 2, 1, 0).flatten(0, 2)
        self.across_weight = layer.vertical_to_horizontal.weight.flatten(1).T.contiguous()
        self.horizontal_weight = layer.horizontal.weight.permute(3, 2, 1, 0).flatten(0, 2)
        self.residual_weight = layer.residual.weight.flatten(1).T.contiguous()
        window_shift = shift.repeat(reach + 1) @ self.horizontal_weight
        across_bias = layer.vertical_to_horizontal.bias + layer.horizontal.bias + window_shift
        self.biases = torch.cat([layer.vertical.bias, across_bias])

        self.newest = above[:, reach : reach + width, -1].transpose(0, 1)
        self.windows_above = above.as_strided(
            (width, batch, (2 * reach + 1) * num_rows * dim), (above.stride(1), above.stride(0), 1),
            above.storage_offset(),
        )  # fmt: skip
        self.vertical_sum, self.context = sums.chunk(2, dim=-1)
        self.filters, self.gates = (half.unflatten(0, (width, batch)) for half in self.vertical_sum.chunk(2, dim=-1))
        # features of this row, and for each column the window that ends there; left of the map features are 0
        left = (-shift).repeat(batch, reach + width + 1, 1)
        self.places, self.embedded = left[:, reach:].unbind(1), left[:, reach + 1 :].transpose(0, 1)
        self.windows = left.as_strided((width, batch, (reach + 1) * dim), (dim, left.stride(0), 1)).unbind(0)

    def columns(self, outputs: Sequence[Tensor]) -> list[Callable[[], None]]:
        """For each column what computes the next horizontal features and puts them into the column's output (B, D)."""
        contexts = self.context.unflatten(0, (len(self.windows), -1))
        halves = (half.unbind(0) for half in contexts.chunk(2, dim=-1))
        views = zip(self.windows, contexts, *halves, self.places, outputs)
        return [partial(self.horizontal, *of_column) for of_column in views]

    def vertical(self, out: Tensor | None = None) -> None:
        """Prepares the horizontal stack for a row, given the rows above, and puts the next vertical features into out.

        Args:
            out: (w, B, D).
        """
        self.vertical_sum.addmm_(self.windows_above.flatten(0, 1), self.vertical_weight)
        self.context.addmm_(self.vertical_sum, self.across_weight)
        if out is not None:
            torch.mul(self.filters.tanh_(), self.gates.sigmoid_(), out=out)

    def horizontal(
        self, window: Tensor, context: Tensor, filters: Tensor, gates: Tensor, present: Tensor, out: Tensor
    ) -> None:
        """The next horizontal features (B, D) from the present ones and the window that they end; writes `context`."""
        context.addmm_(window, self.horizontal_weight)
        hidden = filters.tanh_().mul_(gates.sigmoid_())
        if self.dropout:
            hidden = F.dropout(hidden, self.dropout)
        torch.addmm(present, hidden, self.residual_weight, out=out)

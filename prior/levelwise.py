"""One network per level of codes, each conditioned on the coarser levels: prod_l p(c_l | c_<l, label)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prior.autoregressive import AutoregressiveConfig, AutoregressivePrior, structure
from prior.base import Codes, check_positive


@dataclass(frozen=True, kw_only=True)
class LevelwiseConfig(AutoregressiveConfig):
    """What every levelwise prior's configuration holds.

    Args:
        hidden_dim: channels of the networks and of their condition maps.
        num_condition_blocks: residual blocks that mix the coarser levels into the condition map of a level.
    """

    hidden_dim: int = 128
    num_condition_blocks: int = 2

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "hidden_dim")
        if self.num_condition_blocks < 0:
            raise ValueError(f"num_condition_blocks must be at least 0, got {self.num_condition_blocks}")
        if any(len(shape) > 2 for shape in self.spec.shapes):
            raise ValueError(f"a level must be a map (h, w) or a vector (N,), got shapes {self.spec.shapes}")


class LevelNetwork(nn.Module, ABC):
    """A causal network over one map of codes: the distribution of each code given those before it in raster order."""

    @abstractmethod
    def forward(self, codes: Tensor, condition: Tensor) -> Tensor:
        """Logits (B, K, h, w) from codes (B, h, w) and the condition map (B, D, h, w)."""

    @abstractmethod
    def steps(self, condition: Tensor) -> Generator[Tensor, Tensor, Tensor]:
        """Yields the logits (B, K) of each code in raster order, is sent the codes (B,), returns the map (B, h, w)."""

    def whole_passes(self, condition: Tensor) -> Generator[Tensor, Tensor, Tensor]:
        """`steps` that only call `forward`, for every code of the map anew: slow, but whatever layers compute."""
        batch, _, height, width = condition.shape
        codes = torch.zeros(batch, height, width, dtype=torch.int64, device=condition.device)
        for row in range(height):
            for column in range(width):
                codes[:, row, column] = yield self(codes, condition)[..., row, column]
        return codes


class LevelwisePrior(AutoregressivePrior):
    """Autoregressive maps, coarse to fine, as in VQ-VAE-2 (Razavi et al. 2019, arXiv:1906.00446).

    Each level has a network of its own, so that a level costs what its own map costs. A vector of N codes is a 1 x N
    map. A subclass names `Config` and `Network`, which is built as Network(config, vocab_size).

    Sampling reads the weights of the networks' layers. Where a layer was replaced, wrapped (LoRA) or given hooks, it
    takes a whole pass for every code instead: merge such layers into plain ones for speed.

    Args:
        config: sizes and code space.
    """

    Network: type[LevelNetwork]

    def __init__(self, config: LevelwiseConfig):
        super().__init__(config)
        vocab_sizes = self.spec.vocab_sizes
        self.sizes = tuple((1, *shape)[-2:] for shape in self.spec.shapes)
        self.conditions = nn.ModuleList(Condition(config, vocab_sizes[:level]) for level in range(len(vocab_sizes)))
        self.networks = nn.ModuleList(self.Network(config, vocab_size) for vocab_size in vocab_sizes)
        self.built = structure(*self.networks)

    def logits(self, codes: Codes, classes: Tensor) -> tuple[Tensor, ...]:
        maps = [code.reshape(-1, *size) for code, size in zip(codes, self.sizes)]
        conditions = [self._condition(level, maps[:level], classes) for level in range(len(maps))]
        outputs = [network(*inputs) for network, *inputs in zip(self.networks, maps, conditions)]
        return tuple(output.flatten(2).mT for output in outputs)

    def steps(self, classes: Tensor) -> Generator[Tensor, Tensor, None]:
        finished, as_built = [], structure(*self.networks) == self.built
        for level, network in enumerate(self.networks):
            steps = network.steps if as_built else network.whole_passes
            finished.append((yield from steps(self._condition(level, finished, classes))))

    def _condition(self, level: int, coarser: list[Tensor], classes: Tensor) -> Tensor:
        return self.conditions[level](classes, coarser, self.sizes[level])


class Condition(nn.Module):
    """What a level's network may know beside its own codes: a map (B, D, h, w) of the class and the coarser levels."""

    def __init__(self, config: LevelwiseConfig, coarser_vocab_sizes: tuple[int, ...]):
        super().__init__()
        dim = config.hidden_dim
        num_blocks = config.num_condition_blocks if coarser_vocab_sizes else 0
        self.class_embedding = nn.Embedding(config.num_classes + 1, dim)  # the last is the null class
        self.code_embeddings = nn.ModuleList(nn.Embedding(vocab_size, dim) for vocab_size in coarser_vocab_sizes)
        self.blocks = nn.ModuleList(ResidualBlock(dim) for _ in range(num_blocks))

    def forward(self, classes: Tensor, coarser: list[Tensor], size: tuple[int, int]) -> Tensor:
        x = self.class_embedding(classes)[:, :, None, None].expand(-1, -1, *size)
        for embedding, codes in zip(self.code_embeddings, coarser):
            x = x + F.interpolate(embedding(codes).movedim(-1, 1), size=size, mode="nearest")
        for block in self.blocks:
            x = block(x)
        return x


def product(conv: nn.Conv2d) -> Callable[[Tensor], Tensor]:
    """The convolution of single windows, flattened: (B, out) from (B, in * height * width), as a matrix product.

    For few of them this takes a third of the time that the convolution takes. The weight is copied, since products are
    faster with its transpose.
    """
    bias, weight = conv.bias, conv.weight.flatten(1).T.contiguous()
    return lambda x: torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)


class Pointwise:
    """1x1 convolutions and what is between them, at one position: (B, out) from (B, in)."""

    def __init__(self, *layers: nn.Module):
        self.layers = [product(layer) if isinstance(layer, nn.Conv2d) else layer for layer in layers]

    def __call__(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class ResidualBlock(nn.Module):
    """x + conv(relu(conv(relu(x))))."""

    def __init__(self, dim: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(), nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU(), nn.Conv2d(dim, dim, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)

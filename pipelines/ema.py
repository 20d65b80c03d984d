"""Running average of weights."""

from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """Running average of a module's parameters; buffers (codebooks with averages of their own) are taken as they are.

    The decay rises as (1 + t) / (10 + t), so that the first steps do not linger.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.average = [p.clone() for p in self._values()]

    def _values(self) -> list[Tensor]:
        """What the parameters hold; of those that FSDP 2 shards this process's part, since few operations take all."""
        values = [p.detach() for p in self.parameters]
        return [value.to_local() if hasattr(value, "to_local") else value for value in values]

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.average, self._values(), 1 - decay)

    @torch.no_grad()
    def adopt_current(self) -> None:
        """Makes the module's present parameters the average (after they were loaded into it)."""
        torch._foreach_copy_(self.average, self._values())

    @contextmanager
    def applied(self):
        """Within the context the module holds the averaged parameters."""
        if self.decay == 0:
            yield
            return
        parameters = self._values()
        kept = [p.clone() for p in parameters]
        torch._foreach_copy_(parameters, self.average)
        try:
            yield
        finally:
            torch._foreach_copy_(parameters, kept)

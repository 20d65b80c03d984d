"""Errors for want of memory become one line that says what to change."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def naming_memory(advice: str) -> Iterator[None]:
    """Raises MemoryError, with `advice`, for what does not fit. The CPU's allocator raises a plain RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise MemoryError(f"out of memory {advice} ({error})") from error

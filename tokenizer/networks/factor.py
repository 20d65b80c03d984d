"""Sampling factors are powers of two: how many halvings they are, and the error where they are not."""


def num_halvings(factor: int, name: str = "a sampling factor") -> int:
    """log2 of `factor`. Raises ValueError, which calls it `name`, unless it is a power of two, at least 1."""
    if factor < 1 or factor & (factor - 1):
        raise ValueError(f"{name} must be a power of two, at least 1, got {factor}")
    return factor.bit_length() - 1

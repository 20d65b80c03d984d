"""Sampling factors are powers of two: how many halvings they are, and the error where they are not."""


def num_halvings(factor: int) -> int:
    """log2 of `factor`. Raises ValueError unless it is a power of two, at least 1."""
    if factor < 1 or factor & (factor - 1):
        raise ValueError(f"a sampling factor must be a power of two, at least 1, got {factor}")
    return factor.bit_length() - 1

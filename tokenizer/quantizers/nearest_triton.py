"""Exact nearest-neighbour search in a codebook as one kernel for GPUs: distances exist in its registers alone."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Vectors and entries of a tile, and channels that are multiplied at a time. Not tuned on a device: chosen from what the
# compiler makes of them for compute capability 8.0 and 9.0, where nothing is spilled from the registers.
ROWS, COLUMNS, DEPTH = 64, 64, 32


def fused_nearest(vectors: Tensor, codebook: Tensor, half_squares: Tensor) -> Tensor:
    """Index of the entry with the smallest |w|^2 / 2 - x.w for each vector; of equal ones the lowest.

    Products and sums are float32, whatever torch allows its own. Their order is not that of torch's matrix products: of
    entries whose distances differ by no more than float32's rounding, either way may find another.

    Args:
        vectors: (N, D) float32, contiguous, like the others.
        codebook: (K, D).
        half_squares: (K,), the entries' |w|^2 / 2.
    Returns:
        (N,) int64 in [0, K), also where distances are not numbers.
    """
    (num_vectors, dim), codes = vectors.shape, _empty_codes(vectors, codebook, half_squares)
    if num_vectors > 0:
        depth = min(DEPTH, max(16, triton.next_power_of_2(dim)))  # a product of tiles needs 16
        grid = (triton.cdiv(num_vectors, ROWS),)
        with torch.cuda.device_of(vectors):  # a kernel starts on the current device, not on that of its arguments
            _search[grid](
                vectors, codebook, half_squares, codes, num_vectors, len(codebook), dim, ROWS, COLUMNS, depth,
                enable_fp_fusion=True,
            )  # fmt: skip
    return codes


def _empty_codes(vectors: Tensor, codebook: Tensor, half_squares: Tensor) -> Tensor:
    return vectors.new_empty(len(vectors), dtype=torch.int64)


# An operator of its own, so that torch.compile need not look into it. Not `custom_op`, which imports the compiler.
torch.library.define("tessera::nearest", "(Tensor vectors, Tensor codebook, Tensor half_squares) -> Tensor")
torch.library.impl("tessera::nearest", "default", fused_nearest)
torch.library.register_fake("tessera::nearest", _empty_codes)


@triton.jit(do_not_specialize=["num_vectors", "codebook_size"])
def _search(
    vectors, codebook, half_squares, codes, num_vectors, codebook_size,
    dim: tl.constexpr, tile_rows: tl.constexpr, tile_columns: tl.constexpr, tile_depth: tl.constexpr,
):  # fmt: skip
    """The codes of tile_rows vectors, going over the codebook tile by tile."""
    rows = tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)
    row_starts = rows.to(tl.int64) * dim
    smallest = tl.full((tile_rows,), float("inf"), tl.float32)
    found = tl.zeros((tile_rows,), tl.int64)
    for first_column in range(0, codebook_size, tile_columns):
        columns = first_column + tl.arange(0, tile_columns)
        column_starts = columns.to(tl.int64) * dim
        products = tl.zeros((tile_rows, tile_columns), tl.float32)
        for first_channel in range(0, dim, tile_depth):
            channels = first_channel + tl.arange(0, tile_depth)
            x = tl.load(
                vectors + row_starts[:, None] + channels[None, :],
                mask=(rows < num_vectors)[:, None] & (channels < dim)[None, :],
                other=0.0,
            )
            w = tl.load(
                codebook + column_starts[None, :] + channels[:, None],
                mask=(columns < codebook_size)[None, :] & (channels < dim)[:, None],
                other=0.0,
            )
            products = tl.dot(x, w, acc=products, input_precision="ieee")  # TF32 would find other entries
        halves = tl.load(half_squares + columns, mask=columns < codebook_size, other=float("inf"))
        values, places = tl.min(halves[None, :] - products, axis=1, return_indices=True)
        nearer = values < smallest  # strictly: of equal ones the first is kept
        found = tl.where(nearer, first_column + places, found)
        smallest = tl.where(nearer, values, smallest)
    tl.store(codes + rows, found, mask=rows < num_vectors)

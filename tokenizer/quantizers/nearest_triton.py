"""Exact nearest-neighbour search in a codebook as one kernel for GPUs: distances exist in its registers alone.

Tensor cores multiply numbers of 8 bits and add in float32. A float32 number is the sum of three such numbers, so six of
their nine products are a product of float32, up to its rounding; they are laid side by side, as channels.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# The parts of vectors and of entries that meet in each product, small products first: 0 is the largest part
VECTOR_PARTS, ENTRY_PARTS = (2, 0, 1, 1, 0, 0), (0, 2, 1, 0, 1, 0)
# Neighbours whose larger score alone is remembered; which of them it was is found at the end
GROUP = 2


class Tiles(NamedTuple):
    """Vectors and entries of a tile, channels that are multiplied at a time, warps, and loads under way."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


# Measured on an H200; few channels, many, and where there are no tensor cores for bfloat16
NARROW, WIDE, FLOAT32 = Tiles(128, 64, 64, 8, 3), Tiles(128, 128, 64, 8, 4), Tiles(64, 64, 16, 4, 2)
WIDTH_OF_NARROW = 64
# Of bfloat16 that vectors are split into at a time: 192 MiB
MOST_NUMBERS = 6 * 2**24


def fused_nearest(vectors: Tensor, codebook: Tensor, half_squares: Tensor) -> Tensor:
    """Index of the entry with the smallest |w|^2 / 2 - x.w for each vector; of equal ones the lowest.

    Products have the precision of float32, whatever torch allows its own, of numbers up to 3.38e38. Their sums are
    taken in another order than those of torch's matrix products: of entries whose distances differ by no more than
    float32's rounding, either way may find another.

    Args:
        vectors: (N, D) float32, contiguous, like the others.
        codebook: (K, D).
        half_squares: (K,), the entries' |w|^2 / 2.
    Returns:
        (N,) int64 in [0, K), also where distances are not numbers.
    """
    codes = _empty_codes(vectors, codebook, half_squares)
    if len(vectors) == 0:
        return codes
    with torch.cuda.device_of(vectors):  # a kernel starts on the current device, not on that of its arguments
        tiles = _tiles(vectors)
        right = _factors(codebook, ENTRY_PARTS, tiles)
        at_once = max(1, MOST_NUMBERS // right.shape[1])
        for some, found in zip(vectors.split(at_once), codes.split(at_once)):
            _search_some(_factors(some, VECTOR_PARTS, tiles), right, some, codebook, half_squares, found, tiles)
    return codes


def _search_some(left, right, vectors, codebook, half_squares, codes, tiles) -> None:
    (num_vectors, dim), codebook_size = vectors.shape, len(codebook)
    num_rows, num_columns = triton.cdiv(num_vectors, tiles.rows), triton.cdiv(codebook_size, tiles.columns)
    # few vectors leave a GPU idle unless several programs share the codebook
    columns = triton.cdiv(num_columns, max(1, _num_programs(vectors.device) // num_rows)) * tiles.columns
    num_parts = triton.cdiv(codebook_size, columns)
    found = codes if num_parts == 1 else codes.new_empty(num_parts, num_vectors)
    scores = vectors.new_empty(found.shape)
    _search[(num_rows, num_parts)](
        left, right, vectors, codebook, half_squares, found, scores, num_vectors, codebook_size, columns,
        dim, left.shape[1], tiles.rows, tiles.columns, tiles.depth, min(64, triton.next_power_of_2(dim)), GROUP,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    if num_parts > 1:
        grid = (triton.cdiv(num_vectors, 256),)
        _choose[grid](found, scores, codes, num_vectors, num_parts, 256, enable_fp_fusion=True)


def _empty_codes(vectors: Tensor, codebook: Tensor, half_squares: Tensor) -> Tensor:
    return vectors.new_empty(len(vectors), dtype=torch.int64)


# An operator of its own, so that torch.compile need not look into it. Not `custom_op`, which imports the compiler.
torch.library.define("tessera::nearest", "(Tensor vectors, Tensor codebook, Tensor half_squares) -> Tensor")
torch.library.impl("tessera::nearest", "default", fused_nearest)
torch.library.register_fake("tessera::nearest", _empty_codes)


def _tiles(vectors: Tensor) -> Tiles:
    if not _has_bfloat16(vectors.device):
        return FLOAT32
    narrow = len(VECTOR_PARTS) * vectors.shape[1] <= WIDTH_OF_NARROW
    return _fitting(NARROW if narrow else WIDE, vectors.device)


def _factors(matrix: Tensor, parts: tuple[int, ...], tiles: Tiles) -> Tensor:
    """(N, width) from vectors or entries (N, D): what is multiplied, so that products of rows are those of both."""
    if _has_bfloat16(matrix.device):
        return _split(matrix, parts, tiles.depth)
    return torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % tiles.depth))


def _has_bfloat16(device: torch.device) -> bool:
    """Whether there are tensor cores for it; not before Ampere."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def _num_programs(device: torch.device) -> int:
    """How many keep a device busy."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _fitting(tiles: Tiles, device: torch.device) -> Tiles:
    """With no more loads under way than shared memory has room for."""
    bytes_of_load = (tiles.rows + tiles.columns) * tiles.depth * 2
    return tiles._replace(num_stages=max(1, min(tiles.num_stages, _shared_memory(device) // bytes_of_load)))


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that a program may have of it; torch tells them since 2.7 alone."""
    if device.type != "cuda":
        return 2**20
    return triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]


def _split(matrix: Tensor, parts: tuple[int, ...], depth: int) -> Tensor:
    """(N, width) in bfloat16 from (N, D) in float32: the given parts of each row side by side, then zeros."""
    width = len(parts) * matrix.shape[1]
    padded = triton.cdiv(width, depth) * depth
    pieces = (matrix.new_empty if padded == width else matrix.new_zeros)(len(matrix), padded, dtype=torch.bfloat16)
    # tuples are no constants for every version of Triton
    order = sum(part * 4**place for place, part in enumerate(parts))
    grid = (triton.cdiv(matrix.numel(), 1024),)
    sizes = (matrix.numel(), matrix.shape[1], padded, len(parts), order, 1024)
    _write_parts[grid](matrix, pieces, *sizes, enable_fp_fusion=True)
    return pieces


@triton.jit(do_not_specialize=["num_numbers"])
def _write_parts(
    numbers, pieces, num_numbers, dim: tl.constexpr, width: tl.constexpr, num_parts: tl.constexpr, order: tl.constexpr,
    size: tl.constexpr,
):  # fmt: skip
    places = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    inside = places < num_numbers
    number = tl.load(numbers + places, mask=inside, other=0.0)
    first = number.to(tl.bfloat16)
    rest = number - first.to(tl.float32)
    second = rest.to(tl.bfloat16)
    third = (rest - second.to(tl.float32)).to(tl.bfloat16)
    starts = pieces + places // dim * width + places % dim
    for part in tl.static_range(num_parts):
        if order // 4**part % 4 == 0:
            tl.store(starts + part * dim, first, mask=inside)
        elif order // 4**part % 4 == 1:
            tl.store(starts + part * dim, second, mask=inside)
        else:
            tl.store(starts + part * dim, third, mask=inside)


@triton.jit(do_not_specialize=["num_vectors", "codebook_size", "columns_of_part"])
def _search(
    left, right, vectors, codebook, half_squares, codes, scores, num_vectors, codebook_size, columns_of_part,
    dim: tl.constexpr, width: tl.constexpr, tile_rows: tl.constexpr, tile_columns: tl.constexpr,
    tile_depth: tl.constexpr, tile_dim: tl.constexpr, group: tl.constexpr,
):  # fmt: skip
    """The codes and scores of tile_rows vectors within one part of the codebook, which it goes over tile by tile."""
    rows = tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)
    inside = rows < num_vectors
    channels = tl.arange(0, tile_depth)
    left_starts = left + rows.to(tl.int64)[:, None] * width + channels[None, :]
    # Each lane remembers its own best score, so that lanes need not meet before the end
    lanes: tl.constexpr = tile_columns // group
    largest = tl.full((tile_rows, lanes), float("-inf"), tl.float32)
    start = tl.program_id(1) * columns_of_part
    tile_of_largest = tl.full((tile_rows, lanes), 0, tl.int32) + start
    if width == tile_depth:  # few channels: those of the vectors stay where they are
        left_tile = tl.load(left_starts, mask=inside[:, None], other=0.0)
    for first in range(start, min(start + columns_of_part, codebook_size), tile_columns):
        columns = first + tl.arange(0, tile_columns)
        known = columns < codebook_size
        right_starts = right + columns.to(tl.int64)[None, :] * width + channels[:, None]
        products = tl.zeros((tile_rows, tile_columns), tl.float32)
        for channel in range(0, width, tile_depth):
            if width != tile_depth:
                left_tile = tl.load(left_starts + channel, mask=inside[:, None], other=0.0)
            right_tile = tl.load(right_starts + channel, mask=known[None, :], other=0.0)
            # TF32 would find other entries
            products = tl.dot(left_tile, right_tile, acc=products, input_precision="ieee")
        tile_scores = products - tl.load(half_squares + columns, mask=known, other=float("inf"))[None, :]
        best = tl.max(tl.reshape(tile_scores, (tile_rows, lanes, group)), axis=2)
        nearer = best > largest  # strictly: of equal ones the first is kept
        tile_of_largest = tl.where(nearer, first, tile_of_largest)
        largest = tl.where(nearer, best, largest)
    first_of_group = tile_of_largest + tl.arange(0, lanes)[None, :] * group
    # Scores that are not numbers are never nearer: without any other, all lanes are equal, and stand at the start
    is_best = largest == tl.max(largest, axis=1)[:, None]
    code = tl.min(tl.where(is_best, first_of_group, 2**31 - 1), axis=1)
    score = tl.full((tile_rows,), float("-inf"), tl.float32)
    row_starts = vectors + rows.to(tl.int64)[:, None] * dim
    first = code
    for member in tl.static_range(group):
        column = first + member
        known = column < codebook_size
        value = -tl.load(half_squares + column, mask=known, other=float("inf"))
        for channel in range(0, dim, tile_dim):
            places = channel + tl.arange(0, tile_dim)
            x = tl.load(row_starts + places[None, :], mask=inside[:, None] & (places < dim)[None, :], other=0.0)
            w = tl.load(
                codebook + column.to(tl.int64)[:, None] * dim + places[None, :],
                mask=known[:, None] & (places < dim)[None, :],
                other=0.0,
            )
            value += tl.sum(x * w, axis=1)
        nearer = value > score
        code = tl.where(nearer, column, code)
        score = tl.where(nearer, value, score)
    place = tl.program_id(1) * num_vectors + rows
    tl.store(codes + place, code.to(tl.int64), mask=inside)
    tl.store(scores + place, score, mask=inside)


@triton.jit(do_not_specialize=["num_vectors", "num_parts"])
def _choose(found, scores, codes, num_vectors, num_parts, size: tl.constexpr):
    """Of the codes found in each part of the codebook, (parts, N), the one with the largest score."""
    rows = tl.program_id(0) * size + tl.arange(0, size)
    inside = rows < num_vectors
    code = tl.load(found + rows, mask=inside, other=0)
    score = tl.load(scores + rows, mask=inside, other=0.0)
    for part in range(1, num_parts):
        place = part * num_vectors + rows
        other = tl.load(scores + place, mask=inside, other=0.0)
        nearer = other > score
        code = tl.where(nearer, tl.load(found + place, mask=inside, other=0), code)
        score = tl.where(nearer, other, score)
    tl.store(codes + rows, code, mask=inside)

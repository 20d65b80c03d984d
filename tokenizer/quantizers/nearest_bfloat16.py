"""Which entries of a codebook can be nearest, from products in bfloat16: for CPUs with instructions for those."""

from functools import cache

import torch
from torch import Tensor

# Least vectors, entries, channels and numbers in a codebook for which it pays: below, the passes over codebook and
# distances take as long as the products that are spared.
LEAST, LEAST_NUMBERS = (2048, 1024, 128), 2**18
# Vectors x entries of a tile of distances, 2 MB, and the least vectors and most entries: fewer of those multiply slowly
TILE, ROWS, COLUMNS = 2**20, 512, 2**13
# Entries that are rounded at a time: what that takes besides is then still in the cache
PIECE = 1024
# Candidates per vector, as of a collapsed codebook, beyond which to look at each takes longer than a float32 search
CANDIDATES = 16
# Vectors whose nearest entries tell how far those are
SAMPLE = 32
# Unit roundoffs: the bounds are multiples of them
BFLOAT16, FLOAT32 = 2.0**-8, 2.0**-24
# Bound on a sum of products that the CPU takes for 0, as smaller than their smallest number
TINY = 2.0**-80


@cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for it, which sum in float32; False where torch is too old to tell.

    Intel's matrix units are many times as fast as float32, AVX-512's dot products twice.
    """
    found = getattr(torch.cpu, "get_capabilities", dict)()
    return any(found.get(unit, False) for unit in ("amx_bf16", "avx512_bf16"))


def screening_pays(vectors: Tensor, codebook: Tensor) -> bool:
    """Whether codes of vectors (N, D) from a codebook (K, D) are found sooner so than by the float32 search alone."""
    if any(size < least for size, least in zip((len(vectors), *codebook.shape), LEAST)):
        return False
    if codebook.numel() < LEAST_NUMBERS:
        return False
    # torch.compile would make graphs of the passes, one for each number of candidates
    return vectors.device.type == "cpu" and not torch.compiler.is_compiling() and cpu_multiplies_bfloat16()


class Screening:
    """Finds the codes of most vectors by bfloat16 products, faster than float32's, and says which it leaves.

    Rounding x and w to bfloat16 moves x.w by no more than |dx| |w| + |x| |dw|, where dx and dw are what rounding took.
    Entries further than that from the least distance cannot be nearest, and of the few left float32's differences x - w
    tell which is: surely, unless two are equal up to the rounding error of the search in float32. So every code found
    is the one that it would find.

    The distances are rounded to bfloat16 too, in proportion to their size. So each vector's are taken less a number a
    little below the least of them, which keeps small those that matter.
    """

    def __init__(self, codebook: Tensor):
        codebook_size, dim = codebook.shape
        self.codebook = codebook
        self.center = codebook.mean(dim=0)  # |x - w| stays and the error of x.w shrinks with the norms
        # |x - w|^2 / 2 = -x.w + |w|^2 / 2 + |x|^2 / 2 as one product of dim + 4 channels: squares in two parts each
        self.channels = codebook.new_ones(codebook_size, dim + 4, dtype=torch.bfloat16)
        largest = []
        for entries, channels in zip(codebook.split(PIECE), self.channels.split(PIECE)):
            norms = _round(self.center - entries, channels[:, :dim], channels[:, dim : dim + 2], 1.0)
            largest.append(torch.stack([entries.norm(dim=1), *norms]).amax(dim=1))
        self.largest, self.reach, self.lost = torch.stack(largest).amax(dim=0)
        self.sum_error = (dim + 8) * FLOAT32  # of a float32 sum over the channels
        self.columns = min(COLUMNS, codebook_size)
        self.tile = self.channels.new_empty(0)

    def __call__(self, vectors: Tensor, codes: Tensor) -> Tensor:
        """Writes codes (N,) of vectors (N, D), float32. Returns the indices of those that float32 has to search."""
        rows = max(ROWS, TILE // self.columns)
        if self.tile.numel() < min(rows, len(vectors)) * self.columns:
            self.tile = self.tile.new_empty(min(rows, len(vectors)) * self.columns)
        part_of_squares = self._part_of_squares(vectors)
        undecided = [codes.new_empty(0)]
        for start in range(0, len(vectors), rows):
            part = slice(start, start + rows)
            found = self._search(vectors[part], part_of_squares, codes[part])
            if found is None and part_of_squares != 1:  # the sample may be unlike these
                part_of_squares = 1.0
                found = self._search(vectors[part], part_of_squares, codes[part])
            if found is None:  # as the others will
                undecided.append(torch.arange(start, len(vectors), device=codes.device))
                break
            undecided.append(start + found)
        return torch.cat(undecided)

    def _part_of_squares(self, vectors: Tensor) -> float:
        """What part of |x|^2 / 2, -1 to 1, makes the least of a vector's distances a little more than 0.

        With less of it more entries are candidates, all whose distances are negative; with more, rounding takes more.
        """
        sample = vectors[:: max(1, len(vectors) // SAMPLE)]
        if len(sample) == 0:
            return 1.0
        least = torch.cdist(sample, self.codebook).amin(dim=1) / (sample - self.center).norm(dim=1)
        return 1 - 0.9 * least.square().amin().nan_to_num(0).clamp(max=2).item()

    def _search(self, vectors: Tensor, part_of_squares: float, codes: Tensor) -> Tensor | None:
        """The same for at most a tile's rows; None if too many entries are candidates."""
        length, dim = vectors.shape
        channels = self.channels.new_ones(length, dim + 4)
        norms, lost = _round(vectors - self.center, channels[:, :dim], channels[:, dim + 2 :], part_of_squares)
        # of |w|^2 / 2 - x.w in the search in float32, whose vectors are not centred
        search_error = self.sum_error * self.largest * (norms + self.center.norm() + self.largest)
        product_error = 1.01 * (lost * self.reach + norms * self.lost)
        # of the second parts of the squares, and of the sum
        product_error += (BFLOAT16**2 + 2 * self.sum_error) * (norms + self.reach).square()
        slack = 2 * (search_error + product_error) + TINY  # of two distances
        rows, places = [], []
        for start in range(0, len(self.codebook), self.columns):
            entries = self.channels[start : start + self.columns]
            distances = self.tile[: length * len(entries)].view(length, len(entries))
            torch.mm(channels, entries.T, out=distances)
            # As integers bfloat16's positive numbers have the order that they have as numbers, and negative ones, which
            # come before, are candidates all. NumPy reads these at 50 GB/s, torch at 3.
            distances = distances.view(torch.int16).numpy()
            least = torch.from_numpy(distances.min(axis=1)).view(torch.bfloat16).float().clamp(min=0)
            limits = (least + slack) * (1 + 5 * BFLOAT16)  # as all three are rounded, this one down
            limits = (limits.view(torch.int32) >> 16).to(torch.int16).numpy()
            (candidates,) = (distances <= limits[:, None]).ravel().nonzero()
            if len(candidates) > CANDIDATES * length:
                return None
            candidates = torch.from_numpy(candidates)
            rows.append(candidates // len(entries))
            places.append(candidates % len(entries) + start)
        rows, places = torch.cat(rows), torch.cat(places)
        codes[rows] = places
        decided = rows.bincount(minlength=length) == 1
        several = ~decided[rows]
        rows, places = self._nearest(vectors, rows[several], places[several], search_error)
        codes[rows] = places
        decided |= rows.bincount(minlength=length) == 1
        return (~decided).nonzero()[:, 0]

    def _nearest(self, vectors: Tensor, rows: Tensor, places: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        """Of the candidates `places` of the vectors `rows` those that may be nearest, in float32."""
        distances = torch.index_select(vectors, 0, rows).sub_(torch.index_select(self.codebook, 0, places))
        distances = distances.norm(dim=1).square() / 2
        least = torch.full_like(error, torch.inf).scatter_reduce_(0, rows, distances, "amin")
        near = distances <= (least * (1 + 2 * self.sum_error) + 2 * error)[rows]
        return rows[near], places[near]


def _round(numbers: Tensor, channels: Tensor, squares: Tensor, part: float) -> tuple[Tensor, Tensor]:
    """Writes vectors (n, D) to channels (n, D) in bfloat16, and `part` of |x|^2 / 2 as the sum of squares (n, 2).

    That sum is right up to 2^-16 of it. Returns the norms (n,) of the vectors and of what rounding took from them,
    which is written over them.
    """
    norms = numbers.norm(dim=1)
    channels.copy_(numbers)
    lost = numbers.sub_(channels).norm(dim=1)
    halves = part / 2 * norms.square()
    squares[:, 0] = halves
    squares[:, 1] = halves - squares[:, 0].float()
    return norms, lost

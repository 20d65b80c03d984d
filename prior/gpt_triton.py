"""What a GPT's layer does between its products, as three kernels: with one row per image, starting them takes the time.

For few images a layer's products are kernels too, since to multiply a matrix by them is to read it.

From Hopper on a kernel starts while the one before it still runs, reads what that one cannot have written, weights and
the past, and then waits for its end (programmatic dependent launch). All of these wait: where one has ended, all before
it have.

Kernels start on the current device, which must be that of their arguments.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from prior.gpt_cuda_decoder import Layer

# Attention has a program per image and head, and each thread loads this many elements of keys and as many of values at
# a time, 2 x 16 bytes of either in bfloat16. Where programs are fewer than a few for each of a GPU's multiprocessors,
# waiting for memory is what takes the time, and more threads wait fewer times. Measured on an H100.
ELEMENTS, NUM_WARPS = 16, 1
FEW_PROGRAMS, NUM_WARPS_OF_FEW = 256, 4
COLUMNS = 1024  # of the feed-forward layer, for each program: 16 bytes of bfloat16 for each thread
FEW_ROWS = 8  # up to which a layer's products are read as `project` does


class FusedLayer(Layer):
    """A `Layer` of eight kernels: four products, and four of these."""

    def attend(self, projected: Tensor, place: Tensor) -> Tensor:
        return attend(projected, self.rotations, place, self.keys, self.values)

    def add_norm(self, x: Tensor, branch: Tensor, norm: torch.nn.RMSNorm) -> tuple[Tensor, Tensor]:
        return x, add_norm(x, branch, norm.weight, norm.eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return silu_mul(gate_up)


class FewRowsLayer(Layer):
    """A `Layer` of five kernels: products that begin with the norm before them, and end with what is done to them."""

    @classmethod
    def through(cls, layers: list[Layer], x: Tensor, place: Tensor, head: Tensor) -> Tensor:
        for layer in layers:
            layer.advance(x, place)
        return project(x, head, norm=layers[-1].next_norm)

    def advance(self, x: Tensor, place: Tensor) -> None:
        """Adds what the layer adds to the residual stream x (B, D), in place."""
        projected = project(x, self.queries_keys_values, norm=self.norm)
        project(attend(projected, self.rotations, place, self.keys, self.values), self.out, add_to=x)
        project(project(x, self.gate_up, norm=self.mlp_norm, gated=True), self.down, add_to=x)


def attend(projected: Tensor, rotations: Tensor | None, place: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of the newest token to itself and all before it; stores its key and value.

    Sums and the softmax are float32. Only the places before the token's are read.

    Args:
        projected: (B, 3 D) queries, keys and values of D = heads x head_dim channels, contiguous, like all others.
        rotations: cosines and signed sines of every place (P, 2, head_dim), float32, or None.
        place: (1,) int64 in [0, P), the token's; read on the device. Neither it nor what is before the place in `keys`
            and `values` may be written by the kernel just before.
        keys: (B, heads, P, head_dim), changed at `place`, in the dtype of `projected`, like `values`.
        values: (B, heads, P, head_dim).
    Returns:
        (B, D), in the dtype of the keys.
    """
    batch, num_heads, num_places, head_dim = keys.shape
    mixed = projected.new_empty(batch, num_heads * head_dim)
    padded_dim = triton.next_power_of_2(head_dim)
    num_warps = NUM_WARPS_OF_FEW if batch * num_heads < FEW_PROGRAMS else NUM_WARPS
    num_slots = max(1, num_warps * 32 * ELEMENTS // padded_dim)
    _attend[(batch * num_heads,)](
        projected, rotations, place, keys, values, mixed, num_places, num_heads, head_dim, padded_dim, num_slots,
        math.log2(math.e) / math.sqrt(head_dim), num_warps=num_warps, **options(keys.device),
    )  # fmt: skip
    return mixed


def add_norm(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Adds a branch (B, D) to the residual stream x (B, D), in place; returns the sum's RMSNorm, in the branch's dtype.

    The sum is rounded to the dtype of x, and normalised in float32. Tensors are contiguous; the weight is (D,), and not
    written by the kernel just before.
    """
    batch, dim = x.shape
    normalised = torch.empty_like(branch)
    padded_dim = triton.next_power_of_2(dim)
    _add_norm[(batch,)](x, branch, weight, normalised, eps, dim, padded_dim, **options(x.device))
    return normalised


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (B, F) of both side by side (B, 2 F), contiguous; computed in float32, rounded once."""
    batch, ffn_dim = len(gate_up), gate_up.shape[1] // 2
    product = gate_up.new_empty(batch, ffn_dim)
    grid = (batch, triton.cdiv(ffn_dim, COLUMNS))
    _silu_mul[grid](gate_up, product, ffn_dim, COLUMNS, **options(gate_up.device))
    return product


def project(
    x: Tensor,
    weight: Tensor,
    *,
    norm: torch.nn.RMSNorm | None = None,
    gated: bool = False,
    add_to: Tensor | None = None,
) -> Tensor:
    """x weight^T, for few rows: the weights are read once, and each element is multiplied by every row's.

    Args:
        x: (B, D); rounded to the weight's dtype after the norm, which is computed in float32.
        weight: (N, D), contiguous like all others; with `gated` (2 N, D), N gates and then N others. Neither it nor the
            norm's may be written by the kernel just before.
        norm: normalises the rows of x first.
        gated: the result is silu(gate) * other, rounded once after it is computed in float32.
        add_to: (B, N), to which the product is added in place.
    Returns:
        (B, N) in the weight's dtype, or `add_to`. Products are rounded to the weight's dtype before all else.
    """
    num_columns, dim = len(weight) // 2 if gated else len(weight), x.shape[1]
    out = weight.new_empty(len(x), num_columns) if add_to is None else add_to
    padded_dim, num_weights = triton.next_power_of_2(dim), 2 if gated else 1
    # rows of the weight for each program, so that there are enough of these, and that its registers hold them
    num_rows = max(1, min(8 if num_columns >= 2048 else 4, 2**15 // (num_weights * padded_dim)))
    elements = num_rows * padded_dim * num_weights
    _project[(triton.cdiv(num_columns, num_rows),)](
        x, None if norm is None else norm.weight, weight, out, 0.0 if norm is None else norm.eps, len(x), num_columns,
        dim, padded_dim, num_rows, gated, add_to is not None,
        num_warps=min(16, max(1, elements // (64 * 32))), **options(x.device),
    )  # fmt: skip
    return out


@functools.cache
def options(device: torch.device) -> dict[str, bool]:
    """Of the compiler and of the start of all kernels."""
    overlaps = (
        device.type == "cuda"
        and torch.version.hip is None  # AMD's GPUs bear the name, and numbers of their own
        and torch.cuda.get_device_capability(device) >= (9, 0)
        and hasattr(triton.language.extra.cuda, "gdc_wait")  # not in Triton's older versions
    )
    return {"overlaps": overlaps, "enable_fp_fusion": True} | ({"launch_pdl": True} if overlaps else {})


@triton.jit(do_not_specialize=["num_places"])
def _attend(
    projected, rotations, place, keys, values, mixed, num_places,
    num_heads: tl.constexpr, head_dim: tl.constexpr, padded_dim: tl.constexpr, num_slots: tl.constexpr,
    scale: tl.constexpr, overlaps: tl.constexpr,
):  # fmt: skip
    """One head of one image; `scale` is of the scores, and makes them exponents of 2."""
    if overlaps:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)  # of the caches, which may have more than 2^31 elements
    image, head = row // num_heads, row % num_heads
    place = tl.load(place).to(tl.int32)
    channels, slots = tl.arange(0, padded_dim), tl.arange(0, num_slots)
    is_channel = channels < head_dim
    keys += row * num_places * head_dim
    values += row * num_places * head_dim
    # A block of the past is on its way while what came before it is used: what counts is the number of bytes under way
    elements = slots[:, None] * head_dim + channels[None, :]
    mask = (slots < place)[:, None] & is_channel[None, :]
    past_keys = tl.load(keys + elements, mask=mask, other=0.0)
    past_values = tl.load(values + elements, mask=mask, other=0.0)

    if overlaps:  # the place and the past are those of the step before, long ended
        tl.extra.cuda.gdc_wait()
    projected += (image * 3 * num_heads + head) * head_dim
    query = tl.load(projected + channels, mask=is_channel, other=0.0)
    key = tl.load(projected + num_heads * head_dim + channels, mask=is_channel, other=0.0)
    value = tl.load(projected + 2 * num_heads * head_dim + channels, mask=is_channel, other=0.0)
    if rotations is not None:
        partners = (channels + head_dim // 2) % head_dim
        partner_query = tl.load(projected + partners, mask=is_channel, other=0.0)
        partner_key = tl.load(projected + num_heads * head_dim + partners, mask=is_channel, other=0.0)
        rotations += place * 2 * head_dim
        cos = tl.load(rotations + channels, mask=is_channel, other=0.0)
        sin = tl.load(rotations + head_dim + channels, mask=is_channel, other=0.0)
        query = (query.to(tl.float32) * cos + partner_query.to(tl.float32) * sin).to(query.dtype)
        key = (key.to(tl.float32) * cos + partner_key.to(tl.float32) * sin).to(key.dtype)
    tl.store(keys + place * head_dim + channels, key, mask=is_channel)
    tl.store(values + place * head_dim + channels, value, mask=is_channel)

    # Each slot of a block has a softmax of its own, over every num_slots-th place: threads meet once, after the loop.
    # All start from the score of the token itself, which comes from registers, so that no maximum is ever infinite.
    query = query.to(tl.float32) * scale
    own_score = tl.sum(query * key.to(tl.float32), axis=0)
    largest = tl.zeros((num_slots,), tl.float32) + own_score
    total = tl.zeros((num_slots,), tl.float32)
    weighted = tl.zeros((num_slots, padded_dim), tl.float32)
    for first in range(0, place, num_slots):
        elements += num_slots * head_dim
        mask = (first + num_slots + slots < place)[:, None] & is_channel[None, :]
        next_keys = tl.load(keys + elements, mask=mask, other=0.0)
        next_values = tl.load(values + elements, mask=mask, other=0.0)
        scores = tl.sum(query[None, :] * past_keys.to(tl.float32), axis=1)
        scores = tl.where(first + slots < place, scores, -float("inf"))
        larger = tl.maximum(largest, scores)
        weights, shrink = tl.exp2(scores - larger), tl.exp2(largest - larger)
        total = total * shrink + weights
        weighted = weighted * shrink[:, None] + weights[:, None] * past_values.to(tl.float32)
        largest, past_keys, past_values = larger, next_keys, next_values
    overall = tl.max(largest, axis=0)
    shrink, own_weight = tl.exp2(largest - overall), tl.exp2(own_score - overall)
    total = tl.sum(total * shrink, axis=0) + own_weight
    weighted = tl.sum(weighted * shrink[:, None], axis=0) + own_weight * value.to(tl.float32)
    tl.store(mixed + row * head_dim + channels, weighted / total, mask=is_channel)


@triton.jit(do_not_specialize=["num_images"])
def _project(
    x, norm_weight, weight, out, eps, num_images, num_columns: tl.constexpr, dim: tl.constexpr,
    padded_dim: tl.constexpr, num_rows: tl.constexpr, gated: tl.constexpr, adds: tl.constexpr, overlaps: tl.constexpr,
):  # fmt: skip
    """num_rows columns of the product."""
    if overlaps:
        tl.extra.cuda.gdc_launch_dependents()
    columns = tl.program_id(0) * num_rows + tl.arange(0, num_rows)
    channels = tl.arange(0, padded_dim)
    is_column, is_channel = columns < num_columns, channels < dim
    elements, mask = columns[:, None] * dim + channels[None, :], is_column[:, None] & is_channel[None, :]
    rows = tl.load(weight + elements, mask=mask, other=0.0)
    if gated:
        other_rows = tl.load(weight + num_columns * dim + elements, mask=mask, other=0.0)
    if norm_weight is not None:
        scale = tl.load(norm_weight + channels, mask=is_channel, other=0.0).to(tl.float32)
    if overlaps:
        tl.extra.cuda.gdc_wait()
    for image in range(num_images):
        row = tl.load(x + image * dim + channels, mask=is_channel, other=0.0).to(tl.float32)
        if norm_weight is not None:
            row = row * tl.rsqrt(tl.sum(row * row, axis=0) / dim + eps) * scale
        row = row.to(rows.dtype).to(tl.float32)[None, :]
        product = tl.sum(rows.to(tl.float32) * row, axis=1).to(rows.dtype).to(tl.float32)
        if gated:
            other = tl.sum(other_rows.to(tl.float32) * row, axis=1).to(rows.dtype).to(tl.float32)
            product = product * tl.sigmoid(product) * other
        place = out + image * num_columns + columns
        if adds:
            product += tl.load(place, mask=is_column, other=0.0).to(tl.float32)
        tl.store(place, product, mask=is_column)


@triton.jit
def _add_norm(x, branch, weight, normalised, eps, dim: tl.constexpr, padded_dim: tl.constexpr, overlaps: tl.constexpr):
    """One row."""
    if overlaps:
        tl.extra.cuda.gdc_launch_dependents()
    channels = tl.arange(0, padded_dim)
    is_channel = channels < dim
    elements = tl.program_id(0).to(tl.int64) * dim + channels
    scale = tl.load(weight + channels, mask=is_channel, other=0.0)
    if overlaps:
        tl.extra.cuda.gdc_wait()
    stream = tl.load(x + elements, mask=is_channel, other=0.0)
    added = tl.load(branch + elements, mask=is_channel, other=0.0)
    stream = (stream.to(tl.float32) + added.to(tl.float32)).to(stream.dtype)
    tl.store(x + elements, stream, mask=is_channel)
    stream = stream.to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(stream * stream, axis=0) / dim + eps)
    tl.store(normalised + elements, stream * inverse_rms * scale.to(tl.float32), mask=is_channel)


@triton.jit
def _silu_mul(gate_up, product, ffn_dim: tl.constexpr, num_columns: tl.constexpr, overlaps: tl.constexpr):
    """num_columns of one row."""
    if overlaps:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    image = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * num_columns + tl.arange(0, num_columns)
    is_column = columns < ffn_dim
    gate = tl.load(gate_up + image * 2 * ffn_dim + columns, mask=is_column, other=0.0).to(tl.float32)
    up = tl.load(gate_up + image * 2 * ffn_dim + ffn_dim + columns, mask=is_column, other=0.0).to(tl.float32)
    tl.store(product + image * ffn_dim + columns, gate * tl.sigmoid(gate) * up, mask=is_column)

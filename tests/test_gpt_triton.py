"""The kernels of a GPT's layer and the decoder made of them: on a GPU where there is one, else in the interpreter."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed; torch's GPU builds bring it, else it takes 1 GB")
from prior import gpt, gpt_triton
from prior.base import CodeSpec
from prior.gpt import GPT, GPTConfig, rotate
from prior.gpt_cuda_decoder import StaticDecoder, TorchLayer, _by_place, layer_for
from prior.gpt_triton import FewRowsLayer, FusedLayer, add_norm, attend, project, silu_mul
from tests.gpt_steps import check_steps

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # conftest.py turns the interpreter on
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


FLOAT32 = 2**-24  # half the relative distance of neighbouring numbers
# for `int` of an array in the interpreter of Triton 3.6
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")


def rounding(dtype: torch.dtype) -> float:
    """The largest relative error of a number in this dtype: the interpreter cuts bits off where a GPU rounds."""
    cuts = DEVICE == "cpu" and dtype == torch.bfloat16
    return torch.finfo(dtype).eps / (1 if cuts else 2)


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def tables(angles: torch.Tensor) -> torch.Tensor:
    return torch.stack([angles.cos(), angles.sin()])


def check_attention(projected, table, place, keys, values):
    """Against float64, but for the rotation's result; all but the place itself stays what it was."""
    batch, num_heads, _, head_dim = keys.shape
    query, key, value = projected.view(batch, 3, num_heads, 1, head_dim).unbind(1)
    if table is not None:
        query, key = (rotate(part, table[:, place : place + 1]) for part in (query, key))
    before = keys.clone(), values.clone()
    rotations = None if table is None else _by_place(table)
    mixed = attend(projected, rotations, torch.tensor([place], device=DEVICE), keys, values)
    assert mixed.dtype == keys.dtype

    others = torch.arange(keys.shape[2], device=DEVICE) != place
    for cache, old in zip((keys, values), before):
        torch.testing.assert_close(cache[:, :, others], old[:, :, others], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(values[:, :, place], value[:, :, 0])
    size = query.abs().amax() + key.abs().amax()
    torch.testing.assert_close(keys[:, :, [place]], key, rtol=rounding(keys.dtype), atol=4 * FLOAT32 * size.item())

    query, past, values = (x.double() for x in (query, keys[:, :, : place + 1], values[:, :, : place + 1]))
    weights = torch.softmax(query @ past.mT / head_dim**0.5, dim=-1)
    expected = (weights @ values).flatten(1)
    # An error of scores is a relative one of weights, above and below the fraction. A score's is that of its head_dim
    # products and some more (Higham 2002, section 4.2), a rotated query's among them
    of_scores = (head_dim + 8) * FLOAT32 * (query.abs() @ past.abs().mT / head_dim**0.5).amax()
    float32 = 2 * (of_scores + (place + 8) * FLOAT32) * (weights @ values.abs()).flatten(1)
    assert ((mixed.double() - expected).abs() <= float32 + rounding(keys.dtype) * expected.abs()).all()


@DTYPES
@pytest.mark.parametrize(("elements", "few_programs"), [(1, 1), (4, 1000), (32, 256)])  # blocks of few places and many
@settings(max_examples=20)
@given(
    batch=st.integers(1, 4),
    num_heads=st.integers(1, 3),
    head_dim=st.sampled_from([4, 16, 24, 64]),
    num_places=st.integers(1, 90),
    where=st.sampled_from(["first", "second", "middle", "last"]),
    rotary=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_attention_is_that_of_torch(
    dtype, elements, few_programs, batch, num_heads, head_dim, num_places, where, rotary, seed
):
    place = {"first": 0, "second": min(1, num_places - 1), "middle": num_places // 2, "last": num_places - 1}[where]
    torch.manual_seed(seed)
    projected = random(batch, 3 * num_heads * head_dim, dtype=dtype)
    keys, values = random(2, batch, num_heads, num_places, head_dim, dtype=dtype)
    keys[:, :, place:] = values[:, :, place:] = torch.nan  # not filled yet
    table = tables(9 * torch.randn(num_places, head_dim // 2, device=DEVICE))
    if dtype != torch.float32:  # quarter turns, which are exact: else how a query is rounded hangs on its last bit
        table = tables(torch.pi / 2 * torch.randint(4, table.shape[1:], device=DEVICE)).round()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt_triton, "ELEMENTS", elements)
        patch.setattr(gpt_triton, "FEW_PROGRAMS", few_programs)
        check_attention(projected, table if rotary else None, place, keys, values)


def test_rotations_in_half_precision_are_rounded_once():
    projected, (keys, values) = random(3, 3 * 48, dtype=torch.bfloat16), random(2, 3, 2, 5, 24, dtype=torch.bfloat16)
    table = tables(9 * torch.randn(5, 12, device=DEVICE))
    exact = rotate(projected.view(3, 3, 2, 1, 24)[:, 1].double(), table[:, 2:3].double())
    attend(projected, _by_place(table), torch.tensor([2], device=DEVICE), keys, values)
    torch.testing.assert_close(keys[:, :, 2:3].double(), exact, rtol=rounding(torch.bfloat16), atol=32 * FLOAT32)


@DTYPES
@pytest.mark.parametrize("head_dim", [16, 24, 64])
def test_a_score_far_above_all_others_takes_all_and_does_not_overflow(dtype, head_dim):
    keys, values = random(2, 2, 1, 40, head_dim, dtype=dtype)
    projected = 1000 * random(2, 3 * head_dim, dtype=dtype)
    keys[:, 0, 7] = projected[:, :head_dim]
    projected[:, head_dim : 2 * head_dim] = 0
    mixed = attend(projected, None, torch.tensor([39], device=DEVICE), keys, values)
    assert torch.equal(mixed, values[:, 0, 7])


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
@DTYPES
@pytest.mark.parametrize("shape", [(1, 16), (3, 24), (4, 768)])
def test_the_sum_and_its_norm_are_those_of_torch(stream, dtype, shape):
    x, branch = random(*shape, dtype=stream), random(*shape, dtype=dtype)
    weight = random(shape[1], dtype=stream)
    total = x.double() + branch.double()
    normalised = add_norm(x, branch, weight, 1e-3)
    torch.testing.assert_close(x.double(), total, rtol=rounding(stream) + FLOAT32, atol=1e-30)
    assert normalised.dtype == dtype
    expected = F.rms_norm(x.double(), shape[1:], weight.double(), 1e-3)
    float32 = (shape[1] + 6) * FLOAT32
    torch.testing.assert_close(normalised.double(), expected, rtol=rounding(dtype) + float32, atol=1e-30)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 5), (3, 1024), (2, 1500)])
def test_gated_values_are_those_of_torch(dtype, shape):
    gate, up = random(2, *shape, dtype=dtype) * 4
    expected = F.silu(gate.double()) * up.double()
    # the exponential's argument is rounded before, and its error grows with it
    torch.testing.assert_close(
        silu_mul(torch.cat([gate, up], dim=1)).double(), expected, rtol=rounding(dtype) + 40 * FLOAT32, atol=1e-30
    )


@DTYPES
@pytest.mark.parametrize(("batch", "num_columns", "dim"), [(1, 5, 16), (3, 2050, 24), (8, 12, 768)])
def test_products_of_few_rows_are_those_of_torch(dtype, batch, num_columns, dim):
    x, weight = random(batch, dim, dtype=torch.float32), random(num_columns, dim, dtype=dtype)
    norm = torch.nn.RMSNorm(dim, eps=1e-3, device=DEVICE)
    norm.weight.data = random(dim, dtype=torch.float32)
    stream = random(batch, num_columns, dtype=torch.float32)
    for layer in (None, norm):
        row = x.double() if layer is None else F.rms_norm(x.double(), (dim,), norm.weight.double(), 1e-3)
        exact, size = row @ weight.double().T, row.abs() @ weight.double().abs().T
        # of the row that is multiplied, of the sum (Higham 2002, section 4.2), and of the result
        bound = (rounding(dtype) + (dim + 10) * FLOAT32) * size + rounding(dtype) * exact.abs()
        product = project(x, weight, norm=layer)
        assert product.dtype == dtype
        assert ((product.double() - exact).abs() <= bound).all()
        added = stream.clone()
        assert project(x, weight, norm=layer, add_to=added) is added
        assert ((added.double() - (stream.double() + exact)).abs() <= bound + FLOAT32 * added.abs()).all()


@DTYPES
@pytest.mark.parametrize(("batch", "ffn_dim", "dim"), [(1, 5, 16), (3, 2050, 24)])
def test_gated_products_of_few_rows_are_products_that_are_gated(dtype, batch, ffn_dim, dim):
    x, weight = random(batch, dim, dtype=dtype), random(2 * ffn_dim, dim, dtype=dtype) / dim**0.5
    x = x + 1  # the kernel just before is not that of the weight
    expected = silu_mul(project(x, weight)).double()
    # other threads add up other parts of a sum, whose rounding may then differ by one
    close = {"rtol": 4 * rounding(dtype) + 40 * FLOAT32, "atol": 4 * rounding(dtype)}
    torch.testing.assert_close(project(x, weight, gated=True).double(), expected, **close)


def decoder_of(layer: type) -> type[StaticDecoder]:
    """A `GraphDecoder` without the graph, on any device."""

    class FusedDecoder(StaticDecoder):
        def __init__(self, *arguments):
            super().__init__(*arguments, layer)

    return FusedDecoder


LAYERS = pytest.mark.parametrize("layer", [FusedLayer, FewRowsLayer])


def make(positions: str, **options) -> GPT:
    spec = CodeSpec(((2, 2), (3, 3)), (5, 4))
    sizes = {"num_layers": 2, "num_heads": 2, "hidden_dim": 24, "positions": positions}
    return GPT(GPTConfig(spec=spec, **sizes, **options)).eval().to(DEVICE)


@pytest.mark.parametrize("positions", ["rotary", "rotary_2d", "learned"])
@pytest.mark.parametrize("batch", [1, 3])
@LAYERS
def test_fused_layers_give_the_logits_of_the_whole_pass(positions, batch, layer, monkeypatch):
    monkeypatch.setattr(gpt, "DECODERS", (decoder_of(layer),))
    monkeypatch.setattr(gpt_triton, "ELEMENTS", 1)
    check_steps(make(positions, num_classes=3), torch.arange(batch, device=DEVICE))


@LAYERS
def test_weights_may_lie_in_memory_in_any_order(layer, monkeypatch):
    monkeypatch.setattr(gpt, "DECODERS", (decoder_of(layer),))
    prior = make("rotary", num_classes=3)
    for block in prior.model.layers:
        for projection in (block.self_attn.o_proj, block.mlp.down_proj):
            transposed = torch.nn.init.normal_(projection.weight.detach(), std=0.5).T.contiguous().T
            projection.weight = torch.nn.Parameter(transposed)
            assert not projection.weight.is_contiguous()
    check_steps(prior, torch.arange(2, device=DEVICE))


@LAYERS
def test_fused_layers_go_on_after_a_caption_and_do_not_see_what_memory_held_before(layer, monkeypatch):
    monkeypatch.setattr(gpt, "DECODERS", (decoder_of(layer),))
    torch.use_deterministic_algorithms(True)  # new memory is full of NaN then
    try:
        check_steps(make("rotary_2d", text_vocab_size=7, max_text_length=5), torch.randint(7, (3, 5), device=DEVICE))
    finally:
        torch.use_deterministic_algorithms(False)


@torch.no_grad()
@pytest.mark.parametrize("autocast", [True, False])
@LAYERS
def test_fused_layers_keep_the_dtypes_of_torch(autocast, layer):
    blocks = make("rotary").model.layers.to(torch.float32 if autocast else torch.bfloat16)
    rotations, place = _by_place(tables(torch.randn(7, 6, device=DEVICE))), torch.tensor([4], device=DEVICE)
    keys, values = random(2, 2, 3, 2, 7, 12, dtype=torch.bfloat16)
    x, head = random(3, 24, dtype=blocks[0].input_layernorm.weight.dtype), random(9, 24, dtype=torch.bfloat16)
    results = []
    for kind in (TorchLayer, layer):
        layers = [
            kind(block, blocks[0].input_layernorm, SimpleNamespace(keys=k, values=v, length=4, max_length=7), rotations)
            for block, k, v in zip(blocks, keys.clone(), values.clone())
        ]
        results.append(kind.through(layers, x.clone(), place, head))
    # some roundings of bfloat16, which keeps 8 bits
    expected, found = results
    torch.testing.assert_close(found, expected, rtol=0, atol=4 * 2**-8 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("batch", "layer"), [(gpt_triton.FEW_ROWS, FewRowsLayer), (gpt_triton.FEW_ROWS + 1, FusedLayer)]
)
def test_few_images_have_layers_of_their_own(batch, layer):
    assert layer_for(torch.zeros(batch, 1, 1, 1)) is layer
    assert layer_for(torch.zeros(batch, 1, 1, 1, dtype=torch.float64)) is TorchLayer


LOADS_OF_A_GPU = r"""
import re
import triton
from triton.backends.compiler import GPUTarget
from prior import gpt_triton

def compiled(kernel, types, constants, num_warps=4):
    pointers = [kernel.arg_names.index(name) for name, kind in types.items() if kind.startswith("*")]
    aligned = {(pointer,): [["tt.divisibility", 16]] for pointer in pointers}
    types = types | dict.fromkeys(constants, "constexpr")
    source = triton.compiler.ASTSource(kernel, types, constants, aligned)
    options = {"enable_fp_fusion": True, "num_warps": num_warps}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]

tensors = dict.fromkeys(("projected", "keys", "values", "mixed"), "*bf16") | {"place": "*i64", "num_places": "i32"}
sizes = {"rotations": None, "num_heads": 12, "head_dim": 64, "padded_dim": 64, "scale": 0.18, "overlaps": False}
for num_warps in (gpt_triton.NUM_WARPS, gpt_triton.NUM_WARPS_OF_FEW):
    slots = num_warps * gpt_triton.ELEMENTS * 32 // 64
    text = compiled(gpt_triton._attend, tensors, sizes | {"num_slots": slots}, num_warps)
    loop = re.search(r"\n(\S+):[^\n]*\.lr\.ph.*?bra\s+\1", text, re.DOTALL)[0]
    print(*(len(re.findall(what, loop)) for what in (r"ld\.global\.v4\.b32", r"ld\.global", r"bar\.sync|\.local")))
tensors = {"x": "*bf16", "branch": "*bf16", "weight": "*bf16", "normalised": "*bf16", "eps": "fp32"}
texts = [compiled(gpt_triton._add_norm, tensors, {"dim": 768, "padded_dim": 1024, "overlaps": False})]
tensors, sizes = {"gate_up": "*bf16", "product": "*bf16"}, {"ffn_dim": 2816, "num_columns": gpt_triton.COLUMNS}
texts.append(compiled(gpt_triton._silu_mul, tensors, sizes | {"overlaps": False}))
tensors = {"x": "*bf16", "norm_weight": "*bf16", "weight": "*bf16", "out": "*bf16", "eps": "fp32", "num_images": "i32"}
sizes = {"num_columns": 2304, "dim": 768, "padded_dim": 1024, "num_rows": 8, "gated": False, "adds": False}
texts.append(compiled(gpt_triton._project, tensors, sizes | {"overlaps": False}))
for text in texts:
    print(*(len(re.findall(what, text)) for what in (r"ld\.global\.v4\.b32", r"ld\.global", r"\.local")))
"""
OVERLAPS_OF_A_GPU = (
    LOADS_OF_A_GPU.partition("\ntensors")[0]
    + r"""
tensors = dict.fromkeys(("projected", "keys", "values", "mixed"), "*bf16") | {"place": "*i64", "num_places": "i32"}
sizes = {"rotations": None, "num_heads": 12, "head_dim": 64, "padded_dim": 64, "num_slots": 32, "scale": 0.18}
texts = [compiled(gpt_triton._attend, tensors, sizes | {"overlaps": True})]
tensors = {"x": "*bf16", "norm_weight": "*bf16", "weight": "*bf16", "out": "*bf16", "eps": "fp32", "num_images": "i32"}
sizes = {"num_columns": 2304, "dim": 768, "padded_dim": 1024, "num_rows": 8, "gated": False, "adds": True}
texts.append(compiled(gpt_triton._project, tensors, sizes | {"overlaps": True}))
tensors = {"x": "*bf16", "branch": "*bf16", "weight": "*bf16", "normalised": "*bf16", "eps": "fp32"}
texts.append(compiled(gpt_triton._add_norm, tensors, {"dim": 768, "padded_dim": 1024, "overlaps": True}))
tensors, sizes = {"gate_up": "*bf16", "product": "*bf16"}, {"ffn_dim": 2816, "num_columns": gpt_triton.COLUMNS}
texts.append(compiled(gpt_triton._silu_mul, tensors, sizes | {"overlaps": True}))
for text in texts:
    start, early, late = re.split(r"griddepcontrol\.(?:launch_dependents|wait)", text)
    print(*(len(re.findall(what, part)) for part in (start, early, late) for what in (r"ld\.global", r"st\.global")))
"""
)


def numbers_of(script: str, cache: Path) -> list[tuple[int, ...]]:
    """What a script prints that compiles kernels, on a line each."""
    pytest.importorskip("triton", minversion="3.3", reason="the compiler was asked in another way before")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [tuple(map(int, line.split())) for line in done.stdout.splitlines()]


def test_kernels_that_start_early_read_weights_and_the_past_before_they_wait_and_write_nothing(tmp_path):
    pytest.importorskip("triton.language.extra.cuda.gdc", reason="kernels cannot start early in older versions")
    attention, product, added, gated = numbers_of(OVERLAPS_OF_A_GPU, tmp_path)
    for counts in (attention, product, added, gated):
        assert counts[:2] == (0, 0)  # the next may start before anything is waited for
        assert counts[3] == 0
        assert counts[4] > 0
        assert counts[5] > 0
    assert attention[2] == 1 + 4  # the place; a thread's 16 elements of keys and of values, 8 at a time
    assert product[2] == 8 + 1  # the rows of a weight, and the norm's
    assert (added[2], gated[2]) == (1, 0)


@pytest.mark.parametrize(
    ("device", "capability", "hip", "overlaps"),
    [
        ("cpu", None, None, False),
        ("cuda:0", (8, 9), None, False),
        ("cuda:0", (9, 0), None, True),
        ("cuda:0", (9, 4), "6.2", False),
    ],
)
def test_kernels_start_early_from_hopper_on(device, capability, hip, overlaps, monkeypatch):
    pytest.importorskip("triton.language.extra.cuda.gdc", reason="kernels cannot start early in older versions")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    options = gpt_triton.options.__wrapped__(torch.device(device))
    assert (options["overlaps"], options.get("launch_pdl", False)) == (overlaps, overlaps)


def test_the_compiled_kernels_load_16_bytes_at_a_time_and_wait_for_no_other_thread_at_each_block(tmp_path):
    wide, loads, others = zip(*numbers_of(LOADS_OF_A_GPU, tmp_path))
    # a thread's 16 elements of keys and of values, 8 at a time; then one load for each tensor, and 8 rows of a weight
    assert wide == loads == (4, 4, 3, 2, 10)
    assert others == (0, 0, 0, 0, 0)

"""The search of the nearest entries as one kernel: on a GPU where there is one, else in Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizer.quantizers import EMAVQ
from tokenizer.quantizers import nearest as search
from tokenizer.quantizers.nearest import Search, nearest

pytest.importorskip("triton", reason="Triton is not installed; torch's GPU builds bring it, else it takes 1 GB")
from tokenizer.quantizers import nearest_triton
from tokenizer.quantizers.nearest_triton import fused_nearest

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # conftest.py turns the interpreter on
# for `int` of an array in the interpreter of older versions
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


@pytest.fixture(scope="module", autouse=True)
def split():
    """In the interpreter, which takes bfloat16 for whole numbers, its results are float32: with the same products."""
    split = nearest_triton._split
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setattr(nearest_triton, "_split", lambda *arguments: split(*arguments).float())
        yield split


def fused(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    vectors, codebook = vectors.to(DEVICE), codebook.to(DEVICE)
    return fused_nearest(vectors, codebook, codebook.square().sum(dim=1) / 2).cpu()


@pytest.fixture
def fused_here(monkeypatch):
    """Has `Search` use the kernel on the device that the tests run on."""
    monkeypatch.setattr(search, "FUSED_DEVICE", DEVICE)


@settings(max_examples=60)
@given(
    num_vectors=st.integers(0, 70),
    codebook_size=st.integers(1, 150),
    dim=st.sampled_from([1, 3, 8, 16, 40]),  # few, since each is compiled anew
    largest=st.sampled_from([1, 100]),
    rows=st.sampled_from([16, 32]),
    tensor_cores=st.booleans(),
    num_programs=st.integers(1, 12),
    most_numbers=st.sampled_from([1, 600, 2**24]),
    seed=st.integers(0, 2**32 - 1),
)
def test_whole_numbers_have_the_codes_of_the_cpu_ties_included(
    num_vectors, codebook_size, dim, largest, rows, tensor_cores, num_programs, most_numbers, seed
):
    generator = torch.Generator().manual_seed(seed)
    # exact in float32, in any order; the small ones tie often
    vectors = torch.randint(-largest, largest + 1, (num_vectors, dim), generator=generator).float()
    codebook = torch.randint(-largest, largest + 1, (codebook_size, dim), generator=generator).float()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("NARROW", "WIDE", "FLOAT32"):
            patch.setattr(nearest_triton, name, getattr(nearest_triton, name)._replace(rows=rows, columns=16, depth=16))
        patch.setattr(nearest_triton, "_has_bfloat16", lambda device: tensor_cores)
        patch.setattr(nearest_triton, "_num_programs", lambda device: num_programs)
        patch.setattr(nearest_triton, "MOST_NUMBERS", most_numbers)
        codes = fused(vectors, codebook)
    assert torch.equal(codes, nearest(vectors, codebook))


@pytest.mark.parametrize("num_programs", [1, 20])
@pytest.mark.parametrize("tensor_cores", [True, False])
@pytest.mark.parametrize("dim", [1, 8, 33, 64, 300])
def test_no_entry_is_nearer_than_the_one_found_by_more_than_rounding(dim, tensor_cores, num_programs, monkeypatch):
    monkeypatch.setattr(nearest_triton, "_has_bfloat16", lambda device: tensor_cores)
    monkeypatch.setattr(nearest_triton, "_num_programs", lambda device: num_programs)
    vectors, codebook = torch.randn(70, dim), torch.randn(600, dim)
    codes = fused(vectors, codebook)
    vectors, codebook = vectors.double(), codebook.double()
    half_squares = codebook.square().sum(dim=1) / 2
    distances = half_squares - vectors @ codebook.T
    # A float32 sum of n terms is off by n 2^-24 of their absolute values' sum at most (Higham 2002, section 4.2)
    rounding = (dim + 2) * 2**-24 * (half_squares + vectors.abs() @ codebook.abs().T)
    row = torch.arange(len(vectors))
    best = distances.argmin(dim=1)
    assert (distances[row, codes] - distances[row, best] <= rounding[row, codes] + rounding[row, best]).all()


@pytest.mark.parametrize("dim", [3, 8, 64])
def test_the_products_of_the_parts_are_those_of_the_numbers(dim, split):
    vectors, codebook = torch.randn(5, dim, device=DEVICE), torch.randn(7, dim, device=DEVICE)
    left = split(vectors, nearest_triton.VECTOR_PARTS, 16)
    right = split(codebook, nearest_triton.ENTRY_PARTS, 16)
    assert left.dtype == right.dtype == torch.bfloat16
    exact = vectors.double() @ codebook.double().T
    largest = vectors.double().abs() @ codebook.double().abs().T
    errors = (left.double() @ right.double().T - exact).abs()
    # each part is at most 2^-8 of the one before, and the three products left out are 2^-24, 2^-24 and 2^-32
    assert (errors <= 2.01 * 2**-24 * largest).all()
    assert (errors > 0).any()


@needs_gpu  # the interpreter does not compute with such numbers
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_codes_are_in_range_whatever_the_numbers(number):
    vectors, codebook = torch.randn(40, 3), torch.randn(67, 3)
    vectors[::2, 0] = number
    assert fused(vectors, codebook).max() < 67
    assert torch.equal(fused(vectors, codebook)[1::2], nearest(vectors[1::2], codebook))
    codebook[::2] = number
    assert 0 <= fused(vectors, codebook).min() <= fused(vectors, codebook).max() < 67


@pytest.mark.usefixtures("fused_here")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_search_hands_the_kernel_what_it_needs(mode, dtype):
    vectors = torch.randint(-9, 10, (5, 40), device=DEVICE).to(dtype).T
    codebook = torch.randint(-9, 10, (5, 12), device=DEVICE).to(dtype).T.requires_grad_()
    with mode(), torch.autocast(DEVICE, torch.bfloat16):
        found = Search(codebook)
        codes = found(vectors).cpu(), found(vectors[:3]).cpu()
    assert found.fused is torch.ops.tessera.nearest
    expected = nearest(vectors.cpu(), codebook.detach().cpu())
    assert torch.equal(codes[0], expected)
    assert torch.equal(codes[1], expected[:3])


@pytest.mark.usefixtures("fused_here")
def test_a_training_step_is_that_without_the_kernel(monkeypatch):
    h = torch.randint(-3, 4, (2, 5, 4, 4), device=DEVICE).float().requires_grad_()
    results = []
    for device in (DEVICE, "nowhere"):
        monkeypatch.setattr(search, "FUSED_DEVICE", device)
        torch.manual_seed(0)
        quantizer = EMAVQ(codebook_size=7, code_dim=5, init="data").to(DEVICE)
        quantized = quantizer(h)
        gradient = torch.autograd.grad(quantized.z.sum() + quantized.losses["commitment"], h)
        quantizer.after_step()
        results.append((quantized.codes[0], *gradient, quantizer.codebook))
    assert all(torch.equal(one, other) for one, other in zip(*results))


@pytest.mark.usefixtures("fused_here")
def test_a_quantizer_is_one_graph_for_torch_compile():
    quantizer = EMAVQ(codebook_size=7, code_dim=5, init="normal").to(DEVICE)
    h = torch.randn(2, 5, 4, 4, device=DEVICE)
    expected = quantizer(h)  # which also finds that the codebook is initialised
    compiled = torch.compile(quantizer, backend="aot_eager", fullgraph=True)(h)
    assert torch.equal(compiled.codes[0], expected.codes[0])
    assert torch.equal(compiled.z, expected.z)


@pytest.mark.parametrize(("shared_memory", "num_stages"), [(232448, 4), (101376, 3), (65536, 2), (100, 1)])
def test_as_many_loads_are_under_way_as_there_is_room_for(shared_memory, num_stages, monkeypatch):
    assert nearest_triton._shared_memory(torch.device(DEVICE, 0)) > 2**15
    monkeypatch.setattr(nearest_triton, "_shared_memory", lambda device: shared_memory)
    assert nearest_triton._fitting(nearest_triton.WIDE, torch.device(DEVICE)).num_stages == num_stages


PRODUCTS_OF_A_GPU = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from tokenizer.quantizers import nearest_triton
tiles, factors = getattr(nearest_triton, sys.argv[1]), sys.argv[2]
names = ("left", "right", "vectors", "codebook", "half_squares", "codes", "scores")
types = dict.fromkeys(names, "*fp32") | {"left": factors, "right": factors, "codes": "*i64"}
types |= dict.fromkeys(("num_vectors", "codebook_size", "columns_of_part"), "i32")
dim = 8 if tiles is nearest_triton.NARROW else 64
width = -(-(6 if factors == "*bf16" else 1) * dim // tiles.depth) * tiles.depth
constants = {"dim": dim, "width": width, "tile_dim": dim, "group": nearest_triton.GROUP}
constants |= {"tile_rows": tiles.rows, "tile_columns": tiles.columns, "tile_depth": tiles.depth}
source = triton.compiler.ASTSource(nearest_triton._search, types | dict.fromkeys(constants, "constexpr"), constants)
options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
text = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
print(text.count("fma.rn.f32"), text.count("tf32"), text.count("wgmma.mma_async"), text.count("f32.bf16.bf16"))
"""


def products_of_a_gpu(folder, *arguments: str) -> list[int]:
    """How often the compiled kernel for a GPU has float32 products, TF32, tensor cores, and bfloat16 on those."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)}
    command = [sys.executable, "-c", PRODUCTS_OF_A_GPU, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [int(number) for number in done.stdout.split()]


@pytest.mark.parametrize("tiles", ["NARROW", "WIDE"])
def test_the_compiled_kernel_multiplies_parts_on_tensor_cores(tiles, tmp_path):
    _, tf32, tensor_cores, of_bfloat16 = products_of_a_gpu(tmp_path, tiles, "*bf16")
    assert tf32 == 0
    assert tensor_cores == of_bfloat16 > 0


def test_the_compiled_kernel_multiplies_in_float32_where_there_are_no_such_tensor_cores(tmp_path):
    products, *tensor_cores = products_of_a_gpu(tmp_path, "FLOAT32", "*fp32")
    assert products >= 64 * 64 * 16 / 128  # a tile's products, by 128 threads
    assert tensor_cores == [0, 0, 0]


def test_the_packages_do_not_import_triton():
    program = "import sys, tokenizer, prior, pipelines; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@needs_gpu
def test_no_memory_grows_with_vectors_times_entries():
    vectors, codebook = torch.randn(2**16, 64, device=DEVICE), torch.randn(2**14, 64, device=DEVICE)
    nearest(vectors, codebook)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    nearest(vectors, codebook)
    parts = 6 * 2 * (vectors.numel() + codebook.numel())  # bytes: six numbers of bfloat16 for each of float32
    # the codes and their scores are 2^20 bytes, all distances 2^32
    assert torch.cuda.max_memory_allocated() - before < parts + 2**22

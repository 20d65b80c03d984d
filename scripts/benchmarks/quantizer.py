"""Train step of a vector quantizer: forward and backward on a feature map, with the update of the codebook."""

from collections.abc import Callable
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Clock, compare, peak_memory
from benchmarks.peers import Peers, load
from benchmarks.report import Case, Report
from tokenizer.quantizers import EMAVQ
from tokenizer.quantizers.nearest import nearest

SIZES = {
    "quick": [(64, 16, 8)],
    "full": list(product((4096, 65536), (512, 1024, 8192, 16384), (8, 64, 256))),
}
# (side of the feature map) by number of vectors
SIDES = {64: 4, 4096: 16, 65536: 32}
# at which memory is measured too
MEMORY_SIZES = [(64, 16, 8), (65536, 1024, 64), (65536, 16384, 64), (65536, 16384, 256)]
OURS, FLOOR = "tessera EMA", "floor: bare GEMM"
# The search of a step, from a CUDA graph: all else of a step, and where entries are few the search too, takes a GPU
# less time than the processor takes to start it
SEARCH, DISTANCES = "part: tessera's search, from a graph", "part: torch.cdist and argmin, from a graph"
# N x K matrices of float32 that a step was found to hold at once; it is timed where they take no more than the largest
MATRICES = {
    "vector-quantize-pytorch EMA": 6, "vector-quantize-pytorch EMA cosine": 4, "diffusers gradient": 1.75,
    "rosinality EMA": 4, "taming gradient": 3, "ritheshkumar95 gradient": 2, DISTANCES: 1.75,
}  # fmt: skip
LARGEST_GB, LARGEST_GB_ON_GPU = 8, 40


class Problem:
    """A feature map (B, D, side, side) of N vectors in all, a gradient of the same shape, and a codebook (K, D)."""

    def __init__(self, num_vectors: int, codebook_size: int, dim: int):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device="cpu").to(torch.get_default_device())

        side = SIDES[num_vectors]
        shape = (num_vectors // side**2, dim, side, side)
        self.size = codebook_size, dim
        self.features = normal(*shape).requires_grad_()
        self.gradient = normal(*shape)
        self.codebook = normal(codebook_size, dim)

    def step(self, quantize: Callable, parameters=(), after: Callable = lambda: None) -> Callable:
        """The train step around `quantize`, which gives code vectors like the features, and a loss."""
        z, loss = quantize(self.features)
        # what a convolution hands back is laid out in memory as what it was given
        gradients = [torch.empty_like(z).copy_(self.gradient), torch.ones_like(loss)]
        inputs = [self.features, *parameters]

        def run():
            torch.autograd.grad(quantize(self.features), inputs, gradients)
            after()

        return run

    def vectors(self) -> Tensor:
        return self.features.detach().movedim(1, -1).flatten(0, -2).contiguous()


def ema_vq(problem: Problem, **options) -> EMAVQ:
    quantizer = EMAVQ(*problem.size, init="normal", **options)
    quantizer.codebook.copy_(problem.codebook)
    quantizer.cluster_sum.copy_(problem.codebook)
    return quantizer


def ours(problem: Problem) -> Callable:
    quantizer = ema_vq(problem)

    def quantize(features):
        output = quantizer(features)
        return output.z, output.losses["commitment"]

    return problem.step(quantize, after=quantizer.after_step)


def rosinality(problem: Problem, folder: str) -> Callable:
    quantizer = load(folder, "vqvae").Quantize(problem.size[1], problem.size[0])
    quantizer.embed.copy_(problem.codebook.T)
    quantizer.embed_avg.copy_(problem.codebook.T)
    quantizer.cluster_size.fill_(1)  # from its zero, entries not used at once become infinite

    def quantize(features):
        z, loss, _ = quantizer(features.permute(0, 2, 3, 1))
        return z.permute(0, 3, 1, 2), 0.25 * loss

    return problem.step(quantize)


def vector_quantize_pytorch(problem: Problem, cosine: bool) -> Callable:
    from vector_quantize_pytorch import VectorQuantize

    codebook_size, dim = problem.size
    quantizer = VectorQuantize(
        dim=dim, codebook_size=codebook_size, decay=0.99, commitment_weight=0.25, accept_image_fmap=True,
        use_cosine_sim=cosine, rotation_trick=False,
    )  # fmt: skip

    def quantize(features):
        z, _, loss = quantizer(features)
        return z, loss.sum()

    return problem.step(quantize)


def diffusers(problem: Problem) -> Callable:
    from diffusers.models.autoencoders.vae import VectorQuantizer

    quantizer = VectorQuantizer(*problem.size, beta=0.25, legacy=False)
    quantizer.embedding.weight.data.copy_(problem.codebook)

    def quantize(features):
        z, loss, _ = quantizer(features)
        return z, loss

    return problem.step(quantize, quantizer.parameters())


def taming(problem: Problem, folder: str) -> Callable:
    quantizer = load(folder, "taming.modules.vqvae.quantize").VectorQuantizer2(*problem.size, beta=0.25, legacy=False)
    quantizer.embedding.weight.data.copy_(problem.codebook)

    def quantize(features):
        z, loss, _ = quantizer(features)
        return z, loss

    return problem.step(quantize, quantizer.parameters())


def ritheshkumar95(problem: Problem, folder: str) -> Callable:
    quantizer = load(folder, "modules").VQEmbedding(*problem.size)
    quantizer.embedding.weight.data.copy_(problem.codebook)

    def quantize(features):
        z, z_gradient = quantizer.straight_through(features)
        return z, F.mse_loss(z_gradient, features.detach()) + 0.25 * F.mse_loss(features, z_gradient.detach())

    return problem.step(quantize, quantizer.parameters())


def floor(problem: Problem) -> Callable:
    """The products of the distances alone, in float32 and in tiles at which they are fast."""
    vectors, codebook = problem.vectors(), problem.codebook
    largest = (2048, 1024) if vectors.device.type == "cpu" else (8192, 16384)
    rows, columns = (min(length, len(matrix)) for length, matrix in zip(largest, (vectors, codebook)))
    tile = torch.empty(rows, columns)
    parts = [(part, entries.T) for part in vectors.split(rows) for entries in codebook.split(columns)]

    def run():
        for part, entries in parts:
            torch.mm(part, entries, out=tile)

    return run


def search(problem: Problem) -> Callable:
    vectors, codebook = problem.vectors(), problem.codebook
    return lambda: nearest(vectors, codebook)


def distances(problem: Problem) -> Callable:
    vectors, codebook = problem.vectors(), problem.codebook
    return lambda: torch.cdist(vectors, codebook).argmin(dim=1)


def from_graph(function: Callable) -> Callable:
    """The function, which returns nothing that is read, recorded on a GPU after a first call."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        function()
    return graph.replay


def build(name: str, size: tuple[int, int, int], folder: str | None = None) -> Callable:
    """The train step called `name`; at the top level of a module, so that a process of its own can make it."""
    problem = Problem(*size)
    makers = {
        OURS: ours,
        "vector-quantize-pytorch EMA": lambda p: vector_quantize_pytorch(p, cosine=False),
        "vector-quantize-pytorch EMA cosine": lambda p: vector_quantize_pytorch(p, cosine=True),
        "diffusers gradient": diffusers,
        FLOOR: floor,
        SEARCH: search,
        DISTANCES: distances,
    }
    if folder is None:
        return makers[name](problem)
    return {"rosinality EMA": rosinality, "taming gradient": taming, "ritheshkumar95 gradient": ritheshkumar95}[name](
        problem, folder
    )


def names(peers: Peers) -> dict[str, str | None]:
    """Candidates and the work trees that they are in."""
    found: dict[str, str | None] = {OURS: None}
    if peers.has("vector_quantize_pytorch"):
        found |= {"vector-quantize-pytorch EMA": None, "vector-quantize-pytorch EMA cosine": None}
    if peers.has("diffusers"):
        found["diffusers gradient"] = None
    for name, label in (("rosinality", "EMA"), ("taming", "gradient"), ("ritheshkumar95", "gradient")):
        if peers.has(name):
            found[f"{name} {label}"] = str(peers.folders[name])
    return {**found, FLOOR: None}


def exactness(size: tuple[int, int, int]) -> dict[str, float]:
    """How far codes and running averages are from those of the N x K matrix of distances as a whole."""
    problem = Problem(*size)
    vectors, codebook, codebook_size = problem.vectors(), problem.codebook, size[1]
    distances = torch.addmm(codebook.square().sum(dim=1) / 2, vectors, codebook.T, alpha=-1)
    codes = distances.argmin(dim=1)
    del distances
    quantizer = ema_vq(problem, revive_below=0.0)
    quantizer(problem.features)
    quantizer.after_step()
    # van den Oord et al. 2017, appendix A.1, after one step from N = share and m = share x entry; in float64
    share = len(vectors) / codebook_size
    sums = torch.zeros(codebook.shape, dtype=torch.float64).index_add_(0, codes, vectors.double())
    cluster_size = quantizer.decay * share + (1 - quantizer.decay) * codes.bincount(minlength=codebook_size)
    cluster_sum = quantizer.decay * share * codebook + (1 - quantizer.decay) * sums
    pairs = [(quantizer.cluster_size, cluster_size), (quantizer.cluster_sum, cluster_sum)]
    return {
        "codes that differ from the whole matrix's": int((codes != nearest(vectors, codebook)).sum()),
        "largest error of the running averages, of their largest entry": max(
            ((found - exact).abs().max() / exact.abs().max()).item() for found, exact in pairs
        ),
    }


def run(report: Report, peers: Peers, clock: Clock, rounds: int, sizes: str, memory_gb: float) -> None:
    for size in SIZES[sizes]:
        case = Case(dict(zip(("vectors", "codes", "dim"), size)))
        if not report.wants(case):
            continue
        matrix_gb = size[0] * size[1] * 4 / 1e9
        largest = LARGEST_GB_ON_GPU if clock.on_gpu else LARGEST_GB
        found = names(peers) | (dict.fromkeys((SEARCH, DISTANCES)) if clock.on_gpu else {})
        candidates = {name: folder for name, folder in found.items() if MATRICES.get(name, 0) * matrix_gb <= largest}
        with torch.device(clock.device):
            steps = {name: build(name, size, folder) for name, folder in candidates.items()}
            case.checks = exactness(size)
        for name in (SEARCH, DISTANCES):
            if name in steps:
                steps[name] = from_graph(steps[name])
        case.add(compare(steps, clock, rounds), references=(FLOOR, OURS))
        if memory_gb and size in MEMORY_SIZES:
            for name, folder in names(peers).items():
                case.peak_bytes[name] = peak_memory(
                    build, (name, size, folder), (name, SIZES["quick"][0], folder), memory_gb, clock.device
                )
        report.add(case)

"""Train steps of tokenizers: forward, backward, optimizer, codebooks. On a CPU, of a VQ-VAE-2; on a GPU, also of VQ-16
and of a DVAE++, each as it is and with the model compiled.
"""

import sys
from collections.abc import Callable
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Clock, compare, peak_memory
from benchmarks.peers import Peers, load
from benchmarks.quantizer import Problem
from benchmarks.quantizer import ours as quantizer_step
from benchmarks.report import Case, Report
from pipelines.objectives import TokenizerLoss
from pipelines.training import adamw
from pipelines.training_config import TrainingConfig
from tokenizer import VQVAE, VQVAE2, VQVAE2Config, VQVAEConfig
from tokenizer.base import Tokenizer
from tokenizer.dvaepp import DVAEPP, DVAEPPConfig

# batch, side of the images
SIZES = {"quick": [(2, 16)], "full": [(32, 32), (16, 64)]}
GPU_SIZES = {"quick": [(2, 16)], "full": [(32, 32)]}
CHANNELS, RESIDUAL, LATENT, CODES = 128, 32, 64, 512  # rosinality's own sizes
# batch, side of the images, channels, codes
VQ16_SIZES = {"quick": (2, 32, 32, 16), "full": (32, 256, 128, 16384)}
VQ16_DIM, VQ16_FACTOR = 8, 16
# batch, bits, chains, sweeps: of scripts/configs/dvaepp_mnist.yaml
DVAEPP_SIZES = {"quick": (4, 8, 8, 2), "full": (100, 200, 200, 5)}
OURS, QUANTIZER = "tessera", "part: the quantizer's step, not compiled"
# modes of torch.compile by what a candidate's name ends in
COMPILED, GRAPHS = " compiled", " in CUDA graphs"
MODES = {"": None, COMPILED: "default", GRAPHS: "reduce-overhead"}
WARM_UP = 6  # calls: it is compiled at two or three, where numbers change; a CUDA graph is recorded at the second after


def compiled(model: nn.Module, mode: str | None) -> nn.Module:
    """The model, to be compiled at its first call unless `mode` is None, as TrainingConfig.compile does."""
    if mode is not None:
        torch.compiler.reset()  # what was compiled for one batch would be compiled again for batches of any size
        model.compile(mode=mode)
    return model


def train_step(model: Tokenizer, images: Tensor, mode: str | None, dtype: torch.dtype | None = None) -> Callable:
    """The step of pipelines/training.py, without its surroundings.

    Args:
        images: (B, C, H, W).
        mode: see `compiled`.
        dtype: of autocast; None leaves it off.
    """
    objective = TokenizerLoss(model)
    objective.initialize({"image": images})
    compiled(objective.model, mode)
    optimizer = adamw(objective, TrainingConfig())
    steps = count()  # an equal number would be compiled as a constant

    def run():
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            losses = objective({"image": images}, next(steps))
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step()

    return run


def ours(batch: int, side: int, mode: str | None) -> Callable:
    quantizer = {"type": "ema_vq", "codebook_size": CODES, "code_dim": LATENT, "init": "normal"}
    network = {"type": "conv", "hidden_dim": CHANNELS, "residual_dim": RESIDUAL}
    config = VQVAE2Config(image_shape=(3, side, side), latent_dim=LATENT, network=network, quantizer=quantizer)
    return train_step(VQVAE2(config), torch.rand(batch, 3, side, side), mode)


def rosinality(batch: int, side: int, mode: str | None, folder: str) -> Callable:
    model = load(folder, "vqvae").VQVAE(channel=CHANNELS, n_res_channel=RESIDUAL, embed_dim=LATENT, n_embed=CODES)
    for quantizer in (model.quantize_t, model.quantize_b):
        quantizer.cluster_size.fill_(1)  # from its zero, entries not used at once become infinite
    compiled(model, mode)
    if mode is not None and folder not in sys.path:
        sys.path.append(folder)  # the compiler imports the modules of what it reads once more, by name
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    images = 2 * torch.rand(batch, 3, side, side) - 1

    def run():
        output, distance = model(images)
        (F.mse_loss(output, images) + 0.25 * distance.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def diffusers(batch: int, side: int, mode: str | None) -> Callable:
    from diffusers import VQModel

    model = VQModel(
        block_out_channels=(64, 128),
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=LATENT, num_vq_embeddings=CODES, vq_embed_dim=LATENT,
    )  # fmt: skip
    compiled(model, mode)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    images = 2 * torch.rand(batch, 3, side, side) - 1

    def run():
        output = model(images)
        (F.mse_loss(output.sample, images) + output.commit_loss).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def build(name: str, batch: int, side: int, folder: str | None, mode: str | None) -> Callable:
    torch.manual_seed(0)
    if folder is not None:
        return rosinality(batch, side, mode, folder)
    return {OURS: ours, "diffusers VQModel": diffusers}[name](batch, side, mode)


def half_precision() -> torch.dtype | None:
    """What GPTs and large tokenizers are trained in on a GPU; CPUs train in float32."""
    return None if torch.get_default_device().type == "cpu" else torch.bfloat16


def vq16(batch: int, side: int, channels: int, codes: int, mode: str | None = None) -> Callable:
    """A step of LlamaGen's VQ-16 (Sun et al. 2024, arXiv:2406.06525) at its sizes, without critic or perceptual loss.

    66.5 million parameters in place of 71.9: attention stands between the middle blocks alone, there also after each
    block of the lowest resolution. The codebook follows running averages here, and gradients there.
    """
    torch.manual_seed(0)
    network = {"type": "resnet", "hidden_dim": channels, "dim_multipliers": (1, 1, 2, 2, 4), "num_residual_blocks": 2}
    config = VQVAEConfig(
        image_shape=(3, side, side), downsample_factor=VQ16_FACTOR, latent_dim=2 * channels, network=network,
        quantizer={"type": "ema_vq", "codebook_size": codes, "code_dim": VQ16_DIM, "init": "normal"},
    )  # fmt: skip
    return train_step(VQVAE(config), torch.rand(batch, 3, side, side), mode, half_precision())


class VQ16Features(Problem):
    """What the quantizer of `vq16` is given: (B, D, side / 16, side / 16), as its convolution leaves them."""

    def __init__(self, batch: int, side: int, codes: int):
        shape = (batch, VQ16_DIM, side // VQ16_FACTOR, side // VQ16_FACTOR)
        self.size = codes, VQ16_DIM
        self.features, self.gradient = (
            torch.randn(shape, dtype=half_precision()).to(memory_format=torch.channels_last) for _ in range(2)
        )
        self.features.requires_grad_()
        self.codebook = torch.randn(codes, VQ16_DIM)


def vq16_quantizer(batch: int, side: int, channels: int, codes: int) -> Callable:
    torch.manual_seed(0)
    return quantizer_step(VQ16Features(batch, side, codes))


def dvaepp(batch: int, bits: int, chains: int, sweeps: int, mode: str | None = None) -> Callable:
    """A step of DVAE++ with one group of bits, 1~ (Vahdat et al. 2018, arXiv:1802.04920), on 28x28 pixels."""
    torch.manual_seed(0)
    prior = {"type": "rbm", "num_chains": chains, "num_sweeps": sweeps}
    config = DVAEPPConfig(
        image_shape=(1, 28, 28), num_groups=1, bits_per_group=bits, prior=prior, kl_warmup_steps=30000
    )
    return train_step(DVAEPP(config), torch.randint(2, (batch, 1, 28, 28)).float(), mode)


Makers = dict[str, tuple[Callable, tuple]]  # by candidate, a function of this module and its arguments


def in_modes(clock: Clock, name: str, modes: tuple[str, ...], make: Callable, *arguments) -> Makers:
    """The candidate `name` as it is and, on a GPU, in further modes."""
    endings = ("", *modes) if clock.on_gpu else ("",)
    return {name + ending: (make, (*arguments, MODES[ending])) for ending in endings}


def time_all(case: Case, clock: Clock, rounds: int, makers: Makers, references: tuple[str, ...]) -> dict[str, Callable]:
    """The candidates, after they were built and timed; see `warm_up` for those that are missing."""
    with torch.device(clock.device):
        candidates = {name: make(*arguments) for name, (make, arguments) in makers.items()}
    warm_up(case, candidates)
    case.add(compare(candidates, clock, rounds), references)
    return candidates


def warm_up(case: Case, candidates: dict[str, Callable]) -> None:
    """Calls what is compiled until it is compiled and recorded, and notes how much of it runs without CUDA graphs.

    What torch.compile cannot run is taken out and noted: it is a result, and should not cost the others theirs.
    """
    for name in [name for name in candidates if name.endswith((COMPILED, GRAPHS))]:
        counted = torch._dynamo.utils.counters["inductor"]
        skipped = counted["cudagraph_skips"]
        try:
            for _ in range(WARM_UP):
                candidates[name]()
        except (RuntimeError, AssertionError) as error:  # assertions are the compiler's own
            print(f"{name} is left out: {type(error).__name__}: {error}")
            case.checks[f"failures of {name}"] = 1
            del candidates[name]
        if name.endswith(GRAPHS):
            case.checks[f"CUDA graphs skipped, {name}"] = counted["cudagraph_skips"] - skipped


def measure_memory(case: Case, clock: Clock, makers: Makers, small: Makers, memory_gb: float) -> None:
    """Peaks of what was timed, but for CUDA graphs, which keep the memory that they once took."""
    if not memory_gb:
        return
    for name, (make, arguments) in makers.items():
        if name in case.seconds and not name.endswith(GRAPHS):
            # what is called first need not be compiled: libraries are the same
            first = small[name.removesuffix(COMPILED)][1]
            case.peak_bytes[name] = peak_memory(make, arguments, first, memory_gb, clock.device)


def vqvae2_makers(clock: Clock, peers: Peers, batch: int, side: int) -> Makers:
    makers = in_modes(clock, OURS, (COMPILED, GRAPHS), build, OURS, batch, side, None)
    if peers.has("rosinality"):
        folder = str(peers.folders["rosinality"])
        makers |= in_modes(clock, "rosinality", (GRAPHS,), build, "rosinality", batch, side, folder)
    if peers.has("diffusers"):
        makers |= in_modes(clock, "diffusers VQModel", (), build, "diffusers VQModel", batch, side, None)
    return makers


def run(report: Report, peers: Peers, clock: Clock, rounds: int, sizes: str, memory_gb: float) -> None:
    floors = report.head["floors"]
    if clock.on_gpu:
        batch, side, *_ = VQ16_SIZES[sizes]
        case = Case({"model": "VQ-16", "images": batch, "pixels": f"{side}x{side}"})
        if report.wants(case):
            run_vq16(case, clock, rounds, VQ16_SIZES[sizes], floors["bf16 GEMM GFLOP/s"], memory_gb)
            report.add(case)
    for batch, side in (GPU_SIZES if clock.on_gpu else SIZES)[sizes]:
        case = Case({"images": batch, "pixels": f"{side}x{side}"})
        if report.wants(case):
            run_vqvae2(case, peers, clock, rounds, batch, side, floors["GEMM GFLOP/s"], memory_gb)
            report.add(case)
    if clock.on_gpu:
        names = ("images", "bits", "chains", "sweeps")
        case = Case({"model": "DVAE++ 1~", **dict(zip(names, DVAEPP_SIZES[sizes]))})
        if report.wants(case):
            run_dvaepp(case, clock, rounds, DVAEPP_SIZES[sizes], memory_gb)
            report.add(case)


def run_vqvae2(
    case: Case, peers: Peers, clock: Clock, rounds: int, batch: int, side: int, gemm_gflops: float, memory_gb: float
) -> None:
    makers = vqvae2_makers(clock, peers, batch, side)
    candidates = time_all(case, clock, rounds, makers, references=(OURS, "rosinality"))
    case.checks["images per second"] = batch / case.seconds[OURS]
    rate = operations(candidates[OURS]) / 1e9 / case.seconds[OURS]
    case.checks["GFLOP/s"] = rate
    if not clock.on_gpu:  # there convolutions are TF32, the product is float32
        case.checks["of the rate of a bare GEMM"] = rate / gemm_gflops
    measure_memory(case, clock, makers, vqvae2_makers(clock, peers, 1, 16), memory_gb)


def run_vq16(case: Case, clock: Clock, rounds: int, size: tuple, gemm_gflops: float, memory_gb: float) -> None:
    """Numbers are those of the compiled step, where it was timed."""
    makers = in_modes(clock, OURS, (COMPILED,), vq16, *size)
    quantizer: Makers = {QUANTIZER: (vq16_quantizer, size)}
    candidates = time_all(case, clock, rounds, makers | quantizer, references=(OURS, OURS + COMPILED))
    seconds = case.seconds.get(OURS + COMPILED, case.seconds[OURS])
    rate = operations(candidates[OURS]) / 1e9 / seconds
    case.checks["images per second"] = size[0] / seconds
    case.checks["TFLOP/s"] = rate / 1e3
    case.checks["of the rate of a bare GEMM"] = rate / gemm_gflops
    case.checks["share of the step that the quantizer takes"] = case.seconds[QUANTIZER] / seconds
    small = in_modes(clock, OURS, (COMPILED,), vq16, *VQ16_SIZES["quick"])
    measure_memory(case, clock, makers, small, memory_gb)


def run_dvaepp(case: Case, clock: Clock, rounds: int, size: tuple, memory_gb: float) -> None:
    makers = in_modes(clock, OURS, (GRAPHS,), dvaepp, *size)
    time_all(case, clock, rounds, makers, references=(OURS,))
    case.checks["steps per second"] = 1 / min(case.seconds.values())
    small = in_modes(clock, OURS, (GRAPHS,), dvaepp, *DVAEPP_SIZES["quick"])
    measure_memory(case, clock, makers, small, memory_gb)


def operations(step: Callable) -> int:
    """Of the matrix products and convolutions of a step that is not compiled."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()

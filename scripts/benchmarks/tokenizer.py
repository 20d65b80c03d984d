"""Train step of a VQ-VAE-2 on 32x32 images: forward, backward, optimizer, codebooks."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Clock, compare, peak_memory
from benchmarks.peers import Peers, load
from benchmarks.report import Case, Report
from pipelines.objectives import TokenizerLoss
from pipelines.training import adamw
from pipelines.training_config import TrainingConfig
from tokenizer import VQVAE2, VQVAE2Config

# batch, side of the images
SIZES = {"quick": [(2, 16)], "full": [(32, 32), (16, 64)]}
CHANNELS, RESIDUAL, LATENT, CODES = 128, 32, 64, 512  # rosinality's own sizes
OURS = "tessera"


def ours(batch: int, side: int) -> Callable:
    """The step of pipelines/training.py, without its surroundings."""
    quantizer = {"type": "ema_vq", "codebook_size": CODES, "code_dim": LATENT, "init": "normal"}
    network = {"type": "conv", "hidden_dim": CHANNELS, "residual_dim": RESIDUAL}
    config = VQVAE2Config(image_shape=(3, side, side), latent_dim=LATENT, network=network, quantizer=quantizer)
    objective = TokenizerLoss(VQVAE2(config))
    optimizer = adamw(objective, TrainingConfig())
    images = torch.rand(batch, 3, side, side)

    def run():
        sum(objective({"image": images}, 0).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step()

    return run


def rosinality(batch: int, side: int, folder: str) -> Callable:
    model = load(folder, "vqvae").VQVAE(channel=CHANNELS, n_res_channel=RESIDUAL, embed_dim=LATENT, n_embed=CODES)
    for quantizer in (model.quantize_t, model.quantize_b):
        quantizer.cluster_size.fill_(1)  # from its zero, entries not used at once become infinite
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    images = 2 * torch.rand(batch, 3, side, side) - 1

    def run():
        output, distance = model(images)
        (F.mse_loss(output, images) + 0.25 * distance.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def diffusers(batch: int, side: int) -> Callable:
    from diffusers import VQModel

    model = VQModel(
        block_out_channels=(64, 128),
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=LATENT, num_vq_embeddings=CODES, vq_embed_dim=LATENT,
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    images = 2 * torch.rand(batch, 3, side, side) - 1

    def run():
        output = model(images)
        (F.mse_loss(output.sample, images) + output.commit_loss).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def build(name: str, batch: int, side: int, folder: str | None = None) -> Callable:
    torch.manual_seed(0)
    if folder is not None:
        return {"rosinality": rosinality}[name](batch, side, folder)
    return {OURS: ours, "diffusers VQModel": diffusers}[name](batch, side)


def run(report: Report, peers: Peers, clock: Clock, rounds: int, sizes: str, memory_gb: float) -> None:
    for batch, side in SIZES[sizes]:
        makers: dict[str, tuple] = {OURS: (OURS, batch, side)}
        if peers.has("rosinality"):
            makers["rosinality"] = ("rosinality", batch, side, str(peers.folders["rosinality"]))
        if peers.has("diffusers"):
            makers["diffusers VQModel"] = ("diffusers VQModel", batch, side)
        case = Case({"images": batch, "pixels": f"{side}x{side}"})
        if not report.wants(case):
            continue
        candidates = {label: build(*arguments) for label, arguments in makers.items()}
        case.add(compare(candidates, clock, rounds), references=(OURS, "rosinality"))
        case.checks["images per second"] = batch / case.seconds[OURS]
        with FlopCounterMode(display=False) as counter:
            candidates[OURS]()
        rate = counter.get_total_flops() / 1e9 / case.seconds[OURS]
        case.checks["GFLOP/s"] = rate
        case.checks["of the rate of a bare GEMM"] = rate / report.head["floors"]["GEMM GFLOP/s"]
        if memory_gb:
            for label, (name, _, _, *folder) in makers.items():
                case.peak_bytes[label] = peak_memory(build, makers[label], (name, 1, 16, *folder), memory_gb)
        report.add(case)

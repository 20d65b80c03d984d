"""What the training loop adds to a step of a small model, and how long it takes to import the library and to load; on
a GPU, the rate at which GPTs train.
"""

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Clock, Timing, compare
from benchmarks.peers import Peers
from benchmarks.report import Case, Report
from benchmarks.sampling import CLASSES, GPTS, Sizes, gpt_config
from pipelines.images import DataConfig, load_images
from pipelines.launch import make_accelerator
from pipelines.objectives import Objective, PriorLoss
from pipelines.training import Update, adamw, fit
from pipelines.training_config import TrainingConfig
from pipelines.two_stage import Pipeline
from prior.base import CodeSpec
from prior.gpt import GPT
from tokenizer import VQVAE, VQVAEConfig

# model, images, side of the square of codes, on a GPU
GPT_STEPS = {"quick": [("gpt", 2, 2)], "full": [("gpt 111M", 128, 16), ("gpt 343M", 64, 16)]}
GPT_STEP = "tessera"
STEPS = {"quick": (2, 4), "full": (50, 300)}  # before the first that is timed, and timed
BATCH, HIDDEN = 100, 200
LOOP, BARE = "tessera loop", "floor: forward, backward, AdamW"
# CPU and wall seconds of the import, then of the load beyond it
PROBE = """
import sys, time
start = time.process_time(), time.perf_counter()
from pipelines import Pipeline
imported = time.process_time(), time.perf_counter()
Pipeline.from_pretrained(sys.argv[1])
loaded = time.process_time(), time.perf_counter()
print(*(b - a for a, b in zip(start, imported)), *(b - a for a, b in zip(imported, loaded)))
"""


class Autoencoder(nn.Module):
    """D-200-200-200-200-D, small enough for whatever the loop adds to show."""

    def __init__(self, num_dims: int):
        super().__init__()
        sizes = [num_dims, HIDDEN, HIDDEN, HIDDEN, HIDDEN, num_dims]
        layers = [part for n, m in pairwise(sizes) for part in (nn.Linear(n, m), nn.Tanh())]
        self.layers = nn.Sequential(*layers[:-1])


class BinaryLoss(Objective):
    """Binary cross-entropy; `starts` are the times at which its training steps began."""

    def __init__(self, num_dims: int, clock: Clock):
        super().__init__()
        self.model = Autoencoder(num_dims)
        self.clock, self.starts = clock, []

    def forward(self, batch: dict, step: int | None = None) -> dict[str, Tensor]:
        if self.training:
            self.starts.append(self.clock())
        pixels = batch["image"].flatten(1)
        nll = F.binary_cross_entropy_with_logits(self.model.layers(pixels), pixels, reduction="none").sum(dim=1)
        return {"nll": nll.mean() if self.training else nll}


def data():
    """Digits of 28x28 pixels, binarised anew each epoch."""
    config = DataConfig(image_size=(28, 28), binarize="stochastic", validation_fraction=0.06)
    train = load_images(config, "train")
    return train, load_images(train.config, "validation")


def bare(clock: Clock, images, num_steps: int) -> list[float]:
    """The times at which the steps began; likewise of `loop`."""
    torch.manual_seed(0)
    objective = BinaryLoss(784, clock)
    optimizer = adamw(objective, TrainingConfig())
    batch = images.__getitems__([(index, 0) for index in range(BATCH)])
    for _ in range(num_steps):
        sum(objective(batch).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return objective.starts


def loop(clock: Clock, images, validation, num_steps: int) -> list[float]:
    torch.manual_seed(0)
    objective = BinaryLoss(784, clock)
    config = TrainingConfig(total_steps=num_steps, batch_size=BATCH, tracker="none", cpu=True)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):  # it says what it validates
        folder = Path(folder)
        updates = [Update("model", objective, adamw(objective, config))]
        accelerator = make_accelerator(config, folder)
        fit(accelerator, updates, images, validation, folder=folder, config=config, resolved={})
    return objective.starts


def gpt_step(sizes: Sizes, batch: int, side: int, compiled: bool) -> tuple[Callable, int]:
    """The step of pipelines/training.py for a GPT, without its surroundings, and the operations of its products.

    In bfloat16 on a GPU.
    """
    torch.manual_seed(0)
    objective = PriorLoss(GPT(gpt_config(sizes, side)))
    optimizer = adamw(objective, TrainingConfig())
    images = {"codes": [torch.randint(sizes.vocab, (batch, side, side))], "label": torch.arange(batch) % CLASSES}
    device = torch.get_default_device().type

    def run():
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            loss = sum(objective(images, 0).values())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with FlopCounterMode(display=False) as counter:
        run()
    if compiled:
        objective.model.compile()
    return run, counter.get_total_flops()


def start_up(folder: Path) -> list[float]:
    """See `PROBE`; in a process of its own, started here so that the library's folder is on its path."""
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(folder)], cwd=root, capture_output=True, text=True, check=True
    )
    return [float(number) for number in done.stdout.split()]


def save_pipeline(folder: Path) -> None:
    """A pipeline of the quickstart's kind: a VQ-VAE of 8x8 images and a GPT."""
    from pipelines.checkpoint import fingerprint
    from prior.gpt import GPTConfig

    config = VQVAEConfig(image_shape=(1, 8, 8), downsample_factor=2, network={"type": "conv", "hidden_dim": 64})
    tokenizer = VQVAE(config)
    spec = CodeSpec(tokenizer.spec.shapes, tokenizer.spec.vocab_sizes)
    prior = GPT(GPTConfig(spec=spec, num_classes=10, tokenizer_fingerprint=fingerprint(tokenizer)))
    Pipeline(tokenizer, prior, class_names=[str(digit) for digit in range(10)]).save_pretrained(folder)


def run(report: Report, peers: Peers, clock: Clock, rounds: int, sizes: str, memory_gb: float) -> None:
    if clock.on_gpu:
        for model, batch, side in GPT_STEPS[sizes]:
            case = Case({"model": model, "batch": batch, "codes": side * side})
            if report.wants(case):
                run_gpt(case, clock, rounds, model, batch, side, report.head["floors"]["bf16 GEMM GFLOP/s"])
                report.add(case)
        return
    case = Case({"model": "784-200-200-200-200-784", "batch": BATCH})
    if report.wants(case):
        run_loop(case, clock, rounds, *STEPS[sizes])
        report.add(case)
    case = Case({"what": "import and load"})
    if report.wants(case):
        run_start_up(case, rounds)
        report.add(case)


def run_loop(case: Case, clock: Clock, rounds: int, warmup: int, timed: int) -> None:
    images, validation = data()
    candidates = {LOOP: partial(loop, clock, images, validation), BARE: partial(bare, clock, images)}
    timings = {name: Timing([]) for name in candidates}
    order = list(candidates)
    for _ in range(rounds):
        for name in order:
            # A run's start, evaluation and end stay outside; the last timed step ends where one more begins
            starts = candidates[name](num_steps=warmup + timed + 1)
            timings[name].seconds.append((starts[-1] - starts[warmup]) / timed)
        order.reverse()
    case.add(timings, references=(LOOP, BARE))
    added = (case.seconds[LOOP] - case.seconds[BARE]) * 1e3
    case.checks["ms that the loop adds to a step, fresh binarisation of the batch included"] = added


def run_gpt(case: Case, clock: Clock, rounds: int, model: str, batch: int, side: int, gemm_gflops: float) -> None:
    with torch.device(clock.device):
        step, operations = gpt_step(GPTS[model], batch, side, compiled=clock.on_gpu)
    case.add(compare({GPT_STEP: step}, clock, rounds), references=())
    rate = operations / 1e9 / case.seconds[GPT_STEP]
    case.checks["codes per second"] = batch * side * side / case.seconds[GPT_STEP]
    case.checks["TFLOP/s"] = rate / 1e3
    case.checks["of the rate of a bare GEMM"] = rate / gemm_gflops


def run_start_up(case: Case, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_pipeline(Path(folder))
        starts = [start_up(Path(folder)) for _ in range(rounds)]
    names = ("CPU seconds of the import", "seconds of the import", "CPU seconds of from_pretrained beyond it",
             "seconds of from_pretrained beyond it")  # fmt: skip
    case.checks = dict(zip(names, map(statistics.median, zip(*starts))))

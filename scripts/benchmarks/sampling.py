"""Drawing codes: GPT with its cache, and PixelCNN and PixelSNAIL with theirs against whole passes for every code."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.measure import Clock, compare, peak_memory
from benchmarks.peers import Peers, load
from benchmarks.report import Case, Report
from prior.base import CodeSpec
from prior.gpt import GPT, GPTConfig
from prior.pixelcnn import PixelCNN, PixelCNNConfig
from prior.pixelsnail import PixelSNAIL, PixelSNAILConfig

# model, batch, side of the square of codes
SIZES = {
    "quick": [("gpt", 2, 2), ("pixelcnn", 2, 2), ("pixelsnail", 2, 2)],
    "full": [
        *[("gpt", batch, side) for batch, side in ((1, 16), (16, 8), (64, 8))],
        *[("pixelcnn", batch, side) for batch, side in ((1, 8), (16, 8), (64, 8), (16, 16))],
        *[("pixelsnail", batch, side) for batch, side in ((1, 8), (16, 8), (16, 16))],
    ],
    "gpu": [
        *[(model, batch, 16) for model in ("gpt 111M", "gpt 343M") for batch in (1, 256)],
        *[(model, batch, 16) for model in ("pixelcnn", "pixelsnail") for batch in (1, 256)],
    ],
}


class Sizes(NamedTuple):
    """Of a transformer."""

    layers: int
    heads: int
    dim: int
    ffn_dim: int
    vocab: int


GPTS = {
    "gpt": Sizes(layers=6, heads=6, dim=384, ffn_dim=1024, vocab=1024),
    # LlamaGen's B and L (Sun et al. 2024, arXiv:2406.06525)
    "gpt 111M": Sizes(layers=12, heads=12, dim=768, ffn_dim=2048, vocab=16384),
    "gpt 343M": Sizes(layers=24, heads=16, dim=1024, ffn_dim=2816, vocab=16384),
}
CLASSES = 10
OURS, NAIVE = "tessera", "tessera, a whole pass for every code"
FLOOR = "floor: weight matrices as bare products"


# Transformers. Each function gives one that draws (batch, side^2) codes.
# ------------------------------------------------------------------------------------------------


def dtype() -> torch.dtype:
    """What transformers compute in, on the device at hand."""
    return torch.float32 if torch.get_default_device().type == "cpu" else torch.bfloat16


def gpt_config(sizes: Sizes, side: int) -> GPTConfig:
    return GPTConfig(
        spec=CodeSpec(((side, side),), (sizes.vocab,)), num_classes=CLASSES, num_layers=sizes.layers,
        num_heads=sizes.heads, hidden_dim=sizes.dim, ffn_dim=sizes.ffn_dim, positions="rotary_2d",
    )  # fmt: skip


def gpt(sizes: Sizes, batch: int, side: int) -> Callable:
    prior, labels = GPT(gpt_config(sizes, side)).to(dtype()), torch.arange(batch) % CLASSES
    return lambda: prior.sample(batch, labels)


def gpt_floor(sizes: Sizes, batch: int, side: int) -> Callable:
    dim, ffn_dim = sizes.dim, sizes.ffn_dim
    layer = [(dim, dim)] * 4 + [(dim, ffn_dim)] * 2 + [(ffn_dim, dim)]
    weights = [torch.randn(shape[::-1], dtype=dtype()) for shape in [*layer * sizes.layers, (dim, sizes.vocab)]]
    inputs = {width: torch.randn(batch, width, dtype=dtype()) for width in (dim, ffn_dim)}

    @torch.no_grad()
    def run():
        for _ in range(side * side):
            for weight in weights:
                F.linear(inputs[weight.shape[1]], weight)

    return run


def huggingface(sizes: Sizes, batch: int, side: int, kind: str) -> Callable:
    import transformers

    transformers.logging.set_verbosity_error()
    if kind == "GPT2":
        config = transformers.GPT2Config(
            vocab_size=sizes.vocab, n_positions=side * side + 1, n_embd=sizes.dim, n_layer=sizes.layers,
            n_head=sizes.heads, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config).eval()
    else:
        config = transformers.LlamaConfig(
            vocab_size=sizes.vocab, hidden_size=sizes.dim, intermediate_size=sizes.ffn_dim,
            num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads, max_position_embeddings=side * side + 1,
            bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config).eval()
    model = model.to(dtype())
    start = (torch.arange(batch) % CLASSES)[:, None]
    mask = torch.ones_like(start)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": side * side, "attention_mask": mask}
    return lambda: model.generate(start, **options)


def llamagen(sizes: Sizes, batch: int, side: int, folder: str) -> Callable:
    models = load(folder, "autoregressive.models.gpt")
    generate = load(folder, "autoregressive.models.generate")
    torch.backends.cuda.sdp_kernel = lambda **options: nullcontext()  # deprecated in torch, and about GPUs
    arguments = models.ModelArgs(
        dim=sizes.dim, n_layer=sizes.layers, n_head=sizes.heads, vocab_size=sizes.vocab, block_size=side * side,
        num_classes=CLASSES,
    )  # fmt: skip
    model, labels = models.Transformer(arguments).to(dtype()).eval(), torch.arange(batch) % CLASSES
    return lambda: generate.generate(model, labels, side * side, temperature=1.0, top_k=0, top_p=1.0)


def taming(sizes: Sizes, batch: int, side: int, folder: str) -> Callable:
    import transformers

    if not hasattr(transformers, "top_k_top_p_filtering"):  # gone from transformers, and not called here
        transformers.top_k_top_p_filtering = None
    module = load(folder, "taming.modules.transformer.mingpt")
    model = module.GPT(sizes.vocab, side * side + 1, n_layer=sizes.layers, n_head=sizes.heads, n_embd=sizes.dim)
    model = model.to(dtype()).eval()
    start = (torch.arange(batch) % CLASSES)[:, None]
    return lambda: module.sample_with_past(start, model, side * side)


# Convolutional priors. "Naive" ones are timed by one pass, times the number of codes.
# ------------------------------------------------------------------------------------------------


def pixelcnn(batch: int, side: int, naive: bool = False) -> Callable:
    spec = CodeSpec(((side, side),), (512,))
    prior = PixelCNN(PixelCNNConfig(spec=spec, num_classes=CLASSES, hidden_dim=64, num_layers=15, kernel_size=3))
    return _whole_pass(prior, batch) if naive else _sample(prior, batch)


def pixelsnail(batch: int, side: int, naive: bool = False) -> Callable:
    spec = CodeSpec(((side, side),), (512,))
    config = PixelSNAILConfig(
        spec=spec, num_classes=CLASSES, hidden_dim=64, num_blocks=2, num_residual_blocks=4, kernel_size=5, num_heads=8
    )
    prior = PixelSNAIL(config)
    return _whole_pass(prior, batch) if naive else _sample(prior, batch)


def _sample(prior, batch: int) -> Callable:
    labels = torch.arange(batch) % CLASSES
    return lambda: prior.sample(batch, labels)


def _whole_pass(prior, batch: int) -> Callable:
    prior.eval()
    codes, labels = (
        tuple(torch.zeros(batch, *shape, dtype=torch.int64) for shape in prior.spec.shapes),
        torch.arange(batch),
    )
    return torch.no_grad()(lambda: prior.logits(codes, labels % CLASSES))


def ritheshkumar95(batch: int, side: int, folder: str) -> Callable:
    model = load(folder, "modules").GatedPixelCNN(input_dim=512, dim=64, n_layers=15, n_classes=CLASSES).eval()
    codes, labels = torch.zeros(batch, side, side, dtype=torch.int64), torch.arange(batch) % CLASSES
    return torch.no_grad()(lambda: model(codes, labels))


def rosinality(batch: int, side: int, folder: str) -> Callable:
    """One column of its sampler, which gives the model all rows so far for each code."""
    model = load(folder, "pixelsnail").PixelSNAIL([side, side], 512, 64, 5, 2, 4, 64).eval()
    codes = torch.zeros(batch, side, side, dtype=torch.int64)

    @torch.no_grad()
    def run():
        cache = {}
        for row in range(side):
            logits, cache = model(codes[:, : row + 1], cache=cache)
            torch.multinomial(logits[:, :, row, 0].softmax(dim=1), 1)

    return run


# Cases
# ------------------------------------------------------------------------------------------------


def build(name: str, model: str, batch: int, side: int, folder: str | None = None) -> Callable:
    torch.manual_seed(0)
    sizes = GPTS[model]
    if folder is not None:
        return {"LlamaGen": llamagen, "taming": taming}[name](sizes, batch, side, folder)
    if name.startswith("transformers"):
        return huggingface(sizes, batch, side, name.split()[1])
    return {OURS: gpt, FLOOR: gpt_floor}[name](sizes, batch, side)


def run(report: Report, peers: Peers, clock: Clock, rounds: int, sizes: str, memory_gb: float) -> None:
    for model, batch, side in SIZES["gpu" if clock.on_gpu and sizes == "full" else sizes]:
        case = Case({"model": model, "batch": batch, "codes": side * side})
        if not report.wants(case):
            continue
        if model in GPTS:
            run_gpt(case, peers, clock, rounds, model, batch, side, memory_gb)
        else:
            run_convolutional(case, peers, clock, rounds, model, batch, side)
        case.checks["codes per second"] = batch * side * side / case.seconds[OURS]
        report.add(case)


def run_gpt(
    case: Case, peers: Peers, clock: Clock, rounds: int, model: str, batch: int, side: int, memory_gb: float
) -> None:
    makers: dict[str, tuple] = {OURS: (OURS, model, batch, side)}
    if peers.has("transformers"):
        kinds = ("Llama",) if clock.on_gpu else ("Llama", "GPT2")  # the architecture that ours is
        labels = [f"transformers {kind} generate" for kind in kinds]
        makers |= {label: (label.removesuffix(" generate"), model, batch, side) for label in labels}
    for label, name in (("LlamaGen generate", "llamagen"), ("taming sample_with_past", "taming")):
        if peers.has(name):
            makers[label] = (label.split()[0], model, batch, side, str(peers.folders[name]))
    if not clock.on_gpu:  # there one by one they take longer to start than to compute
        makers[FLOOR] = (FLOOR, model, batch, side)
    with torch.device(clock.device):
        candidates = {label: build(*arguments) for label, arguments in makers.items()}
    case.add(compare(candidates, clock, rounds), references=(FLOOR, OURS))
    if FLOOR in makers:
        case.checks["fraction of the floor's speed"] = 1 / case.ratios[FLOOR][OURS][1]
    if memory_gb:
        for label, (name, _, _, _, *folder) in makers.items():
            small = (name, model, 1, 2, *folder)
            case.peak_bytes[label] = peak_memory(build, makers[label], small, memory_gb, clock.device)
        longer = peak_memory(build, (OURS, model, batch, 2 * side), (OURS, model, 1, 2), memory_gb, clock.device)
        itemsize = 2 if clock.on_gpu else 4
        case.checks["MB of keys and values"] = keys_values_bytes(GPTS[model], batch, side, itemsize) / 1e6
        case.checks["MB of keys and values of four times the codes"] = (
            keys_values_bytes(GPTS[model], batch, 2 * side, itemsize) / 1e6
        )
        if longer is not None:
            case.checks["peak MB of four times the codes"] = longer / 1e6


def keys_values_bytes(sizes: Sizes, batch: int, side: int, itemsize: int) -> int:
    return 2 * sizes.layers * batch * side * side * sizes.dim * itemsize


def run_convolutional(case: Case, peers: Peers, clock: Clock, rounds: int, model: str, batch: int, side: int) -> None:
    with torch.device(clock.device):
        candidates, times = convolutional(peers, model, batch, side)
    timings = compare(candidates, clock, rounds)
    for name, number in times.items():
        timings[name].seconds = [number * seconds for seconds in timings[name].seconds]
    case.add(timings, references=(OURS,))


def convolutional(peers: Peers, model: str, batch: int, side: int) -> tuple[dict[str, Callable], dict[str, int]]:
    """What draws codes, and how often those have to be called that do not draw them all at once."""
    make = {"pixelcnn": pixelcnn, "pixelsnail": pixelsnail}[model]
    candidates = {OURS: make(batch, side), NAIVE: make(batch, side, naive=True)}
    times = {NAIVE: side * side}
    if model == "pixelcnn" and peers.has("ritheshkumar95"):
        name = "ritheshkumar95, a whole pass for every code"
        candidates[name], times[name] = ritheshkumar95(batch, side, str(peers.folders["ritheshkumar95"])), side * side
    if model == "pixelsnail" and peers.has("rosinality"):
        candidates["rosinality sampler"] = rosinality(batch, side, str(peers.folders["rosinality"]))
        times["rosinality sampler"] = side
    return candidates, times

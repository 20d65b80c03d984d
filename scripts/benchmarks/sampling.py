"""Drawing codes: GPT with its cache, and PixelCNN and PixelSNAIL with theirs against whole passes for every code."""

from collections.abc import Callable
from contextlib import nullcontext

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
}
LAYERS, HEADS, DIM, FFN_DIM, VOCAB = 6, 6, 384, 1024, 1024  # of the transformers
CLASSES = 10
OURS, NAIVE = "tessera", "tessera, a whole pass for every code"
FLOOR = "floor: weight matrices as bare products"


# Transformers. Each function gives one that draws (batch, side^2) codes.
# ------------------------------------------------------------------------------------------------


def gpt(batch: int, side: int) -> Callable:
    config = GPTConfig(
        spec=CodeSpec(((side, side),), (VOCAB,)), num_classes=CLASSES, num_layers=LAYERS, num_heads=HEADS,
        hidden_dim=DIM, ffn_dim=FFN_DIM, positions="rotary_2d",
    )  # fmt: skip
    prior, labels = GPT(config), torch.arange(batch) % CLASSES
    return lambda: prior.sample(batch, labels)


def gpt_floor(batch: int, side: int) -> Callable:
    layer = [(DIM, DIM)] * 4 + [(DIM, FFN_DIM)] * 2 + [(FFN_DIM, DIM)]
    weights = [torch.randn(shape[::-1]) for shape in [*layer * LAYERS, (DIM, VOCAB)]]
    inputs = {width: torch.randn(batch, width) for width in (DIM, FFN_DIM)}

    @torch.no_grad()
    def run():
        for _ in range(side * side):
            for weight in weights:
                F.linear(inputs[weight.shape[1]], weight)

    return run


def huggingface(batch: int, side: int, kind: str) -> Callable:
    import transformers

    transformers.logging.set_verbosity_error()
    if kind == "GPT2":
        config = transformers.GPT2Config(
            vocab_size=VOCAB, n_positions=side * side + 1, n_embd=DIM, n_layer=LAYERS, n_head=HEADS,
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config).eval()
    else:
        config = transformers.LlamaConfig(
            vocab_size=VOCAB, hidden_size=DIM, intermediate_size=FFN_DIM, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, max_position_embeddings=side * side + 1,
            bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config).eval()
    start = (torch.arange(batch) % CLASSES)[:, None]
    mask = torch.ones_like(start)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": side * side, "attention_mask": mask}
    return lambda: model.generate(start, **options)


def llamagen(batch: int, side: int, folder: str) -> Callable:
    models = load(folder, "autoregressive.models.gpt")
    generate = load(folder, "autoregressive.models.generate")
    torch.backends.cuda.sdp_kernel = lambda **options: nullcontext()  # deprecated in torch, and about GPUs
    arguments = models.ModelArgs(
        dim=DIM, n_layer=LAYERS, n_head=HEADS, vocab_size=VOCAB, block_size=side * side, num_classes=CLASSES
    )
    model, labels = models.Transformer(arguments).eval(), torch.arange(batch) % CLASSES
    return lambda: generate.generate(model, labels, side * side, temperature=1.0, top_k=0, top_p=1.0)


def taming(batch: int, side: int, folder: str) -> Callable:
    import transformers

    if not hasattr(transformers, "top_k_top_p_filtering"):  # gone from transformers, and not called here
        transformers.top_k_top_p_filtering = None
    module = load(folder, "taming.modules.transformer.mingpt")
    model = module.GPT(VOCAB, side * side + 1, n_layer=LAYERS, n_head=HEADS, n_embd=DIM).eval()
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


def build(name: str, batch: int, side: int, folder: str | None = None) -> Callable:
    torch.manual_seed(0)
    if folder is not None:
        return {"LlamaGen": llamagen, "taming": taming, "ritheshkumar95": ritheshkumar95, "rosinality": rosinality}[
            name
        ](batch, side, folder)
    if name.startswith("transformers"):
        return huggingface(batch, side, name.split()[1])
    return {"gpt": gpt, FLOOR: gpt_floor}[name](batch, side)


def run(report: Report, peers: Peers, clock: Clock, rounds: int, sizes: str, memory_gb: float) -> None:
    for model, batch, side in SIZES[sizes]:
        case = Case({"model": model, "batch": batch, "codes": side * side})
        if not report.wants(case):
            continue
        if model == "gpt":
            run_gpt(case, peers, clock, rounds, batch, side, memory_gb)
        else:
            run_convolutional(case, peers, clock, rounds, model, batch, side)
        case.checks["codes per second"] = batch * side * side / case.seconds[OURS]
        report.add(case)


def run_gpt(case: Case, peers: Peers, clock: Clock, rounds: int, batch: int, side: int, memory_gb: float) -> None:
    makers: dict[str, tuple] = {OURS: ("gpt", batch, side)}
    if peers.has("transformers"):
        makers |= {f"transformers {kind} generate": (f"transformers {kind}", batch, side) for kind in ("Llama", "GPT2")}
    for label, name in (("LlamaGen generate", "llamagen"), ("taming sample_with_past", "taming")):
        if peers.has(name):
            makers[label] = (label.split()[0], batch, side, str(peers.folders[name]))
    makers[FLOOR] = (FLOOR, batch, side)
    candidates = {label: build(*arguments) for label, arguments in makers.items()}
    case.add(compare(candidates, clock, rounds), references=(FLOOR, OURS))
    case.checks["fraction of the floor's speed"] = 1 / case.ratios[FLOOR][OURS][1]
    if memory_gb:
        for label, (name, *_, last) in makers.items():
            small = (name, 1, 2, last) if isinstance(last, str) else (name, 1, 2)
            case.peak_bytes[label] = peak_memory(build, makers[label], small, memory_gb)
        longer = peak_memory(build, ("gpt", batch, 2 * side), ("gpt", 1, 2), memory_gb)
        case.checks["MB of keys and values"] = keys_values_bytes(batch, side) / 1e6
        case.checks["MB of keys and values of four times the codes"] = keys_values_bytes(batch, 2 * side) / 1e6
        if longer is not None:
            case.checks["peak MB of four times the codes"] = longer / 1e6


def keys_values_bytes(batch: int, side: int) -> int:
    return 2 * LAYERS * batch * side * side * DIM * 4


def run_convolutional(case: Case, peers: Peers, clock: Clock, rounds: int, model: str, batch: int, side: int) -> None:
    make = {"pixelcnn": pixelcnn, "pixelsnail": pixelsnail}[model]
    candidates = {OURS: make(batch, side), NAIVE: make(batch, side, naive=True)}
    times = {NAIVE: side * side}
    if model == "pixelcnn" and peers.has("ritheshkumar95"):
        name = "ritheshkumar95, a whole pass for every code"
        candidates[name], times[name] = ritheshkumar95(batch, side, str(peers.folders["ritheshkumar95"])), side * side
    if model == "pixelsnail" and peers.has("rosinality"):
        candidates["rosinality sampler"] = rosinality(batch, side, str(peers.folders["rosinality"]))
        times["rosinality sampler"] = side
    timings = compare(candidates, clock, rounds)
    for name, number in times.items():
        timings[name].seconds = [number * seconds for seconds in timings[name].seconds]
    case.add(timings, references=(OURS,))

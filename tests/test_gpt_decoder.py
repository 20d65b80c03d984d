"""One token at a time through a GPT gives the logits of the whole pass, whatever way the cache is laid out."""

from contextlib import nullcontext
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from prior import gpt, gpt_cuda_decoder, gpt_decoder
from prior.base import CodeSpec
from prior.gpt import GPT, Cache, GPTConfig, Transformer, rotary_table
from prior.gpt_cuda_decoder import GraphDecoder, StaticDecoder, layer_for
from tests.gpt_steps import check_steps


def make(positions: str, **options) -> GPT:
    spec = CodeSpec(((2, 2), (3, 3)), (5, 4))
    sizes = {"num_layers": 2, "num_heads": 2, "hidden_dim": 16, "positions": positions}
    torch.manual_seed(0)
    return GPT(GPTConfig(spec=spec, **sizes, **options)).eval()


@pytest.mark.parametrize("positions", ["rotary", "rotary_2d", "learned"])
@settings(max_examples=40)
@given(
    block_places=st.integers(1, 20),
    batch=st.integers(1, 4),
    rows_in_blocks=st.sampled_from([1, 4, 1000]),
    few_places=st.sampled_from([0, 64]),
    longest_whole=st.sampled_from([0, 64]),
    padding=st.sampled_from([0, 3]),
    intel=st.booleans(),
)
def test_a_cache_in_blocks_of_any_size_gives_the_logits_of_the_whole_pass(
    positions, block_places, batch, rows_in_blocks, few_places, longest_whole, padding, intel
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt_decoder, "on_intel", lambda: intel)
        lay_out(patch, block_places, rows_in_blocks, few_places, longest_whole, padding)
        check_steps(make(positions, num_classes=3), torch.arange(batch) % 3)


def lay_out(
    patch, block_places: int, rows: int = 1, few_places: int = 0, longest_whole: int = 0, padding: int = 0
) -> None:
    blocks = gpt_decoder.Blocks(rows, longest_whole, block_places, padding)
    patch.setattr(gpt_decoder, "INTEL_BLOCKS", blocks)
    patch.setattr(gpt_decoder, "OTHER_BLOCKS", blocks)
    patch.setattr(gpt_decoder, "FEW_PLACES", few_places)


@pytest.mark.parametrize(
    ("intel", "batch", "form"),
    [
        (True, 2, gpt_decoder.Product),
        (True, 32, gpt_decoder.Transposed),
        (False, 2, gpt_decoder.Transposed),
        (False, 32, gpt_decoder.Packed),
    ],
)
def test_every_form_of_products_gives_the_logits_of_the_whole_pass(intel, batch, form, monkeypatch):
    monkeypatch.setattr(gpt_decoder, "on_intel", lambda: intel)
    check_steps(make("rotary_2d", num_classes=3, ffn_dim=256), torch.arange(batch) % 3)
    used = {type(getattr(layer, name)) for layer in decoder(batch).layers for name in ("gate", "up", "down", "out")}
    assert used == {form} or not hasattr(torch.ops.mkldnn, "_linear_pointwise")


@pytest.mark.parametrize("block_places", [1, 2, 3, 50])
def test_a_prefix_of_several_tokens_reaches_a_cache_in_blocks(block_places, monkeypatch):
    lay_out(monkeypatch, block_places)
    check_steps(make("rotary_2d", text_vocab_size=7, max_text_length=5), torch.randint(7, (3, 5)))


@pytest.mark.parametrize("few_places", [0, 64])
@pytest.mark.parametrize("rows_in_blocks", [1, 1000])
def test_places_that_are_not_filled_yet_do_not_count(few_places, rows_in_blocks, monkeypatch):
    lay_out(monkeypatch, 4, rows_in_blocks, few_places)
    torch.use_deterministic_algorithms(True)  # new memory that nobody writes to is full of NaN then
    try:
        check_steps(make("rotary", num_classes=3), torch.arange(3))
    finally:
        torch.use_deterministic_algorithms(False)


@torch.no_grad()
def test_a_cache_of_many_rows_and_places_gains_blocks_and_any_other_is_one(monkeypatch):
    lay_out(monkeypatch, 8, rows=64, few_places=19, longest_whole=19, padding=5)
    few_rows = decoder(31)  # of two heads
    assert places(few_rows) == [20]
    assert not by_place(few_rows)
    many, seen = decoder(32), []
    assert by_place(many)
    assert many.layers[0].past.blocks[0].stride(3) == 32 * 16 + 5
    for _ in range(19):
        many(torch.zeros(32, 1, dtype=torch.int64), torch.zeros(5, 16))
        seen.append(places(many))
    assert seen == [[8]] * 7 + [[8, 8]] * 8 + [[8, 8, 4]] * 4
    lay_out(monkeypatch, 8, rows=64, few_places=20, longest_whole=20)
    few_places, whole = decoder(31), decoder(32)
    assert places(few_places) == places(whole) == [20]
    assert by_place(few_places)
    assert by_place(whole)


@torch.no_grad()
@pytest.mark.parametrize("intel", [True, False])
def test_intels_processors_have_blocks_of_their_own(intel, monkeypatch):
    monkeypatch.setattr(gpt_decoder, "on_intel", lambda: intel)
    split = gpt_decoder.INTEL_BLOCKS if intel else gpt_decoder.OTHER_BLOCKS
    past = decoder(split.rows // 2).layers[0].past
    assert past.by_place
    assert past.block_places == (20 if intel else split.places)
    assert past.padding == split.padding


def by_place(decoder: gpt_decoder.Decoder) -> bool:
    """Whether what belongs to a place lies together."""
    block = decoder.layers[0].past.blocks[0]
    return block.stride(3) > block.stride(1)


def places(decoder: gpt_decoder.Decoder) -> list[int]:
    """Of each block of the first layer."""
    return [block.shape[3] for block in decoder.layers[0].past.blocks]


@torch.no_grad()
def decoder(batch: int) -> gpt_decoder.Decoder:
    """Of 20 places after a class, with two heads."""
    sizes = {"num_layers": 2, "num_heads": 2, "hidden_dim": 16}
    prior = GPT(GPTConfig(spec=CodeSpec(((20,),), (5,)), positions="rotary", **sizes)).eval()
    classes = torch.zeros(batch, dtype=torch.int64)
    caches, rotation = [Cache(20) for _ in prior.model.layers], rotary_table(prior.config, classes.device)
    prior.model(prior.prefix(classes), rotation, caches)
    made = gpt_decoder.Decoder(prior.model, caches, rotation)
    assert not any(hasattr(cache, "keys") or hasattr(cache, "values") for cache in caches)  # one copy is enough
    return made


# The decoder for GPUs
# ------------------------------------------------------------------------------------------------


class ReplayedDecoder(StaticDecoder):
    """A `GraphDecoder` for any device: what a step does is recorded once, and replayed for other tokens and places."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.replays = {}

    def logits(self, head: int) -> torch.Tensor:
        if head not in self.replays:
            self.replays[head] = make_fx(lambda: StaticDecoder.logits(self, head))()
            self.place -= 1  # recording is a step here, which is done again
        return self.replays[head]()


@pytest.fixture
def decode_by(monkeypatch):
    return lambda *kinds: monkeypatch.setattr(gpt, "DECODERS", kinds)


@pytest.mark.parametrize("positions", ["rotary", "rotary_2d", "learned"])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("kind", [StaticDecoder, ReplayedDecoder])
def test_a_step_of_fixed_shapes_gives_the_logits_of_the_whole_pass(positions, batch, kind, decode_by):
    decode_by(kind)
    check_steps(make(positions, num_classes=3), torch.arange(batch) % 3)


def test_a_step_of_fixed_shapes_takes_the_first_token_too_but_no_caption(decode_by, monkeypatch):
    decode_by(StaticDecoder)
    passes, whole = [], Transformer.forward
    monkeypatch.setattr(Transformer, "forward", lambda *arguments: passes.append(1) or whole(*arguments))
    logits_of(make("rotary_2d", num_classes=3), torch.arange(3))
    assert not passes
    steps = make("rotary_2d", text_vocab_size=7, max_text_length=5).steps(torch.randint(7, (3, 5)))
    with torch.no_grad():
        next(steps)
        steps.send(torch.tensor([0, 1, 2]))
    assert len(passes) == 1


def test_a_step_of_fixed_shapes_goes_on_after_a_caption(decode_by):
    decode_by(StaticDecoder)
    check_steps(make("rotary_2d", text_vocab_size=7, max_text_length=5), torch.randint(7, (3, 5)))


def test_a_step_of_fixed_shapes_does_not_see_what_memory_held_before(decode_by):
    decode_by(StaticDecoder)
    torch.use_deterministic_algorithms(True)  # new memory is full of NaN then
    try:
        check_steps(make("rotary", num_classes=3), torch.arange(3))
    finally:
        torch.use_deterministic_algorithms(False)


@torch.no_grad()
def logits_of(prior: GPT, classes: torch.Tensor) -> torch.Tensor:
    """Of every step, each for the code of vocabulary 0 before it."""
    steps = prior.steps(classes)
    rows = [next(steps).clone()]
    rows += [steps.send(torch.zeros_like(classes)).clone() for _ in range(prior.spec.length - 1)]
    return torch.cat(rows, dim=1)


@pytest.mark.parametrize("autocast", [True, False])
def test_a_step_of_fixed_shapes_computes_in_the_dtype_of_the_whole_pass(autocast, decode_by):
    prior, classes = make("rotary", num_classes=3), torch.arange(3)
    prior = prior if autocast else prior.bfloat16()
    results = []
    for kinds in ((), (StaticDecoder,)):
        decode_by(*kinds)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results.append(logits_of(prior, classes))
    assert results[1].dtype == torch.bfloat16
    # some roundings of bfloat16, which keeps 8 bits
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=4 * 2**-8 * results[0].abs().max().item())


def test_graphs_are_for_gpus_and_neither_decoder_for_training():
    prior = make("rotary")
    with torch.no_grad():
        assert [kind for kind in gpt.DECODERS if kind.serves(prior.model)] == [gpt_decoder.Decoder]
        assert not any(kind.serves(prior.train().model) for kind in (*gpt.DECODERS, StaticDecoder))
    assert not any(kind.serves(prior.eval().model) for kind in (*gpt.DECODERS, StaticDecoder))


@pytest.mark.parametrize("kind", [gpt_decoder.Decoder, StaticDecoder])
def test_no_decoder_takes_over_from_layers_with_hooks(kind, decode_by):
    decode_by(kind)
    prior = make("rotary", num_classes=3)
    prior.model.layers[0].mlp.up_proj.register_forward_hook(lambda layer, inputs, output: output + 1)
    check_steps(prior, torch.arange(3))


class StepsOfGraphs(GraphDecoder):
    """Without the graph."""

    logits = StaticDecoder.logits


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("positions", ["rotary", "rotary_2d", "learned"])
@pytest.mark.parametrize("batch", [1, 3, 9])  # layers of few rows, and of more
def test_captured_steps_are_the_steps(dtype, positions, batch, decode_by):
    prior, classes = make(positions, num_classes=3).to("cuda", dtype), torch.arange(batch, device="cuda") % 3
    results = []
    for kind in (StepsOfGraphs, GraphDecoder, GraphDecoder):
        decode_by(kind)
        results.append(logits_of(prior, classes))
    assert torch.equal(results[1], results[0])
    assert torch.equal(results[2], results[0])


class OnNoGPU(GraphDecoder):
    """What is replayed is a step."""

    serves = staticmethod(StaticDecoder.serves)
    step = StaticDecoder.logits

    def _record(self, head: int) -> None:
        logits = torch.empty(len(self.tokens), len(self.heads[head]))
        self.graphs[head] = SimpleNamespace(replay=lambda: logits.copy_(self.step(head))), logits


def test_each_thread_makes_a_step_once_before_it_is_recorded(decode_by, monkeypatch):
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *arguments: None)
    monkeypatch.setattr(gpt_cuda_decoder, "_recording_stream", lambda device: stream)
    monkeypatch.setattr(gpt_cuda_decoder, "layer_for", lambda keys: gpt_cuda_decoder.TorchLayer)
    monkeypatch.setattr(gpt_cuda_decoder, "_MADE", gpt_cuda_decoder._Made())
    made = []
    monkeypatch.setattr(StaticDecoder, "logits", lambda *arguments: made.append(1) or OnNoGPU.step(*arguments))
    decode_by(OnNoGPU)
    prior, classes = make("rotary", num_classes=3), torch.arange(3)
    check_steps(prior, classes)
    first = len(made)
    assert first == 2  # one for the vocabulary of each level
    check_steps(prior, classes)
    assert len(made) == first
    logits_of(prior, classes[:2])  # of another batch
    assert len(made) > first
    before = len(made)
    thread = Thread(target=logits_of, args=(prior, classes))
    thread.start()
    thread.join()
    assert len(made) == before + first


@pytest.mark.parametrize("installed", [True, False])
def test_layers_are_fused_where_triton_is_installed_and_computes_in_their_dtype(installed, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(gpt_cuda_decoder, "has_kernels", lambda: installed)
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    layers = [layer_for(torch.zeros(100, 1, 1, 1, dtype=dtype)).__name__ for dtype in dtypes]
    assert layers == ["FusedLayer" if installed else "TorchLayer"] * 2 + ["TorchLayer"]

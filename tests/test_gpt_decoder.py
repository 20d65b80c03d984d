"""One token at a time through a GPT gives the logits of the whole pass, whatever way the cache is laid out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prior import gpt_decoder
from prior.base import CodeSpec
from prior.gpt import GPT, Cache, GPTConfig, rotary_table


def make(positions: str, **options) -> GPT:
    spec = CodeSpec(((2, 2), (3, 3)), (5, 4))
    sizes = {"num_layers": 2, "num_heads": 2, "hidden_dim": 16, "positions": positions}
    torch.manual_seed(0)
    return GPT(GPTConfig(spec=spec, **sizes, **options)).eval()


def codes_of(prior: GPT, batch: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randint(size, (batch, *shape)) for size, shape in zip(prior.spec.vocab_sizes, prior.spec.shapes))


@torch.no_grad()
def check(prior: GPT, classes: torch.Tensor) -> None:
    """Every step's logits against those of `logits`."""
    codes = codes_of(prior, len(classes))
    expected = [logits for level in prior.logits(codes, classes) for logits in level.unbind(dim=1)]
    steps, sent = prior.steps(classes), None
    for logits, code in zip(expected, prior.spec.flatten(codes).unbind(dim=1)):
        # float32 sums in another order
        torch.testing.assert_close(steps.send(sent), logits, atol=1e-5, rtol=1e-4)
        sent = code


@pytest.mark.parametrize("positions", ["rotary", "rotary_2d", "learned"])
@settings(deadline=None, max_examples=40)
@given(block=st.integers(1, 20), batch=st.integers(1, 4), rows_for_blocks=st.sampled_from([1, 4, 1000]))
def test_blocks_of_any_length_give_the_logits_of_the_whole_pass(positions, block, batch, rows_for_blocks):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt_decoder, "BLOCK", block)
        patch.setattr(gpt_decoder, "ROWS_FOR_BLOCKS", rows_for_blocks)
        check(make(positions, num_classes=3), torch.arange(batch) % 3)


@pytest.mark.parametrize("block", [1, 2, 3, 50])
def test_a_prefix_of_several_tokens_reaches_the_blocks(block, monkeypatch):
    monkeypatch.setattr(gpt_decoder, "BLOCK", block)
    monkeypatch.setattr(gpt_decoder, "ROWS_FOR_BLOCKS", 1)
    check(make("rotary_2d", text_vocab_size=7, max_text_length=5), torch.randint(7, (3, 5)))


def test_places_that_are_not_filled_yet_do_not_count(monkeypatch):
    monkeypatch.setattr(gpt_decoder, "BLOCK", 4)
    monkeypatch.setattr(gpt_decoder, "ROWS_FOR_BLOCKS", 1)
    torch.use_deterministic_algorithms(True)  # new memory that nobody writes to is full of NaN then
    try:
        check(make("rotary", num_classes=3), torch.arange(3))
    finally:
        torch.use_deterministic_algorithms(False)


def test_many_rows_have_blocks_and_few_have_not():
    rows = gpt_decoder.ROWS_FOR_BLOCKS
    assert [decoder(batch).layers[0].past.shape[:2] for batch in (rows // 2 - 1, rows // 2)] == [(2, 1), (2, 2)]


def decoder(batch: int) -> gpt_decoder.Decoder:
    """Of 20 places after a class, with two heads."""
    sizes = {"num_layers": 2, "num_heads": 2, "hidden_dim": 16}
    prior = GPT(GPTConfig(spec=CodeSpec(((20,),), (5,)), positions="rotary", **sizes)).eval()
    classes = torch.zeros(batch, dtype=torch.int64)
    caches, rotation = [Cache(20) for _ in prior.model.layers], rotary_table(prior.config, classes.device)
    with torch.no_grad():
        prior.model(prior.prefix(classes), rotation, caches)
        made = gpt_decoder.Decoder(prior.model, caches, rotation)
    assert not any(hasattr(cache, "keys") or hasattr(cache, "values") for cache in caches)  # one copy is enough
    return made

"""The law that a GPT's steps are its whole pass, for the tests of its decoders."""

import torch

from prior.gpt import GPT


@torch.no_grad()
def check_steps(prior: GPT, classes: torch.Tensor) -> None:
    """Every step's logits against those of `logits`."""
    sizes = zip(prior.spec.vocab_sizes, prior.spec.shapes)
    codes = tuple(torch.randint(size, (len(classes), *shape), device=classes.device) for size, shape in sizes)
    expected = [logits for level in prior.logits(codes, classes) for logits in level.unbind(dim=1)]
    steps, sent = prior.steps(classes), None
    for logits, code in zip(expected, prior.spec.flatten(codes).unbind(dim=1)):
        # float32 sums in another order
        torch.testing.assert_close(steps.send(sent), logits, atol=1e-5, rtol=1e-4)
        sent = code

"""Whether parts belong together: a prior and a tokenizer, codes and a tokenizer, captions and a text tokenizer."""

import torch

from pipelines.checkpoint import fingerprint, fingerprints
from pipelines.text import TextTokenizer
from prior.base import Prior
from tokenizer.base import Tokenizer


def check_belongs(prior: Prior, tokenizer: Tokenizer) -> None:
    """Raises ValueError, with both fingerprints, unless `prior` was trained on the codes of `tokenizer`.

    Equal code spaces are not enough: codes of another tokenizer decode to what looks like noise.
    """
    expected, found = prior.config.tokenizer_fingerprint, fingerprints(tokenizer)
    if not expected:
        raise ValueError(
            "this prior has no record of the tokenizer whose codes it was trained on; where it is this one, build it "
            "with tokenizer_fingerprint=pipelines.fingerprint(tokenizer)"
        )
    if expected not in found:
        dtype = next(tokenizer.parameters()).dtype
        raise ValueError(
            f"this prior was trained on the codes of tokenizer {expected}, but the tokenizer given has fingerprint "
            f"{found[-1]}; train a prior on this tokenizer's codes, or take the one it came from"
            + ("" if dtype == torch.float32 else f". Its weights are {dtype}: where they were cast by hand, take "
               "from_pretrained(path, dtype=...), or cast a pipeline of both by its `to`")
        )  # fmt: skip
    if prior.spec != tokenizer.spec:
        raise ValueError(f"the prior's code space {prior.spec} is not the tokenizer's, {tokenizer.spec}")


def check_text_tokenizer(prior: Prior, text_tokenizer: TextTokenizer | None) -> None:
    """Raises ValueError, with both fingerprints, unless the captions of `prior` were tokenized by `text_tokenizer`."""
    expected = prior.config.text_tokenizer_fingerprint
    if not prior.conditional_on_text:
        if text_tokenizer is not None:
            raise ValueError("this prior is not conditional on captions: it has no use for a text tokenizer")
    elif text_tokenizer is None:
        raise ValueError(f"this prior is conditional on captions: give their text tokenizer, of fingerprint {expected}")
    elif text_tokenizer.fingerprint != expected:
        raise ValueError(
            f"this prior was trained on captions of text tokenizer {expected or '(none recorded)'}, but the one given "
            f"has fingerprint {text_tokenizer.fingerprint}; token ids mean other words there. Take the one it came from"
        )


def check_codes_belong(tokenizer: Tokenizer, *data_sets) -> None:
    """Raises ValueError, with both fingerprints, unless every `CodeDataset` was written by `tokenizer`."""
    found = fingerprint(tokenizer)
    for codes in data_sets:
        if codes.fingerprint != found:
            raise ValueError(
                f"{codes.folder} holds codes of tokenizer {codes.fingerprint}, but the tokenizer given has fingerprint "
                f"{found}. Write its codes with scripts/extract_codes.py --overwrite true"
            )

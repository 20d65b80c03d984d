"""What a prior is conditional on: the captions that its codes have, their classes, or nothing.

Letters: T largest number of tokens of a caption.
"""

from dataclasses import dataclass, field

from torch import Tensor

from pipelines.codes import CodeDataset, check_same_classes
from pipelines.text import TextConfig, TextTokenizer
from prior import PRIORS
from prior.bits import BitPrior

COLUMNS = 8  # captions that pictures are drawn of


@dataclass(frozen=True)
class Condition:
    """What a prior is conditional on.

    implied: the fields of its configuration that say so. lines: what there is to tell of it.
    text_tokenizer: of the captions. captions: token ids (columns, T) of those that pictures are drawn of. Both are None
    where it is not captions.
    """

    implied: dict = field(default_factory=dict)
    lines: tuple[str, ...] = ()
    text_tokenizer: TextTokenizer | None = None
    captions: Tensor | None = None


def condition_on(
    train_codes: CodeDataset, validation_codes: CodeDataset, prior: str, text: TextConfig | None, *, classes: bool
) -> Condition:
    """The captions if there are any, else the classes; items of both data sets then have what the prior needs of them.

    Args:
        prior: its type.
        text: how captions become token ids; None leaves them aside.
        classes: False leaves the classes aside.
    Raises:
        ValueError: a prior that cannot be conditional on it, classes that differ, `text` without captions, or see
            `TextTokenizer.train`.
    """
    if text is not None and train_codes.has_captions:
        if not PRIORS[prior].takes_text:
            able = ", ".join(name for name, other in PRIORS.items() if other.takes_text)
            raise ValueError(
                f"the codes have captions, on which the prior '{prior}' cannot be conditional; "
                f"add --text_conditional false, or take {able}"
            )
        return _on_captions(train_codes, validation_codes, text)
    if text not in (None, TextConfig()):
        raise ValueError(
            f"the codes have no captions, so {text} would do nothing; leave out its options, or write a "
            "metadata.jsonl beside the images and dump their codes again"
        )
    if not classes:
        return Condition()
    if train_codes.num_classes and issubclass(PRIORS[prior], BitPrior):
        able = (name for name, other in PRIORS.items() if not (issubclass(other, BitPrior) or other.Config.takes_real))
        raise ValueError(
            f"the codes have {train_codes.num_classes} classes, on which the prior '{prior}' "
            f"cannot be conditional; add --class_conditional false, or take one of {', '.join(able)}"
        )
    check_same_classes(train_codes, validation_codes)
    return Condition({"num_classes": train_codes.num_classes})


def _on_captions(train_codes: CodeDataset, validation_codes: CodeDataset, text: TextConfig) -> Condition:
    text_tokenizer = TextTokenizer.train(train_codes.captions, text, others=validation_codes.captions or ())
    num_cut = sum(codes.tokenize_captions(text_tokenizer) for codes in (train_codes, validation_codes))
    captions, _ = text_tokenizer.encode(validation_codes.captions[:COLUMNS])
    implied = {
        "text_vocab_size": text_tokenizer.vocab_size,
        "max_text_length": text_tokenizer.max_length,
        "text_tokenizer_fingerprint": text_tokenizer.fingerprint,
    }
    lines = (
        f"captions of up to {text_tokenizer.max_length} tokens, {text_tokenizer.vocab_size} token ids"
        + (f"; {num_cut} captions are longer, their ends are cut off" if num_cut else ""),
        f"columns of pictures: {' | '.join(text_tokenizer.decode(captions))}",
    )
    return Condition(implied, lines, text_tokenizer, captions)

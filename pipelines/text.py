"""Captions as token ids: a byte-pair encoding, learnt from the captions a prior is conditional on and kept with it.

A text tokenizer's folder is `tokenizer.json`, in the format of the library `tokenizers`, which `transformers` reads
too, and `config.json`. Not to be confused with the tokenizer of images, which is a model.

Letters: B batch, T largest number of tokens of a caption.
"""

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Encoding, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from pipelines.files import MANIFEST, OS_LITTER, atomic_folder, check_manifest, read_json, write_json_atomic
from prior.base import PADDING

TOKENIZER_NAME = "tokenizer.json"
CONFIG_NAME = "config.json"
OURS = {TOKENIZER_NAME, CONFIG_NAME, MANIFEST, *OS_LITTER}
NUM_BYTES = 256
# Token ids are rows of the prior's embedding, captions are places of its attention
LARGEST_VOCAB_SIZE = 2**20
LARGEST_LENGTH = 2**16
FEW_WORDS = 50  # that a message can list


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How captions become token ids.

    Args:
        vocab_size: largest number of token ids, 256 of which are the bytes.
        max_length: tokens of a caption, whose end is cut off where it has more; null (None in Python) takes the longest
            caption's.
    Raises:
        ValueError: a number out of range.
    """

    vocab_size: int = 4096
    max_length: int | None = None

    def __post_init__(self):
        if not NUM_BYTES <= self.vocab_size <= LARGEST_VOCAB_SIZE:
            raise ValueError(
                f"text.vocab_size must lie in [{NUM_BYTES}, {LARGEST_VOCAB_SIZE}], since every byte is a token, "
                f"got {self.vocab_size}"
            )
        if self.max_length is not None and not 1 <= self.max_length <= LARGEST_LENGTH:
            raise ValueError(
                f"text.max_length must lie in [1, {LARGEST_LENGTH}], or be null for the longest caption's, "
                f"got {self.max_length}"
            )


class TextTokenizer:
    """Byte-level byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909; bytes: Radford et al. 2019) of captions.

    Captions are put into lower case, as in DALL-E (arXiv:2102.12092), and their runs of white space into one space.
    Any text can be encoded, down to its bytes; but a token that no training caption had has an embedding that was never
    trained, so that prompts with one are refused.

    Args:
        description: the content of tokenizer.json. It is kept as it is, so that another version of the library, which
            might write it differently, does not change the fingerprint.
        max_length: tokens of a caption, T.
        unseen_ids: token ids that no training caption had.
    Raises:
        ValueError: the description is not one of a tokenizer, or a number is out of range.
    """

    def __init__(self, description: dict, *, max_length: int, unseen_ids: Iterable[int] = ()):
        self.description, self.max_length, self.unseen_ids = description, max_length, sorted(unseen_ids)
        try:
            self._tokenizer = Tokenizer.from_str(json.dumps(description))
        except Exception as error:  # the library raises no other type
            raise ValueError(f"not the description of a text tokenizer: {' '.join(str(error).split())}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._unseen = frozenset(self.unseen_ids)
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        if not 1 <= self.vocab_size <= LARGEST_VOCAB_SIZE or not 1 <= max_length <= LARGEST_LENGTH:
            raise ValueError(
                f"a text tokenizer has 1 to {LARGEST_VOCAB_SIZE} token ids and captions of 1 to {LARGEST_LENGTH} "
                f"tokens, got {self.vocab_size} and {max_length}"
            )
        if self.unseen_ids and not 0 <= self.unseen_ids[0] <= self.unseen_ids[-1] < self.vocab_size:
            raise ValueError(f"unseen_ids must lie in [0, {self.vocab_size})")

    @classmethod
    def train(cls, captions: Sequence[str], config: TextConfig, *, others: Sequence[str] = ()) -> "TextTokenizer":
        """Learns merges from `captions`, the same ones each time; `others` (validation) only count for max_length.

        Raises:
            ValueError: nothing to learn from, or what is no text.
        """
        _check_texts([*captions, *others], "caption")
        if not any(caption.strip() for caption in captions):
            raise ValueError("all captions are empty: a prior cannot be conditional on them; give captions")
        # Where it is not set, the library warns in every process that is forked later, as workers of loaders are
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        tokenizer = Tokenizer(models.BPE())
        spaces = normalizers.Replace(Regex(r"\s+"), " ")
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Lowercase(), spaces, normalizers.Strip()]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=config.vocab_size,
            min_frequency=2,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(captions, trainer)
        encodings = tokenizer.encode_batch(list(captions))
        longest = max(len(encoding) for encoding in [*encodings, *tokenizer.encode_batch(list(others))])
        max_length = config.max_length or longest
        seen = {token for encoding in encodings for token in encoding.ids[:max_length]}
        unseen = set(range(tokenizer.get_vocab_size())) - seen
        return cls(json.loads(tokenizer.to_str()), max_length=max_length, unseen_ids=unseen)

    @property
    def fingerprint(self) -> str:
        """sha256: equal exactly where token ids mean the same."""
        return hashlib.sha256(json.dumps([self.description, self._config()], sort_keys=True).encode()).hexdigest()

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, int]:
        """(token ids (B, T) int64 followed by `PADDING`, number of captions whose end was cut off)."""
        _check_texts(captions, "caption")
        encodings = self._tokenizer.encode_batch(list(captions))
        return self._padded(encodings), sum(len(encoding) > self.max_length for encoding in encodings)

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Token ids (B, T) int64, followed by `PADDING`. The empty prompt is the empty caption.

        Raises:
            ValueError: a prompt is no text, has more than max_length tokens, or a token that no training caption had.
        """
        _check_texts(prompts, "prompt")
        encodings = [self._tokenizer.encode(prompt) for prompt in prompts]
        for prompt, encoding in zip(prompts, encodings):
            for token, (start, _) in zip(encoding.ids, encoding.offsets):
                if token in self._unseen:
                    word = _word_at(prompt, start)
                    raise ValueError(
                        f"no training caption knows the word {_shorten(word)!r} of the prompt {_shorten(prompt)!r}"
                        f"{self._nearest(word)}"
                    )
            if len(encoding) > self.max_length:
                raise ValueError(
                    f"the prompt {_shorten(prompt)!r} has {len(encoding)} tokens, this prior's captions have at most "
                    f"{self.max_length}; shorten it"
                )
        return self._padded(encodings)

    def decode(self, ids: Tensor) -> list[str]:
        """Texts of token ids (B, T), as far as lower case and white space were kept."""
        return [self._tokenizer.decode([i for i in row if i != PADDING]).strip() for row in ids.tolist()]

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the folder; an existing one is replaced only once the new one is complete."""
        folder = Path(folder)
        if folder.is_dir() and (others := {p.name for p in folder.iterdir()} - OURS):
            raise ValueError(f"{folder} holds other files than a text tokenizer's ({', '.join(sorted(others)[:3])})")
        with atomic_folder(folder, overwrite=True) as temporary:
            write_json_atomic(temporary / TOKENIZER_NAME, self.description)
            write_json_atomic(temporary / CONFIG_NAME, self._config())

    @classmethod
    def load(cls, folder: str | Path) -> "TextTokenizer":
        """Reads a folder. Raises ValueError, naming the file, where it is missing or damaged."""
        folder = Path(folder)
        for name in (TOKENIZER_NAME, CONFIG_NAME):
            if not (folder / name).is_file():
                raise ValueError(f"{folder} is not a text tokenizer: it has no {name}")
        if (folder / MANIFEST).is_file():
            check_manifest(folder)
        description, config = read_json(folder / TOKENIZER_NAME), read_json(folder / CONFIG_NAME)
        max_length, unseen_ids = config.get("max_length"), config.get("unseen_ids")
        numbers = [max_length, *unseen_ids] if isinstance(unseen_ids, list) else [None]
        if not all(type(number) is int for number in numbers):
            raise ValueError(f"{folder / CONFIG_NAME} must hold the integer 'max_length' and the list 'unseen_ids'")
        try:
            return cls(description, max_length=max_length, unseen_ids=unseen_ids)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error

    def _config(self) -> dict:
        return {"max_length": self.max_length, "unseen_ids": self.unseen_ids}

    def _padded(self, encodings: Sequence[Encoding]) -> Tensor:
        ids = torch.full((len(encodings), self.max_length), PADDING)
        for row, encoding in zip(ids, encodings):
            tokens = encoding.ids[: self.max_length]
            row[: len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        return ids

    def _nearest(self, word: str) -> str:
        """'; did you mean ...?', and the words that are known where they are few."""
        ids = sorted(set(range(self.vocab_size)) - self._unseen)
        words = {self._tokenizer.decode([i]) for i in ids}
        words = sorted(word.strip() for word in words if word.startswith(" ") and word.strip())
        close = difflib.get_close_matches(word.lower(), words, n=1, cutoff=0.5)
        listed = f" (known: {', '.join(words)})" if 0 < len(words) <= FEW_WORDS else ""
        return (f"; did you mean '{close[0]}'?" if close else "") + listed


def _check_texts(texts: Sequence[str], what: str) -> None:
    for text in texts:
        try:
            str.encode(text)  # half of a surrogate pair is a Python string, but no text
        except (TypeError, UnicodeEncodeError) as error:
            raise ValueError(f"a {what} is a text that UTF-8 can hold, got {text!r}") from error


def _word_at(text: str, place: int) -> str:
    """The word at or after a place, from one white space to the next."""
    return next((found[0] for found in re.finditer(r"\S+", text) if found.end() > place), text)


def _shorten(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."

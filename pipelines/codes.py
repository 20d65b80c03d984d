"""The code store: a data set's codes on disk, written once by `code_writing.write_codes`, read by `CodeDataset`.

    folder/spec.json      code space, count, tokenizer and its fingerprint, data identity, checksums; written last
    folder/level{l}.npy   (count, *shapes[l]) in the smallest unsigned type that holds the level's vocabulary
    folder/labels.npy     (count,) int64; zeros without labels
    folder/captions.jsonl  one JSON string per image and line, where the data have captions

Row i is image i. Letters: B batch, K vocabulary size of a level.
"""

import json
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pipelines.files import check_file, read_json
from pipelines.images import Key, contents_of
from pipelines.text import TextTokenizer
from prior.base import Codes, CodeSpec

FORMAT = "tessera-codes"
FORMAT_VERSION = 1
SPEC = "spec.json"
CAPTIONS = "captions.jsonl"
LABEL_DTYPE = np.dtype("<i8")


def smallest_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned integer type that holds 0 .. vocab_size - 1.

    Raises:
        ValueError: vocab_size is below 1 or above 2^32.
    """
    if not 1 <= vocab_size <= 1 << 32:
        raise ValueError(f"vocab_size must lie in [1, 2^32] to be stored, got {vocab_size}")
    return np.dtype("|u1" if vocab_size <= 1 << 8 else "<u2" if vocab_size <= 1 << 16 else "<u4")


def array_names(spec: CodeSpec) -> list[str]:
    return [*(f"level{level}.npy" for level in range(spec.num_levels)), "labels.npy"]


def check_same_classes(codes: "CodeDataset", others: "CodeDataset") -> None:
    """Raises ValueError unless each label means the same class in both stores."""
    for label, (name, other) in enumerate(zip_longest(codes.class_names, others.class_names)):
        if name != other:
            raise ValueError(
                f"label {label} is {name or 'no class'} in {codes.folder}, but {other or 'no class'} in "
                f"{others.folder}; write both anew from the same data with scripts/extract_codes.py --overwrite true"
            )


class CodeDataset(Dataset):
    """The codes of a finished code store, memory-mapped.

    Items are {"codes": one int64 tensor (*shape) per level, "label": int64}, and after `tokenize_captions` the token
    ids "text" too. Batches come whole, with codes (B, *shape), labels (B,) and text (B, T): use
    `DataLoader(dataset, ..., collate_fn=dataset.collate)`. A key may also be (index, epoch), as for images; there is
    nothing to augment.

    Args:
        folder: the store.
        verify: whether to compare checksums and ranges, which reads every file once; types and shapes always are.
    Attributes:
        spec: the code space. count: number of images. fingerprint: of the tokenizer that wrote the codes.
        contents: hash of their images and classes. tokenizer_folder: where that tokenizer was saved.
        split, num_classes, class_names: of the data.
        metadata: all of spec.json.
    Raises:
        ValueError: not a finished store, or damaged; names the file.
    """

    def __init__(self, folder: str | Path, *, verify: bool = True):
        self.folder = Path(folder)
        path = self.folder / SPEC
        if not path.is_file():
            raise ValueError(
                f"{self.folder} has no {SPEC}: it is not a code store or not finished; run scripts/extract_codes.py"
            )
        self.metadata = read_json(path)
        if self.metadata.get("format") != FORMAT or self.metadata.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{path} is not of format {FORMAT!r}, version {FORMAT_VERSION}; run scripts/extract_codes.py"
            )
        self.count: int = self._entry("count", int)
        self.fingerprint: str = self._entry("tokenizer_fingerprint", str)
        self.split: str = self._entry("split", str)
        self.num_classes: int = self._entry("num_classes", int)
        self.class_names: list[str] = self._entry("class_names", list)
        self.contents = contents_of(self._entry("dataset", dict), self.class_names)
        self.spec = self._read_spec(path)
        if self.count < 1 or self.num_classes < 0:
            raise ValueError(f"{path}: count must be at least 1 and num_classes at least 0")
        self.has_captions: bool = CAPTIONS in self._entry("files", dict)
        self._text: np.ndarray | None = None
        self._arrays = self._open()
        if verify:
            self._verify()

    @property
    def tokenizer_folder(self) -> Path:
        recorded = self._entry("tokenizer", str)
        beside = Path(os.path.realpath(self.folder)) / recorded
        return beside.resolve() if beside.exists() else Path(recorded)

    @cached_property
    def captions(self) -> list[str] | None:
        """The caption of each image; None if the data have none."""
        if not self.has_captions:
            return None
        path = self.folder / CAPTIONS
        try:
            captions = [json.loads(line) for line in path.read_bytes().splitlines()]
        except (ValueError, OSError) as error:
            raise ValueError(f"{path} is missing or damaged: {error}") from error
        if len(captions) != self.count or not all(isinstance(caption, str) for caption in captions):
            raise ValueError(f"{path} must hold {self.count} captions, one JSON string to a line")
        return captions

    def tokenize_captions(self, text_tokenizer: TextTokenizer) -> int:
        """Gives items their captions' token ids, "text", from now on; returns how many captions lost their end.

        Raises:
            ValueError: the data have no captions.
        """
        if self.captions is None:
            raise ValueError(f"{self.folder} has no captions to condition a prior on")
        ids, num_cut = text_tokenizer.encode(self.captions)
        self._text = ids.numpy().astype(np.int32)  # now and for all: the loop moves tensors, not strings
        return num_cut

    def _entry(self, key: str, kind: type) -> Any:
        value = self.metadata.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{self.folder / SPEC}: {key!r} must be of type {kind.__name__}, got {value!r}")
        return value

    def _read_spec(self, path: Path) -> CodeSpec:
        try:
            spec = CodeSpec(shapes=self._entry("shapes", list), vocab_sizes=self._entry("vocab_sizes", list))
            [smallest_dtype(vocab_size) for vocab_size in spec.vocab_sizes]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} does not describe a code space: {error}") from error
        return spec

    def _expected(self) -> Iterator[tuple[Path, np.dtype, tuple[int, ...], int]]:
        """Path, type, shape and number of values of each array."""
        dtypes = [*map(smallest_dtype, self.spec.vocab_sizes), LABEL_DTYPE]
        limits = [*self.spec.vocab_sizes, max(1, self.num_classes)]
        for name, dtype, shape, limit in zip(array_names(self.spec), dtypes, [*self.spec.shapes, ()], limits):
            yield self.folder / name, dtype, (self.count, *shape), limit

    def _open(self) -> list[np.ndarray]:
        arrays = []
        for path, dtype, shape, _ in self._expected():
            try:
                array = np.load(path, mmap_mode="r", allow_pickle=False)
            except (ValueError, OSError, EOFError) as error:
                raise ValueError(f"{path} is missing, truncated or not an array: {error}") from error
            if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != shape:
                found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "an archive"
                raise ValueError(f"{path} must hold {dtype} of shape {shape}, it holds {found}")
            arrays.append(array.view(np.ndarray))  # of which rows are taken in a third of a memmap's time
        return arrays

    def _verify(self) -> None:
        for (path, _, _, limit), array in zip(self._expected(), self._arrays):
            self._check_file(path)
            for start in range(0, self.count, 65536):
                rows = array[start : start + 65536]
                if rows.min() < 0 or rows.max() >= limit:
                    raise ValueError(f"{path} must lie in [0, {limit}), it holds {rows.min()} to {rows.max()}")
        if self.has_captions:
            self._check_file(self.folder / CAPTIONS)

    def _check_file(self, path: Path) -> None:
        entry = self._entry("files", dict).get(path.name)
        if not isinstance(entry, dict):
            raise ValueError(f"{self.folder / SPEC} has no checksum of {path.name}")
        check_file(path, size=entry.get("bytes"), sha256=entry.get("sha256"))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: Key) -> dict[str, Codes | Tensor]:
        batch = self.__getitems__([key])
        codes = tuple(level[0] for level in batch.pop("codes"))
        return {"codes": codes, **{name: values[0] for name, values in batch.items()}}

    def __getitems__(self, keys: Sequence[Key]) -> dict[str, Codes | Tensor]:
        """A whole batch: codes (B, *shape) per level, label (B,), text (B, T) if captions were tokenized."""
        rows = np.array(keys, dtype=np.int64)
        if rows.ndim == 2:  # (index, epoch)
            rows = rows[:, 0]
        if rows.min() < 0 or rows.max() >= self.count:
            raise IndexError(f"rows {rows.min()} to {rows.max()} of a store of {self.count}")
        *codes, labels = (torch.from_numpy(array.take(rows, axis=0).astype(np.int64)) for array in self._arrays)
        text = {} if self._text is None else {"text": torch.from_numpy(self._text[rows].astype(np.int64))}
        return {"codes": tuple(codes), "label": labels, **text}

    @staticmethod
    def collate(batch: dict | list[dict]) -> dict[str, Codes | Tensor]:
        """For DataLoader: batches of `__getitems__` pass, lists of items are stacked."""
        if isinstance(batch, dict):
            return batch
        codes = tuple(torch.stack(level) for level in zip(*(item["codes"] for item in batch)))
        names = [name for name in batch[0] if name != "codes"]
        return {"codes": codes, **{name: torch.stack([item[name] for item in batch]) for name in names}}

    def __getstate__(self) -> dict:
        # a pickled memory map would carry all codes to each worker, which has no use for the captions either
        return {name: value for name, value in vars(self).items() if name != "captions"} | {"_arrays": None}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._arrays = self._open()

"""Images: scikit-learn digits, torchvision data sets and folders, as {"image": (C, H, W) in [0, 1], "label": int}.

A data set has two views. The deterministic one, `dataset[i]`, is what evaluation and the code store see. The training
view, `dataset[i, epoch]`, adds augmentation, drawn by a generator that is a function of (augmentation_seed, epoch, i)
alone: neither a resumed run nor the number of workers or processes changes a single pixel.

Letters: B batch, C channels (1 or 3), H W height and width in pixels.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from PIL import ImageOps
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from tqdm import tqdm

from pipelines.image_sources import DigitsSource, FolderSource, Probe, Source, TorchvisionSource
from pipelines.preprocessing import (
    BadImageError,
    binarize,
    center,
    crop,
    draw_binary,
    naming_image,
    pad,
    resize,
    to_float,
)
from pipelines.scenes import ScenesSource

Split = Literal["train", "validation", "test"]
Key = int | tuple[int, int]

NUM_THREADS = 8  # that read and decode files, on as many cores
TEST_FRACTION = 0.1  # of data without a test split; fixed, so that test results do not depend on the configuration


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, in which shape.

    Args:
        name: "digits" (1797 scans of 8x8, in the box), "scenes" (of them, with captions; image_size is the canvas's),
            "folder", or the name of a torchvision data set (MNIST, ...).
        root: folder of the images, or where torchvision keeps its files; unused by the digits.
        download: whether torchvision may fetch what is not in `root`.
        image_size: (height, width) in pixels; null (None in Python) takes the size of the data, all of which must then
            be equal.
        channels: 1 (grey) or 3 (RGB); null takes 3 if any image has colour.
        resize_filter: how the shorter side is resized to fit `image_size`.
        crop: where the longer side is cut in training; the deterministic view always takes the centre.
        crop_padding: black pixels added on each side before a random crop in training (4 is usual for CIFAR).
        horizontal_flip: whether training mirrors half of the images.
        binarize: how pixels become 0 or 1. threshold: at 0.5. fixed: one draw with the grey value as probability, the
            same every time. stochastic: a fresh draw each epoch in training, the fixed one elsewhere.
        binarize_seed: seed of the fixed draw.
        validation_fraction: share of the images held out where the data has no validation part; of all images where a
            test split, a fixed tenth, is carved out of them too.
        split_seed: seed of the choice of the held-out images, and of the scenes.
        augmentation_seed: seed of crops, flips and fresh binarisation.
        on_bad_image: raise names the first unreadable file; skip leaves such files out and counts them.
        max_images: use at most this many images of the split, chosen by `split_seed`; null uses all.
        cache_bytes: images that fit into this many bytes, one per pixel and channel, are decoded once and kept.
    Raises:
        ValueError: a value out of range.
    """

    name: str = "digits"
    root: str = "data"
    download: bool = True
    image_size: tuple[int, int] | None = None
    channels: int | None = None
    resize_filter: Literal["nearest", "box", "bilinear", "bicubic", "lanczos"] = "bicubic"
    crop: Literal["center", "random"] = "center"
    crop_padding: int = 0
    horizontal_flip: bool = False
    binarize: Literal["none", "threshold", "stochastic", "fixed"] = "none"
    binarize_seed: int = 0
    validation_fraction: float = 0.1
    split_seed: int = 0
    augmentation_seed: int = 0
    on_bad_image: Literal["raise", "skip"] = "raise"
    max_images: int | None = None
    cache_bytes: int = 1 << 30

    def __post_init__(self):
        if self.image_size is not None:
            object.__setattr__(self, "image_size", tuple(self.image_size))  # JSON and YAML give lists
            if len(self.image_size) != 2 or min(self.image_size) < 1:
                raise ValueError(f"image_size must be (height, width) of at least 1 pixel, got {self.image_size}")
        if self.channels not in (None, 1, 3):
            raise ValueError(f"channels must be 1 (grey) or 3 (RGB), got {self.channels}")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must lie in [0, 1), got {self.validation_fraction}")
        if self.max_images is not None and self.max_images < 1:
            raise ValueError(f"max_images must be at least 1, or null for all, got {self.max_images}")
        for name in ("crop_padding", "binarize_seed", "split_seed", "augmentation_seed", "cache_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("resize_filter", "crop", "binarize", "on_bad_image"):
            allowed = get_args(type(self).__dataclass_fields__[name].type)
            if getattr(self, name) not in allowed:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; choose from {', '.join(allowed)}")


def load_images(config: DataConfig, split: Split | Literal["all"]) -> "ImageDataset":
    """The images of one split, or all of a folder that is not divided into splits.

    A test split that the data brings is used as it is, else a tenth is set aside, the same for every configuration.
    Validation images come from a validation folder, or are carved out of the training images.
    Two splits are sure to agree in shape when the second is loaded with the `config` of the first data set.

    Raises:
        ValueError: an unknown name or split, no images, images of different sizes without `image_size`, data that is
            neither in `root` nor can be downloaded.
        BadImageError: an unreadable file, unless they are skipped.
    """
    if split == "all" and config.name != "folder":
        raise ValueError(f"all images are to be had of a folder only, not of {config.name}; name a split")
    if split not in (*get_args(Split), "all"):
        raise ValueError(f"unknown split {split!r}; choose from {', '.join(get_args(Split))}")
    if config.name == "digits":
        source = DigitsSource()
    elif config.name == "scenes":
        source = ScenesSource(split, config.image_size, config.split_seed)
    elif config.name == "folder":
        source = FolderSource(Path(config.root), split)
    else:
        source = TorchvisionSource(config.name, Path(config.root), split, download=config.download)
    return ImageDataset(source, _choose(source, config, split), config, split)


def _choose(source: Source, config: DataConfig, split: str) -> np.ndarray:
    """Sorted indices of the images of a split."""
    indices = np.arange(len(source))
    if source.carved:
        indices = _carve(len(source), source.carved, config)[split]
    if not len(indices):
        few = f"put images into train/ and {split}/ folders; for a trial, the same ones will do"
        raise ValueError(
            f"the {split} split of {source.where} is empty: it is carved out of {len(source)} images "
            f"with validation_fraction = {config.validation_fraction}; "
            f"{few if len(source) <= len(source.carved) else 'use a larger fraction'}"
        )
    if config.max_images is not None and config.max_images < len(indices):
        indices = np.random.default_rng(config.split_seed).permutation(indices)[: config.max_images]
    return np.sort(indices)


def _carve(count: int, carved: tuple[str, ...], config: DataConfig) -> dict[str, np.ndarray]:
    """Divides `count` images into train and the splits that the data does not bring. Train keeps at least one."""
    parts, rest = {}, np.arange(count)
    for split, fraction, seed in (("test", TEST_FRACTION, 0), ("validation", config.validation_fraction, 1)):
        parts[split] = rest[:0]
        if split in carved and fraction > 0:
            order = np.random.default_rng((seed, config.split_seed if split == "validation" else 0)).permutation(rest)
            size = min(max(1, round(fraction * count)), len(rest) - 1)
            parts[split], rest = order[:size], np.sort(order[size:])
    return {**parts, "train": rest}


class ImageDataset(Dataset):
    """Images of one split; made by `load_images`.

    `dataset[i]` is the deterministic view, `dataset[i, epoch]` the training view (see the module). Batches come
    whole: use `DataLoader(dataset, ..., collate_fn=dataset.collate)`.

    Attributes:
        config: the configuration with image_size and channels filled in from the data.
        split: train, validation, test or all.
        image_shape: (C, H, W).
        num_classes: 0 if there are no labels. class_names: their names in the order of the labels.
        captions: one for each image, None if there are none.
        preprocessing: the deterministic preprocessing as plain values, for `preprocess_image`.
        identity: what makes this the same data as at another time: name, split, count, content, preprocessing.
        fingerprint: hash of the identity.
        contents: hash of the images and their classes alone, wherever they are.
        skipped: unreadable files that were left out.
    """

    def __init__(self, source: Source, indices: np.ndarray, config: DataConfig, split: str):
        self.source, self.split = source, split
        self.skipped: list[Path] = []
        self.class_names = source.class_names
        self.num_classes = len(source.class_names)
        self._skip = config.on_bad_image == "skip"
        self._stream = AugmentationStream(config.augmentation_seed)
        self._equal_sizes = config.image_size is None
        self._indices = indices
        probes = self._probe()
        self.config = replace(config, **_fill_in(config, probes, source))
        self.image_shape = (self.config.channels, *self.config.image_size)
        self.preprocessing = _describe_preprocessing(self.config)
        self._cache, self._labels = self._decode_all()
        self.identity = self._describe(hashlib.sha256(b"".join(probe.digest for _, probe in sorted(probes.items()))))
        self.fingerprint = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        self.contents = contents_of(self.identity, self.class_names)

    def __len__(self) -> int:
        return len(self._indices)

    @cached_property
    def captions(self) -> list[str] | None:
        return [self.source.caption(int(index)) for index in self._indices] if self.source.has_captions else None

    def file_digests(self) -> set[bytes]:
        """Of the images of a folder, whatever their files are called; see `FolderSource.file_digest`."""
        return set(self._map(self.source.file_digest, self._indices, "comparing images"))

    def _probe(self) -> dict[int, Probe]:
        """Looks at the images (at most probe_count of them), leaving out those that cannot be read."""
        count = min(len(self._indices), self.source.probe_count)
        looked_at = self._indices[np.linspace(0, len(self._indices) - 1, count).astype(int)]
        probes = dict(zip(looked_at.tolist(), self._map(self.source.probe, looked_at, "looking at images")))
        self._leave_out([index for index, probe in probes.items() if probe is None])
        return {index: probe for index, probe in probes.items() if probe is not None}

    def _leave_out(self, bad: list[int]) -> None:
        self.skipped += [Path(self.source.name(index)) for index in bad]
        self._indices = self._indices[~np.isin(self._indices, bad)]
        if not len(self._indices):
            raise ValueError(f"none of the {len(self.skipped)} images of {self.source.where} can be read")

    def _decode_all(self) -> tuple[Tensor | None, Tensor | None]:
        """Decodes what fits into memory; a set that does not is only checked, and only if bad files are skipped."""
        fits = len(self) * int(np.prod(self.image_shape)) <= self.config.cache_bytes and self.config.crop == "center"
        if not fits and not self._skip:
            return None, None
        pixels = torch.empty((len(self), *self.image_shape), dtype=torch.uint8) if fits else None
        labels = torch.zeros(len(self), dtype=torch.int64)
        good, bad = [], []
        for row, item in enumerate(self._map(self._read, self._indices, "decoding images")):
            if item is None:
                bad.append(int(self._indices[row]))
                continue
            if fits:
                pixels[row] = torch.from_numpy(item[0])
            labels[row] = item[1]
            good.append(row)
        if bad:
            self._leave_out(bad)
            pixels, labels = pixels[good] if fits else None, labels[good]
        return pixels, labels

    def _map(self, function: Callable, indices: np.ndarray, description: str) -> Iterator:
        """function(index) for each index, in order, on a few threads; None for a bad image that is to be skipped."""

        def guarded(index: int):
            try:
                return function(index)
            except BadImageError as error:
                if not self._skip:
                    raise self._with_advice(error) from error
                return None

        quiet = len(indices) < 2000 or os.environ.get("LOCAL_RANK", "0") != "0"
        with (
            ThreadPoolExecutor(min(NUM_THREADS, num_usable_cores())) as pool,
            tqdm(total=len(indices), desc=description, unit="image", disable=True if quiet else None) as progress,
        ):
            run = pool.map if self.source.thread_safe else map
            for start in range(0, len(indices), 4096):  # the pool would queue millions at once
                for result in run(guarded, indices[start : start + 4096].tolist()):
                    progress.update()
                    yield result

    def _with_advice(self, error: BadImageError) -> BadImageError:
        """Skipping leaves out what cannot be read at the start: a file that goes bad later is an error all the same."""
        return BadImageError(f"{error}; mend or remove it" + ("" if self._skip else ", or set on_bad_image to skip"))

    def _read(self, index: int) -> tuple[np.ndarray, int]:
        """Deterministic pixels, uint8 (C, H, W), and label of the source's image `index`; grey if drawn later."""
        pixels, label = self._read_resized(index)
        pixels = center(pixels, self.preprocessing)
        return pixels if self.config.binarize == "stochastic" else binarize(pixels, self.preprocessing), label

    def _read_resized(self, index: int) -> tuple[np.ndarray, int]:
        """As `_read`, before the crop and grey: (C, h, w) that just covers image_size."""
        image, label = self.source.read(index)
        with naming_image(self.source.name(index)):
            image = ImageOps.exif_transpose(image)
            height, width = self.config.image_size
            if self._equal_sizes and image.size != (width, height):
                raise BadImageError(
                    f"it has {image.height}x{image.width} pixels, others {height}x{width}; "
                    f"set image_size to [height, width]"
                )
            return resize(image, self.preprocessing), label

    def _describe(self, content) -> dict:
        content.update(self._indices.astype("<i8").tobytes())
        if self.captions is not None:
            content.update(json.dumps(self.captions).encode())
        return {
            "name": self.config.name,
            "split": self.split,
            "split_seed": self.config.split_seed,
            "count": len(self),
            "content": content.hexdigest(),
            "preprocessing": self.preprocessing,
        }

    @property
    def _augments(self) -> bool:
        config = self.config
        return config.crop == "random" or config.crop_padding > 0 or config.horizontal_flip

    def __getitem__(self, key: Key) -> dict[str, Tensor]:
        index, epoch = _split_key(key)
        pixels, label = self._view(index, epoch)
        return {"image": to_float(pixels), "label": torch.tensor(label, dtype=torch.int64)}

    def __getitems__(self, keys: Sequence[Key]) -> dict[str, Tensor]:
        """A whole batch: image (B, C, H, W), label (B,)."""
        keys = [_split_key(key) for key in keys]
        if self._only_draws and all(epoch is not None for _, epoch in keys):
            return self._drawn(keys)
        # any other draw is made image by image in either view
        drawn = self.config.binarize == "stochastic" or (self._augments and any(epoch is not None for _, epoch in keys))
        if self._cache is None or drawn:
            pixels, labels = zip(*self._views(keys))
            return {"image": to_float(np.stack(pixels)), "label": torch.tensor(labels)}
        rows = torch.tensor([index for index, _ in keys])
        return {"image": to_float(self._cache.index_select(0, rows)), "label": self._labels.index_select(0, rows)}

    @property
    def _only_draws(self) -> bool:
        """Whether the training view of a decoded image is a fresh binarisation and nothing else."""
        return self.config.binarize == "stochastic" and not self._augments and self._cache is not None

    def _drawn(self, keys: list[tuple[int, int]]) -> dict[str, Tensor]:
        """What `_view` gives for each key; all but the draws themselves is done for the whole batch at once."""
        rows = torch.tensor([index for index, _ in keys])
        pixels = self._cache.index_select(0, rows).numpy()
        uniform = np.empty(pixels.shape, dtype=np.float32)
        for row, (index, epoch) in zip(uniform, keys):
            self._stream.at(epoch, index).random(out=row, dtype=np.float32)
        uniform *= 255
        return {"image": torch.from_numpy(uniform < pixels).float(), "label": self._labels.index_select(0, rows)}

    @staticmethod
    def collate(batch: dict[str, Tensor] | list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """For DataLoader: batches of `__getitems__` pass, lists of items are stacked."""
        if isinstance(batch, dict):
            return batch
        return {name: torch.stack([item[name] for item in batch]) for name in ("image", "label")}

    def _views(self, keys: list[tuple[int, int | None]]) -> list[tuple[np.ndarray, int]]:
        """The view of each key; files are read and decoded by threads, unless a loader's processes do that already."""
        if self._cache is not None or not self.source.thread_safe or get_worker_info() is not None:
            return [self._view(index, epoch) for index, epoch in keys]

        def view(key: tuple[int, int | None]) -> tuple[np.ndarray, int]:
            return self._view(*key, AugmentationStream(self.config.augmentation_seed))

        # A pool for each batch costs nothing beside decoding it, and none is left for a fork to break
        with ThreadPoolExecutor(min(NUM_THREADS, num_usable_cores(), len(keys))) as pool:
            return list(pool.map(view, keys))

    def _view(
        self, index: int, epoch: int | None, stream: "AugmentationStream | None" = None
    ) -> tuple[np.ndarray, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of a data set of {len(self)}")
        try:
            if epoch is None:
                return self._deterministic(index)
            return self._augmented(index, (stream or self._stream).at(epoch, index))
        except BadImageError as error:
            raise self._with_advice(error) from error

    def _pixels(self, index: int) -> tuple[np.ndarray, int]:
        if self._cache is None:
            return self._read(int(self._indices[index]))
        return self._cache[index].numpy(), int(self._labels[index])

    def _deterministic(self, index: int) -> tuple[np.ndarray, int]:
        pixels, label = self._pixels(index)
        return binarize(pixels, self.preprocessing) if self.config.binarize == "stochastic" else pixels, label

    def _augmented(self, index: int, generator: np.random.Generator) -> tuple[np.ndarray, int]:
        config = self.config

        def anywhere(slack: int) -> int:
            return int(generator.integers(slack + 1))

        if config.crop == "random":
            pixels, label = self._read_resized(int(self._indices[index]))
            pixels = crop(pixels, config.image_size, anywhere)
            pixels = pixels if config.binarize == "stochastic" else binarize(pixels, self.preprocessing)
        else:
            pixels, label = self._pixels(index)
        if config.crop_padding:
            pixels = crop(pad(pixels, config.crop_padding), config.image_size, anywhere)
        if config.horizontal_flip and generator.random() < 0.5:
            pixels = pixels[:, :, ::-1]
        if config.binarize == "stochastic":
            pixels = draw_binary(pixels, generator)
        return np.ascontiguousarray(pixels), label


def contents_of(identity: dict, class_names: Sequence[str]) -> str:
    """`ImageDataset.contents`, from the identity."""
    return hashlib.sha256(json.dumps([identity.get("content"), class_names]).encode()).hexdigest()


def num_usable_cores() -> int:
    """Of the CPU, those that this process may run on; all where the system does not say, as macOS."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _split_key(key: Key) -> tuple[int, int | None]:
    return (int(key[0]), int(key[1])) if isinstance(key, tuple | list) else (int(key), None)


class AugmentationStream:
    """Random numbers of (seed, epoch, index).

    Philox takes 128 bits of key as they are, so different triples never share a stream. Its state is set anew for each
    image, since making a generator takes ten times as long.
    """

    def __init__(self, seed: int):
        self._philox = np.random.Philox(key=np.array([seed, 0], dtype=np.uint64))
        self._generator = np.random.Generator(self._philox)
        self._start = self._philox.state

    def at(self, epoch: int, index: int) -> np.random.Generator:
        """The generator at the start of a stream; valid until the next call."""
        self._start["state"]["key"][1] = epoch << 40 | index
        self._philox.state = self._start
        return self._generator


def _fill_in(config: DataConfig, probes: dict[int, Probe], source: Source) -> dict:
    """image_size and channels, from the data where the configuration leaves them open."""
    size = config.image_size
    if size is None:
        (first, probe), *others = probes.items()
        size = probe.size
        for index, other in others:
            if other.size != size:
                raise ValueError(
                    f"images differ in size: {source.name(first)} is {size[0]}x{size[1]}, {source.name(index)} is "
                    f"{other.size[0]}x{other.size[1]}; set image_size to [height, width]"
                )
    return {"image_size": size, "channels": config.channels or max(probe.channels for probe in probes.values())}


def _describe_preprocessing(config: DataConfig) -> dict:
    description = {
        "image_size": list(config.image_size),
        "channels": config.channels,
        "resize_filter": config.resize_filter,
        "crop": "center",
        "binarize": config.binarize,
        "value_range": [0, 1],
    }
    if config.binarize in ("fixed", "stochastic"):
        description["binarize_seed"] = config.binarize_seed
    return description

"""Images: scikit-learn digits, torchvision data sets and folders, as {"image": (C, H, W) in [0, 1], "label": int}.

A data set has two views. The deterministic one, `dataset[i]`, is what evaluation and the code store see. The training
view, `dataset[i, epoch]`, adds augmentation, drawn by a generator that is a function of (augmentation_seed, epoch, i)
alone: neither a resumed run nor the number of workers or processes changes a single pixel.

Letters: B batch, C channels (1 or 3), H W height and width in pixels.
"""

import difflib
import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

Split = Literal["train", "validation", "test"]
Key = int | tuple[int, int]

TEST_FRACTION = 0.1  # of data without a test split; fixed, so that test results do not depend on the configuration
VALIDATION_FOLDERS = ("validation", "val", "valid")
GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N")
# Pillow's EPS reader starts Ghostscript on the file; the others are stubs that recognise a file but cannot read it
REFUSED_FORMATS = ("EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, in which shape.

    Args:
        name: "digits" (1797 scans of 8x8, in the box), "folder", or the name of a torchvision data set (MNIST, ...).
        root: folder of the images, or where torchvision keeps its files; unused by the digits.
        download: whether torchvision may fetch what is not in `root`.
        image_size: (height, width) in pixels; None takes the size of the data, which must then all be equal.
        channels: 1 (grey) or 3 (RGB); None takes 3 if any image has colour.
        resize_filter: how the shorter side is resized to fit `image_size`.
        crop: where the longer side is cut in training; the deterministic view always takes the centre.
        crop_padding: black pixels added on each side before a random crop in training (4 is usual for CIFAR).
        horizontal_flip: whether training mirrors half of the images.
        binarize: how pixels become 0 or 1. threshold: at 0.5. fixed: one draw with the grey value as probability, the
            same every time. stochastic: a fresh draw each epoch in training, the fixed one elsewhere.
        binarize_seed: seed of the fixed draw.
        validation_fraction: share of the training images held out, where the data has no validation folder.
        split_seed: seed of the choice of the held-out images.
        augmentation_seed: seed of crops, flips and fresh binarisation.
        on_bad_image: raise names the first unreadable file; skip leaves such files out and counts them.
        max_images: use at most this many images of the split, chosen by `split_seed`; None uses all.
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
            raise ValueError(f"max_images must be at least 1, or none for all, got {self.max_images}")
        for name in ("crop_padding", "binarize_seed", "split_seed", "augmentation_seed", "cache_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("resize_filter", "crop", "binarize", "on_bad_image"):
            allowed = get_args(type(self).__dataclass_fields__[name].type)
            if getattr(self, name) not in allowed:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; choose from {', '.join(allowed)}")


class BadImageError(ValueError):
    """A file that cannot be read as an image; the message names it."""


def load_images(config: DataConfig, split: Split) -> "ImageDataset":
    """The images of one split.

    A test split that the data brings is used as it is, else a tenth is set aside, the same for every configuration.
    Validation images come from a validation folder, or are carved out of the training images.
    Two splits are sure to agree in shape when the second is loaded with the `config` of the first data set.

    Raises:
        ValueError: an unknown name or split, no images, images of different sizes without `image_size`, data that is
            neither in `root` nor can be downloaded.
        BadImageError: an unreadable file, unless they are skipped.
    """
    if split not in get_args(Split):
        raise ValueError(f"unknown split {split!r}; choose from {', '.join(get_args(Split))}")
    if config.name == "digits":
        source = DigitsSource()
    elif config.name == "folder":
        source = FolderSource(Path(config.root), split)
    else:
        source = TorchvisionSource(config, split)
    return ImageDataset(source, _choose(source, config, split), config, split)


def _choose(source: "Source", config: DataConfig, split: Split) -> np.ndarray:
    """Sorted indices of the images of a split."""
    indices = np.arange(len(source))
    if source.carved:
        indices = _carve(len(source), source.carved, config)[split]
    if not len(indices):
        raise ValueError(
            f"the {split} split of {source.where} is empty: it is carved out of {len(source)} images "
            f"with validation_fraction = {config.validation_fraction}; use more images or a larger fraction"
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


# --- Sources: raw images by number ---


class Probe(NamedTuple):
    """What is known of an image without preprocessing it."""

    size: tuple[int, int]  # (H, W) after EXIF rotation
    channels: int
    digest: bytes


class Source:
    """Raw images by number.

    where: for messages. class_names: empty if there are no labels. carved: the splits to be carved out of these images,
    empty when all of them are the split asked for. probe_count: how many images a look at the data takes in.
    thread_safe: whether several threads may read at once.
    """

    where: str
    class_names: list[str]
    carved: tuple[str, ...]
    probe_count: int
    thread_safe = True

    def __len__(self) -> int:
        raise NotImplementedError

    def name(self, index: int) -> str:
        raise NotImplementedError

    def read(self, index: int) -> tuple[Image.Image, int]:
        """The decoded image and its label (0 if there are none)."""
        raise NotImplementedError

    def probe(self, index: int) -> Probe:
        image, label = self.read(index)
        digest = hashlib.sha256(image.tobytes() + str((image.size, image.mode, label)).encode()).digest()
        return Probe((image.height, image.width), 1 if image.mode in GREY_MODES else 3, digest)


class DigitsSource(Source):
    """scikit-learn's 1797 scans of hand-written digits, 8x8 pixels of 17 grey values."""

    where = "the digits"
    carved = ("test", "validation")

    def __init__(self):
        from sklearn.datasets import load_digits  # a second to import

        digits = load_digits()
        self.pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        self.labels = digits.target
        self.class_names = [str(name) for name in digits.target_names]
        self.probe_count = len(self)

    def __len__(self) -> int:
        return len(self.pixels)

    def name(self, index: int) -> str:
        return f"digit {index}"

    def read(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]), int(self.labels[index])


def _formats() -> list[str]:
    Image.init()
    return sorted(set(Image.OPEN) - set(REFUSED_FORMATS))


def _extensions() -> set[str]:
    formats = _formats()
    return {extension for extension, name in Image.registered_extensions().items() if name in formats}


class FolderSource(Source):
    """Image files, with or without one folder per class, with or without train/ validation/ test/ above them."""

    def __init__(self, root: Path, split: Split):
        if not root.is_dir():
            raise ValueError(f"{root.absolute()} is not a folder; set root to the folder that holds the images")
        self.folder, self.carved = _split_folder(root, split)
        self.where = str(self.folder)
        self.class_names, self.paths, self.labels = _list_images(self.folder)
        if (root / "train").is_dir() and self.folder != root / "train":
            self._use_classes(_class_folders(root / "train"))
        self.formats = _formats()
        self.probe_count = len(self)

    def __len__(self) -> int:
        return len(self.paths)

    def _use_classes(self, names: list[str]) -> None:
        """Numbers the classes as training does; a held-out folder may lack some of them."""
        unknown = sorted(set(self.class_names) - set(names))
        if unknown or bool(names) != bool(self.class_names):
            raise ValueError(f"{self.folder}: classes {self.class_names} do not match those of training, {names}")
        self.labels = [names.index(self.class_names[label]) for label in self.labels] if names else self.labels
        self.class_names = names

    def name(self, index: int) -> str:
        return str(self.folder / self.paths[index])

    def read(self, index: int) -> tuple[Image.Image, int]:
        path = self.name(index)
        with _naming_image(path), Image.open(path, formats=self.formats) as image:
            _load(image)
            return image, self.labels[index]

    def probe(self, index: int) -> Probe:
        """From the header alone, and the first and last 4 kB: decoding a million files takes hours."""
        path = self.name(index)
        with _naming_image(path), open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise BadImageError("the file is empty")
            head = file.read(4096)
            file.seek(max(0, size - 4096))
            digest = hashlib.sha256(f"{self.paths[index]}\0{size}\0".encode() + head + file.read()).digest()
            file.seek(0)
            with Image.open(file, formats=self.formats) as image:
                # Orientation: 5 to 8 swap height and width, which TIFF's size heeds already. The base class's method,
                # since PNG's decodes the image.
                sideways = image.format != "TIFF" and Image.Image.getexif(image).get(0x0112, 1) >= 5
                height, width = (image.width, image.height) if sideways else (image.height, image.width)
                return Probe((height, width), 1 if image.mode in GREY_MODES else 3, digest)


def _split_folder(root: Path, split: Split) -> tuple[Path, tuple[str, ...]]:
    """The folder a split's images lie in, and which splits are to be carved out of it."""
    if not (root / "train").is_dir():
        return root, ("test", "validation")
    given = {"train": root / "train"}
    if (root / "test").is_dir():
        given["test"] = root / "test"
    validation = [root / name for name in VALIDATION_FOLDERS if (root / name).is_dir()]
    if len(validation) > 1:
        raise ValueError(f"{root} has several validation folders: {', '.join(map(str, validation))}; keep one")
    if validation:
        given["validation"] = validation[0]
    missing = tuple(name for name in ("test", "validation") if name not in given)
    if split == "train" or split in missing:
        return given["train"], missing
    return given[split], ()


def _class_folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _list_images(folder: Path) -> tuple[list[str], list[str], list[int]]:
    """Class names, paths relative to `folder` in the order of class and path, labels."""
    extensions = _extensions()

    def images_under(top: Path, pattern: str) -> list[str]:
        paths = (path.relative_to(folder) for path in top.glob(pattern) if path.suffix.lower() in extensions)
        return sorted(path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts))

    loose, class_names = images_under(folder, "*"), _class_folders(folder)
    if not class_names:
        if not loose:
            raise ValueError(f"{folder} holds no images; known extensions are {', '.join(sorted(extensions))}")
        return [], loose, [0] * len(loose)
    if loose:
        raise ValueError(
            f"{folder} holds both class folders ({class_names[0]}/, ...) and images ({loose[0]}); move them"
        )
    paths, labels = [], []
    for label, name in enumerate(class_names):
        found = images_under(folder / name, "**/*")
        if not found:
            raise ValueError(f"class folder {folder / name} holds no images; fill it or remove it")
        paths += found
        labels += [label] * len(found)
    return class_names, paths, labels


class TorchvisionSource(Source):
    """Any torchvision data set of single images."""

    probe_count = 256  # these sets are uniform, and some are too large to decode for a look
    thread_safe = False  # some share a file handle, FakeData sets torch's global seed

    def __init__(self, config: DataConfig, split: Split):
        cls = _torchvision_class(config.name)
        parameters = inspect.signature(cls).parameters
        self.where = f"torchvision's {config.name}"
        if "train" in parameters or config.name == "EMNIST":
            choices, brings_test = [{"train": split != "test"}], True
        elif "split" in parameters:
            # ImageNet and some others call the only held-out part "val"
            names = ("test", "val", "valid") if split == "test" else ("train", "trainval", "train-standard")
            choices, brings_test = [{"split": name} for name in names], True
        else:
            choices, brings_test = [{}], False
        self.carved = (
            () if brings_test and split == "test" else (("validation",) if brings_test else ("test", "validation"))
        )
        self.dataset = _construct(cls, choices, config, parameters)
        self.class_names = self._find_class_names()

    def _find_class_names(self) -> list[str]:
        if not isinstance(self.dataset[0][1], int | np.integer | Tensor):
            return []
        names = getattr(self.dataset, "classes", None)
        if names:
            return [name if isinstance(name, str) else ", ".join(map(str, name)) for name in names]
        labels = getattr(self.dataset, "labels", getattr(self.dataset, "targets", None))
        count = getattr(self.dataset, "num_classes", None) or (0 if labels is None else int(max(labels)) + 1)
        return [str(label) for label in range(count)]

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        return f"image {index} of {self.where}"

    def read(self, index: int) -> tuple[Image.Image, int]:
        with _naming_image(self.name(index)):
            image, label = self.dataset[index][:2]
            if not isinstance(image, Image.Image):
                raise BadImageError(f"it is a {type(image).__name__}; only sets of single images can be used")
            image.load()
        return image, int(label) if self.class_names else 0


def _torchvision_class(name: str) -> type:
    import prior  # noqa: F401  its guard lets torchvision import where the operators of its wheel do not load

    from torchvision import datasets  # isort: skip

    if name in datasets.__all__:
        return getattr(datasets, name)
    known = {known.lower(): known for known in ["digits", "folder", *datasets.__all__]}
    near = [known[match] for match in difflib.get_close_matches(name.lower(), known, n=3)]
    hint = f"did you mean {' or '.join(near)}?" if near else "choose digits, folder or a torchvision data set, as MNIST"
    raise ValueError(f"unknown data set {name!r}; {hint}")


def _construct(cls: type, choices: list[dict], config: DataConfig, parameters) -> Dataset:
    """Opens the files if they are there, else downloads them; one process at a time."""
    arguments = {"root": config.root} if "root" in parameters else {}
    if config.name == "EMNIST":
        arguments["split"] = "balanced"
    can_download = "download" in parameters or config.name in ("EMNIST", "QMNIST")
    Path(config.root).mkdir(parents=True, exist_ok=True)
    with FileLock(Path(config.root) / ".download.lock"):
        try:
            return _first_accepted(cls, choices, arguments)
        except (RuntimeError, OSError) as error:  # not there, or not whole
            reason = error
        if can_download and config.download:
            try:
                return _first_accepted(cls, choices, {**arguments, "download": True})
            except (RuntimeError, OSError) as error:
                reason = error
    raise ValueError(
        f"torchvision's {config.name} is not in {Path(config.root).absolute()} and was not downloaded "
        f"({type(reason).__name__}: {reason}). Without a network, copy {_expected_files(cls, config.root)}"
    ) from reason


def _first_accepted(cls: type, choices: list[dict], arguments: dict) -> Dataset:
    for choice in choices:
        try:
            return cls(**arguments, **choice)
        except ValueError as error:
            if not str(error).startswith("Unknown value"):  # torchvision's words for a split the set does not have
                raise
            refused = error
    raise refused


def _expected_files(cls: type, root: str) -> str:
    root = Path(root).absolute()
    if hasattr(cls, "resources"):  # the MNIST family
        return f"{', '.join(Path(name).name for name, _ in cls.resources)} into {root / cls.__name__ / 'raw'}"
    if hasattr(cls, "base_folder") and hasattr(cls, "filename"):  # CIFAR
        return f"{cls.filename} from {cls.url} into {root} and unpack it there, as {cls.base_folder}/"
    return f"the files that the documentation of torchvision.datasets.{cls.__name__} names into {root}"


# --- From an image to an array ---


@contextmanager
def _naming_image(name: str) -> Iterator[None]:
    """Pillow's errors, of many types, rarely say which file they are about."""
    try:
        yield
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:
        raise BadImageError(f"{name}: {error} To read it all the same, raise PIL.Image.MAX_IMAGE_PIXELS") from error
    except Exception as error:
        raise BadImageError(f"{name}: cannot be read as an image: {error}") from error


def _load(image: Image.Image) -> None:
    """Decodes. Pillow 13 mixes up the pixels of uncompressed TIFFs that lie on their side; their size betrays it."""
    announced = image.size
    image.load()
    if image.format == "TIFF" and image.size != announced:
        raise BadImageError("an uncompressed TIFF with a sideways orientation; save it compressed, or as PNG")


def _sixteen_to_eight_bits(image: Image.Image) -> Image.Image:
    """Scales 0..65535 to 0..255; Pillow's own conversion clips everything above 255."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise BadImageError(f"grey values from {values.min()} to {values.max()} do not fit into 16 bits; convert it")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _to_mode(image: Image.Image, channels: int) -> Image.Image:
    """The image upright, opaque (on white), in 8 bits, grey or RGB."""
    _load(image)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = _sixteen_to_eight_bits(image)
    if image.mode == "F":
        raise BadImageError("its pixels are floating point, of unknown range; convert it to 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if channels == 1 and image.mode not in ("1", "L"):
        image = image.convert("RGB")  # CMYK and others have no way to grey of their own
    return image.convert("L" if channels == 1 else "RGB")


def _resize(image: Image.Image, preprocessing: dict) -> np.ndarray:
    """Resizes so that image_size is just covered; uint8 (C, h, w) with h >= H, w >= W, one of them equal."""
    height, width = preprocessing["image_size"]
    image = _to_mode(image, preprocessing["channels"])
    if (image.height, image.width) != (height, width):
        scale = max(height / image.height, width / image.width)
        size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
        image = image.resize(size, Image.Resampling[preprocessing["resize_filter"].upper()])
    pixels = np.array(image)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _crop(pixels: np.ndarray, size: Sequence[int], place: Callable[[int], int]) -> np.ndarray:
    """Cuts (C, H, W) out; `place` chooses the offset among 0..slack."""
    top, left = (place(have - want) for have, want in zip(pixels.shape[1:], size))
    return pixels[:, top : top + size[0], left : left + size[1]]


def _pad(pixels: np.ndarray, width: int) -> np.ndarray:
    """Black on all sides; np.pad takes ten times as long on small images."""
    channels, height, columns = pixels.shape
    padded = np.zeros((channels, height + 2 * width, columns + 2 * width), dtype=np.uint8)
    padded[:, width : width + height, width : width + columns] = pixels
    return padded


def _binarize(pixels: np.ndarray, preprocessing: dict) -> np.ndarray:
    """Deterministic binarisation of uint8 (C, H, W) to 0 and 255.

    The fixed draw is seeded by the pixels themselves, not by the image's number: a user's copy of the file gets the
    same one, and no noise pattern is shared by different images.
    """
    if preprocessing["binarize"] == "none":
        return pixels
    if preprocessing["binarize"] == "threshold":
        return np.where(pixels >= 128, np.uint8(255), np.uint8(0))
    seed = preprocessing["binarize_seed"].to_bytes(16, "little")
    content = hashlib.sha256(seed + str(pixels.shape).encode() + pixels.tobytes()).digest()
    generator = np.random.Generator(np.random.Philox(key=np.frombuffer(content[:16], dtype="<u8")))
    return _draw(pixels, generator)


def _draw(pixels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """0 or 255, the latter with probability pixels / 255."""
    uniform = generator.random(pixels.shape, dtype=np.float32)
    return (uniform * 255 < pixels).view(np.uint8) * np.uint8(255)


def _to_float(pixels: np.ndarray | Tensor) -> Tensor:
    return torch.as_tensor(pixels).float().div_(255)


def preprocess_image(image: Image.Image, preprocessing: dict) -> Tensor:
    """A user's image as the data set would give it: the deterministic view, float32 (C, H, W) in [0, 1].

    Args:
        image: of any mode and size.
        preprocessing: `ImageDataset.preprocessing`, which travels in the tokenizer's configuration.
    Raises:
        ValueError: `preprocessing` lacks an entry; the image's mode cannot be converted.
    """
    missing = {"image_size", "channels", "resize_filter", "crop", "binarize"} - preprocessing.keys()
    if missing:
        raise ValueError(
            f"preprocessing lacks {', '.join(sorted(missing))}: the tokenizer was saved without it; "
            f"give tensors of its image_shape in [0, 1] instead"
        )
    with _naming_image("the image"):
        return _to_float(_binarize(_center(_resize(image, preprocessing), preprocessing), preprocessing))


def _center(pixels: np.ndarray, preprocessing: dict) -> np.ndarray:
    return _crop(pixels, preprocessing["image_size"], lambda slack: slack // 2)


# --- The data set ---


class ImageDataset(Dataset):
    """Images of one split; made by `load_images`.

    `dataset[i]` is the deterministic view, `dataset[i, epoch]` the training view (see the module). Batches come
    whole: use `DataLoader(dataset, ..., collate_fn=dataset.collate)`.

    Attributes:
        config: the configuration with image_size and channels filled in from the data.
        split: train, validation or test.
        image_shape: (C, H, W).
        num_classes: 0 if there are no labels. class_names: their names in the order of the labels.
        preprocessing: the deterministic preprocessing as plain values, for `preprocess_image`.
        identity: what makes this the same data as at another time: name, split, count, content, preprocessing.
        fingerprint: hash of the identity.
        skipped: unreadable files that were left out.
    """

    def __init__(self, source: Source, indices: np.ndarray, config: DataConfig, split: Split):
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

    def __len__(self) -> int:
        return len(self._indices)

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
            except BadImageError:
                if not self._skip:
                    raise
                return None

        quiet = len(indices) < 2000 or os.environ.get("LOCAL_RANK", "0") != "0"
        with (
            ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as pool,
            tqdm(total=len(indices), desc=description, unit="image", disable=quiet) as progress,
        ):
            run = pool.map if self.source.thread_safe else map
            for start in range(0, len(indices), 4096):  # the pool would queue millions at once
                for result in run(guarded, indices[start : start + 4096].tolist()):
                    progress.update()
                    yield result

    def _read(self, index: int) -> tuple[np.ndarray, int]:
        """Deterministic pixels, uint8 (C, H, W), and label of the source's image `index`; grey if drawn later."""
        pixels, label = self._read_resized(index)
        pixels = _center(pixels, self.preprocessing)
        return pixels if self.config.binarize == "stochastic" else _binarize(pixels, self.preprocessing), label

    def _read_resized(self, index: int) -> tuple[np.ndarray, int]:
        """As `_read`, before the crop and grey: (C, h, w) that just covers image_size."""
        image, label = self.source.read(index)
        with _naming_image(self.source.name(index)):
            image = ImageOps.exif_transpose(image)
            height, width = self.config.image_size
            if self._equal_sizes and image.size != (width, height):
                raise BadImageError(
                    f"it has {image.height}x{image.width} pixels, others {height}x{width}; "
                    f"set image_size to [height, width]"
                )
            return _resize(image, self.preprocessing), label

    def _describe(self, content) -> dict:
        content.update(self._indices.astype("<i8").tobytes())
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
        return {"image": _to_float(pixels), "label": torch.tensor(label, dtype=torch.int64)}

    def __getitems__(self, keys: Sequence[Key]) -> dict[str, Tensor]:
        """A whole batch: image (B, C, H, W), label (B,)."""
        keys = [_split_key(key) for key in keys]
        # a stochastic draw is made image by image in either view
        drawn = self.config.binarize == "stochastic" or (self._augments and any(epoch is not None for _, epoch in keys))
        if self._cache is None or drawn:
            pixels, labels = zip(*(self._view(index, epoch) for index, epoch in keys))
            return {"image": _to_float(np.stack(pixels)), "label": torch.tensor(labels)}
        rows = torch.tensor([index for index, _ in keys])
        return {"image": _to_float(self._cache.index_select(0, rows)), "label": self._labels.index_select(0, rows)}

    @staticmethod
    def collate(batch: dict[str, Tensor] | list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """For DataLoader: batches of `__getitems__` pass, lists of items are stacked."""
        if isinstance(batch, dict):
            return batch
        return {name: torch.stack([item[name] for item in batch]) for name in ("image", "label")}

    def _view(self, index: int, epoch: int | None) -> tuple[np.ndarray, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of a data set of {len(self)}")
        return self._deterministic(index) if epoch is None else self._augmented(index, epoch)

    def _pixels(self, index: int) -> tuple[np.ndarray, int]:
        if self._cache is None:
            return self._read(int(self._indices[index]))
        return self._cache[index].numpy(), int(self._labels[index])

    def _deterministic(self, index: int) -> tuple[np.ndarray, int]:
        pixels, label = self._pixels(index)
        return _binarize(pixels, self.preprocessing) if self.config.binarize == "stochastic" else pixels, label

    def _augmented(self, index: int, epoch: int) -> tuple[np.ndarray, int]:
        config, generator = self.config, self._stream.at(epoch, index)

        def anywhere(slack: int) -> int:
            return int(generator.integers(slack + 1))

        if config.crop == "random":
            pixels, label = self._read_resized(int(self._indices[index]))
            pixels = _crop(pixels, config.image_size, anywhere)
            pixels = pixels if config.binarize == "stochastic" else _binarize(pixels, self.preprocessing)
        else:
            pixels, label = self._pixels(index)
        if config.crop_padding:
            pixels = _crop(_pad(pixels, config.crop_padding), config.image_size, anywhere)
        if config.horizontal_flip and generator.random() < 0.5:
            pixels = pixels[:, :, ::-1]
        if config.binarize == "stochastic":
            pixels = _draw(pixels, generator)
        return np.ascontiguousarray(pixels), label


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

"""Where raw images come from: scikit-learn's digits, folders of files, torchvision's data sets."""

import difflib
import errno
import hashlib
import inspect
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from filelock import FileLock
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from pipelines.captions import NAMES, has_captions, read_captions, unused_captions
from pipelines.preprocessing import BadImageError, load, naming_image

VALIDATION_FOLDERS = ("validation", "val", "valid")
# Names, in any case, by which other tools call the folders of splits
SPLIT_LIKE = ("train", "training", "test", "testing", *VALIDATION_FOLDERS)
GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N")
# Pillow's EPS reader starts Ghostscript on the file; the others are stubs that recognise a file but cannot read it
REFUSED_FORMATS = ("EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF")


class Probe(NamedTuple):
    """What is known of an image without preprocessing it."""

    size: tuple[int, int]  # (H, W) after EXIF rotation
    channels: int
    digest: bytes


class Source(ABC):
    """Raw images by number.

    where: for messages. class_names: empty if there are no labels. carved: the splits to be carved out of these images,
    empty when all of them are the split asked for. probe_count: how many images a look at the data takes in.
    thread_safe: whether several threads may read at once. has_captions: whether images have captions, which
    `caption` then gives by number.
    unused_captions: why what seem to be captions are not used, None where there are none such.
    """

    where: str
    class_names: list[str]
    carved: tuple[str, ...]
    probe_count: int
    thread_safe = True
    has_captions = False
    unused_captions: str | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """What messages call the image."""

    @abstractmethod
    def read(self, index: int) -> tuple[Image.Image, int]:
        """The decoded image and its label (0 if there are none)."""

    def probe(self, index: int) -> Probe:
        image, label = self.read(index)
        digest = hashlib.sha256(image.tobytes() + str((image.size, image.mode, label)).encode()).digest()
        return Probe((image.height, image.width), 1 if image.mode in GREY_MODES else 3, digest)


def digit_scans() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's scans of digits, uint8 (1797, 8, 8), and which digit each is."""
    from sklearn.datasets import load_digits  # a second to import

    digits = load_digits()
    return np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target


class DigitsSource(Source):
    """scikit-learn's 1797 scans of hand-written digits, 8x8 pixels of 17 grey values."""

    where = "the digits"
    carved = ("test", "validation")

    def __init__(self):
        self.pixels, self.labels = digit_scans()
        self.class_names = [str(number) for number in range(10)]
        self.probe_count = len(self)

    def __len__(self) -> int:
        return len(self.pixels)

    def name(self, index: int) -> str:
        return f"digit {index}"

    def read(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]), int(self.labels[index])


def readable_formats() -> list[str]:
    """Pillow's, without those that are refused."""
    Image.init()
    return sorted(set(Image.OPEN) - set(REFUSED_FORMATS))


def _extensions() -> set[str]:
    formats = readable_formats()
    return {extension for extension, name in Image.registered_extensions().items() if name in formats}


class FolderSource(Source):
    """Image files, with or without one folder per class, with or without train/ validation/ test/ above them.

    Beside train/ there are no other folders of images; test/ and validation/ may also stand alone. Among classes at
    most one is named as a split. Captions are read from the folder's metadata.jsonl or metadata.csv, see
    `read_captions`.

    Args:
        root: folder of the images.
        split: train, validation or test; or all, the images of a folder that is not divided into splits.
    """

    def __init__(self, root: Path, split: str):
        if not root.is_dir():
            raise ValueError(f"{root.absolute()} is not a folder; set root to the folder that holds the images")
        self.root = root
        self.folder, self.carved = _split_folder(root, split)
        self.where = str(self.folder)
        self.class_names, self.paths, self.labels = _list_images(self.folder)
        self.captions = read_captions(self.folder, self.paths)
        self.has_captions = self.captions is not None
        if (root / "train").is_dir() and self.folder != root / "train":
            self._use_classes(_class_folders(root / "train"))
            self._check_captions(root / "train")
        self.formats = readable_formats()
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

    def _check_captions(self, train: Path) -> None:
        """A held-out folder has captions if that of training has, or stage two would find out."""
        if self.has_captions != has_captions(train):
            having, lacking = (self.folder, train) if self.has_captions else (train, self.folder)
            raise ValueError(f"{having} has captions and {lacking} has none; give both a {NAMES[0]}, or neither")

    @property
    def unused_captions(self) -> str | None:
        return None if self.has_captions else unused_captions(self.folder, self.root, self.class_names)

    def caption(self, index: int) -> str:
        return self.captions[index]

    def name(self, index: int) -> str:
        return str(self.folder / self.paths[index])

    def read(self, index: int) -> tuple[Image.Image, int]:
        path = self.name(index)
        with naming_image(path), Image.open(path, formats=self.formats) as image:
            load(image)
            return image, self.labels[index]

    def file_digest(self, index: int) -> bytes:
        """Hash of the file's size, and its first and last 4 kB, whatever it is called."""
        with open(self.name(index), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            return hashlib.sha256(f"{size}\0".encode() + _ends(file, size)).digest()

    def probe(self, index: int) -> Probe:
        """From the header alone, and the first and last 4 kB: decoding a million files takes hours."""
        path = self.name(index)
        with naming_image(path), open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise BadImageError("the file is empty")
            digest = hashlib.sha256(f"{self.paths[index]}\0{size}\0".encode() + _ends(file, size)).digest()
            file.seek(0)
            with Image.open(file, formats=self.formats) as image:
                # Orientation: 5 to 8 swap height and width, which TIFF's size heeds already. The base class's method,
                # since PNG's decodes the image.
                sideways = image.format != "TIFF" and Image.Image.getexif(image).get(0x0112, 1) >= 5
                height, width = (image.width, image.height) if sideways else (image.height, image.width)
                return Probe((height, width), 1 if image.mode in GREY_MODES else 3, digest)


def _ends(file: BinaryIO, size: int) -> bytes:
    head = file.read(4096)
    file.seek(max(0, size - 4096))
    return head + file.read()


def _split_folder(root: Path, split: str) -> tuple[Path, tuple[str, ...]]:
    """The folder a split's images lie in, and which splits are to be carved out of it."""
    given = _folders_of_splits(root)
    _check_split_names(root, given)
    parts = _listed([folder.name for folder in given.values()])
    if split == "all":
        if given:
            raise ValueError(f"{root} is divided into {parts}; name a split, or one of these folders as the root")
        return root, ()
    if not given:
        return root, ("test", "validation")
    if "train" not in given and split not in given:
        raise ValueError(
            f"{root} holds {parts} alone, and no images of the {split} split; put those into {root / split}"
        )
    missing = tuple(name for name in ("test", "validation") if name not in given)
    if split == "train" or split in missing:
        return given["train"], missing
    return given[split], ()


def _folders_of_splits(root: Path) -> dict[str, Path]:
    """The folder of each split that has one; none where folders are classes, of which one may be called as a split."""
    validation = [root / name for name in VALIDATION_FOLDERS if (root / name).is_dir()]
    given = {name: root / name for name in ("train", "test") if (root / name).is_dir()}
    if validation:
        given["validation"] = validation[0]
    if "train" not in given:
        return given if {folder.name for folder in given.values()} == set(_class_folders(root)) else {}
    if len(validation) > 1:
        raise ValueError(f"{root} has several validation folders: {', '.join(map(str, validation))}; keep one")
    return given


def _check_split_names(root: Path, given: dict[str, Path]) -> None:
    """Raises ValueError where classes would be taken for splits, or splits for classes: nothing else would show it."""
    names = _class_folders(root)
    if not given:
        like = [name for name in names if name.lower() in SPLIT_LIKE]
        if len(like) > 1:
            raise ValueError(
                f"{root} has folders that are named as splits ({_listed(like)}), but no train/, so that each would be "
                f"a class; rename the one that holds the training images train/, the others test/ and validation/"
            )
        return
    # samefile: a file system may not tell Test/ from test/, and there may be links
    splits = [root / name for name in ("train", "test", *VALIDATION_FOLDERS) if (root / name).is_dir()]
    others = [name for name in names if not any(split.samefile(root / name) for split in splits)]
    extensions = _extensions()
    others = [name for name in others if any(path.suffix.lower() in extensions for path in _files_under(root / name))]
    if others:
        raise ValueError(
            f"{root} has images in {_listed(others)} beside train/; if train is a class like these, move all of them "
            f"into {root / 'train'}, else move the others away or rename them test/ and validation/"
        )


def _listed(names: list[str]) -> str:
    return ", ".join(f"{name}/" for name in names[:5]) + (", ..." if len(names) > 5 else "")


def _class_folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _files_under(top: Path) -> Iterator[Path]:
    """All files, also in folders that are links, each folder once. Raises OSError for one that cannot be read."""

    def cannot_read(error: OSError):
        raise error

    seen = set()
    for folder, subfolders, names in os.walk(top, followlinks=True, onerror=cannot_read):
        subfolders.sort()  # which of several links to one folder is taken shall not depend on the disk
        if (real := os.path.realpath(folder)) in seen:
            subfolders.clear()
            continue
        seen.add(real)
        yield from (Path(folder) / name for name in names)


def _list_images(folder: Path) -> tuple[list[str], list[str], list[int]]:
    """Class names, paths relative to `folder` in the order of class and path, labels."""
    extensions = _extensions()

    def images_among(files: Iterable[Path]) -> list[str]:
        paths = (path.relative_to(folder) for path in files if path.suffix.lower() in extensions)
        return sorted(path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts))

    loose, class_names = images_among(folder.iterdir()), _class_folders(folder)
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
        found = images_among(_files_under(folder / name))
        if not found:
            raise ValueError(f"class folder {folder / name} holds no images; fill it or remove it")
        paths += found
        labels += [label] * len(found)
    return class_names, paths, labels


class TorchvisionSource(Source):
    """Any torchvision data set of single images."""

    probe_count = 256  # these sets are uniform, and some are too large to decode for a look
    thread_safe = False  # some share a file handle, FakeData sets torch's global seed

    def __init__(self, name: str, root: Path, split: str, *, download: bool):
        cls = _torchvision_class(name)
        parameters = inspect.signature(cls).parameters
        self.where = f"torchvision's {name}"
        if "train" in parameters or name == "EMNIST":
            choices, brings_test = [{"train": split != "test"}], True
        elif "split" in parameters:
            # ImageNet and some others call the only held-out part "val"
            names = ("test", "val", "valid") if split == "test" else ("train", "trainval", "train-standard")
            choices, brings_test = [{"split": name} for name in names], True
        else:
            choices, brings_test = [{}], False
        missing = ("validation",) if brings_test else ("test", "validation")
        self.carved = () if brings_test and split == "test" else missing
        self.dataset = _construct(cls, choices, root, parameters, download)
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
        with naming_image(self.name(index)):
            image, label = self.dataset[index][:2]
            if not isinstance(image, Image.Image):
                raise BadImageError(f"it is a {type(image).__name__}; only sets of single images can be used")
            image.load()
        return image, int(label) if self.class_names else 0


def _torchvision_class(name: str) -> type:
    from torchvision import datasets

    if name in datasets.__all__:
        return getattr(datasets, name)
    known = {known.lower(): known for known in ["digits", "scenes", "folder", *datasets.__all__]}
    near = [known[match] for match in difflib.get_close_matches(name.lower(), known, n=3)]
    hint = f"did you mean {' or '.join(near)}?" if near else "choose digits, scenes, folder or torchvision's, as MNIST"
    raise ValueError(f"unknown data set {name!r}; {hint}")


def _construct(cls: type, choices: list[dict], root: Path, parameters, download: bool) -> Dataset:
    """Opens the files if they are there, else downloads them; one process at a time."""
    arguments = {"root": root} if "root" in parameters else {}
    if cls.__name__ == "EMNIST":
        arguments["split"] = "balanced"
    can_download = "download" in parameters or cls.__name__ in ("EMNIST", "QMNIST")
    root.mkdir(parents=True, exist_ok=True)
    with _download_lock(root):
        for further in [{}, {"download": True}] if can_download and download else [{}]:
            try:
                return _first_accepted(cls, choices, arguments | further)
            except (RuntimeError, OSError) as error:  # not there, or not whole
                reason = error
    raise ValueError(
        f"torchvision's {cls.__name__} is not in {root.absolute()} and was not downloaded "
        f"({type(reason).__name__}: {reason}). Without a network, copy {_expected_files(cls, root)}"
    ) from reason


def _download_lock(root: Path) -> AbstractContextManager:
    """One process at a time; no lock where the folder cannot be written, into which nobody can download either."""
    try:
        return FileLock(root / ".download.lock").acquire()
    except OSError as error:
        if not isinstance(error, PermissionError) and error.errno != errno.EROFS:
            raise
        return nullcontext()


def _first_accepted(cls: type, choices: list[dict], arguments: dict) -> Dataset:
    for choice in choices:
        try:
            return cls(**arguments, **choice)
        except ValueError as error:
            if not str(error).startswith("Unknown value"):  # torchvision's words for a split the set does not have
                raise
            refused = error
    raise refused


def _expected_files(cls: type, root: Path) -> str:
    root = root.absolute()
    if hasattr(cls, "resources"):  # the MNIST family
        names = ", ".join(Path(name).name for name, _ in cls.resources)
        return f"{names} into {root / cls.__name__ / 'raw'}; data.download unpacks what is there"
    if hasattr(cls, "base_folder") and hasattr(cls, "filename"):  # CIFAR
        return f"{cls.filename} from {cls.url} into {root} and unpack it there, as {cls.base_folder}/"
    return f"the files that the documentation of torchvision.datasets.{cls.__name__} names into {root}"

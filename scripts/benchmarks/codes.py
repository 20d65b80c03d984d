"""From images to codes on disk, and back from there in random order."""

import importlib.util
import pickle
import shutil
import tempfile
from collections import deque, namedtuple
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import default_collate

from benchmarks.measure import Clock, compare, peak_memory
from benchmarks.peers import Peers, load
from benchmarks.report import Case, Report
from benchmarks.tokenizer import CHANNELS, CODES, LATENT, RESIDUAL
from pipelines.checkpoint import fingerprint
from pipelines.code_writing import write_codes
from pipelines.codes import CodeDataset
from pipelines.images import DataConfig, ImageDataset, load_images
from tokenizer import VQVAE2, VQVAE2Config

SIZES = {"quick": [8], "full": [4096]}  # images of 32x32
SIDE = 32
OURS, LMDB = "tessera", "rosinality (LMDB)"
READ_OURS, READ_LMDB = "tessera, read back shuffled", "rosinality, read back shuffled"
READ_BATCHES = (64, 512)
CodeRow = namedtuple("CodeRow", ["top", "bottom", "filename"])  # what its rows are pickled as


def image_folder(folder: Path, count: int) -> ImageDataset:
    """`count` random pictures as files, read once into memory."""
    generator = np.random.default_rng(0)
    for index in range(count):
        pixels = generator.integers(256, size=(SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:06d}.png", compress_level=0)
    return load_images(DataConfig(name="folder", root=str(folder), validation_fraction=0.0), "train")


def model() -> VQVAE2:
    torch.manual_seed(0)
    config = VQVAE2Config(
        image_shape=(3, SIDE, SIDE), latent_dim=LATENT,
        network={"type": "conv", "hidden_dim": CHANNELS, "residual_dim": RESIDUAL},
        quantizer={"type": "ema_vq", "codebook_size": CODES, "code_dim": LATENT, "init": "normal"},
    )  # fmt: skip
    return VQVAE2(config)


def write_ours(images: ImageDataset, store: Path) -> Callable:
    tokenizer = model()
    mark = fingerprint(tokenizer)

    def run():
        shutil.rmtree(store, ignore_errors=True)
        write_codes(
            store, tokenizer, images, split="train", tokenizer_folder=store, fingerprint=mark, batch_size=128,
            progress=False,
        )  # fmt: skip

    return run


def write_rosinality(images: ImageDataset, store: Path, folder: str) -> Callable:
    """Its extract_code.py, with the images already in memory."""
    import lmdb

    model = (
        load(folder, "vqvae").VQVAE(channel=CHANNELS, n_res_channel=RESIDUAL, embed_dim=LATENT, n_embed=CODES).eval()
    )

    def run():
        shutil.rmtree(store, ignore_errors=True)
        environment = lmdb.open(str(store), map_size=2**30)
        with environment.begin(write=True) as transaction:
            index = 0
            for start in range(0, len(images), 128):
                batch = images.__getitems__(range(start, min(start + 128, len(images))))["image"]
                _, _, _, top, bottom = model.encode(2 * batch - 1)
                for one, other in zip(top.detach().numpy(), bottom.detach().numpy()):
                    row = CodeRow(top=one, bottom=other, filename=f"{index:06d}.png")
                    transaction.put(str(index).encode(), pickle.dumps(row))
                    index += 1
        environment.close()

    return run


def shuffled(count: int, batch: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [rows.tolist() for rows in torch.randperm(count, generator=generator).split(batch)]


def read_ours(store: Path, batch: int) -> Callable:
    codes = CodeDataset(store)
    order = shuffled(len(codes), batch)
    return lambda: exhaust(map(codes.__getitems__, order))


def read_rosinality(store: Path, count: int, batch: int) -> Callable:
    """Its LMDBDataset and the collation of torch's DataLoader."""
    import lmdb

    environment = lmdb.open(str(store), readonly=True, lock=False, readahead=False, meminit=False)
    order = shuffled(count, batch)

    def item(index: int) -> tuple:
        with environment.begin() as transaction:
            row = pickle.loads(transaction.get(str(index).encode()))
        return torch.from_numpy(row.top), torch.from_numpy(row.bottom), row.filename

    return lambda: exhaust(default_collate([item(index) for index in rows]) for rows in order)


def exhaust(batches: Iterable) -> None:
    """One batch at a time, as a training loop has them."""
    deque(batches, maxlen=0)


def build(count: int, folder: str | None = None) -> Callable:
    """One dump, in a temporary folder that lives as long as the process that made it."""
    root = Path(tempfile.mkdtemp(prefix="benchmark-codes-"))
    (root / "images").mkdir()
    images = image_folder(root / "images", count)
    run = write_ours(images, root / "store") if folder is None else write_rosinality(images, root / "store", folder)

    def once():
        run()
        shutil.rmtree(root)

    return once


def run(report: Report, peers: Peers, clock: Clock, rounds: int, sizes: str, memory_gb: float) -> None:
    with_lmdb = peers.has("rosinality") and importlib.util.find_spec("lmdb") is not None
    folder = str(peers.folders["rosinality"]) if with_lmdb else None
    for num_files in SIZES[sizes]:
        with tempfile.TemporaryDirectory() as root:
            root = Path(root)
            (root / "images").mkdir()
            images = image_folder(root / "images", num_files)
            count = len(images)  # less those set aside for tests
            case = Case({"images": count, "pixels": f"{SIDE}x{SIDE}", "what": "encode and write"})
            if report.wants(case):
                run_write(case, clock, rounds, images, root, folder)
                if memory_gb:
                    measure_memory(case, num_files, folder, memory_gb)
                report.add(case)
            for batch in READ_BATCHES:
                case = Case({"images": count, "what": "read back shuffled", "batch": batch})
                if report.wants(case):
                    run_read(case, clock, rounds, images, root, folder, batch)
                    report.add(case)


def run_write(case: Case, clock: Clock, rounds: int, images: ImageDataset, root: Path, folder: str | None) -> None:
    writers = {OURS: write_ours(images, root / "ours")}
    if folder is not None:
        writers[LMDB] = write_rosinality(images, root / "lmdb", folder)
    case.add(compare(writers, clock, rounds), references=(OURS, LMDB))
    case.checks["images per second"] = len(images) / case.seconds[OURS]
    case.checks["bytes per image"] = _bytes(root / "ours") / len(images)
    if folder is not None:
        case.checks["bytes per image in LMDB"] = _bytes(root / "lmdb") / len(images)


def measure_memory(case: Case, num_files: int, folder: str | None, memory_gb: float) -> None:
    small = SIZES["quick"][0]
    case.peak_bytes[OURS] = peak_memory(build, (num_files,), (small,), memory_gb)
    four_times = peak_memory(build, (4 * num_files,), (small,), memory_gb)
    if four_times is not None:
        case.checks["peak MB at four times the images"] = four_times / 1e6
    if folder is not None:
        case.peak_bytes[LMDB] = peak_memory(build, (num_files, folder), (small, folder), memory_gb)


def run_read(
    case: Case, clock: Clock, rounds: int, images: ImageDataset, root: Path, folder: str | None, batch: int
) -> None:
    write_ours(images, root / "ours")()
    readers = {READ_OURS: read_ours(root / "ours", batch)}
    if folder is not None:
        write_rosinality(images, root / "lmdb", folder)()
        readers[READ_LMDB] = read_rosinality(root / "lmdb", len(images), batch)
    case.add(compare(readers, clock, rounds), references=(READ_OURS, READ_LMDB))
    case.checks["images per second"] = len(images) / case.seconds[READ_OURS]


def _bytes(folder: Path) -> int:
    """Of disk blocks: a file of a database may be sparse."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())

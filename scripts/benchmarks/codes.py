"""From images to codes on disk, and back from there in random order."""

import pickle
import shutil
import tempfile
from collections import namedtuple
from collections.abc import Callable
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
from pipelines.codes import CodeDataset, write_codes
from pipelines.images import DataConfig, ImageDataset, load_images
from tokenizer import VQVAE2, VQVAE2Config

SIZES = {"quick": [8], "full": [1024]}  # images of 32x32
SIDE = 32
OURS, LMDB = "tessera", "rosinality (LMDB)"
READ_OURS, READ_LMDB = "tessera, read back shuffled", "rosinality, read back shuffled"
READ_BATCH = 64
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


def read_ours(store: Path) -> Callable:
    codes = CodeDataset(store)
    order = torch.randperm(len(codes)).split(READ_BATCH)
    return lambda: [codes.__getitems__(rows.tolist()) for rows in order]


def read_rosinality(store: Path, count: int) -> Callable:
    """Its LMDBDataset and the collation of torch's DataLoader."""
    import lmdb

    environment = lmdb.open(str(store), readonly=True, lock=False, readahead=False, meminit=False)
    order = torch.randperm(count).split(READ_BATCH)

    def item(index: int) -> tuple:
        with environment.begin() as transaction:
            row = pickle.loads(transaction.get(str(index).encode()))
        return torch.from_numpy(row.top), torch.from_numpy(row.bottom), row.filename

    return lambda: [default_collate([item(index) for index in rows.tolist()]) for rows in order]


def build(name: str, count: int, folder: str | None = None) -> Callable:
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
    import importlib.util

    with_lmdb = peers.has("rosinality") and importlib.util.find_spec("lmdb") is not None
    folder = str(peers.folders["rosinality"]) if with_lmdb else None
    for num_files in SIZES[sizes]:
        with tempfile.TemporaryDirectory() as root:
            root = Path(root)
            (root / "images").mkdir()
            images = image_folder(root / "images", num_files)
            count = len(images)  # less those set aside for tests
            writers = {OURS: write_ours(images, root / "ours")}
            if with_lmdb:
                writers[LMDB] = write_rosinality(images, root / "lmdb", folder)
            case = Case({"images": count, "pixels": f"{SIDE}x{SIDE}", "what": "encode and write"})
            case.add(compare(writers, clock, rounds), references=(OURS, LMDB))
            case.checks["images per second"] = count / case.seconds[OURS]
            case.checks["bytes per image"] = _bytes(root / "ours") / count
            if with_lmdb:
                case.checks["bytes per image in LMDB"] = _bytes(root / "lmdb") / count
            if memory_gb:
                small = SIZES["quick"][0]
                case.peak_bytes[OURS] = peak_memory(build, (OURS, num_files), (OURS, small), memory_gb)
                four_times = peak_memory(build, (OURS, 4 * num_files), (OURS, small), memory_gb)
                case.checks["peak MB at four times the images"] = four_times / 1e6
                if with_lmdb:
                    sizes = (LMDB, num_files, folder), (LMDB, small, folder)
                    case.peak_bytes[LMDB] = peak_memory(build, *sizes, memory_gb)
            report.add(case)
            readers = {READ_OURS: read_ours(root / "ours")}
            if with_lmdb:
                readers[READ_LMDB] = read_rosinality(root / "lmdb", count)
            case = Case({"images": count, "what": "read back shuffled"})
            case.add(compare(readers, clock, rounds), references=(READ_OURS, READ_LMDB))
            case.checks["images per second"] = count / case.seconds[READ_OURS]
            report.add(case)


def _bytes(folder: Path) -> int:
    """Of disk blocks: a file of a database may be sparse."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())

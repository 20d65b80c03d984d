"""Writes the code store of `pipelines.codes`: encodes a data set, by any number of processes, stopped and continued.

Zero is a valid code, so that a half-written array would look whole. Therefore rows are encoded in parts, each finished
by a rename with its checksum; the arrays are put together when all parts are there, and the store counts only when
spec.json, its last file, is. A killed dump keeps its finished parts, and because batches never cross parts, neither a
restart nor the number of processes changes a byte (at an equal number of threads per process).
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from pipelines.batches import derived_seed
from pipelines.checkpoint import CONFIG_NAME
from pipelines.codes import (
    CAPTIONS,
    FORMAT,
    FORMAT_VERSION,
    LABEL_DTYPE,
    SPEC,
    CodeDataset,
    array_names,
    smallest_dtype,
)
from pipelines.config import differences
from pipelines.files import atomic_file, folder_lock, read_json, remove_stale, write_json_atomic
from pipelines.images import ImageDataset
from pipelines.memory import naming_memory
from pipelines.pipeline_index import INDEX_NAME
from pipelines.seeding import own_randomness
from prior.base import Codes, CodeSpec, evaluating

logger = logging.getLogger(__name__)

PARTS = ".parts"
DIGEST_BYTES = 32
BATCH_SIZE = 256  # images encoded at once


@dataclass(frozen=True)
class Plan:
    """What a dump will write, as far as it decides the bytes of the parts; class_names tell what the labels mean."""

    spec: CodeSpec
    count: int
    part_size: int
    fingerprint: str
    split: str
    dataset: dict
    class_names: list[str]

    @property
    def dtypes(self) -> list[np.dtype]:
        """Of each array: the levels, then the labels."""
        return [*map(smallest_dtype, self.spec.vocab_sizes), LABEL_DTYPE]

    @property
    def row_shapes(self) -> list[tuple[int, ...]]:
        return [*self.spec.shapes, ()]

    @property
    def num_parts(self) -> int:
        return -(-self.count // self.part_size)

    def rows(self, part: int) -> range:
        return range(part * self.part_size, min((part + 1) * self.part_size, self.count))

    def to_json(self) -> dict:
        fields = {**vars(self), "spec": {"shapes": self.spec.shapes, "vocab_sizes": self.spec.vocab_sizes}}
        return json.loads(json.dumps(fields))  # tuples become lists, as they will after reading

    def digest(self, part: int, body: bytes) -> bytes:
        """Checksum of a part, which also tells the part and the plan it belongs to."""
        # without class names, or parts from before they were in the plan would be lost; plan.json vouches for them
        fields = {name: value for name, value in self.to_json().items() if name != "class_names"}
        header = json.dumps([fields, part], sort_keys=True).encode()
        return hashlib.sha256(hashlib.sha256(header).digest() + body).digest()


def write_codes(
    folder: str | Path,
    tokenizer: nn.Module,
    dataset: ImageDataset,
    *,
    split: str,
    tokenizer_folder: str | Path,
    fingerprint: str,
    batch_size: int = BATCH_SIZE,
    part_size: int = 16384,
    accelerator: Accelerator | None = None,
    num_workers: int = 0,
    progress: bool = True,
    overwrite: bool = False,
) -> CodeDataset:
    """Encodes every image of `dataset`, in its deterministic view, into the code store `folder`.

    A finished store of the same tokenizer, split, data and classes is used as it is; an interrupted one is continued.
    All processes of the accelerator take part, and all must see `folder`. While the arrays are put together the codes
    need twice their space.

    Args:
        folder: the store's folder, created if need be.
        tokenizer: has `spec` and `encode`; encodes in evaluation mode and is given back in the mode it came in.
        dataset: the images.
        split: name of the split, for the record.
        tokenizer_folder: where the tokenizer was saved; recorded relative to `folder`.
        fingerprint: hash of the tokenizer's weights and configuration.
        batch_size: images encoded at once.
        part_size: images per part, the unit of work and of what a crash loses.
        accelerator: None for a single process on the tokenizer's own device.
        num_workers: worker processes that read images.
        progress: whether the main process shows a progress bar.
        overwrite: whether a store of another tokenizer, split, data or classes may be replaced.
    Raises:
        ValueError: `folder` holds another store or a model, or is in use; no images; weights that are not finite;
            codes or labels out of range; codes that are real numbers.
        OSError: disk full or not writable, with the path.
        MemoryError: a batch does not fit into memory.
    """
    if len(dataset) < 1 or batch_size < 1 or part_size < 1:
        raise ValueError(
            f"images, batch_size and part_size must be at least 1, got {len(dataset)}, {batch_size}, {part_size}"
        )
    tokenizer.spec.check_discrete("the code store")
    _check_finite(tokenizer)
    folder = Path(folder)
    class_names = list(dataset.class_names)
    plan = Plan(tokenizer.spec, len(dataset), part_size, fingerprint, split, dataset.identity, class_names)
    if models := [name for name in (CONFIG_NAME, INDEX_NAME) if (folder / name).is_file()]:
        raise ValueError(f"{folder} is a model's folder (it has {models[0]}), which codes would spoil; name another")
    plan.dtypes  # noqa: B018  a vocabulary too large to be stored shall not wait for the first part
    with ExitStack() as stack:

        def prepare() -> list[int] | None:
            stack.enter_context(folder_lock(folder))
            return _prepare(folder, plan, overwrite)

        parts = _on_main_process(prepare, accelerator)
        if parts is not None:
            rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
            device = accelerator.device if accelerator else _device(tokenizer)
            batches = _batches(plan, parts[rank::world], batch_size)
            silent = None if progress and rank == 0 else True  # None: in a terminal only
            loader = tqdm(_load(dataset, batches, num_workers), desc="encoding", unit="batch", disable=silent)
            rows = _encode(tokenizer.to(device), zip(batches, loader), device)
            fewer = f"--run RUN --split {split} --batch_size {max(1, batch_size // 2)}"
            with naming_memory(f"encoding {batch_size} images at a time; run scripts/extract_codes.py {fewer}"):
                for part in parts[rank::world]:
                    _write_part(folder, plan, part, rows, dataset.num_classes)
            if accelerator:
                accelerator.wait_for_everyone()
            extra = {
                "tokenizer": _relative(tokenizer_folder, folder),
                "num_classes": dataset.num_classes,
                "class_names": class_names,
            }
            _on_main_process(lambda: _assemble(folder, plan, extra, dataset.captions), accelerator)
    return CodeDataset(folder, verify=False)


def fitting_batch_size(tokenizer: nn.Module, training_batch_size: int) -> int:
    """Images to encode at once after training that took so many at once, which without gradients fit all the more.

    The draws of a stochastic encoder depend on the batch: it stays BATCH_SIZE there, whatever training took.
    """
    return BATCH_SIZE if tokenizer.is_stochastic else min(BATCH_SIZE, training_batch_size)


def _check_finite(tokenizer: nn.Module) -> None:
    """An encoder with NaN weights gives code 0 everywhere and no error."""
    for name, tensor in tokenizer.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"the tokenizer's {name} is not finite; its codes would be meaningless")


def _device(tokenizer: nn.Module) -> torch.device:
    return next(iter([*tokenizer.parameters(), *tokenizer.buffers()]), torch.empty(0)).device


def _relative(path: str | Path, folder: Path) -> str:
    """Relative, so that a run can be moved with its codes; a hub id stays as it is."""
    if not Path(path).exists():
        return str(path)
    return Path(os.path.relpath(os.path.realpath(path), os.path.realpath(folder))).as_posix()


def _on_main_process(function: Callable[[], Any], accelerator: Accelerator | None) -> Any:
    """The main process's result on all processes; its error too, so that none waits for it in vain."""
    outcome: list[Any] = [None, None]
    if accelerator is None or accelerator.is_main_process:
        try:
            outcome[0] = function()
        except (ValueError, OSError) as error:
            outcome[1] = error
    if accelerator is not None and accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _prepare(folder: Path, plan: Plan, overwrite: bool) -> list[int] | None:
    """The parts that are yet to be written; None if the store is finished."""
    if (folder / SPEC).exists() and _is_finished(folder, plan, overwrite):
        shutil.rmtree(folder / PARTS, ignore_errors=True)  # of a dump that was killed after its last file
        return None
    remove_stale(folder)
    parts = folder / PARTS
    if parts.exists() and not _same_plan(parts / "plan.json", plan):
        logger.warning("%s: discarding the parts of an interrupted dump with another plan", folder)
        shutil.rmtree(parts)
    parts.mkdir(exist_ok=True)
    remove_stale(parts)
    write_json_atomic(parts / "plan.json", plan.to_json())
    missing = [part for part in range(plan.num_parts) if _read_part(folder, plan, part) is None]
    if len(missing) < plan.num_parts:
        logger.info("%s: continuing, %d of %d parts are done", folder, plan.num_parts - len(missing), plan.num_parts)
    return missing


def _is_finished(folder: Path, plan: Plan, overwrite: bool) -> bool:
    try:
        found = read_json(folder / SPEC)
    except ValueError:
        if overwrite:
            return False
        raise
    # The labels follow from the classes of training, of which the identity of held-out images knows nothing
    wanted = {"tokenizer_fingerprint": plan.fingerprint, "split": plan.split, "dataset": plan.to_json()["dataset"],
              "class_names": plan.class_names}  # fmt: skip
    changed = differences({key: found.get(key) for key in wanted}, wanted)
    if changed:
        if overwrite:
            return False
        raise ValueError(
            f"{folder} already holds other codes: "
            f"{'; '.join(f'{key} {_cut(old)}, not {_cut(new)}' for key, (old, new) in changed.items())}. "
            "Choose another folder, or overwrite it"
        )
    try:
        CodeDataset(folder)
    except ValueError as error:
        logger.warning("%s; writing the codes anew", error)
        return False
    return True


def _cut(value: Any) -> str:
    """Of a thousand class names, some."""
    return text if len(text := str(value)) <= 100 else f"{text[:100]}..."


def _same_plan(path: Path, plan: Plan) -> bool:
    try:
        return {"class_names": plan.class_names, **read_json(path)} == plan.to_json()
    except (ValueError, FileNotFoundError):
        return False


def _batches(plan: Plan, parts: Sequence[int], batch_size: int) -> list[range]:
    """Row numbers of each batch; no batch crosses the border of a part."""
    return [
        plan.rows(part)[start : start + batch_size]
        for part in parts
        for start in range(0, len(plan.rows(part)), batch_size)
    ]


def _load(dataset: ImageDataset, batches: list[range], num_workers: int) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=dataset.collate,
        num_workers=num_workers,
        generator=torch.Generator(),  # the loader would draw from the global one
    )


def _encode(
    tokenizer: nn.Module, batches: Iterator[tuple[range, dict]], device: torch.device
) -> Iterator[tuple[Codes, Tensor]]:
    """Codes and labels of batches with their row numbers.

    A stochastic encoder's are draws from q(codes | x), since that is whose rate the prior is to lower, with noise that
    is a function of the first row.
    """
    for rows, batch in batches:
        seed = derived_seed(0, "codes", rows[0])
        with evaluating(tokenizer), torch.inference_mode(), own_randomness(seed, device):
            codes = tokenizer.encode(batch["image"].to(device), sample=tokenizer.is_stochastic)
        yield tuple(code.cpu() for code in codes), batch["label"]


def _write_part(folder: Path, plan: Plan, part: int, batches: Iterator[tuple[Codes, Tensor]], num_classes: int) -> None:
    """Takes the batches of one part off `batches`; the file holds the rows of each array, then the checksum."""
    columns: list[list[bytes]] = [[] for _ in plan.dtypes]
    done = 0
    while done < len(plan.rows(part)):
        codes, labels = next(batches)
        plan.spec.check(codes)  # before the cast, which would wrap around in silence
        if len(labels) != len(codes[0]):
            raise ValueError(f"the tokenizer gave codes of {len(codes[0])} images for a batch of {len(labels)}")
        if labels.min() < 0 or labels.max() >= max(1, num_classes):
            raise ValueError(f"labels must lie in [0, {num_classes}), got {labels.min()} to {labels.max()}")
        for column, values, dtype in zip(columns, (*codes, labels), plan.dtypes):
            column.append(values.numpy().astype(dtype).tobytes())
        done += len(labels)
    body = b"".join(chunk for column in columns for chunk in column)
    with atomic_file(_part_path(folder, part)) as file:
        file.write(body)
        file.write(plan.digest(part, body))


def _part_path(folder: Path, part: int) -> Path:
    return folder / PARTS / f"part-{part:06d}"


def _read_part(folder: Path, plan: Plan, part: int) -> list[bytes] | None:
    """The rows of each array, or None if the part is not there or not whole."""
    try:
        data = _part_path(folder, part).read_bytes()
    except FileNotFoundError:
        return None
    body = data[:-DIGEST_BYTES]
    if data[-DIGEST_BYTES:] != plan.digest(part, body):
        return None
    columns, start = [], 0
    for dtype, shape in zip(plan.dtypes, plan.row_shapes):
        size = len(plan.rows(part)) * int(np.prod(shape)) * dtype.itemsize
        columns.append(body[start : start + size])
        start += size
    return columns


def _assemble(folder: Path, plan: Plan, extra: dict, captions: list[str] | None) -> None:
    """Puts the arrays together from the parts. Plain writes: on a full disk a memory-mapped one is killed by SIGBUS."""
    names = array_names(plan.spec)
    hashes = [hashlib.sha256() for _ in names]
    sizes = [0] * len(names)
    with ExitStack() as stack:
        files = [stack.enter_context(atomic_file(folder / name)) for name in names]

        def append(index: int, data: bytes) -> None:
            files[index].write(data)
            hashes[index].update(data)
            sizes[index] += len(data)

        for index, (dtype, shape) in enumerate(zip(plan.dtypes, plan.row_shapes)):
            append(index, _npy_header(dtype, (plan.count, *shape)))
        for part in range(plan.num_parts):
            columns = _read_part(folder, plan, part)
            if columns is None:
                raise ValueError(f"{_part_path(folder, part)} is missing or damaged; do all processes see {folder}?")
            for index, column in enumerate(columns):
                append(index, column)
        (folder / SPEC).unlink(missing_ok=True)  # of a store that is being replaced, from here on in part
        (folder / CAPTIONS).unlink(missing_ok=True)
    for path in set(folder.glob("level*.npy")) - {folder / name for name in names}:
        path.unlink()
    entries = {
        name: {"dtype": dtype.str, "bytes": size, "sha256": hash_.hexdigest()}
        for name, dtype, size, hash_ in zip(names, plan.dtypes, sizes, hashes)
    }
    if captions is not None:
        # escaped, so that whatever a caption holds neither ends its line nor fails to be UTF-8
        data = "".join(json.dumps(caption) + "\n" for caption in captions).encode()
        with atomic_file(folder / CAPTIONS) as file:
            file.write(data)
        entries[CAPTIONS] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    header = {"format": FORMAT, "format_version": FORMAT_VERSION, "tokenizer_fingerprint": plan.fingerprint}
    fields = {**plan.to_json()["spec"], "split": plan.split, "count": plan.count, "dataset": plan.dataset}
    write_json_atomic(folder / SPEC, {**header, **fields, **extra, "files": entries})
    shutil.rmtree(folder / PARTS)


def _npy_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    buffer = BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()

"""What evaluations compute of a data set once and keep: tensors under the protocol that they were computed by."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save
from torch import Tensor

from pipelines.files import atomic_folder, check_manifest, read_json, write_json_atomic

PROTOCOL_NAME = "protocol.json"
TENSORS_NAME = "tensors.safetensors"


def cached(
    folder: Path | None, kind: str, protocol: dict, compute: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The tensors that `compute` gives, from `folder` if the same protocol was computed before.

    Args:
        folder: the cache; None keeps nothing.
        kind: the first word of the entry's name.
        protocol: plain values, all that the tensors depend on.
        compute: called where there is no entry, or one that is damaged.
    """
    if folder is None:
        return compute()
    digest = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()
    entry = Path(folder) / f"{kind}-{digest[:16]}"
    known = _read(entry, protocol)
    if known is not None:
        return known
    tensors = compute()
    with atomic_folder(entry, overwrite=True) as temporary:
        write_json_atomic(temporary / PROTOCOL_NAME, protocol)
        (temporary / TENSORS_NAME).write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}))
    return tensors


def _read(entry: Path, protocol: dict) -> dict[str, Tensor] | None:
    try:
        check_manifest(entry)
        if read_json(entry / PROTOCOL_NAME) != protocol:
            return None
    except (ValueError, OSError):  # not there, or damaged: it is made anew
        return None
    return load_file(entry / TENSORS_NAME)

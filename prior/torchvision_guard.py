"""Makes `import torchvision` work where its native library does not match the installed torch.

PyPI's torchvision is built for CUDA. Beside a CPU build of torch its library cannot be loaded; torchvision swallows
that, but then registers shape functions for two operators that only the library defines, and the import fails.
`transformers` imports torchvision wherever it is installed, so its models fail too. Declaring the two operators is
enough for everything but the operators themselves, which raise when called: no result can be wrong, only absent.
"""

import glob
import importlib.util
import os

import torch

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[torch.library.Library] = []  # a Library takes its operators with it when it is collected


def ensure_torchvision() -> None:
    """Declares torchvision's operators `nms` and `qnms` if its own library cannot; does nothing the second time."""
    spec = importlib.util.find_spec("torchvision")  # does not import it
    if spec is None or _declared or _load_native_library(spec):
        return
    missing = [name for name in ("nms", "qnms") if not hasattr(torch.ops.torchvision, name)]
    if missing:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in missing:
            library.define(name + SCHEMA)
        _declared.append(library)


def _load_native_library(spec) -> bool:
    """Whether torchvision's own operators are there; loading the library twice is loading it once."""
    folder = next(iter(spec.submodule_search_locations or ()), "")
    paths = sorted(glob.glob(os.path.join(glob.escape(folder), "_C*.so")))
    try:
        for path in paths:
            torch.ops.load_library(path)
    except OSError:
        return False
    return bool(paths)

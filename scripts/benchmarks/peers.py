"""Other people's implementations: from PyPI where they are installed, or a work tree given as --peer NAME=FOLDER."""

import importlib
import importlib.util
import shutil
import subprocess
import sys
import types
import warnings
from contextlib import contextmanager
from pathlib import Path

PACKAGES = ("vector_quantize_pytorch", "diffusers", "transformers")
# A work tree is known by a file that its benchmark imports
FOLDERS = {
    "rosinality": "vqvae.py",
    "llamagen": "autoregressive/models/gpt.py",
    "taming": "taming/modules/vqvae/quantize.py",
    "ritheshkumar95": "modules.py",
}


class Peers:
    """What there is to compare with.

    Args:
        folders: "NAME=FOLDER" of each work tree.
    Raises:
        ValueError: a name that is not known, or a folder that is not that project's.
    """

    def __init__(self, folders: list[str]):
        self.folders: dict[str, Path] = {}
        for text in folders:
            name, _, folder = text.partition("=")
            if name not in FOLDERS:
                raise ValueError(f"unknown peer '{name}'; choose from {', '.join(FOLDERS)}, as NAME=FOLDER")
            if not folder:
                raise ValueError(f"--peer {name} has no folder; write --peer {name}=FOLDER")
            if not (Path(folder) / FOLDERS[name]).is_file():
                raise ValueError(f"--peer {text}: {folder} is not a work tree of {name}, it has no {FOLDERS[name]}")
            self.folders[name] = Path(folder).absolute()

    def has(self, name: str) -> bool:
        return name in self.folders or (name in PACKAGES and importlib.util.find_spec(name) is not None)

    def versions(self) -> dict[str, str]:
        """The commit of each work tree that git knows."""
        found = {}
        for name, folder in self.folders.items() if shutil.which("git") else ():
            command = ["git", "rev-parse", "--show-prefix", "--short", "HEAD"]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            prefix, _, commit = done.stdout.partition("\n")
            if done.returncode == 0 and not prefix:  # else the folder is a part of another work tree
                found[name] = commit.strip()
        return found


def load(folder: str, module: str) -> types.ModuleType:
    """Imports `module` with `folder` first on the path, and leaves none of the folder's modules behind."""
    before = set(sys.modules)
    with _first_on_path(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = importlib.import_module(module)
    own = {path.stem for path in Path(folder).iterdir()}
    for name in set(sys.modules) - before:
        if name.split(".")[0] in own:
            del sys.modules[name]
    return loaded


@contextmanager
def _first_on_path(folder: str):
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)

"""Files and folders that are either whole or not there: atomic JSON, checksums, folders finished by one rename, locks.

Nothing here creates a file of mode 0600: what a run writes is readable as far as the umask says.
"""

import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

MANIFEST = "manifest.json"
OS_LITTER = {".DS_Store", "Thumbs.db", "desktop.ini"}  # what file managers leave in every folder that is looked at
# Of file systems that cannot: some of FUSE's, such as mounted cloud drives, and some servers'
NO_FSYNC_OF_FOLDERS = {errno.EINVAL, errno.ENOTSUP, errno.EBADF}
FOREIGN_STALE_SECONDS = 24 * 3600  # whether a process of another machine lives cannot be asked; no save takes a day

_in_progress: set[Path] = set()  # temporary names of this process, so that a recycled process id is recognised


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives an OSError that does not say which file it is about (disk full, input/output error) the path."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        reason = os.strerror(error.errno)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            reason += f" ({shutil.disk_usage(_existing_parent(path)).free} bytes free)"
        raise OSError(error.errno, reason, str(path)) from error


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in Path(path).absolute().parents if parent.is_dir())


def fsync_dir(folder: str | Path) -> None:
    """Makes the names in a folder (a rename, a new file) survive a loss of power, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FSYNC_OF_FOLDERS:
            raise
    finally:
        os.close(descriptor)


def fsync_file(path: str | Path) -> None:
    """Makes the bytes of a file, whoever wrote it, survive a loss of power."""
    with open(path, "rb") as file, naming(path):
        os.fsync(file.fileno())


def sha256_file(path: str | Path) -> str:
    """SHA-256 of the bytes of a file, in hexadecimal."""
    with open(path, "rb") as file, naming(path):
        return hashlib.file_digest(file, "sha256").hexdigest()


def _temporary_name(final: Path) -> Path:
    # the start of the name: a whole long one would leave no room for the rest
    return final.parent / f".tmp-{final.name[:40]}@{socket.gethostname()}@{os.getpid()}@{secrets.token_hex(4)}"


def is_stale(temporary: Path) -> bool:
    """Whether a `.tmp-...` name was left by a run that is no longer there."""
    match = re.search(r"@([^@]+)@(\d+)@[0-9a-f]{8}$", temporary.name)
    if match is None or temporary in _in_progress:
        return False
    host, pid = match[1], int(match[2])
    if host != socket.gethostname():
        return time.time() - temporary.stat().st_mtime > FOREIGN_STALE_SECONDS
    if pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)  # signal 0 only asks
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def remove_stale(folder: str | Path) -> None:
    """Removes the `.tmp-*` files and folders that dead runs left in `folder`."""
    for temporary in Path(folder).glob(".tmp-*"):
        try:
            if not is_stale(temporary):
                continue
        except FileNotFoundError:  # another process was quicker
            continue
        if temporary.is_dir() and not temporary.is_symlink():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file to write that takes the place of `path` in one step when the block ends without an error.

    On an error or a kill `path` is as it was before. A symbolic link is followed, not replaced.

    Raises:
        ValueError: `path` exists and is not a regular file; renaming over a device node would destroy it.
        OSError: with the path and, when the disk is full, the free bytes.
    """
    final = Path(os.path.realpath(path))
    if final.exists() and not final.is_file():
        raise ValueError(f"{final} is not a regular file; name a file to write")
    temporary = _temporary_name(final)
    _in_progress.add(temporary)
    try:
        with naming(final):
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, final)
            fsync_dir(final.parent)
    finally:
        temporary.unlink(missing_ok=True)
        _in_progress.discard(temporary)


def write_json_atomic(path: str | Path, obj: dict) -> None:
    """Writes `obj` as JSON in one step: readers see the old file or the new one, nothing between.

    Raises:
        ValueError: `obj` holds NaN or infinity, which JSON does not have.
    """
    try:
        text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{path}: cannot be written as JSON: {error}") from error
    with atomic_file(path) as file:
        file.write(text.encode() + b"\n")


def _unique_keys(pairs: list[tuple[str, object]]) -> dict:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return result


def _refuse_constant(name: str):
    raise ValueError(f"{name} is not JSON")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text} is too large")
    return value


def read_json(path: str | Path) -> dict:
    """Reads a JSON object.

    Raises:
        ValueError: naming the file, when it is not JSON in UTF-8, not an object, repeats a key or holds NaN.
        FileNotFoundError: there is no such file.
    """
    with open(path, "rb") as file, naming(path):
        data = file.read()
    try:
        obj = json.loads(
            data.decode(), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant, parse_float=_finite_float
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(obj, dict):
        raise ValueError(f"{path} must hold a JSON object, it holds a {type(obj).__name__}")
    return obj


@contextmanager
def atomic_folder(final: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder to fill that becomes `final` in one step when the block ends without an error.

    Every file gets its checksum into `manifest.json` (see `check_manifest`). On an error the temporary folder is
    removed; what a killed run left is removed by the next call for the same parent folder.

    Args:
        final: the folder's name once it is whole; parents are created.
        overwrite: whether an existing `final` is replaced; it stays until the new one is complete.
    Raises:
        ValueError: `final` exists and `overwrite` is false.
        OSError: with the path and, when the disk is full, the free bytes.
    """
    final = Path(os.path.realpath(final))
    final.parent.mkdir(parents=True, exist_ok=True)
    _recover_replaced(final)
    remove_stale(final.parent)
    if final.exists() and not (overwrite and final.is_dir()):
        raise ValueError(f"{final} exists already; choose another folder or remove it")
    temporary = _temporary_name(final)
    _in_progress.add(temporary)
    try:
        with naming(final):
            temporary.mkdir()
            yield temporary
            _write_manifest(temporary)
            _rename_folder(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _in_progress.discard(temporary)


def _write_manifest(folder: Path) -> None:
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            fsync_dir(path)
        elif path != folder / MANIFEST:
            fsync_file(path)
            files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    write_json_atomic(folder / MANIFEST, {"files": files})


def _replaced_name(final: Path) -> Path:
    return final.parent / f".old-{final.name}"


def _rename_folder(temporary: Path, final: Path) -> None:
    replaced = _replaced_name(final)
    if final.exists():
        final.rename(replaced)  # a folder cannot be renamed over another that is not empty
    try:
        temporary.rename(final)
    except OSError:
        if replaced.exists():
            replaced.rename(final)
        raise
    fsync_dir(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _recover_replaced(final: Path) -> None:
    """Undoes a replacement that was killed between its two renames."""
    replaced = _replaced_name(final)
    if replaced.exists() and not final.exists():
        replaced.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)


def check_manifest(folder: str | Path) -> None:
    """Checks every file of a folder written by `atomic_folder`; files added later are not looked at.

    Raises:
        ValueError: naming the file that is missing, has another size, or "sha256 mismatch".
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} has no {MANIFEST}: it is not finished, or not a folder of ours")
    files = read_json(folder / MANIFEST).get("files")
    if not isinstance(files, dict):
        raise ValueError(f"{folder / MANIFEST} has no table 'files'")
    for name, entry in files.items():
        if not isinstance(entry, dict) or name.startswith("/") or ".." in Path(name).parts:
            raise ValueError(f"{folder / MANIFEST}: {name!r} is not a valid entry of a file inside the folder")
        check_file(folder / name, size=entry.get("bytes"), sha256=entry.get("sha256"))


def check_file(path: str | Path, *, size: int, sha256: str) -> None:
    """Raises ValueError, naming the file, unless it has this size in bytes and this checksum."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    if path.stat().st_size != size:
        raise ValueError(f"{path}: sha256 mismatch: it holds {path.stat().st_size} bytes instead of {size}")
    if (found := sha256_file(path)) != sha256:
        raise ValueError(f"{path}: sha256 mismatch: it is {found} instead of {sha256}; the file was changed or damaged")


@contextmanager
def folder_lock(folder: str | Path) -> Iterator[None]:
    """Keeps a second run out of `folder` (created if need be) while the block runs. A dead run holds no lock.

    Raises:
        ValueError: another run holds the lock; the message has its process id and host.
        NotADirectoryError: it cannot be a folder.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        there = f"{folder} cannot be a folder, since there is a file in its place; name another"
        raise NotADirectoryError(there) from error
    owner = folder / ".lock-owner.json"
    # The owner cannot stand in the lock file itself: whoever tries to take the lock truncates that one.
    lock = FileLock(folder / ".lock", timeout=0, mode=0o666 & ~_umask())
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"{folder} is in use by {_describe_owner(owner)}; wait for it or use another folder") from None
    try:
        write_json_atomic(owner, {"pid": os.getpid(), "host": socket.gethostname(), "since": time.ctime()})
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _describe_owner(owner: Path) -> str:
    try:
        entry = read_json(owner)
        return f"process {entry['pid']} on {entry['host']} since {entry['since']}"
    except (OSError, ValueError, KeyError):  # it is just starting or just ending
        return "another process"

"""The manners of a script: what it refuses at once, what it says, how it ends."""

import json
import os
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from pipelines.config import flatten, wants_json
from pipelines.evaluation.report import format_table
from pipelines.images import ImageDataset
from pipelines.launch import exit_process

SHOWN = 8  # of a list in a table


@dataclass
class Outcome:
    """What a script says at its end.

    values: what --json prints, on one line. text: what people read in its place; default a table of the values.
    error: what part of the work failed, for the exit status and standard error.
    """

    values: dict
    text: str | None = None
    error: str | None = None

    def __str__(self) -> str:
        if self.text is not None:
            return self.text
        rows = flatten(self.values)
        return format_table({name: _in_words(value) for name, value in rows.items() if value is not None})


def _in_words(value):
    if isinstance(value, list):
        return ", ".join([*map(str, value[:SHOWN]), *(["..."] if len(value) > SHOWN else [])])
    return f"{value:,}" if isinstance(value, int) else value


def run_script(main: Callable[[], Outcome | None]) -> None:
    """Calls `main` and prints its outcome, as JSON if --json is given; then nothing else goes to standard output.

    A user's mistake ends with status 1 and one line, unless TESSERA_TRACEBACK is set.
    """
    as_json = wants_json()
    try:
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            outcome = main()
        if outcome is not None:
            print(json.dumps(outcome.values) if as_json else outcome, flush=True)
            if outcome.error is not None:
                raise ValueError(outcome.error)
    except (ValueError, OSError, ArithmeticError, MemoryError) as error:
        if os.environ.get("TESSERA_TRACEBACK"):
            raise
        exit_process(f"error: {one_line(error)}")
    except RuntimeError as error:
        if not _lost_another_process(error):
            raise
        exit_process(1)  # the other one says why
    except KeyboardInterrupt:
        exit_process(130)
    except SystemExit as stop:  # of a run that was told to stop
        exit_process(stop.code or 0)
    if dist.is_initialized():
        exit_process()


def _lost_another_process(error: RuntimeError) -> bool:
    """Whether a process other than the first waited for one that had ended, in which case its error is no news."""
    lost = isinstance(error, dist.DistError) or "onnection closed by peer" in str(error) or "gloo" in str(error)
    return dist.is_initialized() and dist.get_rank() > 0 and lost


def one_line(error: BaseException) -> str:
    """The message of an error on one line; of one that a worker process raised, without its traceback."""
    message = str(error)
    if message.startswith("Caught ") and "Original Traceback" in message:
        *_, last = re.finditer(r"^[\w.]+: ", message, re.MULTILINE)  # after the traceback: its class, and what it says
        message = message[last.end() :]
    return " ".join(message.split())


def choose_device(name: str | None) -> torch.device:
    """The device named, or an accelerator where there is one. Raises ValueError for one that cannot be used here."""
    # Of a CUDA build, current_accelerator() names the GPU also on a machine that has none
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name is None:
        return accelerator or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        known = "cpu" if accelerator is None else f"cpu or {accelerator.type}"
        raise ValueError(f"device '{name}' cannot be used here; take {known}") from error


def refuse_several_processes() -> None:
    """Raises ValueError where a script that does its work alone was launched several times over."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("several processes were launched, but this script works alone; start it with python")


def check_writable(path: Path) -> None:
    """Raises ValueError where a file could not be written, before the work on what is to be in it is done."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a regular file; name a file to write")
    folder = next(above for above in path.absolute().parents if above.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{path} cannot be written: {folder} is not a folder that can be written to; name another")


def check_seed(seed: int) -> None:
    """Raises ValueError for a seed that torch does not take."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must lie in [0, 2^63), got {seed}")


def say(line: str) -> None:
    """Once per machine, on standard error."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(line, file=sys.stderr)


def say_skipped(*data_sets: ImageDataset) -> None:
    """Names and counts the files that were left out."""
    for images in data_sets:
        if images.skipped:
            named = ", ".join(map(str, images.skipped[:10])) + (", ..." if len(images.skipped) > 10 else "")
            count = len(images.skipped)
            say(f"left out {count} unreadable of {count + len(images)} {images.split} images: {named}")


def say_unused_captions(*data_sets: ImageDataset) -> None:
    """Says why what seem to be captions are not used."""
    for reason in dict.fromkeys(images.source.unused_captions for images in data_sets):
        if reason is not None:
            say(reason)

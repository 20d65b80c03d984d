"""Captions of a folder of images, as Hugging Face's image folders hold them: metadata.jsonl or metadata.csv."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

NAMES = ("metadata.jsonl", "metadata.csv")


def read_captions(folder: Path, images: list[str]) -> list[str] | None:
    """The caption of each image: the field "text" beside the field "file_name", which is a path below `folder`.

    Args:
        folder: the folder of a split.
        images: paths relative to it.
    Returns:
        None if there is no metadata, or none of it has a field "text".
    Raises:
        ValueError: an image without a caption or with two, a caption that UTF-8 cannot hold, a file that cannot be
            read, or both kinds of file.
    """
    path, rows = _metadata(folder)
    if not _hold_captions(rows):
        return None
    captions: dict[str, str] = {}
    for line, row in rows:
        name, text = row.get("file_name"), row.get("text")
        if not isinstance(name, str) or not isinstance(text, str) or not text.strip():
            raise ValueError(f"{path}, line {line}: 'file_name' and 'text' must be strings with something in them")
        try:
            text.encode()  # JSON can escape half of a surrogate pair, which stage two could not make tokens of
        except UnicodeEncodeError as error:
            raise ValueError(f"{path}, line {line}: 'text' must be what UTF-8 can hold, got {text!r}") from error
        name = Path(name).as_posix()
        if name in captions:
            raise ValueError(f"{path}, line {line}: {name} has a caption already; an image has one")
        captions[name] = text
    missing = [image for image in images if image not in captions]
    if missing:
        raise ValueError(
            f"{path} has no caption for {len(missing)} of {len(images)} images, {missing[0]} the first; add them, or "
            "remove the images"
        )
    return [captions[image] for image in images]


def has_captions(folder: Path) -> bool:
    """Whether the folder's metadata have captions, whatever its images. Raises as `read_captions`."""
    return _hold_captions(_metadata(folder)[1])


def unused_captions(folder: Path, root: Path, class_names: Sequence[str]) -> str | None:
    """Why metadata that seem to hold captions, as other tools would read them, are not used; None if there are none.

    Args:
        folder: the folder of a split, for which `read_captions` found none.
        root: the folder above the splits, or `folder` itself.
        class_names: the class folders within it.
    """
    path, rows = _metadata(folder)
    first = rows[0][1] if rows else {}
    texts = [name for name, value in first.items() if name != "file_name" and isinstance(value, str)]
    if texts:
        return f"{path} has no field 'text', only {', '.join(texts)}: captions are not used"
    elsewhere = [(above / name, above) for above in (root, *map(folder.joinpath, class_names)) for name in NAMES]
    for path, above in elsewhere:
        if above != folder and path.is_file():
            return (
                f"{path} is not read: captions are not used; they are read from {folder / path.name}, where file_name "
                f"is a path below {folder}"
            )
    return None


def _hold_captions(rows: list[tuple[int, dict]]) -> bool:
    return any("text" in row for _, row in rows)


def _metadata(folder: Path) -> tuple[Path | None, list[tuple[int, dict]]]:
    """The folder's file of metadata, and its rows with their line numbers."""
    found = [folder / name for name in NAMES if (folder / name).is_file()]
    if len(found) > 1:
        raise ValueError(f"{folder} has both {NAMES[0]} and {NAMES[1]}; keep one")
    if not found:
        return None, []
    return found[0], list(_json_rows(found[0]) if found[0].suffix == ".jsonl" else _csv_rows(found[0]))


def _json_rows(path: Path) -> Iterator[tuple[int, dict]]:
    for line, text in enumerate(_text(path).split("\n"), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path}, line {line}, is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {line}, must be an object with 'file_name' and 'text', not {text[:40]!r}")
        yield line, row


def _csv_rows(path: Path) -> Iterator[tuple[int, dict]]:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""))
    try:
        _check_separator(path, reader.fieldnames or ())
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(
            f"{path}, after line {reader.line_num}, cannot be read as CSV: {error}; does a quote there lack its end?"
        ) from error


def _check_separator(path: Path, names: Sequence[str]) -> None:
    """Some spreadsheets separate columns otherwise; with one column only there would seem to be no captions."""
    for separator in (";", "\t"):
        columns = [name.strip(' "') for name in names[0].split(separator)] if len(names) == 1 else []
        if len(columns) > 1 and "text" in columns:
            raise ValueError(f"{path} separates its columns by {separator!r}; they must be separated by ','")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # some spreadsheets begin with a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error

"""Captions of users' own folders, from metadata.jsonl or metadata.csv to the prior's prefix."""

import csv
import json
import re
import subprocess
import sys

import pytest
from PIL import Image

from pipelines.captions import read_captions
from pipelines.images import DataConfig, load_images
from pipelines.scripting import say_unused_captions
from pipelines.two_stage import Pipeline

ROWS = [{"file_name": f"{name}.png", "text": f"the letter {name}, 'quoted', \u00e9"} for name in "abcd"]
IMAGES = [row["file_name"] for row in ROWS]
TEXTS = [row["text"] for row in ROWS]


def write(folder, rows, kind="jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"metadata.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def save_images(folder, names):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), number * 40).save(folder / name)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_captions_are_found_by_file_name_in_the_order_of_the_images(kind, tmp_path):
    write(tmp_path, [{**row, "other": "field"} for row in ROWS[::-1]], kind)
    assert read_captions(tmp_path, IMAGES) == TEXTS
    assert read_captions(tmp_path, IMAGES[2:]) == TEXTS[2:]


def test_a_csv_may_begin_with_a_byte_order_mark_and_hold_line_breaks(tmp_path):
    (tmp_path / "metadata.csv").write_bytes(b'\xef\xbb\xbffile_name,text\r\na.png,"two\nlines"\r\n')
    assert read_captions(tmp_path, ["a.png"]) == ["two\nlines"]


def test_a_caption_in_a_csv_ends_at_a_line_break_only(tmp_path):
    (tmp_path / "metadata.csv").write_text(
        "file_name,text\na.png,one\x85line\nb.png,two\u2028lines\n", encoding="utf-8"
    )
    assert read_captions(tmp_path, ["a.png", "b.png"]) == ["one\x85line", "two\u2028lines"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file_name;text\na.png;x\n", r"metadata\.csv separates its columns by ';'"),
        ('"text"\t"file_name"\nx\ta.png\n', r"separates its columns by '\\t'; they must be separated by ','"),
        (f'file_name,text\na.png,"x\n{"x" * 200_000}', "after line 1, cannot be read as CSV: field larger .* a quote"),
    ],
)
def test_a_csv_that_would_be_misread_is_refused(text, message, tmp_path):
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_captions(tmp_path, ["a.png"])


def test_no_metadata_or_none_with_text_means_no_captions(tmp_path):
    assert read_captions(tmp_path, IMAGES) is None
    write(tmp_path, [{"file_name": "a.png", "width": 3}])
    assert read_captions(tmp_path, IMAGES) is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ROWS[:2], r"no caption for 2 of 4 images, c\.png the first"),
        ([*ROWS, ROWS[1]], r"line 5: b\.png has a caption already"),
        ([*ROWS[:3], {"file_name": "d.png", "text": 7}], "line 4: 'file_name' and 'text' must be strings"),
        ([*ROWS[:3], {"file_name": "d.png", "text": " "}], "line 4"),
        ([*ROWS[:3], {"file_name": "d.png"}], "line 4"),
        ([*ROWS[:3], {"file_name": "d.png", "text": "a \ud83d"}], r"line 4: 'text' must be what UTF-8 can hold, got"),
    ],
)
def test_captions_that_are_not_one_to_each_image_are_refused_by_name(rows, message, tmp_path):
    write(tmp_path, rows)
    with pytest.raises(ValueError, match=message):
        read_captions(tmp_path, IMAGES)


def test_files_that_cannot_be_read_are_refused_by_line(tmp_path):
    path = tmp_path / "metadata.jsonl"
    path.write_text('{"file_name": "a.png", "text": "x"}\n\n{"file_name": \n')
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 3, is not JSON"):
        read_captions(tmp_path, ["a.png"])
    path.write_text('["a.png", "x"]\n')
    with pytest.raises(ValueError, match="line 1, must be an object"):
        read_captions(tmp_path, ["a.png"])
    path.write_bytes(b'{"file_name": "a.png", "text": "\xff"}\n')
    with pytest.raises(ValueError, match="is not UTF-8"):
        read_captions(tmp_path, ["a.png"])
    write(tmp_path, ROWS, "csv")
    with pytest.raises(ValueError, match=r"both metadata\.jsonl and metadata\.csv"):
        read_captions(tmp_path, IMAGES)


def test_images_carry_their_captions_through_the_carving_of_splits(tmp_path):
    names = [f"{kind}/{number:03}.png" for kind in ("cat", "dog") for number in range(20)]
    save_images(tmp_path, names)
    write(tmp_path, [{"file_name": name, "text": f"picture {name}"} for name in names])
    seen = []
    for split in ("train", "validation", "test"):
        images = load_images(DataConfig(name="folder", root=str(tmp_path)), split)
        expected = [f"picture {images.source.paths[index]}" for index in images._indices]
        assert images.captions == expected
        seen += expected
    assert sorted(seen) == sorted(f"picture {name}" for name in names)


def test_the_captions_are_part_of_what_identifies_the_images(tmp_path):
    save_images(tmp_path, IMAGES)
    config = DataConfig(name="folder", root=str(tmp_path), validation_fraction=0.25)
    plain = load_images(config, "train").fingerprint
    write(tmp_path, ROWS)
    captioned = load_images(config, "train").fingerprint
    write(tmp_path, [{**row, "text": "another"} for row in ROWS])
    assert len({plain, captioned, load_images(config, "train").fingerprint}) == 3


def test_a_split_without_captions_beside_training_images_with_some_is_refused_before_any_training(tmp_path):
    for split in ("train", "validation"):
        save_images(tmp_path / split, IMAGES)
    write(tmp_path / "train", ROWS)
    config = DataConfig(name="folder", root=str(tmp_path))
    with pytest.raises(ValueError, match=r"train has captions and .*validation has none"):
        load_images(config, "validation")
    write(tmp_path / "validation", ROWS)
    assert load_images(config, "validation").captions == TEXTS


LAYOUTS = {
    "another field": ({"metadata.jsonl": ("caption", "")}, r"metadata\.jsonl has no field 'text', only caption: "),
    "above the splits": (
        {"../metadata.jsonl": ("text", "train/")},
        r"metadata\.jsonl is not read: .* they are read from .*/train/metadata\.jsonl, where file_name is a path below",
    ),
    "in the class folders": (
        {f"{name}/metadata.jsonl": ("text", "") for name in ("cat", "dog")},
        r"cat/metadata\.jsonl is not read: captions are not used; they are read from .*/train/metadata\.jsonl",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_captions_that_are_not_used_are_no_secret(layout, tmp_path, capsys):
    files, message = LAYOUTS[layout]
    folder = tmp_path / "train"
    save_images(folder, [f"{kind}/{name}" for kind in ("cat", "dog") for name in IMAGES])
    for name, (field, prefix) in files.items():
        path = folder / name
        write(path.parent, [{"file_name": prefix + "a.png", field: "a letter", "width": 3}])
    images = load_images(DataConfig(name="folder", root=str(tmp_path)), "train")
    assert images.captions is None
    say_unused_captions(images, images)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)


def test_of_captions_that_are_used_and_of_none_nothing_is_said(tmp_path, capsys):
    save_images(tmp_path, IMAGES)
    config = DataConfig(name="folder", root=str(tmp_path))
    say_unused_captions(load_images(config, "train"), load_images(DataConfig(), "train"))
    write(tmp_path, [{"file_name": "a.png", "width": 3}])
    say_unused_captions(load_images(config, "train"))
    write(tmp_path, ROWS)
    say_unused_captions(load_images(config, "train"))
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_a_prior_of_a_folder_with_captions_follows_them(tmp_path):
    """Through the scripts: images of two brightnesses named by their captions; the samples take the named one."""
    for number in range(200):
        shade = (30, 220)[number % 2] + number % 5
        Image.new("L", (8, 8), shade).save(tmp_path / f"{number:03}.png")
    write(tmp_path, [{"file_name": f"{n:03}.png", "text": f"a {('dark', 'light')[n % 2]} square"} for n in range(200)])

    def run(script, *arguments):
        subprocess.run([sys.executable, f"scripts/{script}.py", *arguments], check=True)

    steps = [
        "--training.total_steps",
        "400",
        "--training.batch_size",
        "32",
        "--training.ema_decay",
        "0.9",
        "--training.tracker",
        "none",
    ]
    out = str(tmp_path / "run")
    run("train_tokenizer", "--data.name", "folder", "--data.root", str(tmp_path), "--output", out,
        "--tokenizer.quantizer.codebook_size", "16", *steps)  # fmt: skip
    run("train_prior", "--run", out, "--prior.num_layers", "1", "--prior.num_heads", "2", "--prior.hidden_dim", "32",
        *steps)  # fmt: skip
    pipeline = Pipeline.from_pretrained(out)
    samples = {
        name: pipeline.sample(8, prompts=[f"a {name} square"] * 8, output_type="np") for name in ("dark", "light")
    }
    assert samples["dark"].mean((1, 2, 3)).max() < 0.4
    assert samples["light"].mean((1, 2, 3)).min() > 0.6

"""The code store: whole or not there, the same bytes whatever happened while it was written."""

import errno
import hashlib
import json
import logging
import os
import pickle
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
import warnings
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

from pipelines import files
from pipelines.code_writing import write_codes
from pipelines.codes import CodeDataset, check_same_classes, smallest_dtype
from pipelines.images import DataConfig, load_images
from prior.base import CodeSpec


class PatchTokenizer(nn.Module):
    """Two levels: how bright each 4x4 patch is (300 values), and which quarter of the image is the brightest (4)."""

    is_stochastic = False

    def __init__(self):
        super().__init__()
        self.spec = CodeSpec(((2, 2), (1,)), (300, 4))
        self.scale = nn.Parameter(torch.tensor(299.0))
        self.modes = []

    def encode(self, images, sample=False):
        self.modes.append((self.training, torch.is_inference_mode_enabled()))
        means = torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), 4)[:, 0]
        return (means * self.scale).long(), means.flatten(1).argmax(1, keepdim=True)


def digits(count=33):
    return load_images(DataConfig(max_images=count), "train")


def dump(folder, dataset=None, tokenizer=None, **options):
    options = {"split": "train", "tokenizer_folder": folder.parent, "fingerprint": "f1", "part_size": 10, **options}
    return write_codes(
        folder, tokenizer or PatchTokenizer(), dataset or digits(), batch_size=4, progress=False, **options
    )


def content(folder):
    """Checksums of the store's files; the lock's file name stays behind a finished run."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.name != ".lock"}


def edit_spec(folder, **changes):
    entries = json.loads((folder / "spec.json").read_text())
    (folder / "spec.json").write_text(json.dumps({**entries, **changes}))


# --- what is written ---


@given(st.integers(1, 1 << 32))
def test_dtype_is_the_smallest_that_holds_the_vocabulary(vocab_size):
    dtype = smallest_dtype(vocab_size)
    assert np.iinfo(dtype).max >= vocab_size - 1
    assert dtype.itemsize == 1 or np.iinfo(f"u{dtype.itemsize // 2}").max < vocab_size - 1


@pytest.mark.parametrize("vocab_size", [0, (1 << 32) + 1])
def test_vocabulary_that_cannot_be_stored_is_refused(vocab_size):
    with pytest.raises(ValueError, match=r"vocab_size must lie in \[1, 2\^32\]"):
        smallest_dtype(vocab_size)


@pytest.mark.parametrize("vocab_size", [2, 256, 257, 65536, 65537, 70000])
def test_largest_code_survives_the_store(tmp_path, vocab_size):
    class Largest(nn.Module):
        spec = CodeSpec(((2,),), (vocab_size,))
        is_stochastic = False

        def encode(self, images, sample=False):
            return (torch.tensor([[0, vocab_size - 1]]).expand(len(images), 2),)

    store = dump(tmp_path / "codes", digits(3), Largest())
    assert store[2]["codes"][0].tolist() == [0, vocab_size - 1]


def test_row_i_is_image_i(tmp_path):
    dataset, tokenizer = digits(), PatchTokenizer()
    store = dump(tmp_path / "codes", dataset, tokenizer)
    batch = dataset.__getitems__(list(range(33)))
    expected = tokenizer.encode(batch["image"])
    found = store.__getitems__(list(range(33)))
    assert len(store) == store.count == 33
    assert all(torch.equal(a, b) for a, b in zip(found["codes"], expected))
    assert torch.equal(found["label"], batch["label"])
    assert [np.load(tmp_path / "codes" / f"level{i}.npy").dtype for i in (0, 1)] == [np.uint16, np.uint8]
    assert sorted(content(tmp_path / "codes")) == ["labels.npy", "level0.npy", "level1.npy", "spec.json"]


def test_encodes_in_evaluation_and_inference_mode_and_gives_the_mode_back(tmp_path):
    tokenizer = PatchTokenizer().train()
    state = torch.get_rng_state()
    dump(tmp_path / "codes", tokenizer=tokenizer)
    assert set(tokenizer.modes) == {(False, True)}
    assert tokenizer.training
    assert torch.equal(torch.get_rng_state(), state)


def test_metadata_and_relative_tokenizer_folder(tmp_path):
    (tmp_path / "run ä" / "tokenizer").mkdir(parents=True)
    store = dump(tmp_path / "run ä" / "codes", tokenizer_folder=tmp_path / "run ä" / "tokenizer")
    assert store.metadata["tokenizer"] == "../tokenizer"
    assert (store.fingerprint, store.split, store.num_classes) == ("f1", "train", 10)
    assert store.class_names == [str(i) for i in range(10)]
    assert store.metadata["dataset"] == digits().identity
    (tmp_path / "run ä").rename(tmp_path / "moved")
    assert CodeDataset(tmp_path / "moved" / "codes").tokenizer_folder == tmp_path / "moved" / "tokenizer"


def test_part_size_and_workers_change_nothing(tmp_path):
    dump(tmp_path / "a")
    dump(tmp_path / "b", part_size=7, num_workers=2)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_modes_follow_the_umask(tmp_path):
    previous = os.umask(0o027)
    try:
        dump(tmp_path / "codes")
    finally:
        os.umask(previous)
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "codes").glob("*.*")} == {0o640}


# --- interruption ---

CHILD = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import test_codes
from pathlib import Path

class Killed(test_codes.PatchTokenizer):
    def encode(self, images, sample=False):
        if len(self.modes) == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(images)

test_codes.dump(Path(sys.argv[1]), tokenizer=Killed())
"""


def test_killed_dump_keeps_its_parts_and_ends_with_the_same_bytes(tmp_path):
    dump(tmp_path / "whole")
    folder = tmp_path / "killed"
    child = [sys.executable, "-c", CHILD.format(tests=str(Path(__file__).parent)), str(folder), "7"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    result = subprocess.run(child, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr
    with pytest.raises(ValueError, match="not a code store or not finished"):
        CodeDataset(folder)
    tokenizer = PatchTokenizer()
    dump(folder, tokenizer=tokenizer)  # batches of a part: 4 + 4 + 2; the kill came in the third part
    assert len(tokenizer.modes) == 4
    assert content(folder) == content(tmp_path / "whole")


class Interrupted(PatchTokenizer):
    def encode(self, images, sample=False):
        if len(self.modes) == 7:
            raise KeyboardInterrupt
        return super().encode(images)


def interrupt_now():
    raise KeyboardInterrupt


def interrupt(folder, **options):
    with pytest.raises(KeyboardInterrupt):
        dump(folder, tokenizer=Interrupted(), **options)


def test_parts_that_a_kill_left_beside_the_finished_store_are_removed(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", lambda folder: interrupt_now())
        with pytest.raises(KeyboardInterrupt):
            dump(tmp_path)
    assert (tmp_path / "spec.json").is_file()
    assert (tmp_path / ".parts" / "part-000003").is_file()
    dump(tmp_path)
    assert not (tmp_path / ".parts").exists()


def test_damaged_part_is_redone(tmp_path):
    dump(tmp_path / "whole")
    interrupt(tmp_path / "codes")
    part = tmp_path / "codes" / ".parts" / "part-000001"
    data = bytearray(part.read_bytes())
    data[3] ^= 1
    part.write_bytes(data)
    tokenizer = PatchTokenizer()
    dump(tmp_path / "codes", tokenizer=tokenizer)
    assert len(tokenizer.modes) == 7  # this part and the two that were missing: 3 + 3 + 1
    assert content(tmp_path / "codes") == content(tmp_path / "whole")


@pytest.mark.parametrize("change", [{"fingerprint": "f2"}, {"split": "test"}, {"part_size": 11}])
def test_parts_of_another_plan_are_discarded(tmp_path, caplog, change):
    interrupt(tmp_path / "codes")
    dump(tmp_path / "whole", **change)
    with caplog.at_level(logging.WARNING):
        dump(tmp_path / "codes", **change)
    assert "another plan" in caplog.text
    assert content(tmp_path / "codes") == content(tmp_path / "whole")


def test_parts_of_other_data_are_discarded(tmp_path):
    interrupt(tmp_path / "codes")
    other = load_images(DataConfig(max_images=33, split_seed=1), "train")
    dump(tmp_path / "codes", other)
    dump(tmp_path / "whole", other)
    assert content(tmp_path / "codes") == content(tmp_path / "whole")


def test_assembly_that_fails_leaves_no_store_and_is_repeated(tmp_path):
    """Disk full while the arrays are put together, by a limit on the size of files."""
    dataset, folder = digits(400), tmp_path / "codes"
    dump(tmp_path / "whole", dataset)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # a part has 202 bytes, level0.npy 3328
        with pytest.raises(OSError, match=r"bytes free.*level0\.npy"):
            dump(folder, dataset)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert not [*folder.glob("*.npy"), *folder.glob(".tmp-*"), *folder.glob("spec.json")]
    tokenizer = PatchTokenizer()
    dump(folder, dataset, tokenizer)
    assert not tokenizer.modes  # all parts were there
    assert content(folder) == content(tmp_path / "whole")


# --- a store that is there already ---


def test_finished_store_is_used_as_it_is(tmp_path):
    dump(tmp_path / "codes")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "codes").glob("*.*")}
    tokenizer = PatchTokenizer()
    dump(tmp_path / "codes", tokenizer=tokenizer)
    assert not tokenizer.modes
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "codes").glob("*.*")} == before


def test_store_of_another_tokenizer_is_refused_unless_overwritten(tmp_path):
    dump(tmp_path / "codes", fingerprint="old")
    with pytest.raises(ValueError, match="tokenizer_fingerprint old, not new"):
        dump(tmp_path / "codes", fingerprint="new")
    assert CodeDataset(tmp_path / "codes").fingerprint == "old"
    assert dump(tmp_path / "codes", fingerprint="new", overwrite=True).fingerprint == "new"


def test_store_of_other_data_is_refused(tmp_path):
    dump(tmp_path / "codes")
    with pytest.raises(ValueError, match="already holds other codes: dataset"):
        dump(tmp_path / "codes", digits(20))


class Named:
    """Images whose labels follow from classes that other images name, as those of a held-out folder."""

    def __init__(self, images, class_names):
        self.images, self.class_names, self.num_classes = images, class_names, len(class_names)
        self.identity = images.identity

    def __len__(self):
        return len(self.images)

    def __getitems__(self, keys):
        batch = self.images.__getitems__(keys)
        return batch | {"label": batch["label"] + self.num_classes - 10}

    collate = staticmethod(lambda batch: batch)
    captions = None


TEN = [str(number) for number in range(10)]


def test_store_with_labels_of_other_classes_is_written_anew(tmp_path):
    first = dump(tmp_path / "codes", Named(digits(), TEN))
    more = Named(digits(), ["-1", *TEN])
    with pytest.raises(ValueError, match=r"already holds other codes: class_names \['0', .*, not \['-1', '0'"):
        dump(tmp_path / "codes", more)
    store = dump(tmp_path / "codes", more, overwrite=True)
    assert store.class_names == ["-1", *TEN]
    assert store[0]["label"] == first[0]["label"] + 1


def test_parts_with_labels_of_other_classes_are_discarded(tmp_path):
    interrupt(tmp_path / "codes", dataset=Named(digits(), TEN))
    more = Named(digits(), ["-1", *TEN])
    dump(tmp_path / "codes", more)
    dump(tmp_path / "whole", more)
    assert content(tmp_path / "codes") == content(tmp_path / "whole")


def test_parts_whose_plan_names_no_classes_are_continued(tmp_path):
    """As they were left by versions that did not know them there."""
    interrupt(tmp_path / "codes")
    path = tmp_path / "codes" / ".parts" / "plan.json"
    plan = json.loads(path.read_text())
    del plan["class_names"]
    path.write_text(json.dumps(plan))
    tokenizer = PatchTokenizer()
    dump(tmp_path / "codes", tokenizer=tokenizer)
    assert len(tokenizer.modes) == 4


@pytest.mark.parametrize(("names", "message"), [(["-1", *TEN], "label 0 is 0 in .*, but -1 in"),
                                                ([*TEN, "10"], "label 10 is no class in .*, but 10 in")])  # fmt: skip
def test_stores_whose_labels_mean_different_classes_are_refused(tmp_path, names, message):
    train = dump(tmp_path / "train")
    check_same_classes(train, train)
    with pytest.raises(ValueError, match=message):
        check_same_classes(train, dump(tmp_path / "validation", Named(digits(), names), split="validation"))


def test_damaged_store_is_written_anew(tmp_path, caplog):
    dump(tmp_path / "codes")
    before = content(tmp_path / "codes")
    os.truncate(tmp_path / "codes" / "level0.npy", 150)
    dump(tmp_path / "codes")
    assert "level0.npy" in caplog.text
    assert content(tmp_path / "codes") == before


def test_second_dump_into_one_folder_is_refused(tmp_path):
    code = (
        "import sys, time; from pipelines.files import folder_lock\n"
        "with folder_lock(sys.argv[1]): print(1, flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "codes")], env=environment, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout.readline()
        with pytest.raises(ValueError, match=rf"in use by process {other.pid} on "):
            dump(tmp_path / "codes")
    finally:
        other.kill()
        other.communicate()
    dump(tmp_path / "codes")  # the lock of a dead run is no obstacle


def test_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file/codes"):
        dump(tmp_path / "file" / "codes")


# --- refusals while writing ---


@pytest.mark.parametrize("value", [300, -1, -100, 65536])
def test_code_out_of_range_is_refused_before_the_cast(tmp_path, value):
    class Wrong(PatchTokenizer):
        def encode(self, images, sample=False):
            maps, quarters = super().encode(images)
            maps[0, 0, 0] = value
            return maps, quarters

    with pytest.raises(ValueError, match=r"level 0 of the codes must lie in \[0, 300\)"):
        dump(tmp_path / "codes", tokenizer=Wrong())


def test_weights_that_are_not_finite_are_refused(tmp_path):
    tokenizer = PatchTokenizer()
    tokenizer.scale.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="scale is not finite"):
        dump(tmp_path / "codes", tokenizer=tokenizer)


# --- reading ---


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "codes"
    dump(folder)
    return folder


@pytest.fixture
def store(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "codes"))


@pytest.mark.parametrize("name", ["level0.npy", "level1.npy", "labels.npy"])
def test_flipped_bit_is_found_and_the_file_named(store, name):
    data = bytearray((store / name).read_bytes())
    data[-1] ^= 1
    (store / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"{name}: sha256 mismatch"):
        CodeDataset(store)


@pytest.mark.parametrize("length", [0, 60, 150])
@pytest.mark.parametrize("verify", [True, False])
def test_truncated_array_is_named(store, length, verify):
    os.truncate(store / "level0.npy", length)
    with pytest.raises(ValueError, match=r"level0\.npy"):
        CodeDataset(store, verify=verify)


def test_missing_array_is_named(store):
    (store / "labels.npy").unlink()
    with pytest.raises(ValueError, match=r"labels\.npy is missing"):
        CodeDataset(store)


def test_array_of_another_type_is_refused(store):
    np.save(store / "level1.npy", np.zeros((33, 1), dtype=np.int64))
    with pytest.raises(ValueError, match=r"level1\.npy must hold uint8 of shape \(33, 1\), it holds int64"):
        CodeDataset(store)


def test_pickled_array_is_never_unpickled(store):
    marker = store / "marker"

    class Attack:
        def __reduce__(self):
            return (marker.write_text, ("",))

    np.save(store / "level1.npy", np.array([Attack()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"level1\.npy"):
        CodeDataset(store)
    assert not marker.exists()


def test_value_out_of_range_is_found_even_with_a_matching_checksum(store):
    array = np.load(store / "level1.npy")
    array[5] = 4
    np.save(store / "level1.npy", array)
    entries = json.loads((store / "spec.json").read_text())["files"]
    entries["level1.npy"]["sha256"] = files.sha256_file(store / "level1.npy")
    edit_spec(store, files=entries)
    with pytest.raises(ValueError, match=r"level1\.npy must lie in \[0, 4\), it holds \d to 4"):
        CodeDataset(store)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "is not of format"),
        ({"format_version": 99}, "is not of format"),
        ({"count": "33"}, "'count' must be of type int"),
        ({"count": True}, "'count' must be of type int"),
        ({"count": 0}, "count must be at least 1"),
        ({"count": 10**12}, "must hold uint16"),
        ({"shapes": 5}, "'shapes' must be of type list"),
        ({"shapes": [5, [1]]}, "does not describe a code space"),
        ({"vocab_sizes": [300, 0]}, "code sizes must be integers"),
        ({"vocab_sizes": [10**12, 4]}, "vocab_size must lie in"),
        ({"tokenizer_fingerprint": None}, "'tokenizer_fingerprint' must be of type str"),
        ({"files": {}}, "no checksum of level0"),
    ],
)
def test_wrong_entry_of_spec_json_is_named(store, changes, message):
    edit_spec(store, **changes)
    with pytest.raises(ValueError, match=message):
        CodeDataset(store)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"count": NaN}', '{"a": 1, "a": 2}', "\x00", "[" * 100000])
def test_broken_spec_json_is_named(store, text):
    (store / "spec.json").write_text(text)
    with pytest.raises(ValueError, match=r"spec\.json"):
        CodeDataset(store)


def test_folder_without_a_store_says_what_to_run(tmp_path):
    with pytest.raises(ValueError, match=r"run scripts/extract_codes\.py"):
        CodeDataset(tmp_path)


@pytest.mark.parametrize("keys", [[7, 3, 32, 7], [(7, 0), (3, 5), (32, 1), (7, 0)]], ids=["rows", "rows and epochs"])
def test_items_batches_and_loaders_agree(finished, keys):
    store = CodeDataset(finished)
    whole = store.__getitems__(keys)
    single = store.collate([store[key] for key in keys])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (loaded,) = DataLoader(store, batch_sampler=[keys], collate_fn=store.collate)
    for batch in (single, loaded):
        assert isinstance(batch["codes"], tuple)
        assert all(torch.equal(a, b) for a, b in zip(batch["codes"], whole["codes"]))
        assert torch.equal(batch["label"], whole["label"])
    assert {tensor.dtype for tensor in (*whole["codes"], whole["label"])} == {torch.int64}
    store.spec.check(whole["codes"])


def test_iteration_ends(finished):
    assert len(list(CodeDataset(finished))) == 33


@pytest.mark.parametrize("index", [-1, 33])
def test_row_outside_of_the_store_is_an_index_error(finished, index):
    with pytest.raises(IndexError, match="of a store of 33"):
        CodeDataset(finished)[index]


def test_pickled_dataset_does_not_carry_the_codes(finished):
    store = CodeDataset(finished)
    again = pickle.loads(pickle.dumps(store))
    assert torch.equal(again[3]["codes"][0], store[3]["codes"][0])
    assert store.__getstate__()["_arrays"] is None


# --- two processes ---

TORCHRUN = """
import sys
sys.path.insert(0, {tests!r})
import test_codes
from pathlib import Path
from accelerate import Accelerator
from pipelines.launch import exit_process

accelerator = Accelerator()
assert accelerator.num_processes == 2
for count in (9, 10, 33):
    tokenizer = test_codes.PatchTokenizer()
    folder, images = Path(sys.argv[1]) / str(count), test_codes.digits(count)
    store = test_codes.dump(folder, images, tokenizer, accelerator=accelerator)
    assert len(store) == count
# four parts of 3, 3, 3 and 1 batches, dealt in turn
assert len(tokenizer.modes) == (6, 4)[accelerator.process_index]
try:
    test_codes.dump(Path(sys.argv[1]) / "9", test_codes.digits(9), accelerator=accelerator, fingerprint="other")
except ValueError as error:
    (Path(sys.argv[1]) / f"refused{{accelerator.process_index}}").write_text(str(error))
exit_process()
"""


def test_two_processes_write_the_bytes_of_one(tmp_path):
    script = tmp_path / "dump.py"
    script.write_text(TORCHRUN.format(tests=str(Path(__file__).parent)))
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    result = subprocess.run(
        [*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    for count in (9, 10, 33):
        dump(tmp_path / f"one{count}", digits(count))
        assert content(tmp_path / str(count)) == content(tmp_path / f"one{count}")
    assert all("f1, not other" in (tmp_path / f"refused{rank}").read_text() for rank in (0, 1))


# --- files ---


def test_json_is_replaced_in_one_step_and_survives_a_failure(tmp_path):
    path = tmp_path / "a.json"
    files.write_json_atomic(path, {"a": [1, "ä"]})
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        files.write_json_atomic(path, {"a": float("nan")})
    assert files.read_json(path) == {"a": [1, "ä"]}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nope", "is not valid JSON"),
        ("[1]", "must hold a JSON object, it holds a list"),
        ('{"x": 1, "x": 2}', "the key 'x' stands twice"),
        ('{"x": -Infinity}', "-Infinity is not JSON"),
        ('{"x": 1e999}', "1e999 is too large"),
    ],
)
def test_bad_json_is_named(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=rf"a\.json.*{message}"):
        files.read_json(tmp_path / "a.json")


def test_symbolic_link_is_followed_not_replaced(tmp_path):
    (tmp_path / "real.json").write_text("{}")
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    files.write_json_atomic(tmp_path / "link.json", {"a": 1})
    assert (tmp_path / "link.json").is_symlink()
    assert files.read_json(tmp_path / "real.json") == {"a": 1}


def test_device_is_never_replaced():
    with pytest.raises(ValueError, match="not a regular file"):
        files.write_json_atomic("/dev/null", {})


def fill(folder, text="x"):
    (folder / "sub").mkdir()
    (folder / "sub" / "b").write_text(text)
    (folder / "a").write_text(text)


def test_atomic_folder_is_whole_or_not_there(tmp_path):
    with pytest.raises(FileNotFoundError), files.atomic_folder(tmp_path / "new" / "f") as folder:
        shutil.copy(tmp_path / "missing", folder)
    assert not list((tmp_path / "new").iterdir())
    with files.atomic_folder(tmp_path / "new" / "f") as folder:
        fill(folder)
    files.check_manifest(tmp_path / "new" / "f")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["f"]


def test_atomic_folder_replaces_only_when_asked(tmp_path):
    with files.atomic_folder(tmp_path / "f") as folder:
        fill(folder, "old")
    with pytest.raises(ValueError, match="exists already"), files.atomic_folder(tmp_path / "f"):
        pass
    with files.atomic_folder(tmp_path / "f", overwrite=True) as folder:
        (folder / "a").write_text("new")
    assert sorted(p.name for p in (tmp_path / "f").iterdir()) == ["a", "manifest.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_replacement_killed_between_its_renames_is_undone(tmp_path):
    with files.atomic_folder(tmp_path / "f") as folder:
        fill(folder, "old")
    (tmp_path / "f").rename(tmp_path / ".old-f")
    with pytest.raises(ValueError, match="exists already"), files.atomic_folder(tmp_path / "f"):
        pass
    files.check_manifest(tmp_path / "f")


@pytest.mark.parametrize(("number", "passes"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_folders_of_file_systems_that_cannot_make_names_durable_are_written_all_the_same(
    tmp_path, monkeypatch, number, passes
):
    fsync = os.fsync

    def refuse_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    with nullcontext() if passes else pytest.raises(OSError, match="Input/output error"):
        with files.atomic_folder(tmp_path / "f") as folder:
            fill(folder)
        files.check_manifest(tmp_path / "f")


@pytest.mark.parametrize("name", ["a" * 250, "瓦" * 83])
def test_names_may_be_as_long_as_the_file_system_takes(tmp_path, name):
    files.write_json_atomic(tmp_path / name, {})
    for text in ("old", "new"):
        with files.atomic_folder(tmp_path / "folders" / name, overwrite=True) as folder:
            fill(folder, text)
    assert (tmp_path / "folders" / name / "a").read_text() == "new"
    assert [p.name for p in tmp_path.glob("**/.*")] == []


@pytest.mark.parametrize("damage", ["flip", "truncate", "unlink"])
def test_manifest_names_the_damaged_file(tmp_path, damage):
    with files.atomic_folder(tmp_path / "f") as folder:
        fill(folder)
    path = tmp_path / "f" / "sub" / "b"
    {"flip": lambda: path.write_text("y"), "truncate": lambda: path.write_text(""), "unlink": path.unlink}[damage]()
    with pytest.raises(ValueError, match="b is missing" if damage == "unlink" else "b: sha256 mismatch"):
        files.check_manifest(tmp_path / "f")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd"])
def test_manifest_does_not_leave_its_folder(tmp_path, name):
    files.write_json_atomic(tmp_path / "manifest.json", {"files": {name: {}}})
    with pytest.raises(ValueError, match="not a valid entry"):
        files.check_manifest(tmp_path)


def test_leftovers_of_dead_runs_are_removed_and_those_of_living_ones_kept(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = os.uname().nodename
    stale = tmp_path / f".tmp-x@{host}@{dead.pid}@00000000"
    living = tmp_path / f".tmp-x@{host}@{os.getppid()}@00000000"
    foreign = tmp_path / ".tmp-x@elsewhere@1@00000000"
    old = tmp_path / ".tmp-x@elsewhere@1@11111111"
    for folder in (stale, living, foreign, old):
        folder.mkdir()
    os.utime(old, (0, time.time() - 2 * files.FOREIGN_STALE_SECONDS))
    with files.atomic_folder(tmp_path / "f") as folder:
        fill(folder)
    assert [path.exists() for path in (stale, living, foreign, old)] == [False, True, True, False]


def test_full_disk_is_reported_with_the_path(tmp_path):
    with (
        pytest.raises(OSError, match=r"bytes free.*weights"),
        files.naming(tmp_path / "weights"),
        open("/dev/full", "wb", buffering=0) as file,
    ):
        file.write(b"1")


def test_codes_of_a_stochastic_encoder_are_draws_that_the_row_decides(tmp_path):
    class Noisy(PatchTokenizer):
        is_stochastic = True

        def encode(self, images, sample=False):
            assert sample
            quarter = torch.randint(4, (len(images), 1))
            return super().encode(images)[0], quarter

    state = torch.get_rng_state()
    first = dump(tmp_path / "a", tokenizer=Noisy())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    again = dump(tmp_path / "b", tokenizer=Noisy())
    codes = first.__getitems__(range(33))["codes"]
    assert all(torch.equal(a, b) for a, b in zip(codes, again.__getitems__(range(33))["codes"]))
    assert len(codes[1].unique()) == 4
    assert not torch.equal(codes[1][:4], codes[1][4:8])

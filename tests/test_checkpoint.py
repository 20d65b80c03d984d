"""Models and training states on disk: equal after a round trip, refused with the reason when anything is wrong."""

import errno
import json
import os
import pickle
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from pipelines.checkpoint import (
    build_prior,
    build_tokenizer,
    fingerprint,
    load_pretrained,
    load_prior,
    load_state,
    load_tokenizer,
    model_config,
    newest_state,
    resolve_folder,
    save_model,
    save_state,
)
from prior import PRIORS, CodeSpec, Prior
from prior.pixelcnn import PixelCNN
from prior.rbm import RBM, RBMConfig
from tests import tiny
from tokenizer import TOKENIZERS, VQVAE, VQVAE2, Tokenizer
from tokenizer.likelihoods import LIKELIHOODS
from tokenizer.networks import NETWORKS
from tokenizer.quantizers import FSQ, QUANTIZERS

PREPROCESSING = {"image_size": [8, 8], "channels": 3, "resize_filter": "bicubic", "crop": "center", "binarize": "none"}
TOKENIZER_VARIANTS = [
    *((name, {}) for name in sorted(TOKENIZERS)),
    *(("vqvae", {"quantizer": {"type": name, **tiny.QUANTIZERS.get(name, {})}}) for name in sorted(QUANTIZERS)),
    *(("vqvae", {"network": {"type": name, **tiny.NETWORKS.get(name, {})}}) for name in sorted(NETWORKS)),
    *(("vqvae", {"likelihood": {"type": name, **tiny.LIKELIHOODS.get(name, {})}}) for name in sorted(LIKELIHOODS)),
]
MODELS = [
    *(pytest.param("tokenizer", name, parts, id="-".join([name, *(part["type"] for part in parts.values())]))
      for name, parts in TOKENIZER_VARIANTS),
    *(pytest.param("prior", name, {}, id=name) for name in sorted(PRIORS)),
]  # fmt: skip


def make(kind: str, name: str, **options):
    """A model whose weights have all moved from where they start."""
    if kind == "tokenizer":
        model = build_tokenizer({"type": name, **tiny.TOKENIZERS[name], **options})
    else:
        codes = {"spec": tiny.SPECS["levels"], "num_classes": 2}
        if name in tiny.BIT_PRIORS:
            codes = {"spec": tiny.SPECS["powers"], "num_classes": 0}
        if name in tiny.REAL_PRIORS:
            codes = {"spec": tiny.REAL_SPECS["levels"], "num_classes": 0}
        model = build_prior({"type": name, **tiny.PRIORS[name], **codes, **options})
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor += torch.rand_like(tensor)
    return model.eval()


def load(kind: str, folder):
    return load_tokenizer(folder) if kind == "tokenizer" else load_prior(folder)


@pytest.fixture
def folder(tmp_path):
    save_model(make("tokenizer", "vqvae", preprocessing=PREPROCESSING), tmp_path / "model")
    return tmp_path / "model"


def change_config(folder, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def change_weights(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refusal(folder) -> str:
    start = time.monotonic()
    with pytest.raises(ValueError) as error:  # noqa: PT011 (each caller looks at the message)
        load_tokenizer(folder)
    assert time.monotonic() - start < 2
    assert str(folder) in str(error.value)
    return str(error.value)


# Model folders
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name", "parts"), MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_equal_after_saving_and_loading(kind, name, parts, dtype, tmp_path):
    model = make(kind, name, **parts).to(dtype)
    save_model(model, tmp_path / "a ä")
    loaded = load(kind, tmp_path / "a ä")
    assert json.dumps(model_config(loaded)) == json.dumps(model_config(model))
    assert not loaded.training
    for key, tensor in model.state_dict().items():
        other = loaded.state_dict()[key]
        assert other.dtype == tensor.dtype
        assert torch.equal(other, tensor)
    assert fingerprint(loaded) == fingerprint(model)
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]


def test_a_fingerprint_changes_with_one_weight_or_one_field():
    model = make("tokenizer", "vqvae", preprocessing=PREPROCESSING)
    before = fingerprint(model)
    model.config = replace(model.config, preprocessing={**PREPROCESSING, "crop": "random"})
    assert fingerprint(model) != before
    model.config = replace(model.config, preprocessing=PREPROCESSING)
    assert fingerprint(model) == before
    with torch.no_grad():
        model.decoder[0].weight.view(-1)[-1] += 1e-6
    assert fingerprint(model) != before


def test_a_configuration_holds_no_more_than_json_does(folder):
    model = load_tokenizer(folder)
    assert json.loads(json.dumps(model_config(model))) == json.loads((folder / "config.json").read_text())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**24), 2**24) | st.floats(-1e6, 1e6) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=20)
@given(st.dictionaries(st.text(max_size=5), JSON, max_size=3))
def test_preprocessing_of_any_form_survives(preprocessing):
    config = {"type": "vqvae", **tiny.TOKENIZERS["vqvae"], "preprocessing": preprocessing}
    assert build_tokenizer(config).config.preprocessing == preprocessing


def test_files_have_the_mode_that_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        save_model(make("prior", "uniform"), tmp_path / "model")
        state = save_state(tmp_path / "state", 1, {"weights": {"w": torch.ones(2)}}, {})
    finally:
        os.umask(before)
    for path in [*(tmp_path / "model").iterdir(), *state.iterdir()]:
        assert path.stat().st_mode & 0o777 == 0o640, path


def test_a_symbolic_link_is_followed_not_replaced(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    model = make("tokenizer", "vqvae")
    save_model(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert fingerprint(load_tokenizer(tmp_path / "elsewhere")) == fingerprint(model)


def test_saving_replaces_a_model_but_no_folder_that_holds_anything_else(folder):
    other = make("tokenizer", "vqvae2")
    save_model(other, folder)
    assert fingerprint(load_tokenizer(folder)) == fingerprint(other)
    (folder / ".DS_Store").write_bytes(b"")  # of a file manager: nobody's work
    save_model(other, folder)
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds other files than a model's \(thesis\.txt\)"):
        save_model(other, folder)
    assert (folder / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("kind", "name", "options"),
    [
        ("tokenizer", "vqvae", {"preprocessing": {**PREPROCESSING, "binarize_seed": 20261126}}),
        ("tokenizer", "vqvae", {"quantizer": {"type": "gumbel", **tiny.QUANTIZERS["gumbel"], "decay_steps": 10**9}}),
        ("tokenizer", "dvaepp", {"kl_warmup_steps": 10**9}),
        ("prior", "rbm", {"spec": CodeSpec(((1, 2),), (2**25,))}),
        ("prior", "uniform", {"spec": CodeSpec(((1, 2), (2,)), (3, 2**62))}),
    ],
    ids=["seed", "decay", "warm-up", "25 bits", "62 bits"],
)
def test_numbers_that_take_no_memory_may_be_large(kind, name, options, tmp_path):
    model = make(kind, name, **options)
    save_model(model, tmp_path / "model")
    assert fingerprint(load(kind, tmp_path / "model")) == fingerprint(model)


def test_what_could_not_be_loaded_is_neither_built_nor_saved(tmp_path):
    too_many = {"spec": CodeSpec(((2,),), (2,)), "num_chains": 2, "burn_in": 2**24 + 1}
    with pytest.raises(ValueError, match=r"config\.burn_in = 16777217 is beyond the limit of 16777216"):
        build_prior({"type": "rbm", **too_many})
    array = {"type": "vq", "codebook_size": np.int64(8), "code_dim": 4}
    for model, message in [
        (RBM(RBMConfig(**too_many)), "RBM cannot be saved: config.burn_in = 16777217 is beyond the limit"),
        (VQVAE(VQVAE.Config(image_shape=(3, 8, 8), quantizer=array)), "VQVAE cannot be saved: .*int64 is not JSON"),
    ]:
        with pytest.raises(ValueError, match=message):
            save_model(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())


class Itemized(FSQ):
    """Gets its vocabulary size from a tensor."""

    def __init__(self, levels: tuple[int, ...] = (8, 5)):
        super().__init__(levels)
        self.vocab_sizes = (self.levels.prod().item(),)


def test_a_constructor_that_needs_values_of_tensors_is_named_not_the_file(tmp_path, monkeypatch):
    monkeypatch.setitem(QUANTIZERS, "itemized", Itemized)
    save_model(make("tokenizer", "vqvae", quantizer={"type": "itemized"}), tmp_path)
    message = refusal(tmp_path)
    assert "a 'vqvae' whose constructors do not work on the meta device" in message
    assert "config.json" not in message


@pytest.mark.parametrize(("kind", "name", "parts"), MODELS)
def test_a_model_lies_on_the_cpu_whatever_the_default_device(kind, name, parts, tmp_path):
    save_model(make(kind, name, **parts), tmp_path / "model")
    torch.set_default_device("meta")
    try:
        loaded = load(kind, tmp_path / "model")
    finally:
        torch.set_default_device(None)
    assert {tensor.device.type for tensor in [*loaded.parameters(), *loaded.buffers()]} <= {"cpu"}


def test_a_compiled_model_is_the_model(tmp_path):
    model = make("prior", "gpt")
    before = fingerprint(model)
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    compiled = torch.compile(model, backend="eager")
    assert fingerprint(compiled) == before
    save_model(compiled, tmp_path / "model")
    assert fingerprint(load_prior(tmp_path / "model")) == before


@pytest.mark.parametrize("change", [lambda layer: weight_norm(layer), lambda layer: prune.identity(layer, "weight")])
def test_weights_that_no_configuration_asks_for_replace_no_folder(change, tmp_path):
    model = make("prior", "gpt")
    save_model(model, tmp_path / "model")
    before = fingerprint(model)
    change(model.model.layers[0].self_attn.q_proj)
    with pytest.raises(ValueError, match=r"GPT cannot be saved.* missing model\.layers\.0\.self_attn\.q_proj\.weight;"):
        save_model(model, tmp_path / "model")
    assert fingerprint(load_prior(tmp_path / "model")) == before


def test_a_class_of_ones_own_that_is_not_registered_is_refused_by_its_registry():
    class Mine(VQVAE):
        pass

    model = Mine(VQVAE.Config(**tiny.TOKENIZERS["vqvae"]))
    for either in (model, torch.compile(model, backend="eager")):
        with pytest.raises(ValueError, match=r"Mine is not registered \(known: .*vqvae2\)"):
            fingerprint(either)


def test_the_habit_methods_load_what_they_name(folder, tmp_path):
    save_model(make("tokenizer", "vqvae2"), tmp_path / "two")
    make("prior", "pixelcnn").save_pretrained(tmp_path / "prior")
    assert type(VQVAE.from_pretrained(folder)) is type(Tokenizer.from_pretrained(folder)) is VQVAE
    assert type(Tokenizer.from_pretrained(str(tmp_path / "two"))) is VQVAE2
    assert type(Prior.from_pretrained(tmp_path / "prior")) is PixelCNN
    assert type(Prior.from_pretrained(tmp_path, subfolder="prior")) is PixelCNN
    half = Prior.from_pretrained(tmp_path, subfolder="prior", device="cpu", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert next(VQVAE.from_pretrained(folder, dtype="bfloat16").parameters()).dtype == torch.bfloat16
    assert next(VQVAE.from_pretrained(folder, dtype="auto").parameters()).dtype == torch.float32
    with pytest.raises(ValueError, match="dtype must be a floating-point type of torch or its name"):
        VQVAE.from_pretrained(folder, dtype=torch.int8)
    for subfolder in ("three", "../", "/"):
        with pytest.raises(ValueError, match=rf"has no folder '{subfolder}' within"):
            Prior.from_pretrained(tmp_path / "prior", subfolder=subfolder)
    with pytest.raises(ValueError, match="holds a VQVAE2, not a VQVAE"):
        VQVAE.from_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match="unknown tokenizer 'pixelcnn'"):
        load_pretrained(Tokenizer, tmp_path / "prior")


# Broken model folders
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not valid JSON"),
        ("{'type': 'vqvae'}", "is not valid JSON"),
        ('{"type": "vqvae"', "is not valid JSON"),
        ('{"type": NaN}', "NaN is not JSON"),
        ('{"type": 1e999}', "too large"),
        ('{"type": "vqvae", "type": "vqvae2"}', "the key 'type' stands twice"),
        ("[" * 100_000, "is not valid JSON"),
        ("\xff", "is not valid JSON"),
        ("[]", "must hold a JSON object, it holds a list"),
        ("{}", "unknown tokenizer ''"),
        ('{"type": ["vqvae"]}', "unknown tokenizer"),
        ('{"type": "os.system"}', "unknown tokenizer 'os.system'"),
        ('{"type": "vqvae"}', "image_shape"),
    ],
)
def test_a_broken_configuration_is_refused_by_name(folder, text, message):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert message in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_dmi": 4}, "no field 'latent_dmi'; did you mean 'latent_dim'?"),
        ({"network": {"type": "conv", "hidden_dim": "many"}}, "\"network.hidden_dim\": Expected a <class 'int'>"),
        ({"latent_dim": "many"}, "\"latent_dim\": Expected a <class 'int'>"),
        ({"latent_dim": 4.5}, "\"latent_dim\": Expected a <class 'int'>"),
        ({"latent_dim": None}, '"latent_dim" must not be null'),
        ({"network": {"type": "conv", "hidden_dim": None}}, '"hidden_dim" must not be null'),
        ({"latent_dim": True}, "\"latent_dim\": Expected a <class 'int'>"),
        ({"latent_dim": -1}, "latent_dim must be at least 1"),
        ({"image_shape": [3, 8]}, '"image_shape": Expected a tuple with 3 elements'),
        ({"image_shape": "abc"}, '"image_shape"'),
        ({"preprocessing": [1]}, "\"preprocessing\": Expected a <class 'dict'>"),
        ({"likelihood": "normal"}, "\"likelihood\": Expected a <class 'dict'>"),
        ({"network": {}}, "unknown network ''"),
        ({"network": {"type": "conv", "hiden_dim": 8}}, "no option 'hiden_dim'; did you mean 'hidden_dim'?"),
        ({"network": {"type": "conv", "hidden_dim": 8.5}}, "\"network.hidden_dim\": Expected a <class 'int'>"),
        ({"quantizer": {"type": "vq", "codebook_size": [5]}}, "\"quantizer.codebook_size\": Expected a <class 'int'>"),
        ({"latent_dim": 10**9}, "config.latent_dim = 1000000000 is beyond the limit"),
        ({"image_shape": [3, 10**30, 8]}, "is beyond the limit"),
        ({"latent_dim": 2**24, "network": {"type": "conv", "hidden_dim": 2**24}}, "missing"),
        ({"network": {"type": "conv", "num_residual_blocks": 10**9}}, "is beyond the limit"),
        ({"network": {"type": "conv", "num_residual_blocks": 10**7}}, "far more layers"),
    ],
    ids=str,
)
def test_a_wrong_value_is_refused_by_name_at_once(folder, changes, message):
    change_config(folder, **changes)
    assert message in refusal(folder)


def test_numbers_of_parts_may_be_text_as_yaml_gives_small_ones():
    text = {"type": "ema_vq", "codebook_size": "16", "decay": "9e-1"}
    config = {"type": "vqvae", "image_shape": [1, 8, 8]}
    model = build_tokenizer({**config, "quantizer": text})
    assert model.config.quantizer == {"type": "ema_vq", "codebook_size": 16, "decay": 0.9}
    assert model_config(model) == model_config(build_tokenizer({**config, "quantizer": model.config.quantizer}))


def test_a_prior_of_many_layers_is_refused_at_once(tmp_path):
    save_model(make("prior", "gpt"), tmp_path)
    for num_layers, message in ((10**9, "beyond the limit"), (10**7, "far more layers")):
        change_config(tmp_path, num_layers=num_layers)
        with pytest.raises(ValueError, match=message):
            load_prior(tmp_path)


@pytest.mark.parametrize("name", ["gpt", "pixelcnn", "pixelsnail", "factorial"])
@pytest.mark.parametrize("vocab_size", [2**40, 2**62, 2**64])
def test_an_absurd_vocabulary_is_refused_without_its_memory(name, vocab_size, tmp_path):
    save_model(make("prior", name), tmp_path)
    change_config(tmp_path, spec={"shapes": [[1, 1], [1, 2]], "vocab_sizes": [vocab_size, 2]})
    start = time.monotonic()
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_prior(tmp_path)
    assert time.monotonic() - start < 2


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["type", *tiny.TOKENIZERS["vqvae2"], "preprocessing", "quantizer.type", "network.hidden_dim",
                        "quantizer.codebook_size", "network.num_residual_blocks", "likelihood.x"]), JSON)  # fmt: skip
def test_garbage_in_a_configuration_is_never_another_error(tmp_path_factory, key, garbage):
    folder = tmp_path_factory.mktemp("garbage")
    config = {"type": "vqvae2", **tiny.TOKENIZERS["vqvae2"], "likelihood": {"type": "normal"}}
    config = json.loads(json.dumps(config))
    section, _, field = key.rpartition(".")
    (config[section] if section else config)[field] = garbage
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"w": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"config\.json"):
        load_tokenizer(folder)


def test_a_folder_without_a_model_is_refused(tmp_path, folder):
    assert "is not a model folder: it has no config.json" in refusal(tmp_path)
    (folder / "model.safetensors").unlink()
    assert "model.safetensors is missing" in refusal(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("decoder.0.weight"), "missing decoder.0.weight"),
        (lambda t: t.update(extra=torch.ones(1)), "unexpected extra"),
        (lambda t: t.update({"to_quantizer.bias": torch.ones(7)}), "to_quantizer.bias has shape (7,)"),
        (lambda t: t.update({"quantizer.num_updates": torch.tensor(0.5)}), "sha256 mismatch"),
    ],
    ids=["missing", "unexpected", "shape", "dtype"],
)
def test_weights_that_do_not_fit_are_refused_by_key(folder, change, message):
    change_weights(folder, change)
    assert message in refusal(folder)


def test_weights_of_another_kind_of_number_are_refused_also_without_a_manifest(folder):
    change_weights(folder, lambda t: t.update({"quantizer.num_updates": torch.tensor(0.5)}))
    (folder / "manifest.json").unlink()
    assert "quantizer.num_updates holds torch.float32, it must be torch.int64" in refusal(folder)


def header(entries: dict, data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(start: int, end: int, shape=(2,)) -> dict:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a readable safetensors file"),
        (b"\x05", "not a readable safetensors file"),
        ((2**63).to_bytes(8, "little"), "not a readable safetensors file"),
        ((200 << 20).to_bytes(8, "little") + b"{}", "not a readable safetensors file"),
        ((10).to_bytes(8, "little") + b"not json!!", "not a readable safetensors file"),
        (header({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "not a readable safetensors file"),
        (header({"a": entry(0, 8, [2**62, 2**62])}, bytes(8)), "not a readable safetensors file"),
        (header({"a": entry(0, 8)}, bytes(9)), "not a readable safetensors file"),
        (header({"a": entry(0, 8)}, bytes(7)), "not a readable safetensors file"),
        (b"<!DOCTYPE html><html>404</html>", "(it is a web page: download the file itself)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "(it is a Git LFS pointer"),
    ],
    ids=["empty", "short", "2^63", "200 MB", "not JSON", "overlap", "overflow", "long", "cut", "HTML", "LFS"],
)
def test_a_broken_weights_file_is_refused_with_a_hint(folder, data, message):
    (folder / "model.safetensors").write_bytes(data)
    assert message in refusal(folder)


def test_one_flipped_bit_in_the_weights_is_found(folder):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert "model.safetensors: sha256 mismatch" in refusal(folder)


class Explosive:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.pt"])
def test_a_pickle_is_never_executed(folder, tmp_path, name):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Explosive(tmp_path / "executed")))
    refusal(folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("path", ["/nowhere/at/all", "no such folder", "runs/nowhere", "../nowhere", "a/b/c", "file"])
def test_what_is_neither_a_folder_nor_on_the_hub_is_refused_at_once(path, tmp_path):
    start = time.monotonic()
    with pytest.raises(ValueError, match=path):
        resolve_folder(path)
    assert time.monotonic() - start < 1


# Training states
# ------------------------------------------------------------------------------------------------


def tensors(value: float = 1.0) -> dict:
    return {"weights": {"w": torch.full((3,), value), "n": torch.tensor(2)}, "optimizer": {"0.m": torch.zeros(2, 2)}}


def steps(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def damage(path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_state_is_equal_after_saving_and_loading(tmp_path):
    saved = save_state(tmp_path / "a ä", 7, tensors(), {"name": "ü", "list": [1, 2.5, None]})
    assert newest_state(tmp_path / "a ä") == saved
    loaded, info = load_state(saved)
    assert info == {"step": 7, "name": "ü", "list": [1, 2.5, None]}
    assert loaded.keys() == tensors().keys()
    torch.testing.assert_close(loaded, tensors(), rtol=0, atol=0)


def test_only_the_newest_states_are_kept(tmp_path):
    for step in (5, 10, 99_999_999, 100_000_000):  # the last has a digit more
        save_state(tmp_path, step, tensors(), {})
    assert steps(tmp_path) == ["step-100000000", "step-99999999"]
    assert newest_state(tmp_path).name == "step-100000000"


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_newest_state_is_named_and_passed_over(tmp_path, name):
    for step in (5, 10):
        save_state(tmp_path, step, tensors(), {})
    damage(tmp_path / "step-00000010" / name)
    with pytest.warns(UserWarning, match=f"step-00000010/{name}: sha256 mismatch.*falling back"):
        assert newest_state(tmp_path).name == "step-00000005"
    (tmp_path / "step-00000010" / name).unlink()
    with pytest.warns(UserWarning, match=f"{name} is missing"):
        assert newest_state(tmp_path).name == "step-00000005"


def test_an_old_state_that_cannot_be_removed_stops_no_training(tmp_path, monkeypatch):
    def busy(*args, **kwargs):  # as on NFS, where a file that another process has open stays under another name
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))

    with monkeypatch.context() as patched:
        patched.setattr(os, "rmdir", busy)
        for step in (10, 20, 30):
            save_state(tmp_path, step, tensors(), {})
    assert newest_state(tmp_path).name == "step-00000030"
    save_state(tmp_path, 40, tensors(), {})
    assert steps(tmp_path) == ["step-00000030", "step-00000040"]


def test_damaged_later_states_never_displace_a_good_one(tmp_path):
    for step in (20, 30):
        save_state(tmp_path, step, tensors(), {})
        (tmp_path / f"step-{step:08d}" / "state.json").unlink()
    saved = save_state(tmp_path, 10, tensors(), {})
    with pytest.warns(UserWarning, match="state.json is missing"):
        assert newest_state(tmp_path) == saved


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
    save_state(tmp_path, 5, tensors(), {})
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="step 6: weights/w is not finite"):
            save_state(tmp_path, 6, tensors(value), {})
    with pytest.raises(ValueError, match="JSON"):
        save_state(tmp_path, 6, tensors(), {"loss": float("nan")})
    assert steps(tmp_path) == ["step-00000005"]


def test_without_states_there_is_no_newest(tmp_path):
    assert newest_state(tmp_path / "nowhere") is None
    (tmp_path / "step-1.old").mkdir()
    assert newest_state(tmp_path) is None


# Kills itself in the middle of the n-th save, at the k-th call of the functions that reach the disk.
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from pipelines import checkpoint

folder, pid_per_point = Path(sys.argv[1]), int(sys.argv[2])
steps = [10, 20, 30]

def save(step):
    checkpoint.save_state(folder, step, {"weights": {"w": torch.full((3,), float(step))}}, {})

def kill_at(point):
    calls = 0
    def watch(event, arguments):
        nonlocal calls
        if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "shutil.rmtree") and any(
            str(folder) in str(argument) for argument in arguments
        ):
            calls += 1
            if calls == point:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(watch)

for step in steps[:2]:
    save(step)
# one child per point: the models are imported only once
for point in range(1, pid_per_point + 1):
    child = os.fork()
    if child == 0:
        kill_at(point)
        save(steps[2])
        os._exit(0)
    _, status = os.waitpid(child, 0)
    found = checkpoint.newest_state(folder)
    loaded, info = checkpoint.load_state(found)
    assert loaded["weights"]["w"].tolist() == [float(info["step"])] * 3
    print(point, os.WIFSIGNALED(status), found.name, flush=True)
    if not os.WIFSIGNALED(status):
        break
    for name in ("step-00000030", "step-00000010"):
        checkpoint.shutil.rmtree(folder / name, ignore_errors=True)
    save(10)
    save(20)
"""


def test_a_kill_at_any_point_of_a_save_leaves_a_complete_newest_state(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", KILLED, str(tmp_path / "a ä"), "80"],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    outcomes = [line.split() for line in result.stdout.splitlines()]
    assert len(outcomes) > 15
    assert outcomes[-1][1:] == ["False", "step-00000030"]  # the one that lived to the end
    newest = [outcome[2] for outcome in outcomes]
    assert newest == sorted(newest)  # first the state before, then the new one
    assert newest[0] == "step-00000020"
    assert not list((tmp_path / "a ä").glob(".tmp-*"))

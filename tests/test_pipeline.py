"""Laws of the pipeline: every tokenizer with every prior samples, saves, loads and samples the same again."""

import copy
import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import fields

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import Pipeline
from pipelines.animation import CodeRecording, partial_images, save_animation
from pipelines.checkpoint import build_prior, build_tokenizer, fingerprint, save_model
from pipelines.demo.actions import description, refusals
from pipelines.drawing import decode_codes
from pipelines.labels import labels_as_typed
from pipelines.masks import code_masks, named_mask
from pipelines.pictures import (
    check_picture,
    class_columns,
    grid_picture,
    save_grid,
    save_reconstructions,
    save_samples,
    side_by_side,
)
from pipelines.runs import load_pipeline
from pipelines.stages import save_stage_one, save_stage_two
from pipelines.text import TextConfig, TextTokenizer
from prior import PRIORS, Prior
from tests import tiny
from tokenizer import TOKENIZERS, Tokenizer

PREPROCESSING = {"image_size": [8, 8], "channels": 3, "resize_filter": "bicubic", "crop": "center", "binarize": "none"}
NAMES = ["cat", "dog", "owl"]


def make_tokenizer(name: str = "vqvae", **options):
    defaults = {**tiny.TOKENIZERS[name], "preprocessing": PREPROCESSING}
    if "likelihood" in {field.name for field in fields(TOKENIZERS[name].Config)}:
        defaults["likelihood"] = {"type": "normal"}
    return build_tokenizer({"type": name, **defaults, **options})


def make_prior(name: str, tokenizer, num_classes: int = 0):
    implied = {"spec": tokenizer.spec, "num_classes": num_classes, "tokenizer_fingerprint": fingerprint(tokenizer)}
    prior = build_prior({"type": name, **tiny.PRIORS[name], **implied})
    with torch.no_grad():
        for parameter in prior.parameters():  # decided enough for the samples to depend on every weight
            parameter += 0.3 * torch.randn_like(parameter)
    return prior


def make(tokenizer: str = "vqvae", prior: str | None = "gpt", num_classes: int = 0, **options) -> Pipeline:
    if prior in tiny.BIT_PRIORS:
        options = {**tiny.POWERS_OF_TWO.get(tokenizer, {}), **options}
    tokenizer = make_tokenizer(tokenizer, **options)
    if prior and not tiny.takes(prior, tokenizer.spec, num_classes):
        pytest.skip(f"{prior} is not made for these codes")
    prior = prior and make_prior(prior, tokenizer, num_classes)
    pipeline = Pipeline(tokenizer, prior, class_names=NAMES[:num_classes])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def reload(pipeline: Pipeline, folder, **options) -> Pipeline:
    pipeline.save_pretrained(folder)
    loaded = Pipeline.from_pretrained(folder, **options)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def seeds(*numbers: int) -> list[torch.Generator]:
    return [seed(number) for number in numbers]


# Sampling
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [0, 3])
@pytest.mark.parametrize("prior", [None, *sorted(PRIORS)])
@pytest.mark.parametrize("tokenizer", sorted(TOKENIZERS))
def test_it_samples_the_same_after_saving_and_loading(tokenizer, prior, num_classes, tmp_path):
    pipeline = make(tokenizer, prior, num_classes if prior else 0)
    loaded = reload(pipeline, tmp_path / "a ä")
    for output_type in ("pt", "codes"):
        before = pipeline.sample(5, generator=seed(), output_type=output_type)
        after = loaded.sample(5, generator=seed(), output_type=output_type)
        torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert type(loaded.prior) is type(pipeline.prior)
    assert loaded.has_stage_two == (prior is not None)
    several = [loaded.sample(24, generator=seed(number), output_type="codes")[0] for number in (0, 1)]
    assert not torch.equal(*several)


@pytest.mark.parametrize("prior", [None, *sorted(PRIORS)])
def test_an_image_depends_on_its_own_generator_alone(prior):
    pipeline = make("vqvae2", prior, 3 if prior and prior not in tiny.BIT_PRIORS else 0)
    together = pipeline.sample(5, generator=seeds(0, 1, 2, 3, 4), output_type="codes")
    in_batches = pipeline.sample(5, generator=seeds(0, 1, 2, 3, 4), output_type="codes", batch_size=2)
    alone = pipeline.sample(generator=seeds(3), output_type="codes")
    for level, codes in enumerate(together):
        assert torch.equal(in_batches[level], codes)
        assert torch.equal(alone[level], codes[3:4])
    with pytest.raises(ValueError, match="got 2 generators for 3 images"):
        pipeline.sample(3, generator=seeds(0, 1))


def test_a_decoder_with_latents_of_its_own_draws_them_from_the_images_generator():
    pipeline = make("dvaepp", None, network={"type": "conv", **tiny.LATENT_NETWORKS["conv"]})
    assert pipeline.tokenizer.has_local_latents
    together = pipeline.sample(5, generator=seeds(0, 1, 2, 3, 4), output_type="pt")
    in_batches = pipeline.sample(5, generator=seeds(0, 1, 2, 3, 4), output_type="pt", batch_size=2)
    torch.testing.assert_close(in_batches, together)
    codes = pipeline.sample(5, generator=seeds(0, 1, 2, 3, 4), output_type="codes")
    others = pipeline.decode(codes, generator=seeds(5, 6, 7, 8, 9), output_type="pt")
    assert (others - together).abs().max() > 1e-3


def test_one_generator_gives_the_same_images_whatever_the_batch_size():
    pipeline = make(num_classes=3)
    all_at_once = pipeline.sample(5, generator=seed(), output_type="pt")
    torch.testing.assert_close(pipeline.sample(5, generator=seed(), output_type="pt", batch_size=2), all_at_once)


def test_the_global_generator_is_left_alone_when_another_is_given():
    pipeline = make(num_classes=3)
    state = torch.get_rng_state()
    pipeline.sample(2, generator=seed())
    pipeline.reconstruct(pipeline.sample(2, generator=seed(), output_type="pt"))
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_generator_samples_follow_the_global_seed():
    pipeline = make(num_classes=3)
    first, second = (pipeline.sample(4, output_type="pt") for _ in range(2))
    torch.manual_seed(0)
    make(num_classes=3)
    torch.manual_seed(5)
    third = pipeline.sample(4, output_type="pt")
    torch.manual_seed(5)
    assert torch.equal(pipeline.sample(4, output_type="pt"), third)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("channels", [1, 3])
def test_output_types(channels):
    pipeline = make(image_shape=(channels, 8, 12))
    pil, arrays, tensors, codes = (
        pipeline(3, generator=seed(), output_type=output_type) for output_type in ("pil", "np", "pt", "codes")
    )
    assert arrays.shape == (3, 8, 12, channels)
    assert tensors.shape == (3, channels, 8, 12)
    assert arrays.dtype == np.float32
    assert 0 <= arrays.min() <= arrays.max() <= 1
    np.testing.assert_array_equal(arrays, tensors.permute(0, 2, 3, 1))
    for image, array in zip(pil, arrays):
        assert image.mode == {1: "L", 3: "RGB"}[channels]
        assert image.size == (12, 8)
        assert abs(np.asarray(image).reshape(array.shape) - 255 * array).max() <= 0.5 + 1e-4
    pipeline.tokenizer.spec.check(codes)
    assert torch.equal(pipeline.decode(codes, output_type="pt"), tensors)
    with pytest.raises(ValueError, match="unknown output_type 'latent'"):
        pipeline.sample(output_type="latent")


def test_what_it_returns_can_be_trained_with_and_changed():
    pipeline = make()
    images, codes = (pipeline.sample(2, output_type=output_type) for output_type in ("pt", "codes"))
    images.mul_(0.5)
    table = torch.nn.Embedding(5, 3)
    (table(codes[0]).sum() + (images * torch.ones((), requires_grad=True)).sum()).backward()
    assert table.weight.grad is not None


def test_class_labels_by_number_name_array_or_tensor_are_the_same():
    pipeline = make(num_classes=3)
    expected = pipeline.sample(2, class_labels=[2, 0], generator=seed(), output_type="pt")
    for labels in (["owl", "cat"], ("owl", 0), torch.tensor([2, 0]), np.array([2, 0]), [np.int64(2), 0]):
        assert torch.equal(pipeline.sample(class_labels=labels, generator=seed(), output_type="pt"), expected)
    same = pipeline.sample(2, class_labels=[1, 1], generator=seed(), output_type="pt")
    for label in (1, "dog", torch.tensor(1), np.int64(1)):
        assert torch.equal(pipeline.sample(2, class_labels=label, generator=seed(), output_type="pt"), same)
    assert len(pipeline.sample(class_labels="dog")) == 1


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("dgo", "unknown class 'dgo' (known: cat, dog, owl)"),
        ([0, 3], "labels must lie in [0, 3)"),
        (-1, "labels must lie in [0, 3)"),
        ([0], "got 1 class labels for 2 images"),
        ([0.5, 1], "a class label is a number or a name, got 0.5"),
        ([True, False], "a class label is a number or a name, got True"),
        (1.0, "a class label is a number or a name, got 1.0"),
    ],
)
def test_wrong_class_labels_are_refused(labels, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is compared below)
        make(num_classes=3).sample(2, class_labels=labels)
    assert message in str(error.value)


def test_labels_for_an_unconditional_prior_and_impossible_numbers_are_refused():
    pipeline = make()
    for arguments, message in [
        ({"class_labels": 1}, "this prior is unconditional"),
        ({"class_labels": "cat"}, "none has a name"),
        ({"num_images": 0}, "num_images and batch_size must be at least 1"),
        ({"num_images": "cat"}, "num_images must be an integer, got 'cat'"),
        ({"generator": 3}, "generator must be a torch.Generator or a list of them, got 3"),
        ({"batch_size": 0}, "num_images and batch_size must be at least 1"),
        ({"batch_size": 2.5}, "batch_size must be an integer, got 2.5"),
        ({"temperature": "1"}, "temperature must be finite and at least 0, got '1'"),
        ({"top_p": "0.9"}, r"top_p must lie in \(0, 1\], or be None to keep every code, got '0.9'"),
        ({"temperature": -1}, "temperature must be finite and at least 0"),
        ({"guidance_scale": 2.0}, "needs a prior that is conditional on classes or captions"),
    ]:
        with pytest.raises(ValueError, match=message):
            pipeline.sample(**arguments)


def test_sampling_options_reach_the_prior():
    pipeline = make("vqvae", "gpt", num_classes=3)
    greedy = pipeline.sample(4, 1, temperature=0, output_type="codes", generator=seed())
    assert all(torch.equal(greedy[0][0], codes) for codes in greedy[0])
    assert torch.equal(pipeline.sample(4, 1, top_k=1, output_type="codes")[0], greedy[0])
    assert torch.equal(pipeline.sample(4, 1, top_p=1e-6, output_type="codes")[0], greedy[0])
    free, guided = (pipeline.sample(16, 1, guidance_scale=s, generator=seed(), output_type="codes") for s in (1.0, 9.0))
    assert not torch.equal(free[0], guided[0])
    assert torch.equal(pipeline.sample(4, 1, min_p=1.0, output_type="codes")[0], greedy[0])
    options = {"guidance_scale": 9.0, "guidance_schedule": (0.5, 1.0), "generator": seed(), "output_type": "codes"}
    late = pipeline.sample(16, 1, **options)[0].flatten(1)
    first, second = free[0].flatten(1), guided[0].flatten(1)
    assert torch.equal(late[:, :2], first[:, :2])  # guided from the third of four codes on
    assert not torch.equal(late[:, 2:], first[:, 2:])
    assert not torch.equal(first[:, :2], second[:, :2])


@pytest.mark.parametrize("num_classes", [0, 3])
def test_every_sample_can_carry_its_log_probability_and_label(num_classes):
    pipeline = make("vqvae2", "gpt", num_classes)
    options = {"generator": seeds(0, 1, 2, 3, 4), "output_type": "codes", "return_log_prob": True}
    codes, log_prob, labels = pipeline.sample(5, batch_size=2, **options)
    torch.testing.assert_close(log_prob, pipeline.prior.log_prob(codes, labels), atol=1e-4, rtol=1e-4)
    plain = (
        pipeline.sample(5, labels, generator=seeds(0, 1, 2, 3, 4), output_type="codes") if num_classes == 0 else codes
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, codes))
    assert (labels is None) == (num_classes == 0)
    output = pipeline.sample(2, temperature=0, return_log_prob=True)
    assert output.log_prob.tolist() == [0, 0]  # there was no choice
    assert [image.size for image in output.images] == [(8, 8)] * 2


@pytest.mark.parametrize("prior", tiny.BIT_PRIORS)
def test_priors_without_a_log_probability_of_their_samples_say_so(prior):
    if "return_log_prob" in PRIORS[prior].sampling_options:
        pytest.skip(f"{prior} has one")
    with pytest.raises(ValueError, match=f"{PRIORS[prior].__name__} cannot honour return_log_prob; it supports"):
        make("vqvae", prior).sample(2, return_log_prob=True)


def test_a_number_on_a_command_line_is_a_class_of_that_name():
    for typed, expected in [(2, "2"), ("2", "2"), (0, 0), ([3, 0, "1"], ["3", 0, "1"]), (None, None)]:
        assert labels_as_typed(typed, ["1", "2", "3"]) == expected
    names = ["001", "010", "cat"]
    for typed, expected in [("001", "001"), ("0", 0), (["010", "1", "02"], ["010", 1, 2]), ("cat", "cat"), (0, 0),
                            (2, 2), ("-1", "-1")]:  # fmt: skip
        assert labels_as_typed(typed, names) == expected
    for typed, name in [(1, "001"), ("1", "001"), ("01", "001"), ([0, 10], "010")]:
        with pytest.raises(ValueError, match=rf"may be the class '{name}', .* quote it, as in '\[\"{name}\"\]'$"):
            labels_as_typed(typed, names)


def test_the_progress_bar_can_be_silenced(capsys):
    pipeline = make()
    pipeline.sample(2)
    assert capsys.readouterr().err == ""
    pipeline.set_progress_bar_config(desc="drawing")
    pipeline.sample(2)
    assert "drawing: 100%" in capsys.readouterr().err


# Encoding and decoding
# ------------------------------------------------------------------------------------------------


def test_pil_images_and_tensors_are_encoded_alike():
    pipeline = make()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    images = [Image.fromarray(array) for array in pixels]
    tensors = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    assert torch.equal(pipeline.encode(images)[0], pipeline.encode(tensors)[0])
    assert torch.equal(pipeline.encode(images[0])[0], pipeline.encode(tensors)[0][:1])
    larger = images[0].resize((16, 16), Image.Resampling.NEAREST).convert("RGBA")
    assert pipeline.encode(larger)[0].shape == (1, 2, 2)
    reconstructed = pipeline.reconstruct(images, output_type="pt")
    assert torch.equal(reconstructed, pipeline.decode(pipeline.encode(tensors), output_type="pt"))
    assert [image.size for image in pipeline.reconstruct(images)] == [(8, 8)] * 2


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 8, 8), "takes images of shape (batch, 3, 8, 8), got (3, 8, 8)"),
        (torch.zeros(1, 1, 8, 8), "takes images of shape"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "must be floating-point in [0, 1], got torch.uint8"),
        (torch.full((1, 3, 8, 8), 255.0), "must be floating-point in [0, 1], got torch.float32 from 255 to 255"),
        (torch.full((1, 3, 8, 8), float("nan")), "must be floating-point in [0, 1]"),
        (np.zeros((1, 8, 8, 3)), "images must be PIL images, or one tensor"),
        (["cat.png"], "images must be PIL images, or one tensor"),
        ([], "images must be PIL images, or one tensor"),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_what_is_not_an_image_is_refused(images, message, training):
    pipeline = make()
    pipeline.tokenizer.train(training)
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is compared below)
        pipeline.encode(images)
    assert message in str(error.value)
    assert pipeline.tokenizer.training == training


def test_codes_out_of_range_and_impossible_outputs_are_refused():
    pipeline = make()
    with pytest.raises(ValueError, match=r"must lie in \[0, 5\)"):
        pipeline.decode((torch.full((1, 2, 2), 5),))
    for one in (torch.zeros(3, 2, 2, dtype=torch.int64), np.zeros((1, 2, 2), dtype=np.int64)):
        with pytest.raises(ValueError, match=rf"tuple with one tensor for each level \(1\), got {type(one).__name__}"):
            pipeline.decode(one)
    with pytest.raises(ValueError, match="is for sampling"):
        pipeline.reconstruct(torch.zeros(1, 3, 8, 8), output_type="codes")


def test_images_are_prepared_as_in_training():
    pipeline = make()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    prepared = pipeline.prepare([image, image.convert("RGBA").resize((16, 24), Image.Resampling.NEAREST)])
    assert torch.equal(prepared[0], torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255)
    assert prepared.shape == (2, 3, 8, 8)
    assert torch.equal(pipeline.encode(prepared)[0][:1], pipeline.encode(image)[0])


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_vectors_of_codes_are_decoded_as_the_codes_are_or_refused(name):
    tokenizer = make_tokenizer(name).eval()
    codes = tokenizer.encode(torch.rand(3, *tokenizer.config.image_shape).round())
    if type(tokenizer).embed is Tokenizer.embed:
        assert tokenizer.code_strides is None
        for call in (lambda: tokenizer.embed(codes), lambda: tokenizer.decode_embedded(())):
            with pytest.raises(ValueError, match=f"the codes of {type(tokenizer).__name__} stand for no vectors"):
                call()
    elif not tokenizer.has_local_latents:
        torch.testing.assert_close(tokenizer.decode_embedded(tokenizer.embed(codes)), tokenizer.decode(codes))


@pytest.mark.parametrize("tokenizer", sorted(TOKENIZERS))
def test_a_line_between_two_images_begins_and_ends_with_their_reconstructions(tokenizer):
    pipeline = make(tokenizer, None)
    if type(pipeline.tokenizer).embed is Tokenizer.embed:
        pytest.skip("the codes of this tokenizer stand for no vectors")
    first, second = torch.rand(2, 3, 3, 8, 8, generator=seed(1))
    lines = pipeline.interpolate(first, second, 5, output_type="pt").unflatten(0, (3, 5))
    for end, images in ((0, first), (-1, second)):
        torch.testing.assert_close(lines[:, end], pipeline.reconstruct(images, output_type="pt"))
    embedded = [pipeline.tokenizer.embed(pipeline.encode(images)) for images in (first, second)]
    quarter = tuple(0.75 * a + 0.25 * b for a, b in zip(*embedded))
    torch.testing.assert_close(lines[:, 1], pipeline.tokenizer.decode_embedded(quarter))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        pipeline.to(dtype)
        ends = pipeline.interpolate(first, second, 2, output_type="pt").unflatten(0, (3, 2))
        torch.testing.assert_close(ends[:, 1], pipeline.reconstruct(second, output_type="pt"))
    pipeline.to(torch.float32)
    assert len(pipeline.interpolate(first[:1], second[:1])) == 8
    with pytest.raises(ValueError, match="got 1 and 3 images and num_images = 8"):
        pipeline.interpolate(first[:1], second)
    for number in (1, 2.5, "8"):
        with pytest.raises(ValueError, match=f"an integer of at least 2, .* num_images = {number!r}"):
            pipeline.interpolate(first, second, number)


# Folders
# ------------------------------------------------------------------------------------------------


def test_mixed_parts_are_refused_with_both_fingerprints(tmp_path):
    pipeline, other = make(), make_tokenizer()
    pipeline.save_pretrained(tmp_path)
    save_model(other, tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="trained on the codes of tokenizer") as error:
        Pipeline.from_pretrained(tmp_path)
    assert fingerprint(pipeline.tokenizer) in str(error.value)
    assert fingerprint(other) in str(error.value)
    with pytest.raises(ValueError, match="trained on the codes of tokenizer"):
        Pipeline(other, pipeline.prior)


def test_parts_in_half_precision_belong_together_while_they_are_what_was_loaded(tmp_path):
    make().save_pretrained(tmp_path)
    prior = Prior.from_pretrained(tmp_path / "prior", dtype="bfloat16")
    tokenizer = Tokenizer.from_pretrained(tmp_path / "tokenizer", dtype="bfloat16")
    pipeline = Pipeline(tokenizer, prior)
    pipeline.to(torch.float16)
    for part in (tokenizer, copy.deepcopy(tokenizer), Pipeline.from_pretrained(tmp_path, dtype="float16").tokenizer):
        assert Pipeline(part, prior).tokenizer is part
    other = make_tokenizer().to(torch.bfloat16).state_dict()
    for change in (lambda model: model.load_state_dict(other), lambda model: model.decoder[0].weight.data.mul_(2)):
        tokenizer = Tokenizer.from_pretrained(tmp_path / "tokenizer", dtype="bfloat16")
        change(tokenizer)
        with pytest.raises(ValueError, match=r"Its weights are torch.bfloat16: .* take from_pretrained\(path, dtype="):
            Pipeline(tokenizer, prior)


def test_a_prior_built_by_hand_is_told_how_to_record_its_tokenizer():
    tokenizer = make_tokenizer()
    prior = build_prior({"type": "uniform", "spec": tokenizer.spec})
    with pytest.raises(ValueError, match=r"no record .* tokenizer_fingerprint=pipelines\.fingerprint\(tokenizer\)"):
        Pipeline(tokenizer, prior)


def test_compiled_parts_are_saved_as_themselves(tmp_path):
    pipeline = make(num_classes=3)
    compiled = Pipeline(*(torch.compile(part, backend="eager") for part in (pipeline.tokenizer, pipeline.prior)))
    compiled.save_pretrained(tmp_path)
    assert fingerprint(Pipeline.from_pretrained(tmp_path).prior) == fingerprint(pipeline.prior)
    assert "# VQVAE + GPT" in (tmp_path / "README.md").read_text()


def test_where_the_index_is_the_new_one_so_is_the_card(tmp_path, monkeypatch):
    pipeline = make()
    pipeline.save_pretrained(tmp_path)
    pipeline.metrics["validation tokenizer psnr"] = 12.3456
    monkeypatch.setattr("pipelines.two_stage.write_json_atomic", lambda *_: pytest.fail("killed before the index"))
    with pytest.raises(pytest.fail.Exception, match="killed"):
        pipeline.save_index(tmp_path)
    assert "12.3" in (tmp_path / "README.md").read_text()
    assert Pipeline.from_pretrained(tmp_path).metrics == {}


def test_compiled_parts_do_what_they_do_themselves():
    pipeline = make("vqvae", "gpt", num_classes=3)
    compiled = Pipeline(*(torch.compile(part, backend="eager") for part in (pipeline.tokenizer, pipeline.prior)))
    in_part = Pipeline(copy.deepcopy(pipeline.tokenizer), pipeline.prior)
    in_part.tokenizer.decoder = torch.compile(in_part.tokenizer.decoder, backend="eager")
    images, mask = torch.rand(1, 3, 8, 8, generator=seed(1)), torch.zeros(8, 8, dtype=torch.bool)
    mask[:4] = True
    options = {"class_labels": 1, "num_candidates": 2, "output_type": "pt"}
    completed, outpainted = (
        [call(each, **options, generator=seed(0)) for each in (pipeline, compiled, in_part)]
        for call in (
            lambda each, **options: each.complete(images, mask, ranking="importance", **options).images,
            lambda each, **options: each.outpaint(images, (8, 12), **options),
        )
    )
    for plain, *others in (completed, outpainted):
        assert all(torch.equal(plain, other) for other in others)
    assert refusals(compiled) == refusals(pipeline)
    assert description(compiled) == description(pipeline)


def test_given_parts_take_the_place_of_saved_ones(tmp_path):
    pipeline = make()
    pipeline.save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "prior")
    other = make_prior("pixelcnn", pipeline.tokenizer)
    assert Pipeline.from_pretrained(tmp_path, prior=other).prior is other
    assert Pipeline.from_pretrained(tmp_path, prior=other, tokenizer=pipeline.tokenizer).components == {
        "tokenizer": pipeline.tokenizer,
        "prior": other,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "DiTPipeline"}, "describes a 'DiTPipeline', not a Pipeline"),
        ({"tokenizer": ["tokenizer", "VQVAE2"]}, "says that 'tokenizer' is ['tokenizer', 'VQVAE2']"),
        ({"tokenizer": ["os", "system"]}, "says that 'tokenizer' is ['os', 'system']"),
        ({"prior": ["os", "system"]}, "says that 'prior' is ['os', 'system']"),
        ({"prior": ["../prior", "GPT"]}, "says that 'prior' is ['../prior', 'GPT']"),
        ({"tokenizer": "VQVAE"}, "'tokenizer' must be a list, got 'VQVAE'"),
        ({"metrics": None}, "'metrics' must be a dict, got None"),
        ({"id2label": {"0": "cat", "2": "owl"}}, "'id2label' must give a name to each of the classes 0, 1, 2, ..."),
        ({"id2label": {"0": 1}}, "'id2label' must give a name"),
    ],
    ids=str,
)
def test_a_wrong_index_is_refused(tmp_path, changes, message):
    make().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    for key in changes:
        (tmp_path / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if k != key}))
        with pytest.raises(ValueError, match="model_index"):
            Pipeline.from_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({**index, **changes}))
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is compared below)
        Pipeline.from_pretrained(tmp_path)
    assert message in str(error.value)


@pytest.mark.parametrize("evaluation", [5, None, {}, {"data": {}}])
def test_an_index_with_what_is_no_evaluation_is_refused(tmp_path, evaluation):
    make().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "evaluations": {"test": evaluation}}))
    with pytest.raises(ValueError, match="'evaluations' holds none of the test images, got"):
        Pipeline.from_pretrained(tmp_path)


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is not a pipeline: it has no model_index\.json"):
        Pipeline.from_pretrained(tmp_path)
    for path in ("user/name", tmp_path / "nowhere", "nowhere"):
        start = time.monotonic()
        with pytest.raises(ValueError, match=str(path)):
            Pipeline.from_pretrained(path)
        assert time.monotonic() - start < 1


def test_saving_over_an_existing_pipeline_replaces_it(tmp_path):
    make("vqvae2", "pixelcnn", 3).save_pretrained(tmp_path)
    pipeline = make("vqvae", None)
    loaded = reload(pipeline, tmp_path)
    assert not loaded.has_stage_two
    assert loaded.class_names == []
    assert fingerprint(loaded.tokenizer) == fingerprint(pipeline.tokenizer)


# Tokenizer, prior and options: every prior, tokenizer and quantizer, and decoders with latents of their own
KINDS = {
    **{f"vqvae-{prior}": ("vqvae", prior, {}) for prior in PRIORS},
    **{name: (name, None, {}) for name in TOKENIZERS},
    **{name: ("vqvae", None, {"quantizer": {"type": name, **options}}) for name, options in tiny.QUANTIZERS.items()},
    **{f"{name}-conv": (name, None, {"network": {"type": "conv", **tiny.LATENT_NETWORKS["conv"]}})
       for name in ("dvaepp", "gaussian_vae")},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(("tokenizer", "prior", "options"), KINDS.values(), ids=KINDS)
def test_a_pipeline_in_half_precision_samples_saves_and_loads(tokenizer, prior, options, dtype, tmp_path):
    make(tokenizer, prior, **options).save_pretrained(tmp_path / "full")
    half = Pipeline.from_pretrained(tmp_path / "full", dtype=dtype, device="cpu")
    half.set_progress_bar_config(disable=True)
    assert (half.dtype, half.device.type) == (dtype, "cpu")
    loaded = reload(half, tmp_path / "half")  # the prior still belongs to the tokenizer, whose weights were cast
    assert loaded.dtype == dtype
    images = half.sample(3, generator=seed(), output_type="pt")
    assert images.dtype == torch.float32
    assert torch.equal(loaded.sample(3, generator=seed(), output_type="pt"), images)
    half.tokenizer.spec.check(half.encode(images))
    assert half.reconstruct(images, generator=seed(), output_type="pt").shape == images.shape
    assert half.to(dtype=torch.float32).dtype == torch.float32


def test_types_are_given_as_torch_has_them_or_by_name(tmp_path):
    pipeline = make()
    for dtype, expected in [("bfloat16", torch.bfloat16), ("auto", torch.float32), (None, torch.float32)]:
        assert reload(pipeline, tmp_path, dtype=dtype).dtype == expected
    assert next(pipeline.to(torch.bfloat16).prior.parameters()).dtype == torch.bfloat16
    assert pipeline.to("cpu").dtype == torch.bfloat16
    assert pipeline.to("cpu", "float64").dtype == torch.float64
    for dtype in ("bf16", "int64", torch.int8, "Tensor", 16):
        with pytest.raises(ValueError, match=f"floating-point type .* such as 'bfloat16', got '?{dtype}'?$"):
            pipeline.to(dtype=dtype)
        with pytest.raises(ValueError, match=f"floating-point type .* such as 'bfloat16', got '?{dtype}'?$"):
            Pipeline.from_pretrained(tmp_path, dtype=dtype)


@pytest.mark.parametrize("number", [np.float32(3), np.int64(3), torch.tensor(3.0), torch.tensor(3, dtype=torch.int16)])
def test_measured_numbers_of_any_library_are_saved(number, tmp_path):
    pipeline = make()
    pipeline.metrics["fid"] = number
    assert reload(pipeline, tmp_path).metrics == {"fid": 3}
    assert "| fid | 3 |" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("value", [float("nan"), np.float32("inf"), np.zeros(2), torch.zeros(2), {1, 2}, make])
def test_what_cannot_be_saved_leaves_the_folder_as_it_was(value, tmp_path):
    pipeline = make()
    pipeline.save_pretrained(tmp_path)
    other = make()
    other.metrics["fid"] = value
    with pytest.raises(ValueError, match=r"metrics\['fid'\] = .* cannot be written as JSON"):
        other.save_pretrained(tmp_path)
    assert fingerprint(Pipeline.from_pretrained(tmp_path).tokenizer) == fingerprint(pipeline.tokenizer)


class Unregistered(PRIORS["uniform"]):
    pass


@pytest.mark.parametrize("part", ["tokenizer", "prior", "text_tokenizer", "unregistered"])
def test_parts_are_replaced_together_or_not_at_all(part, tmp_path):
    captions = TextTokenizer.train(["a cat"], TextConfig(vocab_size=256))
    text = {"text_vocab_size": captions.vocab_size, "max_text_length": captions.max_length,
            "text_tokenizer_fingerprint": captions.fingerprint}  # fmt: skip

    def make_captioned() -> Pipeline:
        tokenizer = make_tokenizer()
        implied = {"spec": tokenizer.spec, "tokenizer_fingerprint": fingerprint(tokenizer), **text}
        prior = build_prior({"type": "gpt", **tiny.PRIORS["gpt"], **implied})
        return Pipeline(tokenizer, prior, text_tokenizer=captions)

    pipeline, other = make_captioned(), make_captioned()
    pipeline.save_pretrained(tmp_path)
    if part == "unregistered":
        other.prior = Unregistered(PRIORS["uniform"].Config(spec=other.tokenizer.spec))
    else:
        (tmp_path / part / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds other files than a .* \(thesis|Unregistered is not registered"):
        other.save_pretrained(tmp_path)
    assert fingerprint(Pipeline.from_pretrained(tmp_path).tokenizer) == fingerprint(pipeline.tokenizer)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("names", [[0, 1, 2], ["cat", None, "owl"], np.array([0, 1, 2])])
def test_names_of_classes_are_text(names):
    pipeline = make(num_classes=3)
    with pytest.raises(ValueError, match=r"class_names must be text, got"):
        Pipeline(pipeline.tokenizer, pipeline.prior, class_names=names)


def test_the_model_card_holds_what_was_measured(tmp_path):
    pipeline = make(num_classes=3)
    pipeline.metrics = {"test bits_per_dim": 1.23456789, "test num_images": 17}
    loaded = reload(pipeline, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: tessera\n")
    for text in ("| test bits_per_dim | 1.2346 |", "| test num_images | 17 |", "# VQVAE + GPT", "3 x 8 x 8",
                 "2 x 2 codes of 5", "class-conditional (3 classes)",
                 "| classes | cat, dog, owl |"):  # fmt: skip
        assert text in card
    assert loaded.metrics == pipeline.metrics
    reload(make(prior=None), tmp_path)
    assert "Nothing yet" in (tmp_path / "README.md").read_text()


def test_numbers_of_an_earlier_model_leave_the_card(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    save_stage_one(tmp_path, tokenizer, NAMES, {"psnr": 20.0})
    save_stage_one(tmp_path, tokenizer, NAMES, {"psnr": 21.0})  # trained for longer
    assert Pipeline.from_pretrained(tmp_path).metrics == {"validation tokenizer psnr": 21.0}
    prior = make_prior("gpt", tokenizer)
    prior.save_pretrained(tmp_path / "prior")
    save_stage_two(tmp_path, tokenizer, prior, NAMES, {"nll": 2.0})
    pipeline = Pipeline.from_pretrained(tmp_path)
    pipeline.metrics["test nats"] = 5.0
    pipeline.save_index(tmp_path)
    save_stage_two(tmp_path, tokenizer, prior, NAMES, {"nll": 2.0})  # a finished command run again
    assert Pipeline.from_pretrained(tmp_path).metrics == pipeline.metrics
    save_stage_two(tmp_path, tokenizer, prior, NAMES, {"nll": 1.0})
    expected = {"validation tokenizer psnr": 21.0, "validation prior nll": 1.0}
    assert Pipeline.from_pretrained(tmp_path).metrics == expected


def test_parts_that_do_not_belong_together_are_not_saved(tmp_path):
    mine, other = make(num_classes=3), make(num_classes=3)
    next(other.tokenizer.parameters()).data.add_(1)
    tokenizer, mine.tokenizer = mine.tokenizer, other.tokenizer
    with pytest.raises(ValueError, match=r"was trained on the codes of tokenizer .* but the tokenizer given has"):
        mine.save_pretrained(tmp_path / "mixed")
    mine.tokenizer = tokenizer
    mine.to(torch.bfloat16).save_pretrained(tmp_path / "cast")
    next(mine.tokenizer.parameters()).data.add_(1)  # trained on
    with pytest.raises(ValueError, match="was trained on the codes of tokenizer"):
        mine.save_pretrained(tmp_path / "trained")
    assert [path.name for path in tmp_path.rglob("*.*")] == [path.name for path in (tmp_path / "cast").rglob("*.*")]


@pytest.mark.parametrize("names", [["a", "b", "c", "d"], "abc"])
def test_class_names_are_a_list_of_no_more_than_there_are_classes(names):
    pipeline = make(num_classes=3)
    with pytest.raises(ValueError, match="class_names"):
        Pipeline(pipeline.tokenizer, pipeline.prior, class_names=names)


def test_a_run_folder_is_a_pipeline_after_each_stage(tmp_path, capsys):
    tokenizer = make_tokenizer()
    save_model(tokenizer, tmp_path / "tokenizer")
    save_stage_one(tmp_path, tokenizer, NAMES, {"psnr": 20.0})
    assert not Pipeline.from_pretrained(tmp_path).has_stage_two
    prior = make_prior("gpt", tokenizer, 3)
    save_model(prior, tmp_path / "prior")
    save_stage_two(tmp_path, tokenizer, prior, NAMES, {"nll": 1.0})
    pipeline = Pipeline.from_pretrained(tmp_path)
    assert pipeline.metrics == {"validation tokenizer psnr": 20.0, "validation prior nll": 1.0}
    assert not save_stage_one(tmp_path, tokenizer, NAMES, {"psnr": 21.0})  # the same tokenizer: stage two stays
    assert load_pipeline(tmp_path).has_stage_two
    assert capsys.readouterr().err == ""
    other = make_tokenizer()  # a new one: the prior does not belong to it any more
    save_model(other, tmp_path / "tokenizer")
    for _ in range(2):  # also when it is found so
        assert save_stage_one(tmp_path, other, NAMES, {"psnr": 22.0})
    assert "give another --output, or remove" in capsys.readouterr().out
    assert not load_pipeline(tmp_path).has_stage_two
    assert f"{tmp_path / 'prior'} is not used" in capsys.readouterr().err


# Answers as the hub does, and keeps what is committed. Run in another process, because this one is offline.
PUSH = """
import base64, json, os, sys, threading
from http.server import BaseHTTPRequestHandler, HTTPServer

class Hub(BaseHTTPRequestHandler):
    files, asked = {}, []
    def log_message(self, *arguments): pass
    def do_GET(self): self.answer({})
    def do_POST(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b"".join(iter(self.chunk, b""))
        url = os.environ["HF_ENDPOINT"] + "/user/name"
        self.asked.append((self.path, self.headers.get("Authorization")))
        if self.path.startswith("/api/models/") and not self.path.startswith("/api/models/user/name/"):
            return self.answer({"error": "Repository not found"}, 404)
        if "preupload" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            return self.answer({"files": [{"path": path, **modes} for path in paths]})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer({"commitOid": "0" * 40, "commitUrl": url + "/commit/0", "success": True})
        self.answer({"url": url, "id": "user/name"})
    def chunk(self):
        data = self.rfile.read(int(self.rfile.readline(), 16))
        self.rfile.readline()
        return data
    def answer(self, obj, status=200):
        data = json.dumps(obj).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

server = HTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ.update(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HUB_OFFLINE="0")
from pathlib import Path
from pipelines import Pipeline

pipeline = Pipeline.from_pretrained(sys.argv[1])
for repo_id in ("user/name", "name"):
    Hub.files.clear()
    pipeline.push_to_hub(repo_id, token="hf_secret")
for name, data in Hub.files.items():
    path = Path(sys.argv[2]) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
assert any(token == "Bearer hf_secret" for _, token in Hub.asked), Hub.asked
assert not any(b"hf_secret" in data for data in Hub.files.values())
"""


def test_what_is_pushed_to_the_hub_is_the_saved_pipeline(tmp_path):
    pipeline = make(num_classes=3)
    pipeline.save_pretrained(tmp_path / "saved")
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
    result = subprocess.run(
        [sys.executable, "-c", PUSH, str(tmp_path / "saved"), str(tmp_path / "pushed")],
        env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    pushed = Pipeline.from_pretrained(tmp_path / "pushed")
    assert fingerprint(pushed.prior) == fingerprint(pipeline.prior)
    assert pushed.class_names == pipeline.class_names


# Pictures
# ------------------------------------------------------------------------------------------------


def test_a_grid_shows_every_image_in_its_place(tmp_path):
    images = torch.rand(6, 3, 64, 64).round()
    with Image.open(save_grid(images, tmp_path / "a" / "grid.png", columns=3)) as picture:
        grid = np.asarray(picture) / 255
    assert grid.shape == (2 * 66 + 2, 3 * 66 + 2, 3)
    for i, image in enumerate(images):
        top, left = 2 + 66 * (i // 3), 2 + 66 * (i % 3)
        np.testing.assert_array_equal(grid[top : top + 64, left : left + 64], image.permute(1, 2, 0))


def test_each_row_of_originals_has_its_reconstructions_below():
    originals, reconstructions = torch.arange(5), torch.arange(5) + 10
    assert side_by_side(originals, reconstructions, 3).tolist() == [0, 1, 2, 10, 11, 12, 3, 4, 13, 14]


class Images(list):
    """The least of a data set."""

    def __getitems__(self, keys):
        return [self[key] for key in keys]

    @staticmethod
    def collate(items):
        return {"image": torch.stack(items)}


@pytest.mark.parametrize(("count", "columns", "rows"), [(5, 5, 2), (20, 16, 2), (32, 16, 4)])
def test_reconstructions_are_whole_rows_of_pairs(count, columns, rows, tmp_path):
    path = save_reconstructions(make().tokenizer, Images(torch.rand(count, 3, 8, 8)), tmp_path / "r.png")
    with Image.open(path) as picture:
        assert picture.size == (columns * 66 + 2, rows * 66 + 2)


def test_pictures_leave_the_mode_of_the_model_as_it_was(tmp_path):
    pipeline = make(num_classes=3)
    tokenizer = pipeline.tokenizer.train()
    save_reconstructions(tokenizer, Images(torch.rand(5, 3, 8, 8)), tmp_path / "r.png")
    save_samples(pipeline.prior, tokenizer, tmp_path / "s.png", rows=2)
    assert tokenizer.training
    with Image.open(tmp_path / "s.png") as picture:
        assert picture.size == (3 * 66 + 2, 2 * 66 + 2)  # a column for each class


# Local latents
# ------------------------------------------------------------------------------------------------


def test_local_resampling_keeps_the_codes_and_changes_the_image():
    network = {"type": "conv", **tiny.LATENT_NETWORKS["conv"]}
    pipeline = make("dvaepp", None, network=network)
    images = pipeline.sample(4, generator=seed(), resample="local", output_type="pt")
    codes = pipeline.sample(4, generator=seed(), resample="local", output_type="codes")[0]
    assert len(codes.unique(dim=0)) == 1
    assert len(images.unique(dim=0)) == 4
    assert len(pipeline.sample(4, generator=seed(), output_type="codes")[0].unique(dim=0)) > 1
    alone = pipeline.sample(1, generator=seeds(7), output_type="pt")
    together = pipeline.sample(3, generator=seeds(7, 8, 9), resample="local", output_type="pt")
    torch.testing.assert_close(together[:1], alone)


def test_local_resampling_draws_the_codes_of_one_label():
    network = {"type": "conv", **tiny.LATENT_NETWORKS["conv"]}
    pipeline = make("dvaepp", "gpt", 3, network=network)
    options = {"resample": "local", "return_log_prob": True, "output_type": "codes", "generator": seed()}
    for labels in (None, "owl", ["owl", "owl", 2, 2]):
        (codes,), log_prob, found = pipeline.sample(4, labels, **options)
        assert found.equal(found[:1].expand(4))
        assert labels is None or found[0] == 2
        torch.testing.assert_close(pipeline.prior.log_prob((codes,), found), log_prob)
    with pytest.raises(ValueError, match="draws codes once, for all images, but got different labels or prompts"):
        pipeline.sample(class_labels=["owl", "cat"], resample="local")


def test_local_resampling_is_refused_where_there_is_nothing_to_resample():
    with pytest.raises(ValueError, match="latents of its own, which this VQVAE does not have"):
        make().sample(2, resample="local")
    with pytest.raises(ValueError, match="unknown resample 'global'; choose from all, local"):
        make().sample(2, resample="global")


def test_names_stand_above_the_columns():
    images = torch.zeros(6, 3, 64, 64)
    plain, named = grid_picture(images, 3), grid_picture(images, 3, ["cat", "", "a very long name indeed"])
    assert named.size == (plain.width, plain.height + 16)
    array = np.asarray(named)
    np.testing.assert_array_equal(array[16:], np.asarray(plain))
    dark = (array[:16] < 128).all(axis=2)
    assert dark[:, 2:66].any()
    assert not dark[:, 68:132].any()
    assert dark[:, 134:198].any()


def test_names_have_letters_beyond_ascii():
    images = torch.zeros(1, 3, 64, 64)
    first, second = (np.asarray(grid_picture(images, 1, [name])) for name in ("ä", "ß"))
    assert (first != second).any()  # what a font lacks is a box, whatever it is


def test_a_grid_of_classes_has_a_column_for_each():
    pipeline = make(num_classes=3)
    assert class_columns(pipeline, rows=2) == ([0, 1, 2, 0, 1, 2], NAMES)
    assert class_columns(pipeline, ["owl", 0], rows=1) == ([2, 0], ["owl", "cat"])
    assert class_columns(pipeline, 1, rows=2) == ([1, 1], ["dog"])
    pipeline.class_names = []
    assert class_columns(pipeline, rows=1)[1] == ["0", "1", "2"]
    with pytest.raises(ValueError, match="this one has no classes"):
        class_columns(make())
    with pytest.raises(ValueError, match="at least 1 image of each, got 0"):
        class_columns(pipeline, rows=0)


@pytest.mark.parametrize("tokenizer", ["vqvae", "vqvae2"])
def test_partial_codes_are_grey_where_none_has_arrived(tokenizer):
    tokenizer = make_tokenizer(tokenizer).eval()
    codes = tuple(torch.randint(k, (2, *shape)) for shape, k in zip(tokenizer.spec.shapes, tokenizer.spec.vocab_sizes))
    nothing = tuple(torch.zeros_like(code, dtype=torch.bool) for code in codes)
    everything = tuple(torch.ones_like(code, dtype=torch.bool) for code in codes)
    assert (partial_images(tokenizer, codes, nothing) == 0.5).all()
    torch.testing.assert_close(partial_images(tokenizer, codes, everything), tokenizer.decode(codes))
    some = tuple(there.clone() for there in nothing)
    some[-1][:, 0, 1] = True
    stride = tokenizer.code_strides[-1]
    images = partial_images(tokenizer, codes, some)
    shown = (images != 0.5).any(dim=1)
    assert shown[:, :stride, stride : 2 * stride].float().mean() > 0.9
    assert not shown[:, stride:].any()
    assert not shown[:, :, :stride].any()
    # what has not arrived does not matter
    others = tuple((code + ~there) % k for code, there, k in zip(codes, some, tokenizer.spec.vocab_sizes))
    assert torch.equal(partial_images(tokenizer, others, some), images)


def test_decoded_images_leave_for_another_device_batch_by_batch(monkeypatch):
    tokenizer = make_tokenizer("vqvae").eval()
    codes, devices, cat = (torch.zeros(5, *tokenizer.spec.shapes[0], dtype=torch.int64),), [], torch.cat

    def watched(parts, *arguments, **options):
        devices.append([part.device.type for part in parts])
        return cat(parts, *arguments, **options)

    monkeypatch.setattr(torch, "cat", watched)
    images = decode_codes(tokenizer, codes, [torch.Generator()] * 5, batch_size=2, device="meta")
    assert devices[-1] == ["meta"] * 3
    assert images.shape == (5, *tokenizer.config.image_shape)
    assert not decode_codes(tokenizer, codes, [torch.Generator()] * 5, batch_size=2).is_meta


def test_partial_images_do_not_depend_on_the_default_device_of_new_tensors():
    tokenizer = make_tokenizer("vqvae").eval()
    codes = (torch.zeros(2, *tokenizer.spec.shapes[0], dtype=torch.int64),)
    some = (torch.arange(2).bool()[:, None, None].expand_as(codes[0]),)
    plain = partial_images(tokenizer, codes, some)
    torch.set_default_device("meta")
    try:
        changed = partial_images(tokenizer, codes, some)
    finally:
        torch.set_default_device(None)
    assert torch.equal(plain, changed)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("num_frames", "kept"), [(2, 2), (4, 3), (64, 5)])
def test_an_animation_begins_grey_and_ends_with_the_samples(channels, num_frames, kept, tmp_path):
    pipeline = make(image_shape=(channels, 8, 8))
    recording = CodeRecording(pipeline.prior.spec, num_frames)
    images = pipeline.sample(6, codes_callback=recording, generator=seed(), output_type="pt")
    path = save_animation(recording, pipeline.tokenizer, tmp_path / "a" / "codes.gif", columns=3)
    with Image.open(path) as picture:
        assert picture.n_frames == len(recording.states) == kept
        frames = []
        for frame in range(kept):
            picture.seek(frame)
            frames.append(np.asarray(picture.convert("RGB")).astype(int))
    assert np.unique(frames[0]).size <= 2  # grey, and the lines between
    assert abs(frames[0] - 127.5).max() <= 1
    assert abs(frames[-1] - np.asarray(grid_picture(images, 3))).max() <= 8  # a palette of 256 colours
    pixels = [(abs(frame - frames[0]) > 2).any(axis=2).sum() for frame in frames]
    assert sorted(pixels) == pixels
    assert len(set(pixels)) == kept


@pytest.mark.parametrize("tokenizer", ["vqvae", "vqvae2"])
@pytest.mark.parametrize("hidden", ["top", "bottom", "left", "right", [12, 12, 20, 20], [31, 31, 32, 32]], ids=str)
def test_a_recording_of_completions_begins_with_what_is_known(tokenizer, hidden):
    pipeline, images = make(tokenizer, image_shape=(3, 32, 32)), torch.rand(2, 3, 32, 32)
    recording = CodeRecording(pipeline.prior.spec, num_frames=8)
    mask = named_mask(hidden, pipeline.tokenizer)
    codes = pipeline.complete(images, mask, codes_callback=recording, generator=seed()).codes
    unknown, _ = code_masks(mask.expand(2, 1, 32, 32), pipeline.tokenizer)
    assert all(there.equal(~level) for there, level in zip(recording.states[0][1], unknown))
    assert all(there.all() and told.equal(level) for told, there, level in zip(*recording.states[-1], codes))
    # each comes as many steps after the one before it as the plain recording's
    order = pipeline.prior.spec.flatten(unknown)[0]
    assert len(recording.states) == 1 + math.ceil(len(order) / recording.every) <= 8
    for number, (_, arrived) in enumerate(recording.states):
        missing = order[number * recording.every :]
        assert pipeline.prior.spec.flatten(arrived)[0].sum() == len(order) - missing.sum()


@pytest.mark.parametrize("prior", ["uniform", "factorial"])
def test_a_recording_of_codes_that_come_all_at_once_begins_empty(prior):
    pipeline = make("vqvae", prior)
    recording = CodeRecording(pipeline.prior.spec)
    (codes,) = pipeline.sample(2, codes_callback=recording, output_type="codes")
    (_, (first,)), ((last,), (there,)) = recording.states
    assert not first.any()
    assert there.all()
    assert last.equal(codes)


def test_recordings_of_nothing_and_of_two_batches_are_refused(tmp_path):
    pipeline = make()
    with pytest.raises(ValueError, match="nothing was recorded"):
        save_animation(CodeRecording(pipeline.prior.spec), pipeline.tokenizer, tmp_path / "x.gif", columns=1)
    with pytest.raises(ValueError, match="at least 2 frames, got 1"):
        CodeRecording(pipeline.prior.spec, 1)
    with pytest.raises(ValueError, match="an animation shows one batch"):
        pipeline.sample(3, batch_size=2, codes_callback=CodeRecording(pipeline.prior.spec))
    with pytest.raises(ValueError, match=r"written as GIF, got 'x.png'; name a file that ends in .gif"):
        check_picture(tmp_path.__class__("x.png"), suffix=".gif")

"""Masks against brute force, completions against the exact conditional of code spaces small enough to enumerate."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from pipelines.masks import as_mask, code_masks, fill_from_around, named_mask
from pipelines.outpainting import canvas_tokenizer, corners
from prior import PRIORS
from prior.autoregressive import AutoregressivePrior
from prior.sampling import SamplingOptions
from tests import tiny
from tests.test_pipeline import PREPROCESSING, make, make_tokenizer, seed, seeds
from tests.test_priors import joint, sampled_joint
from tests.test_text import make as make_with_captions
from tokenizer import TOKENIZERS

AUTOREGRESSIVE = [name for name, kind in PRIORS.items() if issubclass(kind, AutoregressivePrior)]
BLIND = [name for name in tiny.TOKENIZERS if make_tokenizer(name).code_strides is None]
TOP_HALF = torch.zeros(8, 8, dtype=torch.bool)
TOP_HALF[:4] = True
# Several levels of one shape, several levels of several, images that are padded to whole codes
GEOMETRIES = {
    "vqvae": ("vqvae", {}),
    "padded": ("vqvae", {"image_shape": (3, 9, 13)}),
    "residual": ("vqvae", {"quantizer": {"type": "residual", **tiny.QUANTIZERS["residual"]}}),
    "vqvae2": ("vqvae2", {}),
    "vqvae2-padded": ("vqvae2", {"image_shape": (3, 9, 13)}),
}


def random_images(*shape):
    return torch.rand(*shape, generator=seed(1))


def all_codes(spec):
    sizes = [k for n, k in zip(spec.lengths, spec.vocab_sizes) for _ in range(n)]
    return spec.unflatten(torch.tensor(list(itertools.product(*map(range, sizes)))))


# --- masks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "level"), [("vqvae", 0), ("vqvae2", 0), ("vqvae2", 1)])
def test_what_a_code_changes_lies_about_its_place(name, level):
    tokenizer = make_tokenizer(name, image_shape=(3, 64, 64)).eval()
    stride = tokenizer.code_strides[level]
    row, column = 32 // stride, 24 // stride
    before = [torch.randint(k, (200, *s)) for s, k in zip(tokenizer.spec.shapes, tokenizer.spec.vocab_sizes)]
    after = [code.clone() for code in before]
    after[level][:, row, column] = (after[level][:, row, column] + 1) % tokenizer.spec.vocab_sizes[level]
    changed = (tokenizer.decode(tuple(before)) != tokenizer.decode(tuple(after))).any(dim=1).any(dim=0)
    for place, axis in ((row, 1), (column, 0)):
        first, last = changed.any(dim=axis).nonzero().flatten()[[0, -1]].tolist()
        assert first + last == 2 * place * stride + stride - 1  # as far on the one side as on the other
        assert last < 63


def unknown_by_hand(mask, tokenizer):
    """(h, w) per level, pixel by pixel; what lies beyond the image is as its last row or column."""
    height, width = mask.shape
    levels = []
    for (rows, columns), stride in zip(tokenizer.spec.shapes, tokenizer.code_strides):
        unknown = np.zeros((rows, columns), dtype=bool)
        for y, x in np.ndindex(rows * stride, columns * stride):
            coarser = (level[y // f, x // f] for level, f in zip(levels, tokenizer.code_strides))
            inside = mask[min(y, height - 1), min(x, width - 1)]
            unknown[y // stride, x // stride] |= bool(inside) or any(coarser)
        levels.append(unknown)
    return levels


@pytest.mark.parametrize("geometry", GEOMETRIES)
@settings(max_examples=15)
@given(data=st.data())
def test_masks_are_rounded_outwards_to_codes_and_to_finer_ones(geometry, data):
    name, options = GEOMETRIES[geometry]
    tokenizer = make_tokenizer(name, **options)
    height, width = tokenizer.config.image_shape[1:]
    pixels = data.draw(st.sets(st.integers(0, height * width - 1), max_size=3))
    mask = torch.zeros(height * width, dtype=torch.bool)
    mask[list(pixels)] = True
    mask = mask.view(1, 1, height, width)
    levels, region = code_masks(mask, tokenizer)
    expected = unknown_by_hand(mask[0, 0].numpy(), tokenizer)
    for level, by_hand in zip(levels, expected, strict=True):
        np.testing.assert_array_equal(level[0], by_hand)
    stride = tokenizer.code_strides[-1]
    whole = np.kron(expected[-1], np.ones((stride, stride), dtype=bool))[:height, :width]
    np.testing.assert_array_equal(region[0, 0], whole)


def test_all_ways_to_write_a_mask_are_the_same():
    tokenizer = make_tokenizer(image_shape=(3, 8, 12), preprocessing={**PREPROCESSING, "image_size": [8, 12]})
    expected = torch.zeros(2, 1, 8, 12, dtype=torch.bool)
    expected[:, :, 2:5, 3:8] = True
    picture = Image.fromarray(expected[0, 0].numpy().astype(np.uint8) * 255)
    forms = [expected, expected[0, 0], expected.numpy(), picture, [picture, picture], picture.convert("RGB"),
             picture.resize((36, 24), Image.Resampling.NEAREST), named_mask([2, 3, 5, 8], tokenizer)]  # fmt: skip
    for form in forms:
        assert as_mask(form, 2, tokenizer).equal(expected)
    for half, place in (("top", (0, 0, 4, 12)), ("left", (0, 0, 8, 6)), ("bottom", (4, 0, 8, 12)),
                        ("right", (0, 6, 8, 12))):  # fmt: skip
        assert named_mask(half, tokenizer).equal(named_mask(place, tokenizer))
    assert named_mask("right", tokenizer)[:, 6:].all()


def test_a_mask_image_is_cropped_as_its_image_and_loses_no_pixel(tmp_path):
    tokenizer = make_tokenizer()
    large = Image.new("L", (1024, 512))
    large.putpixel((1023 - 256, 511), 255)  # the last pixel of the central square: one of 4096 that make one
    large.putpixel((0, 0), 255)  # cut off
    large.save(tmp_path / "mask.png")
    mask = as_mask(named_mask(str(tmp_path / "mask.png"), tokenizer), 1, tokenizer)
    assert mask.nonzero().tolist() == [[0, 0, 7, 7]]


def turned(picture, orientation):
    """The picture as a camera of this EXIF orientation stores it."""
    stored = picture.transpose({3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}[orientation])
    stored.getexif()[0x0112] = orientation
    return stored


@pytest.mark.parametrize("orientation", [3, 6])
def test_masks_and_images_are_both_looked_at_upright(orientation):
    pipeline, pixels = make(), np.random.default_rng(0).integers(0, 256, (32, 16, 3), dtype=np.uint8)
    image, mask = Image.fromarray(pixels), Image.new("L", (16, 32))
    mask.paste(255, (0, 8, 5, 14))
    assert ImageOps.exif_transpose(turned(mask, orientation)).tobytes() == mask.tobytes()
    expected = pipeline.complete(image, mask, generator=seed(), output_type="pt")
    assert 0 < expected.region.sum() < expected.region.numel()
    for photo, hole in [(turned(image, orientation), mask), (image, turned(mask, orientation)),
                        (turned(image, orientation), turned(mask, orientation))]:  # fmt: skip
        found = pipeline.complete([photo], [hole], generator=seed(), output_type="pt")
        assert found.region.equal(expected.region)
        assert found.images.equal(expected.images)


def test_a_mask_of_sixteen_bits_is_white_from_half_of_them_on():
    values = np.full((8, 8), 300, dtype=np.uint16)
    values[2, 3:5] = 65535, 40000
    assert as_mask(Image.fromarray(values), 1, make_tokenizer()).nonzero()[:, 2:].tolist() == [[2, 3], [2, 4]]


@given(st.tuples(*[st.integers(1, 40)] * 2), st.data())
def test_a_mask_image_counts_each_pixel_that_it_touches(size, data):
    height, width = size
    values = np.zeros(size, dtype=np.uint8)
    scale = max(8 / height, 8 / width)
    rows, columns = max(8, round(height * scale)), max(8, round(width * scale))
    row, column = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    values[row, column] = 255
    touched = np.zeros((rows, columns), dtype=bool)
    for y, x in np.ndindex(rows, columns):  # overlaps of intervals, in whole numbers
        inside = (y * height < (row + 1) * rows, row * rows < (y + 1) * height)
        touched[y, x] = all(inside) and x * width < (column + 1) * columns and column * columns < (x + 1) * width
    top, left = (rows - 8) // 2, (columns - 8) // 2
    touched = touched[top : top + 8, left : left + 8]
    if touched.any():
        assert np.array_equal(as_mask(Image.fromarray(values), 1, make_tokenizer())[0, 0].numpy(), touched)
    else:
        with pytest.raises(ValueError, match="marks no pixel"):
            as_mask(Image.fromarray(values), 1, make_tokenizer())


@pytest.mark.parametrize("fill", ["part", "all"])
def test_what_a_mask_image_hides_is_not_looked_at_where_pictures_are_resized(fill):
    pipeline = make("vqvae", "gpt", image_shape=(3, 8, 8))
    pipeline.tokenizer.initialize(torch.rand(64, 3, 8, 8))
    mask = np.zeros((30, 30), dtype=np.uint8)
    mask[15 if fill == "part" else 0 :] = 255
    pictures = [np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8) for _ in range(3)]
    pictures[1][mask > 0] = 255 - pictures[1][mask > 0]
    pictures[2][mask == 0] = 255 - pictures[2][mask == 0]
    first, second, third = (
        pipeline.complete(Image.fromarray(picture), Image.fromarray(mask), generator=seed(), output_type="pt")
        for picture in pictures
    )
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.codes[0], second.codes[0])
    assert torch.equal(first.codes[0], third.codes[0]) == (fill == "all")  # what is not hidden matters


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.eye(8, dtype=np.uint8), "marks no pixel .* white .255 .* its brightest pixel is 1 of 255"),
        (np.full((8, 8), 300, dtype=np.uint16), "its brightest pixel is 1 of 255"),
        (np.zeros((8, 8), dtype=bool), "its brightest pixel is 0 of 255"),
        (np.eye(8, dtype=np.float32), "the mask: .* its pixels are floating point"),
    ],
)
def test_mask_images_that_mark_nothing_are_refused(picture, message):
    pipeline, picture = make(), Image.fromarray(picture)
    with pytest.raises(ValueError, match=message):
        pipeline.complete(torch.rand(1, 3, 8, 8), picture)
    with pytest.raises(ValueError, match=message):  # one of them is enough: its image would come back unchanged
        pipeline.complete(torch.rand(2, 3, 8, 8), [Image.new("L", (8, 8), "white"), picture])


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(8, 8), r"mask must be boolean .* of shape \(8, 8\), or \(2, 1, 8, 8\), got torch.float32"),
        (torch.zeros(2, 8, 8, dtype=torch.bool), r"got torch.bool of shape \(2, 8, 8\)"),
        (torch.zeros(8, 9, dtype=torch.bool), r"got torch.bool of shape \(8, 9\)"),
        ([Image.new("L", (8, 8))] * 3, "got 3 mask images for 2 images: give one, or one each"),
        ("left", "boolean tensor or array, or mask images, got str"),
    ],
)
def test_wrong_masks_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        make().complete(torch.rand(2, 3, 8, 8), mask)


@pytest.mark.parametrize("box", [(0, 0, 9, 4), (0, 0, 0, 4), (-1, 0, 4, 4), (0, 0, 4)])
def test_boxes_outside_of_the_image_are_refused(box):
    with pytest.raises(ValueError, match="within the 8 x 8 pixels, got"):
        named_mask(box, make_tokenizer())
    for name in ("middle", "", "."):
        with pytest.raises(ValueError, match=f"no file '{name}'; a mask is one of top, bottom, left, right, a box, or"):
            named_mask(name, make_tokenizer())


def test_what_fills_a_mask_comes_from_around_it_alone():
    images = random_images(3, 3, 6, 7)
    mask = torch.zeros(3, 1, 6, 7, dtype=torch.bool)
    mask[0, :, 2, 3] = True
    mask[1, :, :, 2:] = True
    mask[2] = True
    filled = fill_from_around(images, mask)
    around = images[0, :, 1:4, 2:5].flatten(1)[:, [0, 1, 2, 3, 5, 6, 7, 8]]
    torch.testing.assert_close(filled[0, :, 2, 3], around.mean(dim=1))
    torch.testing.assert_close(filled[1, :, 2:4, 2], torch.stack([images[1, :, i - 1 : i + 2, 1].mean(1)
                                                                  for i in (2, 3)], dim=1))  # fmt: skip
    assert (filled[2] == 0.5).all()
    assert filled.where(mask, 0).ge(0).all()
    assert torch.equal(filled.where(~mask, 0), images.where(~mask, 0))
    assert torch.equal(fill_from_around(images.where(~mask, torch.nan), mask), filled)
    for i in range(3):
        assert torch.equal(fill_from_around(images[i : i + 1], mask[i : i + 1])[0], filled[i])


# --- completion -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prior", [None, *(name for name, kind in sorted(PRIORS.items()) if "given" in kind.sampling_options)]
)
@pytest.mark.parametrize("tokenizer", ["vqvae", "vqvae2"])
def test_what_is_known_stays_and_what_is_hidden_is_never_looked_at(tokenizer, prior):
    pipeline = make(tokenizer, prior)
    with torch.no_grad():
        for parameter in pipeline.tokenizer.parameters():  # a fresh network hardly looks at its input
            parameter += 0.3 * torch.randn_like(parameter)
    pipeline.tokenizer.initialize(torch.rand(64, 3, 8, 8))
    images, mask = random_images(2, 3, 8, 8), torch.zeros(8, 8, dtype=torch.bool)
    mask[3, 1:7] = True
    others = images.where(~mask, torch.rand(2, 3, 8, 8).round())
    many = torch.cat([images.where(~mask, torch.rand(8, 8).round()) for _ in range(20)])
    below = [level[:, -1].unflatten(0, (20, 2)) for level in pipeline.encode(many)]
    assert any((codes != codes[0]).any() for codes in below)  # the encoder sees beyond a code's place
    completions = pipeline.complete(images, mask, num_candidates=3, generator=seed(), output_type="pt")
    again = pipeline.complete(others, mask, num_candidates=3, generator=seed(), output_type="pt")
    torch.testing.assert_close(again, completions, rtol=0, atol=0)
    unknown, region = code_masks(mask.expand(2, 1, 8, 8), pipeline.tokenizer)
    encoded = pipeline.encode(fill_from_around(images, mask.expand(2, 1, 8, 8)))
    for drawn, level, hidden in zip(completions.codes, encoded, unknown):
        known = drawn.unflatten(0, (2, 3)).where(~hidden[:, None], 0)
        assert known.equal(level[:, None].where(~hidden[:, None], 0).expand_as(known))
    assert completions.region.equal(region)
    decoded = pipeline.decode(completions.codes, generator=seeds(*range(6)), output_type="pt")
    torch.testing.assert_close(completions.images, decoded)
    codes = pipeline.complete(images, mask, num_candidates=3, generator=seed(), output_type="codes").images
    assert all(a.equal(b) for a, b in zip(codes, completions.codes))


@pytest.mark.parametrize("name", BLIND)
def test_codes_without_a_place_in_the_image_are_refused(name):
    pipeline = make(name, None)
    images = torch.zeros(1, *pipeline.tokenizer.config.image_shape)
    for call in (lambda: pipeline.complete(images, TOP_HALF), lambda: pipeline.outpaint(images, (64, 64))):
        with pytest.raises(ValueError, match=f"the codes of {TOKENIZERS[name].__name__} .* have no place in it"):
            call()


def test_known_pixels_are_kept_exactly_if_asked():
    pipeline, mask = make(), TOP_HALF.clone()
    pictures = [Image.fromarray(a) for a in np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)]
    mask[4, 4] = True  # its whole code is drawn, but only this pixel is shown of it
    kept = pipeline.complete(pictures, mask, num_candidates=2, keep_known_pixels=True, generator=seed())
    free = pipeline.complete(pictures, mask, num_candidates=2, generator=seed())
    for i, (image, other) in enumerate(zip(kept.images, free.images)):
        array, original, decoded = (np.asarray(x) for x in (image, pictures[i // 2], other))
        np.testing.assert_array_equal(array[~mask], original[~mask])
        np.testing.assert_array_equal(array[mask], decoded[mask])
        assert (decoded[~mask] != original[~mask]).any()


def test_no_more_than_a_batch_is_encoded_at_a_time():
    pipeline, images, sizes = make(), random_images(5, 3, 8, 8), []
    pipeline.tokenizer.to_quantizer.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    pipeline.complete(images, TOP_HALF, batch_size=2)
    pipeline.outpaint(images, (8, 12), batch_size=np.int64(2))
    assert sizes == [2, 2, 1] * 2


def test_half_precision_keeps_pixels_exactly_too():
    pipeline, images = make().to(dtype=torch.bfloat16), random_images(1, 3, 8, 8)
    kept = pipeline.complete(images, TOP_HALF, keep_known_pixels=True, output_type="pt").images
    assert kept[:, :, 4:].equal(images[:, :, 4:])


@pytest.mark.parametrize("ranking", ["log_prob", "importance"])
def test_candidates_of_an_image_depend_on_its_own_generator_alone(ranking):
    pipeline, images = make("vqvae2", "pixelcnn", 3), random_images(3, 3, 8, 8)
    mask = torch.stack([torch.roll(TOP_HALF, i, 0) for i in range(3)])[:, None]
    options = {"num_candidates": 4, "ranking": ranking, "output_type": "codes"}
    together = pipeline.complete(images, mask, generator=seeds(0, 1, 2), **options)
    batches = pipeline.complete(images, mask, generator=seeds(0, 1, 2), batch_size=5, **options)
    alone = pipeline.complete(images[1:2], mask[1:2], generator=seeds(1), **options)
    for level, codes in enumerate(together.codes):
        assert batches.codes[level].equal(codes)
        assert alone.codes[level].equal(codes[4:8])
    assert alone.class_labels.equal(together.class_labels[1:2])
    torch.testing.assert_close(alone.log_prob, together.log_prob[1:2])


@pytest.mark.parametrize("prior", AUTOREGRESSIVE)
def test_candidates_are_ranked_by_the_priors_own_log_probability(prior):
    pipeline = make("vqvae2", prior, 3)
    # options change what is drawn, not how it is judged
    options = {"temperature": 2.0, "top_k": 4, "num_candidates": 5, "generator": seed()}
    completions = pipeline.complete(random_images(2, 3, 8, 8), TOP_HALF, class_labels=["owl", "cat"], **options)
    assert completions.class_labels.tolist() == [[2] * 5, [0] * 5]
    expected = pipeline.prior.log_prob(completions.codes, completions.class_labels.flatten()).view(2, 5)
    torch.testing.assert_close(completions.log_prob, expected)
    assert completions.log_prob.diff(dim=1).le(0).all()
    assert len(completions.log_prob.unique()) > 2
    assert completions.weights is None


def exact_conditional(prior, spec, codes, known):
    """p(label, unknown codes | known codes) for labels drawn uniformly, with an axis for the label and each code."""
    every = all_codes(spec)
    num_labels = max(1, prior.num_classes)
    labels = [torch.full((len(every[0]),), y) if prior.num_classes else None for y in range(num_labels)]
    with torch.no_grad():
        joint = np.stack([prior.log_prob(every, y).double().exp().numpy() for y in labels]) / num_labels
    fits = (spec.flatten(every) == spec.flatten(codes)) | ~spec.flatten(known)
    joint = joint * fits.all(dim=1).numpy()
    return joint / joint.sum()


def frequencies(spec, codes, labels=None, num_labels=1):
    """Of codes (n, ...) and labels (n,), in the form of `exact_conditional`."""
    sequence = spec.flatten(codes).numpy().T
    sizes = [k for n, k in zip(spec.lengths, spec.vocab_sizes) for _ in range(n)]
    counts = np.zeros((num_labels, np.prod(sizes)))
    np.add.at(counts, (np.zeros(len(sequence.T), int) if labels is None else labels.numpy(),
                       np.ravel_multi_index(sequence, sizes)), 1)  # fmt: skip
    return counts / counts.sum()


def total_variation(p, q):
    return np.abs(p - q).sum() / 2


@pytest.mark.parametrize("num_classes", [0, 3])
def test_reweighted_completions_tend_to_the_exact_conditional(num_classes):
    pipeline, n, num_candidates = make("vqvae", "gpt", num_classes), 1000, 20
    spec, mask = pipeline.tokenizer.spec, torch.zeros(8, 8, dtype=torch.bool)
    mask[:4, 4:] = mask[4:, :4] = True  # codes 1 and 2 of 4: known ones stand before them and after
    completions = pipeline.complete(
        random_images(1, 3, 8, 8).expand(n, -1, -1, -1), mask, num_candidates=num_candidates, ranking="importance",
        generator=seed(), output_type="codes", batch_size=n * num_candidates,
    )  # fmt: skip
    (codes,), labels = completions.codes, completions.class_labels
    expected = exact_conditional(pipeline.prior, spec, (codes[:1],), (torch.tensor([[[True, False], [False, True]]]),))
    first = frequencies(spec, (codes[::num_candidates],), None if labels is None else labels[:, 0], len(expected))
    drawn = frequencies(spec, (codes,), None if labels is None else labels.flatten(), len(expected))
    # 0.1 is half sampling noise of 1000 draws and half the bias of 20 candidates; the draws themselves are far from it
    assert total_variation(first, expected) < 0.1
    assert total_variation(drawn, expected) > 0.2
    torch.testing.assert_close(completions.weights.sum(dim=1), torch.ones(n))
    assert completions.weights[:, 0].mean() > 1.2 / num_candidates


@pytest.mark.parametrize("prior", AUTOREGRESSIVE)
def test_weights_are_the_likelihood_of_the_known_codes(prior):
    pipeline, spec = make("vqvae", prior), make_tokenizer().spec
    completions = pipeline.complete(
        random_images(1, 3, 8, 8), TOP_HALF, num_candidates=6, ranking="importance", temperature=0.5, generator=seed()
    )
    every = all_codes(spec)
    with torch.no_grad():
        joint = pipeline.prior.log_prob(every).double().exp().view(5, 5, 5, 5)
    drawn = spec.flatten(completions.codes)
    # the known codes are the last two: p(known | drawn) = p(all) / p(drawn)
    weights = torch.stack([joint[tuple(c)] / joint[tuple(c[:2])].sum() for c in drawn.tolist()])
    torch.testing.assert_close(completions.weights[0], (weights / weights.sum()).float(), rtol=1e-3, atol=1e-5)


def test_under_sampling_options_the_first_follows_their_law_times_the_likelihood_of_what_follows():
    pipeline, n, num_candidates, options = make(), 1000, 20, {"temperature": 3.0, "top_k": 3}
    spec, images = pipeline.prior.spec, random_images(1, 3, 8, 8).expand(n, -1, -1, -1)
    completions = pipeline.complete(
        images, TOP_HALF, num_candidates=num_candidates, ranking="importance", generator=seed(), output_type="codes",
        batch_size=n * num_candidates, **options,
    )  # fmt: skip
    p = joint(pipeline.prior)
    known = tuple(completions.codes[0][0, 1].tolist())
    likelihood = p[:, :, *known] / p.sum((2, 3))
    expected = sampled_joint(spec, SamplingOptions(**options), p).sum((2, 3)) * likelihood
    first = frequencies(spec, (completions.codes[0][::num_candidates],)).reshape(p.shape)[:, :, *known]
    exact = p[:, :, *known] / p[:, :, *known].sum()
    # half sampling noise and half bias, as above
    assert total_variation(first, expected / expected.sum()) < 0.1 < 0.2 < total_variation(first, exact)


def test_a_prefix_is_conditioned_on_exactly_so_that_weights_are_equal():
    completions = make().complete(
        random_images(2, 3, 8, 8), TOP_HALF.flip(0), num_candidates=8, ranking="importance", generator=seed()
    )
    torch.testing.assert_close(completions.weights, torch.full((2, 8), 1 / 8))


def test_one_label_serves_all_candidates_and_wrong_arguments_are_refused():
    pipeline, images = make(num_classes=3), torch.zeros(2, 3, 8, 8)
    assert pipeline.complete(images, TOP_HALF, num_candidates=2, class_labels=1).class_labels.tolist() == [[1, 1]] * 2
    for arguments, message in [
        ({"class_labels": [1]}, "got 1 class labels for 2 images: give one, or one each"),
        ({"num_candidates": 0}, "num_candidates and batch_size must be at least 1, got 0 and 64"),
        ({"num_candidates": 1.5}, "num_candidates must be an integer, got 1.5"),
        ({"ranking": "best"}, "unknown ranking 'best'; choose from log_prob, importance"),
        ({"output_type": "latent"}, "unknown output_type 'latent'"),
        ({"generator": seeds(0)}, "got 1 generators for 2 images"),
        ({"temperature": -1}, "temperature must be finite and at least 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            pipeline.complete(images, TOP_HALF, **arguments)
    pictures = [Image.new("RGB", (8, 8))]
    with pytest.raises(ValueError, match="as large as its image, got 8 x 4 for an image of 8 x 8"):
        pipeline.complete(pictures, Image.new("L", (8, 4)))


def calls_with_prompts(pipeline):
    """Every way to give prompts, for two images; each gives codes or images as tensors."""
    images = random_images(2, 3, 8, 8)
    pt = {"generator": seed(), "output_type": "pt"}
    return [
        lambda prompts: pipeline.sample(2, prompts=prompts, **pt),
        lambda prompts: pipeline.complete(images, TOP_HALF, prompts=prompts, **pt).images,
        lambda prompts: pipeline.outpaint(images, (8, 12), prompts=prompts, **pt),
        lambda prompts: pipeline.rejection_sample(2, prompts=prompts, score=lambda x: x.mean((1, 2, 3)),
                                                  keep_fraction=0.5, **pt).images,
    ]  # fmt: skip


@pytest.mark.parametrize("call", range(4))
def test_prompts_come_as_a_list_or_an_array_and_what_is_none_is_refused(call):
    pipeline = make_with_captions()
    prompts = ["a one", "a three left of a seven"]
    expected, found = (calls_with_prompts(pipeline)[call](form) for form in (prompts, np.array(prompts)))
    assert found.equal(expected)
    with pytest.raises(ValueError, match="prompts must be a caption or a list of them, got 3"):
        calls_with_prompts(pipeline)[call](3)


@pytest.mark.parametrize(
    ("option", "hint"),
    [("return_log_prob", ""), ("labels", "; did you mean 'class_labels'?"), ("progress", ""), ("given", ""),
     ("temprature", "; did you mean 'temperature'?")],
)  # fmt: skip
def test_an_option_that_sampling_does_not_have_is_refused_by_name(option, hint):
    pipeline, images = make(num_classes=3), torch.zeros(1, 3, 8, 8)
    for method, arguments in [
        (pipeline.complete, {"images": images, "mask": TOP_HALF}),
        (pipeline.outpaint, {"images": images, "size": (8, 12)}),
        (pipeline.rejection_sample, {"score": lambda x: x.mean((1, 2, 3)), "keep_fraction": 0.5}),
    ]:
        with pytest.raises(ValueError, match=rf"{method.__name__} has no option '{option}'.*{re.escape(hint)}.*known:"):
            method(**arguments, **{option: None})


def test_candidates_of_independent_codes_weigh_the_same():
    completions = make("vqvae", "bernoulli").complete(
        random_images(2, 3, 8, 8), TOP_HALF, num_candidates=3, ranking="importance", generator=seed()
    )
    torch.testing.assert_close(completions.weights, torch.full((2, 3), 1 / 3))


def test_priors_that_cannot_weigh_single_codes_say_so():
    pipeline = make("vqvae", "rbm")
    with pytest.raises(ValueError, match=r"RBM does not predict one code after another.* take ranking = 'log_prob'"):
        pipeline.complete(torch.zeros(1, 3, 8, 8), TOP_HALF, num_candidates=2, ranking="importance")
    with pytest.raises(ValueError, match=r"RBM does not predict one code after another.* take num_candidates = 1"):
        pipeline.outpaint(torch.zeros(1, 3, 8, 8), (8, 12), num_candidates=2)
    assert pipeline.outpaint(torch.zeros(1, 3, 8, 8), (8, 12), output_type="pt").shape == (1, 3, 8, 12)


def test_the_script_tells_the_weights_of_candidates(tmp_path):
    pipeline, script = make(), Path(__file__).resolve().parents[1] / "scripts/complete.py"
    pipeline.save_pretrained(tmp_path / "p")
    image = pipeline.sample(1)[0]
    image.save(tmp_path / "a.png")
    command = [sys.executable, script, "--run", "p", "--images", "a.png", "--mask", "top", "--ranking", "importance"]
    command += ["--device", "cpu", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    expected = pipeline.complete(image, TOP_HALF, num_candidates=4, ranking="importance", generator=seed())
    assert json.loads(done.stdout)["weights"] == expected.weights.tolist()


# --- outpainting ----------------------------------------------------------------------------------------------------


@given(st.data())
def test_windows_cover_the_canvas_and_each_continues_what_is_there(data):
    window = [data.draw(st.integers(2, 6)) for _ in range(2)]
    size = [data.draw(st.integers(least, 20)) for least in window]
    start = tuple(data.draw(st.integers(0, side - least)) for side, least in zip(size, window))
    stride = data.draw(st.integers(1, min(window)))
    covered, order = np.zeros(size, dtype=bool), corners(tuple(size), start, tuple(window), stride)
    assert order[0] == start
    for number, (top, left) in enumerate(order):
        place = covered[top : top + window[0], left : left + window[1]]
        # an overlap of all but a stride, unless windows just touch
        assert number == 0 or place.sum() >= (window[0] - stride) * (window[1] - stride)
        assert place.shape == tuple(window)
        place[:] = True
    assert covered.all()


@pytest.mark.parametrize(("name", "options"), GEOMETRIES.values(), ids=GEOMETRIES)
def test_a_canvas_is_decoded_as_images_are_away_from_its_edges(name, options):
    options = {**options, "image_shape": (3, 48, 48)}
    tokenizer = make_tokenizer(name, **options).eval()
    state = torch.get_rng_state()
    larger = canvas_tokenizer(tokenizer, (64, 80))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(a is b or a.data_ptr() == b.data_ptr() for a, b in zip(larger.parameters(), tokenizer.parameters()))
    canvas = [torch.randint(k, (1, *shape)) for shape, k in zip(larger.spec.shapes, larger.spec.vocab_sizes)]
    cut = tuple(c[:, 8 // f : 56 // f, 16 // f : 64 // f] for c, f in zip(canvas, tokenizer.code_strides))
    whole, window = larger.decode(tuple(canvas)), tokenizer.decode(cut)
    assert whole.shape == (1, 3, 64, 80)
    # the tiny network's codes reach fewer than 16 pixels far
    torch.testing.assert_close(whole[..., 8 + 16 : 56 - 16, 16 + 16 : 64 - 16], window[..., 16:-16, 16:-16])


@pytest.mark.parametrize("prior", AUTOREGRESSIVE)
@pytest.mark.parametrize("tokenizer", ["vqvae", "vqvae2"])
def test_the_image_stays_where_it_is_put(tokenizer, prior):
    pipeline, images = make(tokenizer, prior, 3), random_images(2, 3, 8, 8)
    options = {"position": (4, 8), "class_labels": ["owl", "cat"], "generator": seeds(0, 1), "num_candidates": 2}
    codes = pipeline.outpaint(images, (12, 16), output_type="codes", **options)
    for level, known, f in zip(codes, pipeline.encode(images), pipeline.tokenizer.code_strides):
        assert level.shape == (2, 12 // f, 16 // f)
        assert level[:, 4 // f : 12 // f, 8 // f : 16 // f].equal(known)
    options["generator"] = seeds(0, 1)
    canvas = pipeline.outpaint(images, (12, 16), output_type="pt", keep_known_pixels=True, **options)
    assert canvas.shape == (2, 3, 12, 16)
    assert canvas[:, :, 4:12, 8:16].equal(images)
    alone = {**options, "class_labels": "cat", "generator": seeds(1)}
    alone = pipeline.outpaint(images[1:], (12, 16), output_type="codes", **alone)
    assert all(a.equal(level[1:]) for a, level in zip(alone, codes))


def test_a_canvas_of_the_images_own_size_is_the_reconstruction():
    pipeline, images = make(), random_images(2, 3, 8, 8)
    canvas = pipeline.outpaint(images, (8, 8), output_type="pt")
    torch.testing.assert_close(canvas, pipeline.reconstruct(images, output_type="pt"))
    for size in ((8, 16), [8, 16], np.array([8, 16]), torch.tensor([8, 16])):
        assert [image.size for image in pipeline.outpaint(images, size)] == [(16, 8)] * 2


@pytest.mark.parametrize("position", [(0, 0), (0, 4)])
def test_the_outer_codes_follow_the_prior_given_what_the_window_overlaps(position):
    """One window of 2 x 2 codes that overlaps the image by a column, on its right or on its left."""
    pipeline, n = make(), 800
    images = random_images(1, 3, 8, 8).expand(n, -1, -1, -1)
    options = {"position": position, "output_type": "codes", "batch_size": 100_000}
    for num_candidates, near in ((20, True), (1, False)):
        (canvas,) = pipeline.outpaint(images, (8, 12), num_candidates=num_candidates, generator=seed(), **options)
        window = canvas[:, :, 1:] if position == (0, 0) else canvas[:, :, :2]
        known = torch.tensor([[[position == (0, 0), position != (0, 0)]] * 2])
        expected = exact_conditional(pipeline.prior, pipeline.prior.spec, (window[:1],), (known,))
        distance = total_variation(frequencies(pipeline.prior.spec, (window,)), expected)
        assert distance < 0.1 if near else distance > 0.15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": (8, 13)}, r"multiples of 4, at least 8 x 8, got \(8, 13\)"),
        ({"size": (4, 16)}, r"multiples of 4, at least 8 x 8, got \(4, 16\)"),
        ({"size": (8, 16), "position": (4, 0)}, r"at most \(0, 8\), got \(4, 0\)"),
        ({"size": (16, 16), "position": (0, 2)}, r"position must be .* multiples of 4, .*got \(0, 2\)"),
        ({"size": (16, 16), "stride": 12}, "stride must be a multiple of 4 from 4 to 8 pixels, got 12"),
        ({"size": (16, 16), "stride": 2}, "got 2"),
        ({"size": (16, 16), "stride": 4.0}, "stride must be a multiple of 4 .*, got 4.0"),
        ({"size": 16}, r"size must be \(height, width\) in multiples of 4, .*got 16"),
        ({"size": "16"}, "size must be .*got '16'"),
        ({"size": (16.0, 16.0)}, r"size must be .*got \(16.0, 16.0\)"),
        ({"size": (16, 16), "position": 4}, r"position must be \(top, left\) in multiples of 4, .*got 4"),
        ({"size": (16, 16), "num_candidates": 1.5}, "num_candidates must be an integer, got 1.5"),
        ({"size": (16, 16), "batch_size": 2.5}, "batch_size must be an integer, got 2.5"),
        ({"size": (16, 16), "class_labels": 1}, "this prior is unconditional"),
        ({"size": (16, 16), "output_type": "png"}, "unknown output_type 'png'"),
    ],
)
def test_wrong_canvases_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make().outpaint(torch.zeros(1, 3, 8, 8), **arguments)


def test_images_that_are_padded_to_whole_codes_have_no_canvas():
    pipeline = make(image_shape=(3, 9, 13))
    with pytest.raises(ValueError, match="images of 9 x 13 pixels are padded to whole codes of 4 x 4"):
        pipeline.outpaint(torch.zeros(1, 3, 9, 13), (16, 16))

"""The evaluator against itself: distances with known answers, caches, protocols, pictures, refusals."""

import copy
import json
import math
import os
import re
import shutil
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import evaluate as evaluate_script
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pipelines import Pipeline, comparable, evaluate
from pipelines.card import model_card
from pipelines.checkpoint import build_prior, build_tokenizer, fingerprint
from pipelines.config import plain
from pipelines.evaluation.cache import cached
from pipelines.evaluation.classifier import Classifier, at_most, classifier_features
from pipelines.evaluation.codebook_pictures import code_vectors, position_entropy
from pipelines.evaluation.features import (
    FeatureNetwork,
    class_score,
    feature_statistics,
    frechet_distance,
    precision_recall,
    reference_of,
)
from pipelines.evaluation.image_quality import class_agreement, copying, nearest_images, sample_metrics
from pipelines.evaluation.ood import NoiseImages, auroc, load_other
from pipelines.evaluation.pretrained import inception_features, lpips_network, read_weights
from pipelines.evaluation.protocol import pixels_of
from pipelines.evaluation.reconstruction import count_positions, lpips, reconstruct, ssim
from pipelines.evaluation.report import dropped, earlier_result, format_summary, format_value, record, with_earlier
from pipelines.files import write_json_atomic
from pipelines.images import DataConfig, Split, load_images
from pipelines.metrics import NotMeasurableError
from pipelines.runs import load_images_for, save_config
from prior.annealed_importance import LogPartition
from tests import tiny
from tokenizer.quantizers import QUANTIZERS

CPU = torch.device("cpu")


def digits(split: str, **options):
    return load_images(DataConfig(max_images=60, **options), split)


def make(prior: str | None = "gpt", image_shape=(1, 8, 8), likelihood: str = "normal", **overrides) -> Pipeline:
    config = {**tiny.TOKENIZERS["vqvae"], "likelihood": {"type": likelihood}, **overrides, "image_shape": image_shape}
    tokenizer = build_tokenizer({"type": "vqvae", **config})
    if prior is None:
        return Pipeline(tokenizer)
    implied = {"spec": tokenizer.spec, "tokenizer_fingerprint": fingerprint(tokenizer)}
    class_names = [str(number) for number in range(10)] if prior == "gpt" else []
    if class_names:
        implied["num_classes"] = len(class_names)
    built = build_prior({"type": prior, **tiny.PRIORS[prior], **implied})
    return Pipeline(tokenizer, built, class_names=class_names)


# Distances between sets
# ------------------------------------------------------------------------------------------------


def exactly_normal(count: int = 200, dim: int = 5) -> torch.Tensor:
    """Draws whose sample mean is exactly 0 and whose sample covariance is exactly the identity."""
    draws = torch.randn(count, dim, dtype=torch.float64)
    draws = draws - draws.mean(dim=0)
    return draws @ torch.linalg.inv(torch.linalg.cholesky(draws.T.cov()).T)


def test_the_distance_of_a_set_to_itself_is_zero():
    statistics = feature_statistics(torch.randn(300, 16) * 5 + 3)
    assert frechet_distance(statistics, statistics) == pytest.approx(0, abs=1e-6)


def test_the_distance_of_known_gaussians_is_the_analytic_one():
    draws, deviations = exactly_normal(), torch.tensor([0.5, 1.0, 2.0, 3.0, 0.1], dtype=torch.float64)
    shift = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0], dtype=torch.float64)
    shifted = feature_statistics(draws + shift)
    assert frechet_distance(feature_statistics(draws), shifted) == pytest.approx(shift.square().sum().item())
    # commuting covariances: sum of squared differences of the deviations
    scaled = feature_statistics(draws * deviations + shift)
    expected = (shift.square() + (deviations - 1).square()).sum().item()
    assert frechet_distance(feature_statistics(draws), scaled) == pytest.approx(expected)
    assert frechet_distance(scaled, feature_statistics(draws)) == pytest.approx(expected)


def test_the_distance_of_two_draws_of_one_gaussian_goes_to_zero_with_their_number():
    distances = [
        frechet_distance(*(feature_statistics(torch.randn(count, 8)) for _ in range(2))) for count in (100, 10000)
    ]
    assert 0 < distances[1] < distances[0] / 20


def test_the_class_score_is_one_for_equal_images_and_the_number_of_classes_for_sure_and_even_ones():
    assert class_score(torch.randn(1, 7).expand(50, -1)) == (pytest.approx(1), pytest.approx(0, abs=1e-9))
    sure = 100.0 * torch.eye(4).repeat(2500, 1)
    mean, deviation = class_score(sure)
    assert mean == pytest.approx(4, rel=0.01)
    assert deviation < 0.01
    with pytest.raises(NotMeasurableError, match="got 9 samples"):
        class_score(sure[:9])


def brute_force_share(points: np.ndarray, centres: np.ndarray) -> float:
    """The share of points within the distance of some centre to its third neighbour."""
    inside = 0
    for point in points:
        for centre in centres:
            radius = sorted(np.linalg.norm(centres - centre, axis=1))[3]
            if np.linalg.norm(point - centre) <= radius:
                inside += 1
                break
    return inside / len(points)


def test_precision_and_recall_agree_with_brute_force():
    samples, reference = torch.randn(40, 3) * 2, torch.randn(30, 3)
    precision, recall = precision_recall(samples, reference)
    assert precision == pytest.approx(brute_force_share(samples.numpy(), reference.numpy()))
    assert recall == pytest.approx(brute_force_share(reference.numpy(), samples.numpy()))
    assert precision != recall
    assert precision_recall(samples, samples) == (1, 1)
    assert precision_recall(samples, samples + 100) == (0, 0)
    with pytest.raises(NotMeasurableError, match="at least 4 images"):
        precision_recall(samples[:3], reference)


def pixels_as_features(images):
    return images.flatten(1)[:, 20:26], images.flatten(1)[:, :10]


PIXELS = FeatureNetwork("_pixels", {"network": "pixels"}, pixels_as_features)


def test_samples_that_are_the_reference_are_at_distance_zero_with_full_precision_and_recall():
    images = digits("train")
    reference = reference_of(PIXELS, images, batch_size=7, cache=None)
    samples = images.__getitems__(range(60))["image"]
    values = sample_metrics(PIXELS, samples, reference, batch_size=11)
    assert values["fid_pixels"] == pytest.approx(0, abs=1e-8)
    assert values["precision_pixels"] == values["recall_pixels"] == 1
    assert values.keys() == {f"{n}_pixels" for n in ("fid", "inception_score", "precision", "recall")} | {
        "inception_score_pixels_std"
    }
    shifted = (samples * 0.5 * 255).round() / 255
    assert sample_metrics(PIXELS, shifted, reference)["fid_pixels"] > 0.01


def test_features_are_of_images_as_a_file_would_hold_them():
    images = torch.rand(3, 1, 8, 8) * 1.2 - 0.1
    rounded = (images.clamp(0, 1) * 255).round() / 255
    torch.testing.assert_close(PIXELS(images)[0], pixels_as_features(rounded)[0])


# The cache
# ------------------------------------------------------------------------------------------------


def test_what_was_computed_by_the_same_protocol_is_not_computed_again(tmp_path):
    calls = []

    def compute():
        calls.append(len(calls))
        return {"values": torch.tensor([len(calls)])}

    for protocol, expected in (({"n": 1}, 1), ({"n": 1}, 1), ({"n": 2}, 2), ({"n": 1}, 1)):
        assert cached(tmp_path, "kind", protocol, compute)["values"].item() == expected
    assert cached(tmp_path, "other", {"n": 1}, compute)["values"].item() == 3
    assert cached(None, "kind", {"n": 1}, compute)["values"].item() == 4
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("name", ["protocol.json", "tensors.safetensors", "manifest.json"])
def test_a_damaged_entry_is_computed_again(name, tmp_path):
    cached(tmp_path, "kind", {"n": 1}, lambda: {"values": torch.zeros(3)})
    (entry,) = tmp_path.iterdir()
    content = bytearray((entry / name).read_bytes())
    content[-3] ^= 1
    (entry / name).write_bytes(content)
    for _ in range(2):  # and then kept
        assert cached(tmp_path, "kind", {"n": 1}, lambda: {"values": torch.ones(3)})["values"].sum() == 3


def test_reference_statistics_are_kept_by_data_and_features(tmp_path):
    images = digits("train")
    first = reference_of(PIXELS, images, batch_size=60, cache=tmp_path)
    again = reference_of(PIXELS, images, batch_size=7, cache=tmp_path)
    assert frechet_distance(first.statistics, again.statistics) == pytest.approx(0, abs=1e-9)
    assert torch.equal(first.features, again.features)
    assert len(list(tmp_path.iterdir())) == 1
    reference_of(PIXELS, digits("test"), batch_size=60, cache=tmp_path)
    reference_of(FeatureNetwork("", {"network": "others"}, pixels_as_features), images, batch_size=60, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    (protocol,) = {path.read_text() for path in tmp_path.glob("*/protocol.json") if "others" in path.read_text()}
    assert json.loads(protocol)["data"]["split"] == "train"


# The classifier
# ------------------------------------------------------------------------------------------------


def test_images_are_averaged_down_and_never_up():
    assert at_most(torch.rand(1, 1, 64, 40), 32).shape == (1, 1, 32, 20)
    image = torch.rand(1, 1, 8, 8)
    assert at_most(image, 32) is image
    halves = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(at_most(halves, 32), torch.nn.functional.avg_pool2d(halves, 2))


@pytest.mark.parametrize("image_shape", [(1, 1, 1), (3, 5, 70)])
def test_the_classifier_takes_any_size(image_shape):
    features, logits = Classifier(image_shape[0], 3).eval()(torch.rand(2, *image_shape))
    assert features.shape == (2, 128)
    assert logits.shape == (2, 3)


@pytest.mark.parametrize(("class_folder", "number"), [("", "none"), ("cats", "1")])
def test_without_labels_of_two_classes_there_is_no_classifier(class_folder, number, tmp_path):
    (tmp_path / class_folder).mkdir(exist_ok=True)
    for grey in range(20):
        Image.new("L", (8, 8), grey).save(tmp_path / class_folder / f"{grey:02}.png")
    config = DataConfig(name="folder", root=str(tmp_path))
    with pytest.raises(NotMeasurableError, match=f"labels of at least 2 classes, and these images have {number}; give"):
        classifier_features(load_images(config, "train"), load_images(config, "test"), device=CPU)


def test_a_classifier_is_a_function_of_images_and_seed():
    images, before = digits("train"), torch.get_rng_state()
    weights = []
    for seed in (0, 0, 1):
        network, accuracy = classifier_features(images, images, device=CPU, seed=seed)
        weights.append(network.protocol["weights"])
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(7)
        before = torch.get_rng_state()
    assert accuracy > 0.95  # of the images that it was trained on
    assert weights[0] == weights[1] != weights[2]


# Reconstructions and codes
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [7, 60])
def test_reconstructions_are_measured_image_by_image(batch_size):
    pipeline, images = make(image_shape=(1, 16, 16)), digits("test", image_size=(16, 16))
    measured = reconstruct(pipeline, images, network=PIXELS, batch_size=batch_size)
    originals = images.__getitems__(range(len(images)))["image"]
    decoded = pipeline.reconstruct(originals, output_type="pt")
    mse = (decoded - originals).square().flatten(1).mean(dim=1)
    torch.testing.assert_close(measured.values["mse"], mse.double())
    torch.testing.assert_close(measured.values["psnr"], (-10 * mse.log10()).double())
    torch.testing.assert_close(measured.features, PIXELS(decoded)[0])
    torch.testing.assert_close(measured.values["ssim"], ssim(decoded, originals).double())
    codes = pipeline.encode(originals)[0].flatten(1)
    (table,) = measured.position_counts
    for position in range(codes.shape[1]):
        counted = Counter(codes[:, position].tolist())
        assert table[position].tolist() == [counted[code] for code in range(5)]
    assert measured.counts.get_buffer("total_0").tolist() == table.sum(dim=0).tolist()


def ssim_by_hand(first, second):
    """Wang et al. 2004, window by window, of one channel (H, W)."""
    offsets = np.arange(11) - 5
    weights = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for row, column in np.ndindex(first.shape[0] - 10, first.shape[1] - 10):
        x, y = (image[row : row + 11, column : column + 11] for image in (first, second))
        mx, my = (weights * x).sum(), (weights * y).sum()
        vx, vy, cov = ((weights * a).sum() for a in ((x - mx) ** 2, (y - my) ** 2, (x - mx) * (y - my)))
        values.append((2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    return np.mean(values)


@pytest.mark.parametrize("shape", [(3, 13, 17), (1, 11, 11)])
def test_ssim_is_the_mean_over_windows_within_the_image(shape):
    first = torch.rand(2, *shape)
    second = (first + 0.2 * torch.randn_like(first)).clamp(0, 1)
    expected = [
        np.mean([ssim_by_hand(*pair) for pair in zip(*pairs)])
        for pairs in zip(first.double().numpy(), second.double().numpy())
    ]
    np.testing.assert_allclose(ssim(second, first).numpy(), expected, rtol=1e-6)
    flat = torch.full((1, *shape), 0.7)
    assert ssim(flat, flat).item() == 1


def test_ssim_is_one_for_equal_images_and_falls_with_noise():
    images = torch.rand(4, 1, 16, 16)
    torch.testing.assert_close(ssim(images, images), torch.ones(4))
    noisy = [ssim((images + noise * torch.randn_like(images)).clamp(0, 1), images).mean() for noise in (0.05, 0.3)]
    assert 1 > noisy[0] > noisy[1]
    assert ssim(images[:1], images[1:2]).shape == (1,)
    with pytest.raises(NotMeasurableError, match="11 x 11 pixels, these images have a side of 10"):
        ssim(images[..., :10], images[..., :10])


def test_codes_are_counted_by_position_in_each_level():
    tables = [torch.zeros(2, 3, dtype=torch.int64), None, torch.zeros(1, 2, dtype=torch.int64)]
    for _ in range(2):
        count_positions(tables, (torch.tensor([[[0, 2]], [[1, 2]]]), torch.zeros(2, 5), torch.tensor([[1], [1]])))
    assert tables[0].tolist() == [[2, 2, 0], [0, 0, 4]]
    assert tables[2].tolist() == [[0, 4]]
    torch.testing.assert_close(position_entropy(tables[0]), torch.tensor([math.log(2), 0.0], dtype=torch.float64))


@pytest.mark.parametrize("quantizer", sorted(QUANTIZERS))
def test_code_vectors_are_what_the_codes_are_decoded_from(quantizer):
    pipeline = make(None, quantizer={"type": quantizer, **tiny.QUANTIZERS[quantizer]})
    vectors = code_vectors(pipeline.tokenizer)
    codes = pipeline.encode(torch.rand(2, 1, 8, 8))
    assert [len(level) for level in vectors] == list(pipeline.tokenizer.spec.vocab_sizes)
    embedded = sum(level[code] for level, code in zip(vectors, codes)).permute(0, 3, 1, 2)
    torch.testing.assert_close(pipeline.tokenizer.quantizer.embed(codes), embedded)


# Memorisation and other data
# ------------------------------------------------------------------------------------------------


def test_neighbours_are_those_of_an_exhaustive_search():
    images = digits("train")
    queries = torch.rand(9, 1, 8, 8)
    all_images = images.__getitems__(range(60))["image"]
    expected = torch.cdist(queries.flatten(1), all_images.flatten(1)).div(8).sort(dim=1)
    for batch_size in (2, 7, 60):
        found = nearest_images(queries, images, batch_size=batch_size)
        torch.testing.assert_close(found.distances, expected.values[:, :3])
        assert torch.equal(found.indices, expected.indices[:, :3])
    copies = nearest_images(all_images[[5, 3]], images)
    assert copies.indices[:, 0].tolist() == [5, 3]
    assert copies.distances[:, 0].max() < 1e-3


def test_copying_is_the_probability_that_a_sample_is_nearer():
    samples, held_out = torch.randint(5, (40,)).float(), torch.randint(6, (30,)).float()
    brute = np.mean([(s < h) + (s == h) / 2 for s in samples.tolist() for h in held_out.tolist()])
    assert copying(samples, held_out) == pytest.approx(brute)
    assert copying(torch.zeros(5), held_out + 1) == 1
    assert copying(held_out + 9, held_out) == 0


def test_auroc_is_the_probability_that_an_inside_score_is_higher():
    inside, outside = torch.randint(5, (40,)).double(), torch.randint(4, (30,)).double()
    brute = np.mean([(i > o) + (i == o) / 2 for i in inside.tolist() for o in outside.tolist()])
    assert auroc(inside, outside) == pytest.approx(brute)
    assert auroc(outside, inside) == pytest.approx(1 - brute)


@pytest.mark.parametrize(("binarize", "num_values"), [("none", 256), ("threshold", 2)])
def test_noise_is_the_same_in_every_batch_and_has_all_pixel_values(binarize, num_values):
    noise = NoiseImages(digits("test", binarize=binarize))
    whole = noise.__getitems__(list(range(60)))["image"]
    assert torch.equal(noise.__getitems__([4, 9])["image"], whole[[4, 9]])
    assert whole.shape == (60, 1, 8, 8)
    values, counts = (whole * (num_values - 1)).round().unique(return_counts=True)
    assert len(values) == num_values
    assert counts.max() < 3840 / num_values * 3
    assert noise.identity["count"] == 60


def test_other_data_are_prepared_alike_and_have_no_labels(tmp_path):
    for number in range(20):
        Image.new("RGB", (20, 12), (number, 0, 0)).save(tmp_path / f"{number:02}.png")
    images = digits("test")
    other = load_other(str(tmp_path), images)
    batch = other.collate(other.__getitems__([0, 1]))
    assert batch["image"].shape == (2, 1, 8, 8)
    assert batch["label"].tolist() == [0, 0]
    assert other.identity["preprocessing"] == images.preprocessing
    with pytest.raises(ValueError, match="holds the very images"):
        load_other("digits", images)


def test_another_data_set_is_not_looked_for_in_a_folder_of_images(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "pipelines.evaluation.ood.load_images", lambda config, split: asked.append(config) or digits("validation")
    )
    images = digits("test")
    for name, root in (("folder", DataConfig.root), ("MNIST", "elsewhere")):
        monkeypatch.setattr(images, "config", replace(images.config, name=name, root="elsewhere"))
        load_other("FashionMNIST", images)
        assert (asked[-1].name, asked[-1].root) == ("FashionMNIST", root)


# Weights of others
# ------------------------------------------------------------------------------------------------


def alexnet_weights():
    from torchvision.models import alexnet

    with torch.device("meta"):
        trunk = alexnet(weights=None).features.state_dict()
    return {f"features.{name}": 0.05 * torch.randn(value.shape) for name, value in trunk.items()}


def test_lpips_takes_weights_from_safetensors(tmp_path):
    weights = alexnet_weights()
    save_file(weights, tmp_path / "alex.safetensors")
    before = torch.get_rng_state()
    network, protocol = lpips_network(str(tmp_path / "alex.safetensors"), device=CPU)
    assert torch.equal(torch.get_rng_state(), before)
    images = torch.rand(3, 1, 32, 32)
    noisy = (images + 0.1 * torch.randn_like(images)).clamp(0, 1)
    assert lpips(network, images, images).tolist() == [0, 0, 0]
    distances = lpips(network, noisy, images)
    assert (distances > 0).all()
    torch.testing.assert_close(lpips(network, noisy[1:2], images[1:2]), distances[1:2])
    assert torch.equal(network.net.slice5[0].weight, weights["features.10.weight"])
    with pytest.raises(NotMeasurableError, match="at least 31 pixels, these have a side of 30"):
        lpips(network, images[..., :30], images[..., :30])
    weights["features.0.bias"] += 1
    save_file(weights, tmp_path / "other.safetensors")
    assert lpips_network(str(tmp_path / "other.safetensors"), device=CPU)[1] != protocol
    del weights["features.0.bias"]
    save_file(weights, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match=r"AlexNet: features\.0\.bias is missing"):
        lpips_network(str(tmp_path / "less.safetensors"), device=CPU)


def test_weights_are_read_from_safetensors_alone(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"from safetensors files only, got '.*weights\.pth'\. Convert"):
        read_weights(str(tmp_path / "weights.pth"), "")
    with pytest.raises(ValueError, match="there is no file"):
        read_weights(str(tmp_path / "none.safetensors"), "")
    (tmp_path / "cut.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        read_weights(str(tmp_path / "cut.safetensors"), "")


def test_a_download_that_fails_says_where_the_file_belongs(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(NotMeasurableError, match=f"cannot be downloaded .* put it into {tmp_path}/hub/checkpoints"):
        read_weights("download", (tmp_path / "nowhere" / "weights-0123abcd.pth").as_uri())


def test_a_downloaded_file_is_checked_and_never_unpickled(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    checkpoints = tmp_path / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    torch.save({"a": torch.ones(2)}, checkpoints / "weights-0123abcd.pth")
    assert read_weights("download", "https://localhost/weights-0123abcd.pth")["a"].tolist() == [1, 1]
    torch.save({"a": Pipeline}, checkpoints / "weights-0123abcd.pth")  # a class, which pickle would import
    with pytest.raises(NotMeasurableError, match="cannot be downloaded"):
        read_weights("download", "https://localhost/weights-0123abcd.pth")


@pytest.mark.slow  # a network of 95 MB
def test_inception_takes_weights_from_safetensors(tmp_path):
    import io

    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, *arguments, **options):
            pass

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    untrained = Untrained("untrained", ["2048", "logits_unbiased"], feature_extractor_weights_path=nothing)
    save_file(untrained.state_dict(), tmp_path / "inception.safetensors")
    network = inception_features(str(tmp_path / "inception.safetensors"), device=CPU)
    grey = torch.randint(256, (2, 1, 28, 28)) / 255
    features, logits = network(grey)
    expected = untrained((grey * 255).round().to(torch.uint8).repeat(1, 3, 1, 1))
    torch.testing.assert_close(features, expected[0])
    torch.testing.assert_close(logits, expected[1])
    assert network.suffix == ""
    assert len(network.protocol["weights"]) == 64
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="does not hold the weights of Inception"):
        inception_features(str(tmp_path / "other.safetensors"), device=CPU)


# Whole evaluations
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluation")


def test_a_decoder_that_gives_nothing_spoils_no_other_numbers(folder):
    pipeline = make()
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        for parameter in pipeline.tokenizer.decoder.parameters():
            parameter.fill_(math.nan)
    result = evaluate(pipeline, digits("test"), digits("train"), num_samples=20, ood=["noise"], cache=folder / "cache")
    assert {"ood_noise", "copying"} <= set(result["not_measured"])
    assert "codebook" in result["groups"]
    assert not {"copying", "fid_classifier", "rfid_classifier", "ood_auroc_noise"} & result["metrics"].keys()


def test_a_value_is_rounded_no_more_coarsely_than_it_is_known():
    values = {
        "a": 123456.7,
        "a_se": 0.314,
        "b": 85.7412,
        "b_se": 0.22,
        "c": 1.5,
        "c_std": 0.0,
        "d": math.nan,
        "d_se": 1.0,
    }
    shown = ["123456.70 ± 0.31", "85.741 ± 0.22", "1.5 ± 0", "nan ± 1"]
    assert [format_value(values, name) for name in "abcd"] == shown


def test_names_of_all_kinds_stay_in_their_cells_of_the_card():
    pipeline = make("gpt")
    pipeline.class_names = ["<b>x", "two\nlines", "`a|b"]
    pipeline.metrics = {"test ood_auroc_a|b": 0.5}
    card = model_card(pipeline)
    assert "| classes | \\<b\\>x, two lines, \\`a\\|b |" in card
    assert "| test ood_auroc_a\\|b | 0.5 |" in card


@pytest.fixture(scope="module")
def evaluated(folder):
    torch.manual_seed(0)
    pipeline = make()
    pipeline.set_progress_bar_config(disable=True)
    before = torch.get_rng_state()
    result = evaluate(
        pipeline, digits("test"), digits("train"), num_samples=20, ood=["noise"], folder=folder / "pictures",
        cache=folder / "cache",
    )  # fmt: skip
    assert torch.equal(torch.get_rng_state(), before)
    return pipeline, result


def test_an_evaluation_measures_each_group_and_says_why_others_are_missing(evaluated):
    _, result = evaluated
    assert set(result["groups"]) == {
        "likelihood", "classifier", "reconstruction", "rfid_classifier", "codebook", "samples_classifier",
        "memorisation", "ood_noise",
    }  # fmt: skip
    assert set(result["groups"]) == set(result["protocol"])
    assert sorted(name for names in result["groups"].values() for name in names) == sorted(result["metrics"])
    assert all(map(math.isfinite, result["metrics"].values()))
    assert set(result["not_measured"]) == {"fid", "lpips", "ssim"}
    assert not {"fid", "rfid", "inception_score", "precision", "recall"} & set(result["metrics"])
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["versions"]["torch"] == torch.__version__


def test_the_numbers_of_an_evaluation_are_those_of_its_parts(evaluated, folder):
    pipeline, result = evaluated
    metrics, images = result["metrics"], digits("test").__getitems__(range(60))["image"]
    decoded = pipeline.reconstruct(images, output_type="pt")
    network, _ = classifier_features(digits("train"), digits("test"), device=CPU, cache=folder / "cache")
    rfid = frechet_distance(*(feature_statistics(network(part)[0]) for part in (decoded, images)))
    assert metrics["rfid_classifier"] == pytest.approx(rfid, rel=1e-4)
    held_out = decoded[torch.linspace(0, 59, 20).long()]
    distances = nearest_images(held_out, digits("train")).distances[:, 0]
    assert metrics["nearest_train_held_out"] == pytest.approx(distances.mean().item(), rel=1e-4)
    assert metrics["mse"] == pytest.approx((decoded - images).square().mean().item())
    codes = pipeline.encode(images)[0]
    assert metrics["codebook_usage"] == pytest.approx(len(codes.unique()) / 5)
    assert metrics["uniform_nats_per_code"] == pytest.approx(math.log(5))
    assert metrics["num_images"] == 60
    assert metrics["negative_elbo_nats"] == pytest.approx(metrics["distortion_nats"] + metrics["rate_nats"])
    assert metrics["classifier_accuracy"] > 0.6


def test_the_protocol_says_what_the_numbers_depend_on(evaluated):
    _, result = evaluated
    protocol = result["protocol"]
    assert protocol["likelihood"]["data"] == digits("test").identity
    assert protocol["likelihood"]["pixels"] == "256 discrete values, no dequantisation"
    samples = protocol["samples_classifier"]
    assert samples["data"] == digits("train").identity
    assert (samples["num_samples"], samples["num_reference"]) == (20, 60)
    assert samples["features"] == protocol["rfid_classifier"]["features"]
    assert len(samples["features"]["weights"]) == 64


def test_a_second_evaluation_uses_the_cache_and_agrees(evaluated, folder):
    pipeline, result = evaluated
    entries = {path: path.stat().st_mtime_ns for path in (folder / "cache").glob("*/*")}
    assert sorted(path.name.split("-")[0] for path in (folder / "cache").iterdir()) == [
        "classifier", "reference", "reference",
    ]  # fmt: skip
    torch.rand(3)
    again = evaluate(
        pipeline, digits("test"), digits("train"), num_samples=20, metrics=["samples", "reconstruction"],
        cache=folder / "cache", batch_size=60,
    )  # fmt: skip
    assert {path: path.stat().st_mtime_ns for path in (folder / "cache").glob("*/*")} == entries
    for name in ("fid_classifier", "recall_classifier", "rfid_classifier", "psnr", "classifier_accuracy"):
        assert again["metrics"][name] == pytest.approx(result["metrics"][name], rel=1e-4)
    assert again["protocol"]["samples_classifier"] == result["protocol"]["samples_classifier"]
    assert "nats" not in again["metrics"]


def test_pictures_are_made_where_a_folder_is_named(evaluated, folder):
    _, result = evaluated
    assert result["pictures"] == {
        "codebook": "codebook.png", "nearest_training_images": "nearest_training_images.png",
    }  # fmt: skip
    for name in result["pictures"].values():
        with Image.open(folder / "pictures" / name) as picture:
            assert len(picture.convert("L").getcolors()) > 10
    with Image.open(folder / "pictures" / "nearest_training_images.png") as picture:
        assert picture.size == (8 * 66 + 2, 8 * 66 + 2)  # two blocks of samples above three neighbours each


def test_a_set_against_itself_is_perfect_but_copied(folder):
    """A pipeline whose samples are its training images."""
    pipeline, train = make(), digits("train")

    class Copier(Pipeline):
        def sample(self, num_images, **options):
            return train.__getitems__(range(num_images))["image"]

    copier = Copier(pipeline.tokenizer, pipeline.prior)
    result = evaluate(
        copier, digits("test"), train, metrics=["samples", "memorisation"], num_samples=60, cache=folder / "cache"
    )
    metrics = result["metrics"]
    assert metrics["fid_classifier"] == pytest.approx(0, abs=1e-4)
    assert metrics["precision_classifier"] == metrics["recall_classifier"] == 1
    assert metrics["nearest_train_sample"] < 1e-3
    assert metrics["copying"] == 1


def test_weights_that_cannot_be_downloaded_are_a_reason_and_the_rest_is_measured(folder, tmp_path, monkeypatch):
    def without_network(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", without_network)
    result = evaluate(
        make(), digits("test"), digits("train"), metrics=["reconstruction", "samples"], num_samples=20,
        inception_weights="download", lpips_weights="download", cache=folder / "cache",
    )  # fmt: skip
    for name in ("fid", "lpips"):
        assert re.match(r"https://.* cannot be downloaded .*no network", result["not_measured"][name])
    assert {"psnr", "rfid_classifier", "fid_classifier"} <= result["metrics"].keys()
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="does not hold the weights of torchvision's AlexNet"):
        evaluate(make(), digits("test"), metrics=["codebook"], lpips_weights=str(tmp_path / "other.safetensors"))


def test_the_bound_of_the_images_is_computed_once_for_all_groups(monkeypatch):
    pipeline, batches = make(), []
    draw = pipeline.tokenizer.draw_posteriors
    monkeypatch.setattr(
        pipeline.tokenizer, "draw_posteriors", lambda images, k: batches.append(len(images)) or draw(images, k)
    )
    result = evaluate(pipeline, digits("test"), metrics=["likelihood"], ood=["noise"])
    assert batches == [60, 60]  # of the images, of noise
    assert {"nats", "ood_auroc_noise"} <= result["metrics"].keys()


def test_a_likelihood_without_log_z_is_missing_with_its_reason_and_the_rest_is_there():
    pipeline = make("rbm", quantizer={"type": "lfq", "num_bits": 3})
    partition = LogPartition(1.0, 3.0, 0.1, 5.0, exact=False)
    pipeline.prior.log_partition = lambda callback=None: partition
    result = evaluate(pipeline, digits("test"), metrics=["likelihood", "codebook"])
    assert "log Z is not known well enough" in result["not_measured"]["likelihood"]
    assert "bits_per_dim" not in result["metrics"]
    assert result["metrics"]["log_partition_upper"] == 3
    assert result["metrics"]["perplexity"] >= 1
    with pytest.raises(ValueError, match="nothing could be measured: samples are compared with the training images"):
        evaluate(pipeline, digits("test"), metrics=["memorisation"])


def test_a_prior_of_other_classes_is_measured_without_them():
    pipeline = make()
    pipeline.class_names = [f"class {number}" for number in range(10)]
    result = evaluate(pipeline, digits("test"), metrics=["likelihood"])
    assert "images of the prior's classes (class 0," in result["not_measured"]["prior_nats_per_code"]
    assert "prior_nats_per_code" not in result["metrics"]
    pipeline.class_names = make().class_names
    other = evaluate(pipeline, digits("test"), metrics=["likelihood"])
    assert result["metrics"] == {k: v for k, v in other["metrics"].items() if k != "prior_nats_per_code"}
    assert "prior_nats_per_code" in other["metrics"]


class Poses(torch.nn.Module):
    """A tokenizer whose code is the class, and whose images are those of the class, drawn anew each time."""

    has_local_latents = True

    def __init__(self, images, faithful: float):
        super().__init__()
        batch = images.__getitems__(range(len(images)))
        self.images, self.labels, self.faithful = batch["image"], batch["label"], faithful

    def decode(self, codes, generators):
        drawn = []
        for label, generator in zip(codes[0][:, 0], generators):
            faithful = torch.rand((), generator=generator) < self.faithful
            among = (self.labels == label).nonzero()[:, 0] if faithful else torch.arange(len(self.labels))
            drawn.append(among[torch.randint(len(among), (), generator=generator)])
        return self.images[torch.stack(drawn)]


@pytest.mark.parametrize("faithful", [0.0, 0.5, 1.0])
def test_class_agreement_is_that_of_images_with_the_same_codes(faithful, folder):
    images = digits("train")
    classifier, _ = classifier_features(images, digits("test"), device=CPU, cache=folder / "cache")
    labels = images.__getitems__(range(len(images)))["label"]

    class Model:
        tokenizer, prior = Poses(images, faithful), SimpleNamespace(conditional_on_text=False)

        def sample(self, num_images, generator, output_type, batch_size):
            assert output_type == "codes"
            return (labels[torch.randint(len(labels), (num_images, 1), generator=generator)],)

    found = class_agreement(Model(), classifier, 400, batch_size=128, seed=0)
    chance = (labels.bincount() / len(labels)).square().sum().item()
    expected = faithful**2 + (1 - faithful**2) * chance  # both keep to their class, or at least one does not
    error = found["class_agreement_se"]
    assert error == pytest.approx(math.sqrt(expected * (1 - expected) / 400), abs=0.006)
    assert found["class_agreement"] == pytest.approx(expected, abs=0.03 + 3 * error)  # the classifier errs too
    assert found["class_agreement_by_chance"] == pytest.approx(chance, abs=0.02)


def test_class_agreement_by_chance_is_that_of_all_pairs_of_different_codes(monkeypatch):
    classes = iter([[0, 2, 2, 1, 0], [0, 2, 1, 1, 2]])
    drawn = [torch.nn.functional.one_hot(torch.tensor(next(classes)), 4) for _ in range(2)]
    monkeypatch.setattr("pipelines.evaluation.image_quality.extract", lambda *_: (None, drawn.pop(0)))
    monkeypatch.setattr("pipelines.evaluation.image_quality.decode_codes", lambda *_, **__: torch.zeros(5, 1))
    monkeypatch.setattr("pipelines.evaluation.image_quality.draw_samples", lambda *_, **__: None)
    found = class_agreement(SimpleNamespace(tokenizer=None), None, 5, batch_size=5, seed=0)
    same = np.equal.outer([0, 2, 2, 1, 0], [0, 2, 1, 1, 2])
    assert found["class_agreement"] == same.diagonal().mean()
    assert found["class_agreement_by_chance"] == (same.sum() - same.trace()) / 20


def test_local_latents_are_measured_where_there_are_some():
    options = {**tiny.TOKENIZERS["dvaepp"], "image_shape": (1, 8, 8), "likelihood": {"type": "normal"}}
    network = {"type": "conv", **tiny.LATENT_NETWORKS["conv"]}
    pipeline = Pipeline(build_tokenizer({"type": "dvaepp", **options, "network": network}))
    result = evaluate(pipeline, digits("test"), digits("train"), metrics=["local"], num_samples=20)
    assert result["groups"]["local"] == ["class_agreement", "class_agreement_se", "class_agreement_by_chance"]
    assert result["protocol"]["local"]["num_pairs"] == 10
    with pytest.raises(ValueError, match="nothing could be measured: the decoder draws no latents of its own"):
        evaluate(make(), digits("test"), digits("train"), metrics=["local"])
    with pytest.raises(ValueError, match="images are compared by their class"):
        evaluate(pipeline, digits("test"), metrics=["local"])


def test_codes_that_are_real_numbers_have_no_codebook():
    options = {**tiny.TOKENIZERS["gaussian_vae"], "image_shape": (1, 8, 8), "likelihood": {"type": "normal"}}
    pipeline = Pipeline(build_tokenizer({"type": "gaussian_vae", **options}))
    result = evaluate(pipeline, digits("test"), metrics=["likelihood", "codebook"], num_draws=3)
    assert "real numbers" in result["not_measured"]["codebook"]
    assert result["metrics"]["nats"] < result["metrics"]["negative_elbo_nats"]
    assert result["metrics"]["num_draws"] == result["protocol"]["likelihood"]["num_draws"] == 3
    assert "prior_nats_per_code" not in result["metrics"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ["likelyhood"]}, "there are no metrics 'likelyhood'; did you mean 'likelihood'"),
        ({"num_samples": 9}, "num_samples must be at least 10, got 9"),
        ({"num_draws": 0}, "num_draws must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"inception_weights": "x.pth"}, "safetensors files only, got 'x.pth'"),
        ({"ood": ["digitss"]}, "unknown data set 'digitss'"),
        ({"metrics": []}, "metrics must name at least one group of likelihood, .*; leave it out for all"),
        ({"ood": ["a/x", "b/x/"]}, "ood data sets 'a/x' and 'b/x/' would both be called 'x' and overwrite each other"),
        ({"ood": ["noise", "a/noise"]}, "would both be called 'noise'"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(None if "ood" in options else make(), digits("test"), **options)


def test_training_images_prepared_otherwise_are_refused():
    with pytest.raises(ValueError, match="prepared in another way"):
        evaluate(make(), digits("test"), digits("train", binarize="threshold"))


# Results of several models
# ------------------------------------------------------------------------------------------------


def test_results_of_one_protocol_make_a_table(evaluated):
    _, result = evaluated
    other = copy.deepcopy(result)
    other["metrics"]["bits_per_dim"] = 7.0
    del other["metrics"]["copying"]
    rows = comparable({"a": result, "b": other}, ["bits_per_dim", "copying"])
    assert rows == [
        {"name": "a", "bits_per_dim": result["metrics"]["bits_per_dim"], "copying": result["metrics"]["copying"]},
        {"name": "b", "bits_per_dim": 7.0, "copying": None},
    ]
    assert comparable({"a": result})[0].keys() == {"name", *result["metrics"]}


@pytest.mark.parametrize(
    ("metric", "group", "field", "value"),
    [
        ("fid_classifier", "samples_classifier", "num_samples", 999),
        ("fid_classifier", "samples_classifier", "features", {"network": "another"}),
        ("bits_per_dim", "likelihood", "pixels", "2 discrete values, by a threshold at 0.5"),
        ("psnr", "reconstruction", "data", {"split": "train"}),
    ],
)
def test_results_of_different_protocols_refuse_to_stand_in_one_table(evaluated, metric, group, field, value):
    _, result = evaluated
    other = copy.deepcopy(result)
    other["protocol"][group][field] = value
    with pytest.raises(ValueError, match=f"'{metric}' of one and of two cannot stand in one table.*{field}"):
        comparable({"one": result, "two": other}, [metric])
    unaffected = "perplexity" if group != "codebook" else "psnr"
    comparable({"one": result, "two": other}, [unaffected])


def test_the_bound_of_a_deterministic_encoder_stands_beside_any_number_of_draws():
    pipeline = make()
    one, many = (
        evaluate(pipeline, digits("test"), metrics=["likelihood"], ood=["noise"], num_draws=num_draws)
        for num_draws in (1, 100)
    )
    assert many["protocol"]["likelihood"]["num_draws"] == "any: the encoder is deterministic"
    assert many["protocol"]["ood_noise"]["num_draws"] == "any: the encoder is deterministic"
    stochastic = {}
    for num_draws in (5, 10):
        stochastic[num_draws] = copy.deepcopy(one)
        stochastic[num_draws]["protocol"]["likelihood"]["num_draws"] = num_draws
    rows = comparable({"five": stochastic[5], "one": one, "many": many})
    assert rows[1]["bits_per_dim"] == rows[2]["bits_per_dim"]
    with pytest.raises(ValueError, match=r"of five and of ten cannot stand in one table.*num_draws: 5 and 10"):
        comparable({"one": one, "five": stochastic[5], "ten": stochastic[10]})


def test_a_resize_filter_is_part_of_the_protocol():
    results = {
        name: evaluate(make(None), digits("test", resize_filter=name), metrics=["codebook"])
        for name in ("bicubic", "nearest")
    }
    with pytest.raises(ValueError, match=r"data\.preprocessing\.resize_filter: bicubic and nearest"):
        comparable(results)


def test_metrics_without_a_protocol_or_a_value_are_refused(evaluated):
    _, result = evaluated
    with pytest.raises(ValueError, match="no result has the metric 'psnrr'; there are"):
        comparable({"a": result}, ["psnrr"])
    with pytest.raises(ValueError, match="does not say how 'psnr' was measured"):
        comparable({"a": {"metrics": {"psnr": 1.0}}})


def test_binarisation_is_named_with_its_seed():
    assert pixels_of({"binarize": "threshold"}) == "2 discrete values, by a threshold at 0.5"
    assert pixels_of({"binarize": "fixed", "binarize_seed": 4}) == "2 discrete values, one fixed draw with seed 4"


# Beside earlier results
# ------------------------------------------------------------------------------------------------


class Run:
    """A run folder that is evaluated again and again, as scripts/evaluate.py does it."""

    def __init__(self, folder):
        self.folder = folder
        make().save_pretrained(folder)

    def evaluate(self, *groups, split="test", keep=True, **options):
        """The result as it was saved, and the lines of what it left out."""
        pipeline, number = Pipeline.from_pretrained(self.folder), options.get("num_draws", 1)
        result = evaluate(pipeline, digits(split), digits("train"), metrics=groups, **options)
        result = {"command": f"evaluate {' '.join(groups)} {number}", **result}
        result = with_earlier(result, earlier_result(pipeline, split, result, self.folder) if keep else None)
        lines = dropped(pipeline, split, result, self.folder)
        (self.folder / "evaluation.json").write_text(json.dumps(result))
        record(pipeline, split, result)
        pipeline.save_index(self.folder)
        return result, lines

    def forget(self):
        """Makes its files what they were before results were entered whole and with fingerprints of the weights."""
        for name, entries in (("evaluation.json", None), ("model_index.json", "evaluations")):
            saved = json.loads((self.folder / name).read_text())
            for result in [saved] if entries is None else saved[entries].values():
                for field in ("weights", "parts") if entries is None else ("weights", "parts", "groups", "pictures"):
                    del result[field]
            (self.folder / name).write_text(json.dumps(saved))
        later = max(path.stat().st_ctime for path in self.folder.rglob("*")) + 1
        os.utime(self.folder / "evaluation.json", (later, later))

    @property
    def card(self):
        return Pipeline.from_pretrained(self.folder).metrics

    def change_weights(self):
        pipeline = Pipeline.from_pretrained(self.folder)
        with torch.no_grad():
            next(pipeline.prior.parameters()).add_(1)
        pipeline.save_pretrained(self.folder)


@pytest.fixture
def saved_run(tmp_path):
    return Run(tmp_path)


def test_groups_that_are_not_measured_again_stay_with_their_protocol_and_command(saved_run):
    first, _ = saved_run.evaluate("likelihood", num_draws=3)
    second, lines = saved_run.evaluate("codebook", seed=1)
    assert lines == []
    assert list(second["groups"]) == ["codebook", "likelihood"]
    assert second["metrics"].items() > first["metrics"].items()
    assert second["protocol"]["likelihood"] == first["protocol"]["likelihood"]
    assert [(part["command"], part["seed"], part["groups"]) for part in second["parts"]] == [
        ("evaluate likelihood 3", 0, ["likelihood"]), ("evaluate codebook 1", 1, ["codebook"]),
    ]  # fmt: skip
    assert saved_run.card == {f"test {name}": value for name, value in second["metrics"].items()}
    card = (saved_run.folder / "README.md").read_text()
    for part in ("likelihood: seed 0, python .*\n\n```bash\nevaluate likelihood 3\n```\n",
                 "codebook: seed 1, python .*\n\n```bash\nevaluate codebook 1\n```\n"):  # fmt: skip
        assert re.search(part, card)
    assert "likelihood (of an earlier evaluation)\n" in format_summary(second)
    third, _ = saved_run.evaluate("likelihood")
    assert [part["command"] for part in third["parts"]] == ["evaluate codebook 1", "evaluate likelihood 1"]
    assert third["metrics"]["num_draws"] == 1
    assert third["protocol"]["likelihood"]["num_draws"] == "any: the encoder is deterministic"


def test_numbers_of_another_data_set_are_replaced_with_a_word(saved_run):
    saved_run.evaluate("codebook")
    for path in (saved_run.folder / "evaluation.json", saved_run.folder / "model_index.json"):
        path.write_text(path.read_text().replace('"name": "digits"', '"name": "MNIST"'))
    _, (line,) = saved_run.evaluate("codebook")
    assert line.endswith("were of MNIST, not of digits; their numbers are replaced")
    assert saved_run.evaluate("codebook")[1] == []


def test_another_split_replaces_no_numbers_of_the_card(saved_run):
    first, _ = saved_run.evaluate("likelihood")
    second, (line,) = saved_run.evaluate("codebook", split="validation")
    assert list(second["groups"]) == ["codebook"]
    assert line.endswith("evaluation.json was of the test images, whose numbers stay in the model card")
    third, _ = saved_run.evaluate("codebook")
    assert third["metrics"].items() > first["metrics"].items()
    assert {f"validation {name}" for name in second["metrics"]} < saved_run.card.keys()


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("what", ["weights", "images", "keep"])
def test_numbers_of_other_weights_or_images_are_dropped_with_a_word(saved_run, what, old):
    saved_run.evaluate("likelihood")
    if old:
        saved_run.forget()
    options = {}
    if what == "weights":
        saved_run.change_weights()
        later = (saved_run.folder / "evaluation.json").stat().st_mtime + 1
        os.utime(saved_run.folder / "prior" / "model.safetensors", (later, later))
    elif what == "images":
        path = saved_run.folder / "model_index.json"
        path.write_text(path.read_text().replace(digits("test").identity["content"], "0" * 64))
        path = saved_run.folder / "evaluation.json"
        saved = path.stat().st_mtime
        path.write_text(path.read_text().replace(digits("test").identity["content"], "0" * 64))
        os.utime(path, (saved, saved))
    else:
        options = {"keep": False}
    result, (line,) = saved_run.evaluate("codebook", **options)
    assert list(result["groups"]) == ["codebook"]
    assert line.startswith("dropped what earlier evaluations measured of likelihood: it was of other images or weights")
    assert saved_run.card == {f"test {name}": value for name, value in result["metrics"].items()}


def test_numbers_from_before_weights_were_recorded_stay_while_no_weights_are_newer(saved_run):
    first, _ = saved_run.evaluate("likelihood")
    saved_run.forget()
    second, lines = saved_run.evaluate("codebook")
    assert lines == []
    assert second["metrics"].items() > first["metrics"].items()
    assert second["parts"][0]["command"] == first["command"]


def test_what_was_tried_again_in_vain_is_not_kept_and_reasons_go_where_there_are_numbers(saved_run):
    result = {
        "command": "again", "metrics": {"psnr": 1.0}, "groups": {"reconstruction": ["psnr"]},
        "protocol": {"reconstruction": {}}, "not_measured": {"lpips": "no weights"}, "pictures": {},
        "seed": 0, "versions": {},
    }  # fmt: skip
    earlier = result | {
        "metrics": {"psnr": 0.0, "lpips": 0.5, "nats": 3.0}, "not_measured": {"psnr": "a", "ssim": "b"},
        "groups": {"reconstruction": ["psnr"], "lpips": ["lpips"], "likelihood": ["nats"]},
        "protocol": {"reconstruction": {}, "lpips": {}, "likelihood": {"num_draws": 2}},
    }  # fmt: skip
    both = with_earlier(result, earlier)
    assert both["metrics"] == {"psnr": 1.0, "nats": 3.0}
    assert both["not_measured"] == {"ssim": "b", "lpips": "no weights"}


# For people
# ------------------------------------------------------------------------------------------------


def test_the_card_says_how_its_numbers_were_measured(evaluated, tmp_path):
    pipeline, result = evaluated
    pipeline.metrics = {"validation tokenizer psnr": 21.0, "test gone": 1.0, "test tokenizer psnr": 2.0}
    record(pipeline, "test", with_earlier({**result, "command": "python scripts/evaluate.py --run x"}, None))
    pipeline.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    value, error = (result["metrics"][name] for name in ("bits_per_dim", "bits_per_dim_se"))
    assert f"| test bits_per_dim | {value:.5g} ± {error:.2g} |" in card
    assert "python scripts/evaluate.py --run x" in card
    assert f"digits test (60 images, {digits('test').identity['content'][:12]})" in card
    assert "not measured, fid: it needs inception_weights" in card
    assert f"torch {torch.__version__}" in card
    loaded = Pipeline.from_pretrained(tmp_path)
    assert loaded.evaluations["test"]["protocol"] == result["protocol"]
    assert loaded.metrics["validation tokenizer psnr"] == 21
    assert "test gone" not in loaded.metrics
    assert loaded.metrics["test tokenizer psnr"] == 2
    for field in ("parts", "groups"):  # which earlier versions did not record
        del loaded.evaluations["test"][field]
    assert model_card(loaded) == card


def test_the_summary_names_every_number_and_every_reason(evaluated):
    _, result = evaluated
    lines = format_summary(result).splitlines()
    spreads = ("_se", "_std")
    for name in result["metrics"]:
        assert name.endswith(spreads) or any(line.startswith(f"  {name} ") for line in lines), name
    assert f"  ssim: {result['not_measured']['ssim']}" in lines


# Images of a run
# ------------------------------------------------------------------------------------------------


def save_folder(root, count: int = 40, first: int = 0):
    root.mkdir()
    for number in range(count):
        pixels = np.random.default_rng(first + number).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number:02}.png")
    return root


def record_run(folder, config: DataConfig, *, where: str) -> None:
    """What training leaves of the data of a run: its configuration, and their contents in a state or in the codes."""
    images = load_images(config, "train")
    save_config(folder / "stage_one" / "config.yaml", {"data": plain(asdict(config))})
    if where == "state":
        path, written = "stage_one/state/step-00000004/state.json", {"surroundings": {"training data": images.contents}}
    elif where == "codes":
        path, written = "codes/train/spec.json", {"dataset": images.identity, "class_names": images.class_names}
    else:  # of an earlier version
        path, written = "stage_one/state/step-00000004/state.json", {}
    (folder / path).parent.mkdir(parents=True)
    write_json_atomic(folder / path, written)


def add_image(root):
    Image.new("L", (8, 8)).save(root / "aa.png")


def remove_image(root):
    (root / "07.png").unlink()


def rename_image(root):
    (root / "07.png").rename(root / "zz.png")


@pytest.mark.parametrize("change", [add_image, remove_image, rename_image])
@pytest.mark.parametrize("where", ["state", "codes"])
def test_a_split_that_would_hold_training_images_is_refused(change, where, tmp_path):
    root = save_folder(tmp_path / "pictures")
    config = DataConfig(name="folder", root=str(root))
    tokenizer = make(preprocessing=load_images(config, "train").preprocessing).tokenizer
    record_run(tmp_path / "run", config, where=where)
    held_out = {split: load_images_for(tokenizer, config, split, run=tmp_path / "run") for split in Split.__args__}
    trained_on = {held_out["train"].source.name(index) for index in held_out["train"]._indices}
    change(root)
    now = load_images(config, "test")
    assert {now.source.name(index) for index in now._indices} & trained_on  # why it is refused
    for split in ("test", "validation"):
        with pytest.raises(
            ValueError, match=rf"not those that .*run was trained on: the {split} split .* --data\.root"
        ):
            load_images_for(tokenizer, replace(config, max_images=3), split, run=tmp_path / "run")
    assert len(load_images_for(tokenizer, config, "train", run=tmp_path / "run")) > 0


def test_other_images_than_a_runs_own_are_no_reason_to_refuse(tmp_path):
    root, other = save_folder(tmp_path / "pictures"), save_folder(tmp_path / "others", 30, first=100)
    config = DataConfig(name="folder", root=str(root))
    tokenizer = make(preprocessing=load_images(config, "train").preprocessing).tokenizer
    record_run(tmp_path / "run", config, where="state")
    record_run(tmp_path / "earlier", config, where="nowhere")
    load_images_for(tokenizer, replace(config, max_images=3), "test", run=tmp_path / "run")
    add_image(root)
    load_images_for(tokenizer, replace(config, root=str(other)), "test", run=tmp_path / "run")
    load_images_for(tokenizer, config, "test", run=tmp_path / "earlier")
    (root / "train").mkdir()
    for path in list(root.glob("*.png")):
        path.rename(root / "train" / path.name)
    save_folder(root / "test", 5)
    assert len(load_images_for(tokenizer, config, "test", run=tmp_path / "run")) == 5  # which are what they are called


def test_a_changed_copy_of_a_runs_images_is_refused(tmp_path, capsys):
    root = save_folder(tmp_path / "pictures")
    config = DataConfig(name="folder", root=str(root))
    tokenizer = make(preprocessing=load_images(config, "train").preprocessing).tokenizer
    record_run(tmp_path / "run", config, where="state")
    copy = replace(config, root=str(shutil.copytree(root, tmp_path / "copy")))
    held_out = load_images_for(tokenizer, config, "test", run=tmp_path / "run")
    assert len(load_images_for(tokenizer, copy, "test", run=tmp_path / "run")) == len(held_out)
    for path in sorted(Path(copy.root).iterdir()):  # by other names others are held out
        path.rename(path.with_name(f"{99 - int(path.stem):02}.png"))
    common = len(load_images(copy, "test").file_digests() - held_out.file_digests())
    assert common > 0
    with pytest.raises(ValueError, match=rf"{common} of the .* carved out of {copy.root} are among those in {root} "):
        load_images_for(tokenizer, copy, "test", run=tmp_path / "run")
    assert capsys.readouterr().err == ""
    root.rename(tmp_path / "gone")
    load_images_for(tokenizer, copy, "test", run=tmp_path / "run")
    assert f"was trained on images in {root}, which are not there now" in capsys.readouterr().err


def test_a_runs_images_may_be_moved(tmp_path, capsys):
    root = save_folder(tmp_path / "pictures")
    config = DataConfig(name="folder", root=str(root), max_images=25)
    tokenizer = make(preprocessing=load_images(config, "train").preprocessing).tokenizer
    record_run(tmp_path / "run", config, where="codes")
    moved = replace(config, root=str(root.rename(tmp_path / "moved")))
    for split in ("test", "validation"):
        load_images_for(tokenizer, replace(moved, max_images=2), split, run=tmp_path / "run")
    with pytest.raises(ValueError, match=r"data\.split_seed is 1, but .* was trained with 0"):
        load_images_for(tokenizer, replace(moved, split_seed=1), "validation", run=tmp_path / "run")
    assert capsys.readouterr().err == ""


# The script
# ------------------------------------------------------------------------------------------------


def run_script(pipeline, folder, monkeypatch, *options) -> dict:
    """What scripts/evaluate.py finds of a run that was trained on 60 digits."""
    pipeline.save_pretrained(folder)
    save_config(folder / "stage_one" / "config.yaml", {"data": plain(asdict(DataConfig(max_images=60)))})
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--run", str(folder), "--device", "cpu", *options])
    return evaluate_script.main().values


def test_fewer_images_to_evaluate_are_compared_with_all_training_images(tmp_path, monkeypatch):
    pipeline = make(preprocessing=digits("train").preprocessing)
    options = ("--metrics", "memorisation", "--data.max_images", "20", "--num_samples", "10")
    protocol = run_script(pipeline, tmp_path, monkeypatch, *options)["protocol"]["memorisation"]
    assert (protocol["data"]["count"], protocol["train"]["count"]) == (20, 60)


def test_the_sizes_of_the_estimate_of_log_z_can_be_given(tmp_path, monkeypatch):
    preprocessing = digits("train").preprocessing
    pipeline = make("rbm", quantizer={"type": "lfq", "num_bits": 9}, preprocessing=preprocessing)
    options = ("--metrics", "likelihood", "--ais_temperatures", "3", "--ais_chains", "7")
    metrics = run_script(pipeline, tmp_path, monkeypatch, *options)["metrics"]
    assert 1 <= metrics["log_partition_ess"] <= 7  # by the model's own 512 chains it would be hundreds
    with pytest.raises(ValueError, match=r"ais_temperatures and ais_chains set the size .* this GPT makes none"):
        run_script(make(preprocessing=preprocessing), tmp_path / "gpt", monkeypatch, *options)

"""A small classifier of a data set's own classes: a feature space where Inception cannot be had, or does not suit."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from pipelines.batches import read_batch
from pipelines.checkpoint import weights_digest
from pipelines.evaluation.cache import cached
from pipelines.evaluation.features import FeatureNetwork
from pipelines.metrics import NotMeasurableError
from pipelines.seeding import own_randomness

# What is trained. A change of any of it is another feature space, and must be seen in the protocol
RECIPE = {
    "network": "convolutions 5x5 32, 3x3 64, 3x3 64 of stride 2, 2, 1, batch norm, relu; mean to 4x4; 128 features",
    "largest_side": 32,
    "most_steps": 400,
    "most_epochs": 100,
    "batch_size": 128,
    "optimizer": "AdamW, learning rate up to 3e-3 in one cycle, weight decay 1e-2",
}


class Classifier(nn.Module):
    """Images (B, C, H, W) in [0, 1] to features (B, 128) and logits (B, Y); larger images are averaged down to 32."""

    def __init__(self, image_channels: int, num_classes: int):
        super().__init__()
        self.layers = nn.Sequential(
            *_layer(image_channels, 32, kernel_size=5, stride=2),
            *_layer(32, 64, kernel_size=3, stride=2),
            *_layer(64, 64, kernel_size=3, stride=1),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(4 * 4 * 64, 128),
            nn.ReLU(),
        )
        self.head = nn.Linear(128, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.layers(2 * at_most(images, RECIPE["largest_side"]) - 1)
        return features, self.head(features)


def _layer(in_channels: int, out_channels: int, *, kernel_size: int, stride: int) -> list[nn.Module]:
    padding = kernel_size // 2
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=padding, bias=False)
    return [convolution, nn.BatchNorm2d(out_channels), nn.ReLU()]


def at_most(images: Tensor, side: int) -> Tensor:
    """Images whose longer side is at most `side` pixels, by averages over areas; smaller ones as they are."""
    height, width = images.shape[2:]
    scale = side / max(height, width)
    if scale >= 1:
        return images
    return F.interpolate(images, (max(1, round(height * scale)), max(1, round(width * scale))), mode="area")


def classifier_features(
    train_images, test_images, *, device: torch.device, cache: Path | None = None, seed: int = 0
) -> tuple[FeatureNetwork, float]:
    """The feature space of a classifier trained on `train_images`, and its accuracy on `test_images`.

    It is trained on the CPU, in seconds to a minute, and is a function of the images, the seed and the number of
    threads; the protocol holds a hash of its weights.

    Raises:
        NotMeasurableError: the images have labels of fewer than 2 classes.
    """
    num_classes, channels = train_images.num_classes, train_images.image_shape[0]
    if num_classes < 2:
        raise NotMeasurableError(
            "a classifier of the data set needs labels of at least 2 classes, and these images have "
            f"{num_classes or 'none'}; give the weights of Inception"
        )
    recipe = {**RECIPE, "seed": seed, "trained_on": train_images.identity}
    with own_randomness(seed, torch.device("cpu")):
        classifier = Classifier(channels, num_classes)
    weights = cached(cache, "classifier", recipe, lambda: _train(classifier, train_images, seed).state_dict())
    classifier.load_state_dict(weights)
    classifier.eval().to(device)
    protocol = {
        "network": "classifier",
        "weights": weights_digest(weights),
        "trained_on": train_images.identity,
        "num_features": 128,
    }
    network = FeatureNetwork("_classifier", protocol, lambda images: classifier(images.to(device)))
    return network, _accuracy(network, test_images)


def _train(classifier: Classifier, images, seed: int) -> Classifier:
    batch_size = RECIPE["batch_size"]
    num_steps = min(RECIPE["most_steps"], math.ceil(RECIPE["most_epochs"] * len(images) / batch_size))
    num_epochs = math.ceil(num_steps * batch_size / len(images))
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(images), generator=generator) for _ in range(num_epochs)])
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=num_steps)
    classifier.train()
    steps = order[: num_steps * batch_size].split(batch_size)
    for keys in tqdm(steps, desc="training the classifier", unit="step", disable=None):
        batch = read_batch(images, keys.tolist())
        _, logits = classifier(batch["image"])
        optimizer.zero_grad()
        F.cross_entropy(logits, batch["label"]).backward()
        optimizer.step()
        schedule.step()
    return classifier


def _accuracy(network: FeatureNetwork, images) -> float:
    correct = 0
    for start in range(0, len(images), 500):
        batch = read_batch(images, range(start, min(start + 500, len(images))))
        correct += (network(batch["image"])[1].argmax(dim=1) == batch["label"]).sum().item()
    return correct / len(images)

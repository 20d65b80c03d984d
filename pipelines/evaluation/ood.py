"""Out-of-distribution detection: whether log p(x) is higher for the data that a model learned than for others."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipelines.images import DataConfig, ImageDataset, load_images
from pipelines.metrics import NotMeasurableError

NOISE = "noise"


class NoiseImages:
    """As many images as another data set has, every pixel value equally probable; binary where that one is.

    Attributes:
        identity: what makes this the same data as at another time.
    """

    def __init__(self, images: ImageDataset, seed: int = 0):
        self.image_shape, self.count, self.seed = images.image_shape, len(images), seed
        self.num_values = 256 if images.preprocessing["binarize"] == "none" else 2
        self.identity = {
            "name": NOISE, "num_values": self.num_values, "seed": seed, "count": self.count,
            "image_shape": list(self.image_shape),
        }  # fmt: skip

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, keys: list[int]) -> dict[str, Tensor]:
        draws = [
            np.random.default_rng((self.seed, key)).integers(self.num_values, size=self.image_shape) for key in keys
        ]
        images = torch.from_numpy(np.stack(draws)).float() / (self.num_values - 1)
        return {"image": images, "label": torch.zeros(len(keys), dtype=torch.int64)}

    @staticmethod
    def collate(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return batch


def load_other(name: str, images: ImageDataset) -> NoiseImages | ImageDataset:
    """Another data set, its test split, prepared as `images` are and at most as many.

    Args:
        name: "noise", the name of a data set in the folder where `images` came from, or a folder of images.
        images: what the model is evaluated on.
    Raises:
        ValueError: as `load_images`; or it is the data set that `images` are.
    """
    if name == NOISE:
        return NoiseImages(images)
    folder = Path(name).is_dir()
    config = replace(
        images.config,
        name="folder" if folder else name,
        # a folder of images is no place for the files of another data set
        root=name if folder else DataConfig.root if images.config.name == "folder" else images.config.root,
        max_images=len(images),
    )
    other = load_images(config, "test")
    if other.identity["content"] == images.identity["content"]:
        raise ValueError(f"'{name}' holds the very images that the model is evaluated on; name another data set")
    return other


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Area under the receiver operating characteristic of scores (N,), (M,) that should be higher inside.

    It is the probability that an inside score exceeds an outside one: 1/2 for chance. Values far below are not rare for
    log p(x) of simpler images (Nalisnick et al. 2019, arXiv:1810.09136).

    Raises:
        NotMeasurableError: a score that is not a number.
    """
    if inside.isnan().any() or outside.isnan().any():
        raise NotMeasurableError("the bound on log p(x) of some images came out as nan")
    from sklearn.metrics import roc_auc_score  # a second to import

    truth = np.concatenate([np.ones(len(inside)), np.zeros(len(outside))])
    return float(roc_auc_score(truth, torch.cat([inside, outside]).double().numpy()))

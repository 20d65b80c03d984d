"""Group normalisation: torch's, but where nothing of the image would be left."""

import pytest
import torch
from torch import nn

from tests import tiny
from tokenizer import TOKENIZERS
from tokenizer.networks.group_norm import GroupNorm


@pytest.mark.parametrize(
    ("channels", "size", "groups"), [(8, (2, 3), 8), (8, (1, 2), 8), (12, (1, 1), 4), (1, (2, 2), 1)]
)
def test_it_is_torchs_where_groups_hold_several_values(channels, size, groups):
    x = torch.randn(3, channels, *size)
    ours, theirs = GroupNorm(8, channels), nn.GroupNorm(groups, channels)
    assert torch.equal(ours(x), theirs(x))
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_values_of_their_own_group_are_normalised_together():
    x = torch.randn(3, 8, 1, 1)
    torch.testing.assert_close(GroupNorm(8, 8)(x), nn.GroupNorm(1, 8)(x))


NARROW = {
    "resnet": {
        **tiny.TOKENIZERS["vqvae"],
        "downsample_factor": 8,
        "network": {"type": "resnet", "hidden_dim": 8, "dim_multipliers": (1,), "num_residual_blocks": 1},
    },
    "conv": {**tiny.TOKENIZERS["gaussian_vae"], "network": {"type": "conv", "hidden_dims": (8, 8, 8, 8)}},
}


@pytest.mark.parametrize(("name", "network"), [("vqvae", "resnet"), ("gaussian_vae", "conv")])
@torch.no_grad()
def test_features_of_narrow_networks_at_1x1_depend_on_the_image(name, network):
    torch.manual_seed(0)
    tokenizer = TOKENIZERS[name](TOKENIZERS[name].Config(**NARROW[network])).eval()
    images = torch.rand(16, 3, 8, 8).round()
    if network == "resnet":
        features = tokenizer._features(images)
        assert features.shape[2:] == (1, 1)
        assert features.std(dim=0).max() > 1e-3
    tokenizer.spec.check(tokenizer.encode(images[:1]))

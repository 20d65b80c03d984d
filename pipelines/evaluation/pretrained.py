"""Networks that others trained on ImageNet, for FID and LPIPS, from a safetensors file or from their makers."""

import io
import pickle
import sys
from contextlib import redirect_stdout
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pipelines.checkpoint import weights_digest
from pipelines.evaluation.features import FeatureNetwork, fidelity
from pipelines.metrics import NotMeasurableError
from pipelines.seeding import own_randomness

DOWNLOAD = "download"
# What torchvision's AlexNet needs for its fifth feature map to have a pixel
SMALLEST_LPIPS_SIDE = 31


def inception_features(weights: str, *, device: torch.device) -> FeatureNetwork:
    """The 2048 features and the logits of the Inception-v3 that FID is defined by, as torch-fidelity computes them.

    Images are resized to 299x299 with TensorFlow 1's bilinear filter, grey ones repeated over three channels.

    Args:
        weights: a safetensors file with the tensors of torch-fidelity's weights file, or "download" for that file
            itself, kept in torch's hub folder.
        device: where to compute.
    Raises:
        ValueError: the file cannot be read, or holds other weights.
        NotMeasurableError: it cannot be downloaded, or torch-fidelity is not installed.
    """
    module = fidelity("feature_extractor_inceptionv3")
    tensors = read_weights(weights, module.URL_INCEPTION_V3)
    # The constructor unpickles whatever file it is given; so it gets a stream that is written here
    stream = io.BytesIO()
    torch.save(tensors, stream)
    stream.seek(0)
    try:
        with own_randomness(0, torch.device("cpu")):  # it is initialised before it is loaded
            network = module.FeatureExtractorInceptionV3(
                "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=stream
            )
    except RuntimeError as error:
        raise ValueError(f"{weights} does not hold the weights of Inception: {_short(error)}") from error
    network.to(device)

    def function(images: Tensor) -> tuple[Tensor, Tensor]:
        images = (images.to(device) * 255).round().to(torch.uint8)
        return network(images.expand(-1, 3, -1, -1).contiguous())

    protocol = {
        "network": "Inception-v3 of torch-fidelity",
        "weights": weights_digest(tensors),
        "resized": "bilinear of TensorFlow 1, 299x299",
        "num_features": 2048,
    }
    return FeatureNetwork("", protocol, function)


def lpips_network(weights: str, *, device: torch.device) -> tuple[nn.Module, dict]:
    """LPIPS with AlexNet (Zhang et al. 2018, arXiv:1801.03924), version 0.1, and its protocol.

    The module maps two batches of images (B, 3, H, W) in [-1, 1] to distances (B, 1, 1, 1).

    Args:
        weights: a safetensors file with the tensors of torchvision's AlexNet, or "download" for torchvision's file.
        device: where to compute.
    Raises:
        ValueError, NotMeasurableError: as `inception_features`, for torchmetrics.
    """
    try:
        from torchmetrics.functional.image.lpips import _LPIPS
    except ImportError as error:
        raise NotMeasurableError(f"LPIPS needs torchmetrics: pip install 'tessera-codes[metrics]' ({error})") from error
    from torchvision.models import AlexNet_Weights

    tensors = read_weights(weights, AlexNet_Weights.IMAGENET1K_V1.url)
    with own_randomness(0, torch.device("cpu")):
        network = _LPIPS(net="alex", pnet_rand=True)  # the heads come with torchmetrics, the trunk does not
    trunk = {f"features.{name.split('.', 1)[1]}": name for name in network.net.state_dict()}
    missing = sorted(trunk.keys() - tensors.keys())
    if missing:
        raise ValueError(f"{weights} does not hold the weights of torchvision's AlexNet: {missing[0]} is missing")
    tensors = {name: tensors[name] for name in trunk}
    try:
        network.net.load_state_dict({trunk[name]: tensor for name, tensor in tensors.items()})
    except RuntimeError as error:
        raise ValueError(f"{weights} does not hold the weights of torchvision's AlexNet: {_short(error)}") from error
    return network.to(device), {"network": "LPIPS 0.1 with AlexNet, torchmetrics", "weights": weights_digest(tensors)}


def read_weights(weights: str, url: str) -> dict[str, Tensor]:
    """Tensors of a safetensors file, or of a PyTorch file at `url`, without unpickling anything but tensors.

    Raises:
        ValueError: the file cannot be read, or is no safetensors file.
        NotMeasurableError: `url` cannot be downloaded.
    """
    if weights == DOWNLOAD:
        try:
            with redirect_stdout(sys.stderr):  # torch says there what it downloads
                return torch.hub.load_state_dict_from_url(
                    url, map_location="cpu", progress=False, check_hash=True, weights_only=True
                )
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise NotMeasurableError(
                f"{url} cannot be downloaded ({type(error).__name__}: {_short(error)}). Without a network, fetch it "
                f"elsewhere and put it into {torch.hub.get_dir()}/checkpoints"
            ) from error
    path = Path(weights)
    if path.suffix != ".safetensors":
        raise ValueError(
            f"weights are read from safetensors files only, got '{weights}'. Convert it with python -c \"import sys, "
            'torch, safetensors.torch as s; s.save_file(torch.load(sys.argv[1], weights_only=True), sys.argv[2])" '
            "FILE.pth FILE.safetensors"
        )
    if not path.is_file():
        raise ValueError(f"there is no file {path.absolute()}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {_short(error)}") from error


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]

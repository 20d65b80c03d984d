"""`Pipeline`: a tokenizer and a prior over its codes as one thing that samples, encodes, decodes, saves and loads."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from numbers import Integral, Number
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import HfApi
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from pipelines.card import model_card
from pipelines.checkpoint import fingerprint, load_prior, load_tokenizer, resolve_folder, save_model
from pipelines.files import atomic_file, read_json, write_json_atomic
from pipelines.preprocessing import preprocess_image
from prior.base import Codes, Prior
from prior.sampling import ImageNoise
from tokenizer.base import Tokenizer

INDEX_NAME = "model_index.json"
OUTPUT_TYPES = ("pil", "np", "pt", "codes")
Generators = torch.Generator | Sequence[torch.Generator]


class Pipeline:
    """Chains a prior's sampling to a tokenizer's decoding.

        from pipelines import Pipeline
        pipeline = Pipeline.from_pretrained("runs/digits-vqvae")
        pipeline.sample(class_labels=[3, 7])[0].save("three.png")

    Args:
        tokenizer: stage one.
        prior: stage two; None takes the prior that the tokenizer assumed (or learned) while training.
        class_names: one per class label, for labels given by name.
        metrics: measured numbers, kept with the pipeline and shown in its model card.
    Raises:
        ValueError: the prior was trained on the codes of another tokenizer.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prior: Prior | None = None,
        *,
        class_names: Sequence[str] = (),
        metrics: dict | None = None,
    ):
        self.tokenizer = tokenizer.eval()
        self.has_stage_two = prior is not None
        self.prior = (tokenizer.prior if prior is None else prior).eval()
        self.class_names = list(class_names)
        self.metrics = dict(metrics or {})
        self._progress_bar_config: dict = {}
        if prior is not None:
            check_belongs(prior, tokenizer)

    # Loading and saving
    # --------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        tokenizer: Tokenizer | None = None,
        prior: Prior | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        **download_options,
    ) -> "Pipeline":
        """Loads a folder written by `save_pretrained` or by the training scripts, or a hub repository of that form.

        Args:
            path_or_id: folder, or "user/name" on the hub.
            tokenizer, prior: used in place of the saved ones.
            device: where the models go; default the CPU.
            dtype: floating-point type of the weights; default as saved.
            download_options: revision, cache_dir, token, local_files_only, force_download.
        Raises:
            ValueError: the folder is not a pipeline, a part is damaged, or its parts do not belong together.
        """
        folder = resolve_folder(path_or_id, **download_options)
        index = _read_index(folder)
        tokenizer = tokenizer or _checked_part(index, "tokenizer", load_tokenizer(folder / "tokenizer"))
        if prior is None and index["prior"] != [None, None]:
            prior = _checked_part(index, "prior", load_prior(folder / "prior"))
        class_names = [name for _, name in sorted(index["id2label"].items(), key=lambda item: int(item[0]))]
        return cls(tokenizer, prior, class_names=class_names, metrics=index["metrics"]).to(device, dtype)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes model_index.json, tokenizer/, prior/ (where there is one) and a model card, README.md."""
        folder = Path(folder)
        save_model(self.tokenizer, folder / "tokenizer")
        if self.has_stage_two:
            # The weights may have been cast since they were loaded; that the two belong together is known here
            config = self.prior.config
            self.prior.config = replace(config, tokenizer_fingerprint=fingerprint(self.tokenizer))
            try:
                save_model(self.prior, folder / "prior")
            finally:
                self.prior.config = config
        self.save_index(folder)

    def save_index(self, folder: Path) -> None:
        """Writes model_index.json and the model card beside model folders that are already there."""
        write_json_atomic(
            folder / INDEX_NAME,
            {
                "_class_name": Pipeline.__name__,
                "_tessera_version": library_version(),
                "tokenizer": ["tokenizer", type(self.tokenizer).__name__],
                "prior": ["prior", type(self.prior).__name__] if self.has_stage_two else [None, None],
                "id2label": {str(i): name for i, name in enumerate(self.class_names)},
                "metrics": self.metrics,
            },
        )
        with atomic_file(folder / "README.md") as file:
            file.write(model_card(self).encode())

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None, **upload_options) -> str:
        """Saves the pipeline and uploads it; returns the address of the commit.

        Args:
            repo_id: "user/name"; created where it does not exist.
            token: default what `hf auth login` stored.
            upload_options: passed to `HfApi.upload_folder` (commit_message, revision, create_pr, ...).
        """
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **upload_options))

    # Use
    # --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        num_images: int | None = None,
        class_labels: int | str | Sequence[int | str] | Tensor | None = None,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance_scale: float = 1.0,
        generator: Generators | None = None,
        output_type: str = "pil",
        batch_size: int = 64,
    ):
        """Draws images.

        Args:
            num_images: default 1, or as many as there are class labels.
            class_labels: a number or name for all images, or one per image; None draws them uniformly.
            temperature, top_k, top_p, guidance_scale: see `Prior.sample`.
            generator: one, or one per image; image i is then the same in a batch of any size.
            output_type: "pil" (list of images), "np" (B, H, W, C) or "pt" (B, C, H, W) in [0, 1], or "codes".
            batch_size: images computed at a time.
        Raises:
            ValueError: an argument out of range, or an option that the prior cannot honour.
        """
        _check_output_type(output_type)
        if hasattr(class_labels, "tolist"):  # tensors and arrays
            class_labels = class_labels.tolist()
        if num_images is None:
            several = isinstance(class_labels, Sequence) and not isinstance(class_labels, str)
            num_images = len(class_labels) if several else 1
        if not isinstance(num_images, Integral):
            raise ValueError(f"num_images must be an integer, got {num_images!r}; class labels are the second argument")
        if num_images < 1 or batch_size < 1:
            raise ValueError(f"num_images and batch_size must be at least 1, got {num_images} and {batch_size}")
        generators = ImageNoise(num_images, generator, torch.device("cpu")).generators
        labels = self._labels(class_labels, num_images, generators)
        batches = []
        with tqdm(**{"total": num_images, "unit": "img", "desc": "sampling", **self._progress_bar_config}) as bar:
            for start in range(0, num_images, batch_size):
                part = slice(start, min(start + batch_size, num_images))
                size = part.stop - part.start

                def advance(done: int, total: int, start=start, size=size):
                    bar.n = start + size * done // total
                    bar.refresh() if done == total else bar.update(0)

                codes = self.prior.sample(
                    size,
                    None if labels is None else labels[part],
                    temperature=temperature,
                    top_k=top_k,
                    top_p=top_p,
                    guidance_scale=guidance_scale,
                    generator=generators[part],
                    callback=advance,
                )
                batches.append(codes if output_type == "codes" else (self.tokenizer.decode(codes, generators[part]),))
        joined = tuple(torch.cat(parts) for parts in zip(*batches))
        return joined if output_type == "codes" else _output(joined[0], output_type)

    __call__ = sample

    @torch.no_grad()
    def encode(self, images) -> Codes:
        """Codes of PIL images (prepared as in training), or of a (B, C, H, W) tensor in [0, 1]."""
        return self.tokenizer.encode(self._images(images))

    @torch.no_grad()
    def decode(self, codes: Codes, *, generator: Generators | None = None, output_type: str = "pil"):
        """Images of codes; see `sample` for `output_type`."""
        _check_output_type(output_type)
        codes = tuple(torch.as_tensor(code, device=self.device) for code in codes)
        self.tokenizer.spec.check(codes)
        return _output(self.tokenizer.decode(codes, generator), output_type)

    def reconstruct(self, images, *, generator: Generators | None = None, output_type: str = "pil"):
        """What is left of images after encoding and decoding; see `encode` and `sample`."""
        return self.decode(self.encode(images), generator=generator, output_type=output_type)

    # What it is made of
    # --------------------------------------------------------------------------------------------

    @property
    def components(self) -> dict[str, torch.nn.Module]:
        return {"tokenizer": self.tokenizer, "prior": self.prior}

    @property
    def device(self) -> torch.device:
        return next(self.tokenizer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.tokenizer.parameters()).dtype

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> "Pipeline":
        for model in self.components.values():
            model.to(device=device, dtype=dtype)
        return self

    def set_progress_bar_config(self, **options) -> None:
        """Options of `tqdm`, e.g. disable=True."""
        self._progress_bar_config = options

    def label_ids(self, labels: Sequence[int | str]) -> list[int]:
        """Class numbers of names (or numbers). Raises ValueError naming the known ones."""
        for label in labels:
            if isinstance(label, str) and label not in self.class_names:
                raise ValueError(f"unknown class '{label}' (known: {', '.join(self.class_names) or 'none has a name'})")
            if not isinstance(label, (str, Integral)) or isinstance(label, bool):
                raise ValueError(f"a class label is a number or a name, got {label!r}")
        return [self.class_names.index(label) if isinstance(label, str) else int(label) for label in labels]

    def _labels(self, class_labels, num_images: int, generators: list[torch.Generator]) -> Tensor | None:
        if class_labels is None:
            if self.prior.num_classes == 0:
                return None
            draws = [torch.randint(self.prior.num_classes, (), generator=g, device=g.device).item() for g in generators]
            return torch.tensor(draws)
        if isinstance(class_labels, (str, Number)):
            class_labels = [class_labels] * num_images
        if len(class_labels) != num_images:
            raise ValueError(f"got {len(class_labels)} class labels for {num_images} images: give one, or one each")
        return torch.tensor(self.label_ids(class_labels))

    def _images(self, images) -> Tensor:
        if isinstance(images, Image.Image):
            images = [images]
        if not isinstance(images, Tensor):
            pictures = isinstance(images, Sequence) and all(isinstance(image, Image.Image) for image in images)
            if not pictures or not images:
                raise ValueError("images must be PIL images, or one tensor (batch, channels, height, width)")
            preprocessing = self.tokenizer.config.preprocessing
            images = torch.stack([preprocess_image(image, preprocessing) for image in images])
        self.tokenizer.check_images(images)
        if not images.is_floating_point() or not ((images >= 0) & (images <= 1)).all():
            raise ValueError(f"image tensors must be floating-point in [0, 1], got {images.dtype} {_range(images)}")
        return images.to(self.device, self.dtype)


def _range(images: Tensor) -> str:
    return f"from {images.min().item():.5g} to {images.max().item():.5g}" if images.numel() else "(empty)"


def check_belongs(prior: Prior, tokenizer: Tokenizer) -> None:
    """Raises ValueError, with both fingerprints, unless `prior` was trained on the codes of `tokenizer`.

    Equal code spaces are not enough: codes of another tokenizer decode to what looks like noise.
    """
    expected, found = prior.config.tokenizer_fingerprint, fingerprint(tokenizer)
    if expected != found:
        raise ValueError(
            f"this prior was trained on the codes of tokenizer {expected or '(none recorded)'}, but the tokenizer "
            f"given has fingerprint {found}; train a prior on this tokenizer's codes, or take the one it came from"
        )
    if prior.spec != tokenizer.spec:
        raise ValueError(f"the prior's code space {prior.spec} is not the tokenizer's, {tokenizer.spec}")


def check_codes_belong(tokenizer: Tokenizer, *data_sets) -> None:
    """Raises ValueError, with both fingerprints, unless every `CodeDataset` was written by `tokenizer`."""
    found = fingerprint(tokenizer)
    for codes in data_sets:
        if codes.fingerprint != found:
            raise ValueError(
                f"{codes.folder} holds codes of tokenizer {codes.fingerprint}, but the tokenizer given has fingerprint "
                f"{found}. Write its codes with scripts/extract_codes.py --overwrite true"
            )


def save_stage_one(folder: Path, tokenizer: Tokenizer, class_names: Sequence[str], metrics: dict) -> None:
    """Makes a run folder a pipeline with the tokenizer's own prior, unless it already has one that belongs."""
    measured = _named("tokenizer", metrics)
    try:
        known = Pipeline.from_pretrained(folder)
        if known.has_stage_two or measured.items() <= known.metrics.items():
            return  # the tokenizer is the one described there already
    except ValueError:
        if (folder / "prior").exists():
            print(f"{folder / 'prior'} does not belong to this tokenizer and is left out of the pipeline; "
                  f"to train another, remove {folder / 'stage_two'}")  # fmt: skip
    Pipeline(tokenizer, class_names=class_names, metrics=measured).save_index(folder)


def save_stage_two(folder: Path, tokenizer: Tokenizer, prior: Prior, class_names: Sequence[str], metrics: dict) -> None:
    """Enters a trained prior into the index of a run folder, with what was measured of it."""
    known = _read_index(folder)["metrics"] if (folder / INDEX_NAME).is_file() else {}
    measured = _named("prior", metrics)
    if not measured.items() <= known.items():  # numbers of the pipeline with another prior are no longer true
        known = {name: value for name, value in known.items() if name.startswith("validation tokenizer ")}
    pipeline = Pipeline(tokenizer, prior, class_names=class_names, metrics={**known, **measured})
    pipeline.save_index(folder)


def _named(stage: str, metrics: dict) -> dict:
    return {f"validation {stage} {name}": value for name, value in metrics.items()}


def library_version() -> str:
    try:
        return version("tessera-codes")
    except PackageNotFoundError:  # used from a folder, not installed
        return "0+unknown"


def _read_index(folder: Path) -> dict:
    if not (folder / INDEX_NAME).is_file():
        raise ValueError(f"{folder} is not a pipeline: it has no {INDEX_NAME}. Did stage one finish?")
    index = read_json(folder / INDEX_NAME)
    if index.get("_class_name") != Pipeline.__name__:
        raise ValueError(f"{folder / INDEX_NAME} describes a {index.get('_class_name')!r}, not a {Pipeline.__name__}")
    expected = {"tokenizer": list, "prior": list, "id2label": dict, "metrics": dict}
    for key, kind in expected.items():
        if not isinstance(index.get(key), kind):
            raise ValueError(f"{folder / INDEX_NAME}: '{key}' must be a {kind.__name__}, got {index.get(key)!r}")
    names = index["id2label"]
    if set(names) != {str(i) for i in range(len(names))} or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{folder / INDEX_NAME}: 'id2label' must give a name to each of the classes 0, 1, 2, ...")
    return index


def _checked_part(index: dict, name: str, model):
    """`model`, if it is what the index says; the index never decides what is imported."""
    if index[name] != [name, type(model).__name__]:
        raise ValueError(
            f"{INDEX_NAME} says that '{name}' is {index[name]}, "
            f"but {name}/config.json describes a {type(model).__name__}"
        )
    return model


def _check_output_type(output_type: str) -> None:
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"unknown output_type '{output_type}' (known: {', '.join(OUTPUT_TYPES)})")


def _output(images: Tensor, output_type: str):
    images = images.float().cpu()
    if output_type == "codes":
        raise ValueError("output_type 'codes' is for sampling")
    if output_type == "pt":
        return images
    arrays = images.permute(0, 2, 3, 1).numpy()
    return arrays if output_type == "np" else to_pil(arrays)


def to_pil(arrays: np.ndarray) -> list[Image.Image]:
    """(B, H, W, C) in [0, 1] -> 8-bit images, C = 1 or 3."""
    bytes_ = (arrays * 255).round().astype(np.uint8)
    return [Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array) for array in bytes_]

"""`Pipeline`: a tokenizer and a prior over its codes as one thing that samples, encodes, decodes, saves and loads."""

import inspect
import tempfile
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import fields, replace
from numbers import Integral
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from huggingface_hub import HfApi
from PIL import Image
from torch import Tensor

from pipelines.belonging import check_belongs, check_text_tokenizer
from pipelines.card import model_card
from pipelines.checkpoint import (
    cast,
    fingerprint,
    floating_point,
    load_prior,
    load_tokenizer,
    resolve_folder,
    saving,
    uncompiled,
)
from pipelines.completion import Completions, Ranking, candidate_generators, check_candidates, check_weighable, complete
from pipelines.drawing import Generators, decode_codes, draw_codes, one_generator_each
from pipelines.files import atomic_file, write_json_atomic
from pipelines.labels import as_list, requested_labels
from pipelines.masks import as_mask, check_geometry, check_mask_sizes, hide
from pipelines.outpainting import check_canvas, outpaint
from pipelines.outputs import as_output_type, check_output_type
from pipelines.pipeline_index import (
    INDEX_NAME,
    PIPELINE,
    TEXT_TOKENIZER,
    as_json,
    checked_part,
    library_version,
    read_index,
)
from pipelines.preprocessing import preprocess_image
from pipelines.rejection import Accepted, Score, rejection_sample
from pipelines.text import TextTokenizer
from prior.base import Codes, Prior, evaluating
from prior.sampling import GuidanceSchedule, SamplingOptions
from tokenizer.base import Tokenizer
from tokenizer.registry import nearest_known


class SampleOutput(NamedTuple):
    """What `Pipeline.sample` returns with return_log_prob.

    images: as output_type says; log_prob: (B,) nats, the log-probability with which the codes of each image were drawn
    under the sampling options, given its label; class_labels: (B,) int64, or None where the prior has no classes.
    """

    images: object
    log_prob: Tensor
    class_labels: Tensor | None


class Pipeline:
    """Chains a prior's sampling to a tokenizer's decoding.

        from pipelines import Pipeline
        pipeline = Pipeline.from_pretrained("runs/digits-vqvae")
        pipeline.sample(class_labels=[3, 7])[0].save("three.png")

    Args:
        tokenizer: stage one.
        prior: stage two; None takes the prior that the tokenizer assumed (or learned) while training.
        class_names: of the first class labels, or all of them, for labels given by name; text.
        metrics: measured numbers, kept with the pipeline and shown in its model card.
        evaluations: by split, how those of them that an evaluation measured came about: command, data, protocol.
        text_tokenizer: what made token ids of the captions, if and only if the prior is conditional on them.
    Raises:
        ValueError: the prior was trained on the codes of another tokenizer, or with captions of another text tokenizer;
            or class names are no text, or more than the prior has classes.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prior: Prior | None = None,
        *,
        class_names: Sequence[str] = (),
        metrics: dict | None = None,
        evaluations: dict | None = None,
        text_tokenizer: TextTokenizer | None = None,
    ):
        self.tokenizer = tokenizer.eval()
        self.has_stage_two = prior is not None
        self.prior = (tokenizer.prior if prior is None else prior).eval()
        self.class_names = list(class_names)
        self.metrics = dict(metrics or {})
        self.evaluations = dict(evaluations or {})
        self.text_tokenizer = text_tokenizer
        self.progress_bar_config: dict = {}
        self._check_parts()
        if isinstance(class_names, str):
            raise ValueError(f"class_names must be a list of names, got '{class_names}'")
        for name in self.class_names:
            if not isinstance(name, str):
                raise ValueError(f"class_names must be text, got {name!r}; give '{name}', or no names at all")
        num_classes = self.prior.num_classes
        if 0 < num_classes < len(self.class_names):
            raise ValueError(f"got {len(self.class_names)} class_names for a prior of {num_classes} classes")

    def _check_parts(self) -> None:
        if self.has_stage_two:
            check_belongs(self.prior, self.tokenizer)
        check_text_tokenizer(self.prior, self.text_tokenizer)

    # Loading and saving
    # --------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        tokenizer: Tokenizer | None = None,
        prior: Prior | None = None,
        text_tokenizer: TextTokenizer | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        **download_options,
    ) -> "Pipeline":
        """Loads a folder written by `save_pretrained` or by the training scripts, or a hub repository of that form.

        Args:
            path_or_id: folder, or "user/name" on the hub.
            tokenizer, prior, text_tokenizer: used in place of the saved ones.
            device: where the models go; default the CPU.
            dtype: floating-point type of the weights, or its name; default, and "auto", as saved.
            download_options: subfolder; revision, cache_dir, token, local_files_only and force_download for the hub.
        Raises:
            ValueError: the folder is not a pipeline, a part is damaged, or its parts do not belong together.
        """
        dtype = floating_point(dtype)
        folder = resolve_folder(path_or_id, **download_options)
        index = read_index(folder)
        tokenizer = tokenizer or checked_part(index, "tokenizer", load_tokenizer(folder / "tokenizer"))
        if prior is None and index["prior"] != [None, None]:
            prior = checked_part(index, "prior", load_prior(folder / "prior"))
        if text_tokenizer is None and prior is not None and prior.conditional_on_text:
            text_tokenizer = TextTokenizer.load(folder / TEXT_TOKENIZER)
        class_names = [index["id2label"][str(i)] for i in range(len(index["id2label"]))]
        pipeline = cls(
            tokenizer, prior, class_names=class_names, metrics=index["metrics"], evaluations=index["evaluations"],
            text_tokenizer=text_tokenizer,
        )  # fmt: skip
        return pipeline.to(device, dtype)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes model_index.json, tokenizer/, prior/ and text_tokenizer/ (where there is one) and a model card.

        Raises:
            ValueError: a part was exchanged or trained on, and does not belong to the others any more; a part cannot be
                saved, its folder holds other files too, or JSON has nothing for one of the metrics or evaluations.
                Nothing is written then.
        """
        folder = Path(folder)
        self._make_plain()
        parts = {folder / "tokenizer": self.tokenizer}
        if self.has_stage_two:
            # The weights may have been cast since they were loaded, and have another fingerprint then
            prior = copy(uncompiled(self.prior))
            prior.config = replace(prior.config, tokenizer_fingerprint=fingerprint(self.tokenizer))
            parts[folder / "prior"] = prior
        with saving(parts):
            self._check_parts()
            if self.text_tokenizer is not None:
                self.text_tokenizer.save_pretrained(folder / TEXT_TOKENIZER)
        self.save_index(folder)

    def save_index(self, folder: Path) -> None:
        """Writes model_index.json and the model card beside model folders that are already there."""
        self._make_plain()
        plain = copy(self)
        plain.tokenizer, plain.prior = uncompiled(self.tokenizer), uncompiled(self.prior)
        text = {} if self.text_tokenizer is None else {TEXT_TOKENIZER: [TEXT_TOKENIZER, TextTokenizer.__name__]}
        # The card first: where the index is the right one, so is the card
        with atomic_file(folder / "README.md") as file:
            file.write(model_card(plain).encode())
        write_json_atomic(
            folder / INDEX_NAME,
            {
                "_class_name": PIPELINE,
                "_tessera_version": library_version(),
                "tokenizer": ["tokenizer", type(plain.tokenizer).__name__],
                "prior": ["prior", type(plain.prior).__name__] if self.has_stage_two else [None, None],
                **text,
                "id2label": {str(i): name for i, name in enumerate(self.class_names)},
                "metrics": self.metrics,
                "evaluations": self.evaluations,
            },
        )

    def _make_plain(self) -> None:
        """Makes metrics and evaluations what they will be when loaded again."""
        self.metrics = as_json("metrics", self.metrics)
        self.evaluations = as_json("evaluations", self.evaluations)

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None, **upload_options) -> str:
        """Saves the pipeline and uploads it; returns the address of the commit.

        Args:
            repo_id: "user/name", or "name" of one's own; created where it does not exist.
            token: default what `hf auth login` stored.
            upload_options: passed to `HfApi.upload_folder` (commit_message, revision, create_pr, ...).
        """
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id  # with the user's name
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
        prompts: str | Sequence[str] | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        guidance_scale: float = 1.0,
        guidance_schedule: GuidanceSchedule = "constant",
        generator: Generators | None = None,
        output_type: str = "pil",
        batch_size: int = 64,
        resample: Literal["all", "local"] = "all",
        codes_callback: Callable[[Codes, Codes], None] | None = None,
        return_log_prob: bool = False,
    ):
        """Draws images.

        Args:
            num_images: default 1, or as many as there are class labels or prompts.
            class_labels: a number or name for all images, or one per image; None draws them uniformly.
            prompts: a caption for all images, or one per image, of a prior that is conditional on captions; None takes
                the empty caption, which stands for none at all.
            temperature, top_k, top_p, min_p, guidance_scale, guidance_schedule: see `Prior.sample`.
            generator: one, or one per image; image i is then the same in a batch of any size.
            output_type: "pil" (list of images), "np" (B, H, W, C) or "pt" (B, C, H, W) in [0, 1], or "codes".
            batch_size: images computed at a time.
            resample: "all", or "local" to draw codes once, of one label or prompt, and for each image only the latents
                that the decoder draws of its own: the same thing in other poses.
            codes_callback: see `Prior.sample`; called for the images of one batch after another.
            return_log_prob: whether to return a `SampleOutput`, with the exact log-probability of every draw.
        Raises:
            ValueError: an argument out of range, or an option that the prior cannot honour.
        """
        check_output_type(output_type)
        generators, labels = self._requested(num_images, class_labels, prompts, generator, batch_size)
        self._check_resample(resample)
        if resample == "local" and labels is not None:
            if (class_labels is not None or prompts is not None) and (labels != labels[:1]).any():
                raise ValueError(
                    "resample 'local' draws codes once, for all images, but got different labels or prompts; "
                    "give one, and sample others by themselves"
                )
            labels = labels[:1].expand(len(generators), *labels.shape[1:])
        num_drawn = 1 if resample == "local" else len(generators)
        codes, log_prob = draw_codes(
            self,
            None if labels is None else labels[:num_drawn],
            generators[:num_drawn],
            batch_size=batch_size,
            codes_callback=codes_callback,
            return_log_prob=return_log_prob,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            guidance_scale=guidance_scale,
            guidance_schedule=guidance_schedule,
        )
        if resample == "local":
            codes = tuple(level.expand(len(generators), *level.shape[1:]) for level in codes)
            log_prob = None if log_prob is None else log_prob.expand(len(generators))
        images = codes
        if output_type != "codes":
            # thousands of large images would not fit into a GPU's memory
            images = decode_codes(self.tokenizer, codes, generators, batch_size=batch_size, device="cpu")
            images = as_output_type(images, output_type)
        if not return_log_prob:
            return images
        return SampleOutput(images, log_prob, None if self.prior.conditional_on_text else labels)

    __call__ = sample

    def complete(
        self,
        images,
        mask,
        *,
        class_labels: int | str | Sequence[int | str] | Tensor | None = None,
        prompts: str | Sequence[str] | None = None,
        num_candidates: int = 1,
        ranking: Ranking = "log_prob",
        keep_known_pixels: bool = False,
        generator: Generators | None = None,
        output_type: str = "pil",
        batch_size: int = 64,
        **options,
    ) -> Completions:
        """Fills a region of images: half of them, a hole, a scratch, or everything but some pixels.

        The mask is rounded outwards to whole codes, coarse ones first (see `masks.code_masks`); what is under it is
        never looked at. All priors here but the Boltzmann machine draw codes level by level in raster order, each given
        those *before* it. Codes after the hole (to the right of it, below it, of finer levels) are known but have no
        part in filling it: drawn so, a candidate need not fit what comes after. More candidates help:
        ranking = "log_prob" puts those first whose codes, known and drawn, are the most probable together, and
        ranking = "importance" orders them at random with weights proportional to the likelihood of the known codes
        that come after. The first is then one draw by sampling-importance-resampling (Rubin 1988), whose distribution
        tends to the exact p(unknown codes | known codes) as their number grows; where a single weight is near one, it
        has not grown enough. That holds at the default sampling options. Others change what candidates are drawn from
        and not how they are weighed, which the prior itself does: the first then tends to the distribution
        proportional to (law of the drawn codes under the options) x (likelihood of the known codes that come after).

        Args:
            images: B PIL images, or a tensor (B, C, H, W) in [0, 1].
            mask: True, or white, where pixels are to be filled; see `masks.as_mask`.
            class_labels, prompts: as in `sample`, for all images or one per image. Without labels each candidate draws
                its own, so that the ranking also tells which class fits.
            num_candidates: completions of each image, R.
            ranking: "log_prob", the most probable first, or "importance", a weighted random order; see above.
            keep_known_pixels: whether pixels outside the mask are those of the images, exactly. By default they are
                decoded, as all others are, which leaves no seam.
            generator: one, or one per image.
            output_type, batch_size: see `sample`.
            options: temperature, top_k, top_p, min_p, guidance_scale, guidance_schedule and codes_callback of
                `Prior.sample`.
        Returns:
            `Completions`: images, candidate r of image i at i R + r, with their likelihoods.
        Raises:
            ValueError: an argument out of range, a tokenizer whose codes have no place in the image, or a prior that
                cannot complete or cannot weigh.
        """
        check_output_type(output_type)
        _check_options(self.complete, options)
        check_candidates(num_candidates, ranking, batch_size)
        if ranking == "importance":
            check_weighable(self.prior, "take ranking = 'log_prob'")
        check_geometry(self.tokenizer)
        check_mask_sizes(mask, images)
        pixels = self.prepare(images)
        hole = as_mask(mask, len(pixels), self.tokenizer).to(pixels.device)
        hidden = hide(images, mask, self.tokenizer)
        if hidden is not images:
            pixels = self.prepare(hidden)
        generators = candidate_generators(one_generator_each(len(pixels), generator), num_candidates)
        labels = requested_labels(self, class_labels, prompts, len(pixels), generators, num_candidates=num_candidates)
        completions = complete(
            self, pixels, hole, labels, generators, ranking=ranking, keep_known_pixels=keep_known_pixels,
            batch_size=batch_size, **options,
        )  # fmt: skip
        images = completions.codes if output_type == "codes" else as_output_type(completions.images, output_type)
        return completions._replace(images=images)

    def outpaint(
        self,
        images,
        size: tuple[int, int],
        *,
        position: tuple[int, int] = (0, 0),
        class_labels: int | str | Sequence[int | str] | Tensor | None = None,
        prompts: str | Sequence[str] | None = None,
        num_candidates: int = 1,
        stride: int | None = None,
        keep_known_pixels: bool = False,
        generator: Generators | None = None,
        output_type: str = "pil",
        batch_size: int = 64,
        **options,
    ):
        """Continues images beyond their edges, onto a larger canvas.

        The prior, which knows maps of one size, slides as a window over a larger map of codes, outwards from the image,
        and fills what it does not know yet; overlaps are what a window continues. The whole map is then decoded as one
        canvas. A prior in raster order continues to the right and downwards; to the left and upwards it fills without
        looking at the image (see `complete`), unless num_candidates lets it choose.

        Args:
            images: B PIL images, or a tensor (B, C, H, W) in [0, 1].
            size: (height, width) of the canvas in pixels, multiples of the coarsest codes' stride.
            position: (top, left) of the images on the canvas, likewise.
            class_labels, prompts: as in `sample`, for all images or one per image; each window has the image's.
            num_candidates: fillings of each window, of which one is drawn with the importance weights of `complete`;
                what it tends to at the default sampling options and at others is said there.
            stride: pixels by which the window moves; default half the shorter side of an image.
            keep_known_pixels: whether the images' own pixels are pasted into the canvas.
            generator: one, or one per image.
            output_type, batch_size: see `sample`; "codes" are those of the canvas.
            options: temperature, top_k, top_p, min_p, guidance_scale, guidance_schedule and codes_callback of
                `Prior.sample`.
        Returns:
            B images of `size`, as output_type says.
        Raises:
            ValueError: an argument out of range, or a tokenizer that cannot decode a larger map.
        """
        check_output_type(output_type)
        _check_options(self.outpaint, options)
        check_candidates(num_candidates, "importance", batch_size)
        if num_candidates > 1:
            check_weighable(self.prior, "take num_candidates = 1")
        size, position, stride = check_canvas(self.tokenizer, size, position, stride)
        pixels = self.prepare(images)
        generators = one_generator_each(len(pixels), generator)
        labels = requested_labels(self, class_labels, prompts, len(pixels), generators)
        canvas, codes = outpaint(
            self, pixels, labels, generators, size=size, position=position, stride=stride,
            num_candidates=num_candidates, keep_known_pixels=keep_known_pixels, batch_size=batch_size, **options,
        )  # fmt: skip
        return codes if output_type == "codes" else as_output_type(canvas, output_type)

    def rejection_sample(
        self,
        num_images: int | None = None,
        class_labels: int | str | Sequence[int | str] | Tensor | None = None,
        *,
        score: Score | None = None,
        classifier: Score | None = None,
        keep_fraction: float | None = None,
        threshold: float | None = None,
        max_draws: int = 100,
        prompts: str | Sequence[str] | None = None,
        generator: Generators | None = None,
        output_type: str = "pil",
        batch_size: int = 64,
        **options,
    ) -> Accepted:
        """Draws more images than asked for and keeps the best: see `rejection.rejection_sample`.

        Args:
            num_images, class_labels, prompts: see `sample`. Without labels, an image draws one of its own; with a
                threshold, each draw does, so that what is accepted follows the model's own law of classes too.
            score: images (B, C, H, W) in [0, 1] -> (B,) numbers, the larger the better.
            classifier: in place of a score, images -> logits (B, num_classes) over the prior's classes; the score is
                the probability of an image's own class (Razavi et al. 2019, arXiv:1906.00446, section 3.3).
            keep_fraction: keep this fraction of all draws, the best of each class or prompt; the number of draws of
                each is rounded up to a whole one, so that of few images a smaller fraction may be kept.
            threshold: in place of a fraction, draw until the score reaches it.
            max_draws: with a threshold, draws of each image before it is given up.
            generator: one, or one per image.
            output_type, batch_size: see `sample`.
            options: temperature, top_k, top_p, min_p, guidance_scale, guidance_schedule and codes_callback of
                `Prior.sample`.
        Returns:
            `Accepted`: images, their scores, and the acceptance rate.
        Raises:
            ValueError: an argument out of range, a score that is not one number per image, or no image at all that
                reaches the threshold.
        """
        check_output_type(output_type)
        _check_options(self.rejection_sample, options)
        if output_type == "codes":
            raise ValueError("output_type 'codes' is for sampling")
        generators, labels = self._requested(num_images, class_labels, prompts, generator, batch_size)
        if threshold is not None and class_labels is None and not self.prior.conditional_on_text:
            labels = None  # an image's label is accepted or rejected with it
        accepted = rejection_sample(
            self, labels, generators, score=score, classifier=classifier, keep_fraction=keep_fraction,
            threshold=threshold, max_draws=max_draws, batch_size=batch_size, **options,
        )  # fmt: skip
        return accepted._replace(images=as_output_type(accepted.images, output_type))

    @torch.no_grad()
    def interpolate(self, first, second, num_images: int = 8, *, output_type: str = "pil"):
        """Images between two: decoded from straight lines between the vectors that their codes stand for.

        The ends are the two reconstructions, by a decoder with latents of its own at their means, where `reconstruct`
        draws them. What lies between are mixtures that no codes stand for; the decoder was trained on none of them, and
        fades more than it transforms. To draw in-between images from the prior, `complete` one image with half of the
        other.

        Args:
            first, second: one image each, or as many of one as of the other.
            num_images: of each line, ends included.
        Returns:
            num_images for each pair, pair by pair, as output_type says.
        Raises:
            ValueError: fewer than 2 images, unequal numbers, or codes that stand for no vectors.
        """
        check_output_type(output_type)
        first, second = self.encode(first), self.encode(second)
        if not isinstance(num_images, Integral) or num_images < 2 or len(first[0]) != len(second[0]):
            raise ValueError(
                "interpolation needs as many first images as second ones and num_images, an integer of at least 2, "
                f"got {len(first[0])} and {len(second[0])} images and num_images = {num_images!r}"
            )
        weights = torch.linspace(0, 1, num_images, device=self.device)[None, :, None, None, None]
        lines = [  # in float32: vectors of some codes are integers, those of others of another type than the weights
            torch.lerp(a[:, None].float(), b[:, None].float(), weights).flatten(0, 1)
            for a, b in zip(self.tokenizer.embed(first), self.tokenizer.embed(second))
        ]
        return as_output_type(self.tokenizer.decode_embedded(tuple(lines)), output_type)

    def _check_resample(self, resample: str) -> None:
        if resample not in ("all", "local"):
            raise ValueError(f"unknown resample {resample!r}; choose from all, local")
        if resample == "local" and not self.tokenizer.has_local_latents:
            raise ValueError(
                f"resample 'local' needs a decoder with latents of its own, which this {type(self.tokenizer).__name__} "
                "does not have: equal codes would give equal images"
            )

    def _requested(self, num_images, class_labels, prompts, generator, batch_size: int):
        """A generator per image and what the prior calls labels, for the arguments of `sample`."""
        if num_images is None:
            given = as_list(class_labels if prompts is None else prompts)
            several = isinstance(given, Sequence) and not isinstance(given, str)
            num_images = len(given) if several else 1
            if several and not given:
                raise ValueError(f"{'class_labels' if prompts is None else 'prompts'} must hold at least one, got none")
        if not isinstance(num_images, Integral):
            raise ValueError(f"num_images must be an integer, got {num_images!r}; class labels are the second argument")
        if not isinstance(batch_size, Integral):
            raise ValueError(f"batch_size must be an integer, got {batch_size!r}")
        if num_images < 1 or batch_size < 1:
            raise ValueError(f"num_images and batch_size must be at least 1, got {num_images} and {batch_size}")
        generators = one_generator_each(num_images, generator)
        return generators, requested_labels(self, class_labels, prompts, num_images, generators)

    def prepare(self, images) -> Tensor:
        """Images (B, C, H, W) in [0, 1] on the pipeline's device: PIL images prepared as in training, or such a tensor.

        Raises:
            ValueError: neither of them, another shape, or values out of range.
        """
        if isinstance(images, Image.Image):
            images = [images]
        if not isinstance(images, Tensor):
            pictures = isinstance(images, Sequence) and all(isinstance(image, Image.Image) for image in images)
            if not pictures or not images:
                got = "none" if pictures else type(images).__name__
                raise ValueError(
                    f"images must be PIL images, or one tensor (batch, channels, height, width); got {got}"
                )
            preprocessing = self.tokenizer.config.preprocessing
            images = torch.stack([preprocess_image(image, preprocessing) for image in images])
        with evaluating(self.tokenizer):  # in training it would not look at the range
            self.tokenizer.check_images(images)
        return images.to(self.device)

    @torch.no_grad()
    def encode(self, images) -> Codes:
        """Codes of PIL images (prepared as in training), or of a (B, C, H, W) tensor in [0, 1]."""
        return self.tokenizer.encode(self.prepare(images).to(self.dtype))

    @torch.no_grad()
    def decode(self, codes: Codes, *, generator: Generators | None = None, output_type: str = "pil"):
        """Images of codes; see `sample` for `output_type`."""
        check_output_type(output_type)
        if isinstance(codes, Sequence):  # where not, the check says so
            codes = tuple(torch.as_tensor(code, device=self.device) for code in codes)
        self.tokenizer.spec.check(codes)
        return as_output_type(self.tokenizer.decode(codes, generator), output_type)

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

    def to(
        self, device: str | torch.device | torch.dtype | None = None, dtype: torch.dtype | str | None = None
    ) -> "Pipeline":
        """Moves or casts the models, `to("cuda")`, `to(torch.bfloat16)` or `to("cuda", torch.bfloat16)`."""
        if isinstance(device, torch.dtype) and dtype is None:
            device, dtype = None, device
        dtype = floating_point(dtype)
        if self.has_stage_two:
            cast(self.tokenizer, dtype)  # the prior stays one over its codes
        for model in self.components.values():
            model.to(device=device, dtype=dtype)
        return self

    def set_progress_bar_config(self, **options) -> None:
        """Options of `tqdm`, e.g. disable=True."""
        self.progress_bar_config = options


def _check_options(method: Callable, options: dict) -> None:
    """Raises ValueError for an option of `method` that it would not pass on to `Prior.sample`."""
    known = [*(field.name for field in fields(SamplingOptions)), "codes_callback"]
    arguments = [name for name in inspect.signature(method).parameters if name != "options"]
    for option in options:
        if option not in known:
            raise ValueError(f"{method.__name__} has no option '{option}'{nearest_known(option, known + arguments)}")

"""Reconstructions of the same images, and samples, of each model: two pictures per member, drawn once."""

from pathlib import Path

import torch
from tqdm import tqdm

from pipelines.batches import derived_seed, read_batch
from pipelines.comparison.findings import Findings
from pipelines.comparison.running import PRIOR, TOKENIZER, Member
from pipelines.drawing import decode_codes, encode_images, one_generator_each
from pipelines.files import read_json, sha256_file, write_json_atomic
from pipelines.images import DataConfig, ImageDataset
from pipelines.pictures import save_grid, side_by_side
from pipelines.runs import check_held_out, load_images_for, saved_data_section
from pipelines.two_stage import Pipeline

COLUMNS = 8
NUM_RECONSTRUCTED = 16
NUM_SAMPLES = 32
KINDS = ("reconstructions", "samples")


class Grids:
    """Draws the pictures of members into a folder, and counts their parameters.

    Args:
        folder: of the pictures.
        split: of the images to reconstruct.
        seed: of the samples.
        device: where to compute.
        batch_size: images computed at a time.
        data_source: fields of `DataConfig` that say where the files of the entries' data are now.
    """

    def __init__(
        self, folder: Path, *, split: str, seed: int, device, batch_size: int = 64, data_source: dict | None = None
    ):
        self.folder, self.split, self.seed, self.device = folder, split, seed, device
        self.batch_size, self.data_source = batch_size, data_source or {}
        self._images: dict[str, ImageDataset] = {}

    def path(self, member: Member, kind: str) -> Path:
        return self.folder / f"{member.name}-{kind}.png"

    def draw(self, member: Member, data: dict | None = None) -> dict[str, int]:
        """Draws what is missing or of other weights or images; gives tokenizer_parameters and prior_parameters.

        Those of a prior that was learned with the tokenizer count as the prior's, not as the tokenizer's.

        Args:
            data: the identity of the images that the member was evaluated on, which are those to show.
        Raises:
            ValueError: the run cannot be loaded, or its data, or they are others than those it was evaluated on.
        """
        note = self.folder / f"{member.name}.json"
        weights = {name: member.folder / name for name in (TOKENIZER, PRIOR)}
        of = {name: sha256_file(path) for name, path in weights.items() if path.is_file()}
        of |= {"split": self.split, "seed": self.seed, "content": data and data["content"]}
        if note.is_file() and all(self.path(member, kind).is_file() for kind in KINDS):
            known = read_json(note)
            if known["of"] == of:
                return known["parameters"]
        pipeline = Pipeline.from_pretrained(member.folder, device=self.device)
        pipeline.set_progress_bar_config(disable=None, leave=False)
        self._reconstruct(pipeline, member, data)
        self._sample(pipeline, member)
        parameters = count_parameters(pipeline)
        write_json_atomic(note, {"of": of, "parameters": parameters})
        return parameters

    def _reconstruct(self, pipeline: Pipeline, member: Member, data: dict | None) -> None:
        self.path(member, "reconstructions").unlink(missing_ok=True)  # one of other images or weights
        images = self._load(pipeline, member, data)
        count = min(NUM_RECONSTRUCTED, len(images))
        columns = min(COLUMNS, count)
        keys = torch.linspace(0, len(images) - 1, count // columns * columns).long().tolist()
        originals = read_batch(images, keys)["image"]
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "reconstruction"))
        generators = one_generator_each(len(originals), generator)
        batch = pipeline.prepare(originals).to(pipeline.dtype)
        codes = encode_images(pipeline.tokenizer, batch, batch_size=self.batch_size)
        decoded = decode_codes(pipeline.tokenizer, codes, generators, batch_size=self.batch_size).float().cpu()
        save_grid(side_by_side(originals, decoded, columns), self.path(member, "reconstructions"), columns=columns)

    def _sample(self, pipeline: Pipeline, member: Member) -> None:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "samples"))
        samples = pipeline.sample(NUM_SAMPLES, generator=generator, output_type="pt", batch_size=self.batch_size)
        save_grid(samples, self.path(member, "samples"), columns=COLUMNS)

    def _load(self, pipeline: Pipeline, member: Member, data: dict | None) -> ImageDataset:
        section = saved_data_section(member.folder)["data"]
        if member.entry is not None:
            section = section | self.data_source
        images = self._load_section(pipeline, member, section)
        if data is not None and images.identity["content"] != data["content"]:  # fewer of them, or more
            images = self._load_section(pipeline, member, section | {"max_images": data["count"]})
        if data is not None and images.identity["content"] != data["content"]:
            raise ValueError(
                f"{member.title} was evaluated on other images ({data['name']} {data['split']}) than those of its run"
            )
        return images

    def _load_section(self, pipeline: Pipeline, member: Member, section: dict) -> ImageDataset:
        key = repr(sorted(section.items()))
        if key not in self._images:
            config = DataConfig(**section)
            self._images[key] = load_images_for(pipeline.tokenizer, config, self.split, run=member.folder)
        else:
            check_held_out(member.folder, self._images[key])
        return self._images[key]


def count_parameters(pipeline: Pipeline) -> dict[str, int]:
    of_whole, of_own_prior, of_prior = (
        sum(parameter.numel() for parameter in model.parameters())
        for model in (pipeline.tokenizer, pipeline.tokenizer.prior, pipeline.prior)
    )
    return {"tokenizer_parameters": of_whole - of_own_prior, "prior_parameters": of_prior}


def draw_all(grids: Grids, findings: Findings) -> dict[str, dict[str, Path]]:
    """{name: {kind: file}}; numbers of parameters are entered into the rows, and why a picture is missing is noted."""
    pictures: dict[str, dict[str, Path]] = {}
    rows = list(zip(findings.members, findings.rows))
    for member, row in tqdm(rows, desc="drawing pictures", unit="model", disable=None):
        try:
            row |= grids.draw(member, findings.results.get(member.name, {}).get("data"))
        except (ValueError, OSError) as error:
            findings.note_missing("pictures", str(error), member)
        pictures[member.name] = {kind: grids.path(member, kind) for kind in KINDS if grids.path(member, kind).is_file()}
    return pictures

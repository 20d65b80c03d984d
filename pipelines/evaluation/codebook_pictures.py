"""Pictures of a codebook: how often its codes are used, where their vectors lie, and which of them fire where."""

import math
from pathlib import Path

import torch
from torch import Tensor

from pipelines.files import atomic_file
from pipelines.metrics import NotMeasurableError, codebook_usage, perplexity
from prior.base import CodeSpec
from tokenizer.base import Tokenizer

# The map shows at most so many code vectors, those that are used most
MOST_VECTORS = 4096
# Codes of which it is shown where they occur
NUM_PLACED = 12


def save_codebook_pictures(
    tokenizer: Tokenizer, counts: dict[int, Tensor], position_counts: list[Tensor | None], folder: Path
) -> list[Path]:
    """Writes one picture per level: histogram of use, map of the code vectors, entropy and commonest code by position,
    and where each of the commonest codes occurs.

    Args:
        tokenizer: whose codes they are.
        counts: (K,) of each level that has a codebook.
        position_counts: (positions, K) of each level, or None.
        folder: gets codebook.png, or codebook_0.png, ... where there are several levels.
    Raises:
        NotMeasurableError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # a second to import
    except ImportError as error:
        raise NotMeasurableError(f"pictures need matplotlib: pip install 'tessera-codes[metrics]' ({error})") from error
    folder.mkdir(parents=True, exist_ok=True)
    vectors = code_vectors(tokenizer)
    paths = []
    for level, level_counts in counts.items():
        whole = Figure(figsize=(11, 10.5), layout="constrained")
        figure, below = whole.subfigures(2, 1, height_ratios=(8.5, 2))
        panels = figure.subplots(2, 2)
        name = f"level {level}: " if len(counts) > 1 else ""
        whole.suptitle(
            f"{name}{codebook_usage(level_counts):.1%} of {len(level_counts)} codes used, "
            f"perplexity {perplexity(level_counts):.1f}"
        )
        _draw_histogram(panels[0, 0], level_counts)
        _draw_map(figure, panels[0, 1], level_counts, vectors[level] if vectors else None)
        _draw_positions(figure, panels[1], tokenizer.spec, level, position_counts[level])
        if position_counts[level] is not None:
            _draw_places(below, tokenizer.spec, level, position_counts[level])
        path = folder / (f"codebook_{level}.png" if len(counts) > 1 else "codebook.png")
        with atomic_file(path) as file:
            whole.savefig(file, format="png", dpi=100)
        paths.append(path)
    return paths


def code_vectors(tokenizer: Tokenizer) -> list[Tensor] | None:
    """The vectors (K, D) of the codes of each level; None where codes have no vectors.

    Of a residual quantizer they are each stage's own entries.
    """
    quantizers = getattr(tokenizer, "quantizers", None) or [getattr(tokenizer, "quantizer", None)]
    if quantizers[0] is None:
        return None
    stages = [stage for quantizer in quantizers for stage in getattr(quantizer, "stages", [quantizer])]
    device = next(tokenizer.parameters()).device
    vectors = []
    with torch.no_grad():
        for stage in stages:
            codes = torch.arange(stage.vocab_sizes[0], device=device).view(1, 1, -1)
            vectors.append(stage.embed((codes,))[0, :, 0].T.float().cpu())
    return vectors


def position_entropy(position_counts: Tensor) -> Tensor:
    """Entropy in nats of the codes at each position, (positions,), from counts (positions, K)."""
    counts = position_counts.double()
    return torch.special.entr(counts / counts.sum(dim=1, keepdim=True).clamp(min=1)).sum(dim=1)


def grid_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns in which a level's positions are shown: a vector as rows that make it about square."""
    if len(shape) == 2:
        return shape
    length = math.prod(shape)
    columns = math.ceil(math.sqrt(length))
    return math.ceil(length / columns), columns


def _draw_histogram(panel, counts: Tensor) -> None:
    shares = (counts / counts.sum().clamp(min=1)).sort(descending=True).values
    panel.stairs(shares.numpy(), fill=True)
    panel.axhline(1 / len(shares), color="grey", linestyle="--", linewidth=1, label="all equally often")
    panel.set(title="how often codes occur", xlabel="codes, commonest first", ylabel="share")
    panel.set_ylim(bottom=0)
    panel.legend()


def _draw_map(figure, panel, counts: Tensor, vectors: Tensor | None) -> None:
    panel.set_title("code vectors, first two principal components")
    if vectors is None or vectors.shape[1] < 2 or len(vectors) < 3:
        panel.text(0.5, 0.5, "codes without vectors, or too few of them", ha="center", va="center")
        panel.set_axis_off()
        return
    from sklearn.decomposition import PCA

    shown = counts.argsort(descending=True, stable=True)[:MOST_VECTORS]
    pca = PCA(n_components=2, random_state=0)
    places = pca.fit_transform(vectors[shown].double().numpy())
    use = counts[shown].double()
    unused = use == 0
    panel.scatter(*places[unused.numpy()].T, s=8, color="lightgrey", label=f"{int(unused.sum())} unused")
    colours = panel.scatter(*places[~unused.numpy()].T, s=12, c=use[~unused].log10().numpy(), cmap="viridis")
    figure.colorbar(colours, ax=panel, label="log10 of occurrences")
    explained = pca.explained_variance_ratio_
    panel.set(xlabel=f"first component, {explained[0]:.0%} of the variance",
              ylabel=f"second component, {explained[1]:.0%} of the variance")  # fmt: skip
    if unused.any():
        panel.legend()


def _draw_positions(figure, panels, spec: CodeSpec, level: int, position_counts: Tensor | None) -> None:
    titles = ("entropy of the codes at each position", "commonest code at each position")
    if position_counts is None:
        for panel, title in zip(panels, titles):
            panel.set_title(title)
            panel.text(0.5, 0.5, "too many positions and codes to count", ha="center", va="center")
            panel.set_axis_off()
        return
    rows, columns = grid_shape(spec.shapes[level])
    share = position_counts.max(dim=1).values / position_counts.sum(dim=1).clamp(min=1)
    values = (position_entropy(position_counts), share.double())
    labels = ("nats", "share of the commonest code")
    for panel, title, value, label in zip(panels, titles, values, labels):
        picture = panel.imshow(_as_grid(value, rows, columns), cmap="magma", vmin=0)
        figure.colorbar(picture, ax=panel, label=label)
        panel.set(title=title, xlabel="column", ylabel="row")
        panel.locator_params(integer=True)
    if rows * columns <= 100:  # the numbers of the codes can still be read
        for position, code in enumerate(position_counts.argmax(dim=1).tolist()):
            row, column = divmod(position, columns)
            colour = "black" if share[position] > 0.6 * share.max() else "white"
            panels[1].text(column, row, str(code), ha="center", va="center", fontsize=7, color=colour)


def _draw_places(figure, spec: CodeSpec, level: int, position_counts: Tensor) -> None:
    """For each of the commonest codes, the share of images that have it at each position."""
    rows, columns = grid_shape(spec.shapes[level])
    shares = position_counts / position_counts.sum(dim=1, keepdim=True).clamp(min=1)
    shown = position_counts.sum(dim=0).argsort(descending=True, stable=True)[:NUM_PLACED].tolist()
    figure.suptitle("where the commonest codes occur", fontsize="medium")
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for panel, code in zip(panels, shown):
        grid = _as_grid(shares[:, code].double(), rows, columns)
        picture = panel.imshow(grid, cmap="magma", vmin=0, vmax=shares[:, shown].max().item())
        panel.set_title(f"code {code}", fontsize="small")
        panel.set(xticks=[], yticks=[])
    figure.colorbar(picture, ax=panels, label="share of images")


def _as_grid(values: Tensor, rows: int, columns: int):
    """(rows, columns) NumPy array of one value for each position; nan where a vector leaves a rest."""
    grid = torch.full((rows * columns,), math.nan, dtype=torch.float64)
    grid[: len(values)] = values
    return grid.view(rows, columns).numpy()

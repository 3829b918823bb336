"""The plots of a mix's report (matplotlib)."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from llava_jax.console import printable, shorten
from train.datasets.mix.files import KINDS
from train.datasets.mix.lengths import Positions
from train.datasets.mix.report import LEFT_OUT
from train.datasets.mix.rows import Mix
from train.figures import label_counts, new_figure

BARS = 12  # sources that are drawn; the others are one bar
BINS = 50


def draw(mix: Mix, lengths: Positions | None) -> Iterator[tuple[str, Any]]:
    """The names of the plots' files, and their figures; none of an empty mix."""
    if not len(mix):
        return
    yield "sources.png", draw_sources(mix)
    yield "texts.png", draw_texts(mix)
    if mix.images is not None and mix.images.good.any():
        yield "images.png", draw_images(mix.images.sizes[mix.images.good].astype(np.int64))
    if lengths is not None and len(lengths.rows):
        yield "positions.png", draw_positions(lengths)


def draw_sources(mix: Mix) -> Any:
    """Rows of each source: by kind, and left out."""
    figure, [ax] = new_figure(1)
    kinds = mix.column("kind")
    shown = min(len(mix.parts), BARS)
    group = np.minimum(mix.part, shown - 1)
    left = np.zeros(shown)
    for i, kind in enumerate(KINDS):
        counts = np.bincount(group[kinds == i], minlength=shown)
        if counts.any():
            ax.barh(range(shown), counts, left=left, label=kind, color=f"C{i}")
            left += counts
    bad = np.zeros(shown)
    for number, file in enumerate(mix.file_of):
        bad[min(number, shown - 1)] += np.isin(mix.files[file].status, list(LEFT_OUT.values())).sum()
    if bad.any():
        ax.barh(range(shown), bad, left=left, label="left out", color="0.85", hatch="//", edgecolor="0.6")
    names = [printable(shorten(part.path, 30)) for part in mix.parts[:shown]]
    if shown < len(mix.parts):
        names[-1] = f"{len(mix.parts) - shown + 1} others"
    ax.set(title="rows of each source", yticks=range(shown), yticklabels=names)
    ax.invert_yaxis()
    label_counts(ax.xaxis)
    _grid(ax, axis="x")
    figure.set_size_inches(9, 1.6 + 0.4 * shown)
    ax.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_texts(mix: Mix) -> Any:
    """Questions of a row, and characters of its questions and answers."""
    figure, [questions, characters] = new_figure(2)
    counts = np.bincount(np.minimum(mix.column("questions"), BINS))
    questions.bar(range(1, len(counts)), counts[1:], width=0.9)
    questions.set(
        title="questions of a row", xlabel="questions" + f" ({BINS} or more in the last)" * (len(counts) > BINS)
    )
    asked, answered = mix.column("asked"), mix.column("answered")
    edges = np.geomspace(1, max(int(asked.max()), int(answered.max()), 10) + 1, BINS)
    for values, label in ((asked, "questions"), (answered, "answers")):
        characters.hist(np.maximum(values, 1), edges, histtype="stepfilled", alpha=0.5, label=label)
    characters.set(title="texts of a row", xlabel="characters", xscale="log")
    label_counts(characters.xaxis)
    characters.legend(fontsize="small")
    label_counts(questions.xaxis)
    for ax in (questions, characters):
        ax.set_ylabel("rows")
        label_counts(ax.yaxis)
        _grid(ax)
    return figure


def draw_images(sizes: np.ndarray) -> Any:
    """Sizes and aspect ratios of images, int64 [n, 2]."""
    figure, [plane, ratio] = new_figure(2)
    limit = float(np.percentile(sizes, 99.5)) * 1.1
    inside = np.clip(sizes, 0, limit)
    drawn = plane.hist2d(inside[:, 0], inside[:, 1], bins=BINS, range=[[0, limit]] * 2, cmin=1, norm="log")
    label_counts(figure.colorbar(drawn[3], ax=plane, label="images").ax.yaxis)
    plane.set(title="sizes of images", xlabel="width", ylabel="height", aspect="equal")
    values = np.clip(sizes[:, 0] / sizes[:, 1], 0.25, 4)
    ratio.hist(values, np.geomspace(0.25, 4, BINS))
    ratio.set(title="aspect ratios", xlabel="width / height", ylabel="images", xscale="log")
    ticks = {0.25: "1:4", 0.5: "1:2", 0.75: "3:4", 1: "1:1", 4 / 3: "4:3", 2: "2:1", 4: "4:1"}
    ratio.set_xticks(list(ticks), list(ticks.values()))
    ratio.minorticks_off()
    label_counts(ratio.yaxis)
    for ax in (plane, ratio):
        _grid(ax)
    return figure


def draw_positions(lengths: Positions) -> Any:
    """Lengths in positions, and where training truncates."""
    figure, [ax] = new_figure(1)
    longest, limit = int(lengths.positions.max()), lengths.model.max_length
    ax.hist(lengths.positions, np.geomspace(max(int(lengths.positions.min()), 1), longest + 1, BINS))
    if longest > limit / 2:
        ax.axvline(limit, color="C3", label=f"--max-length {limit:,}")
        ax.legend(fontsize="small")
    ax.set(
        title=f"lengths with the template {lengths.model.template}",
        xlabel="positions",
        ylabel="rows measured",
        xscale="log",
    )
    for axis in (ax.xaxis, ax.yaxis):
        label_counts(axis)
    _grid(ax)
    return figure


def _grid(ax: Any, axis: str = "both") -> None:
    ax.grid(alpha=0.3, axis=axis)
    ax.set_axisbelow(True)

"""The report of a mix: `summarize` counts, `render` writes Markdown, `draw` plots.

Kinds, questions and lengths are those of the rows in the mix, repeated ones included; invalid rows, duplicates and keys
those of whole files; images are counted once each.
"""

import collections
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from llava_jax.console import plural, printable, shorten
from train.datasets.mix.files import BAD_IMAGE, DUPLICATE, INVALID, KINDS
from train.datasets.mix.images import Images, most_frequent_sizes
from train.datasets.mix.lengths import Positions
from train.datasets.mix.rows import Mix

PERCENTILES = {"median": 50, "90 %": 90, "99 %": 99, "max": 100}
LONGEST = 10  # rows that are listed
SIZES = 8  # sizes of images that are listed, of those that at least `MIN_SHARE` have
MIN_SHARE = 0.005
BAD = 10  # missing or broken images that are listed
KEYS = 20  # keys that are listed
COLUMNS = {"questions": "questions", "asked": "characters of questions", "answered": "characters of answers"}

Report = dict[str, Any]


# ---------------------------------------------------------------- counting


def summarize(mix: Mix, lengths: Positions | None) -> Report:
    """The contents of `report.json`."""
    files = mix.files
    kinds = mix.column("kind")
    status = np.concatenate([file.status for file in files])
    keys = sum((file.unread_keys for file in files), collections.Counter[str]())
    return {
        "rows": len(mix),
        "read": len(status),
        "left_out": {name: int((status == value).sum()) for name, value in LEFT_OUT.items()},
        "sources": [_source(mix, i, kinds) for i in range(len(mix.parts))],
        "kinds": {kind: int((kinds == i).sum()) for i, kind in enumerate(KINDS)},
        "with_image": int((mix.column("images") > 0).sum()),
        "per_row": {name: percentiles(mix.column(name)) for name in COLUMNS},
        "longest": _longest(mix),
        "reasons": dict(sum((file.reasons for file in files), collections.Counter[str]()).most_common()),
        "rows_with_unread_keys": sum(file.rows_with_unread_keys for file in files),
        "unread_keys": dict(keys.most_common(KEYS)),
        "images": None if mix.images is None else _images(mix.images),
        "positions": None if lengths is None else _positions(mix, lengths),
    }


LEFT_OUT = {"invalid": INVALID, "duplicates": DUPLICATE, "bad_images": BAD_IMAGE}


def _source(mix: Mix, number: int, kinds: np.ndarray) -> Report:
    part, chosen = mix.parts[number], mix.part == number
    file = mix.files[mix.file_of[number]]
    return {
        "data": part.path,
        "use": f"{part.strategy}: {part.rows:,} rows" if part.rows else f"{part.weight:g}",
        "read": len(file),
        **{name: int((file.status == value).sum()) for name, value in LEFT_OUT.items()},
        "rows": int(chosen.sum()),
        "kinds": {kind: int((kinds[chosen] == i).sum()) for i, kind in enumerate(KINDS)},
    }


def percentiles(values: np.ndarray) -> Report:
    """Mean and percentiles of numbers; empty without any."""
    if not len(values):
        return {}
    found = np.percentile(values, list(PERCENTILES.values()), method="nearest")
    return {"mean": round(float(values.mean()), 1)} | dict(zip(PERCENTILES, map(int, found), strict=True))


def _longest(mix: Mix) -> list[Report]:
    """The rows with the most characters."""
    asked, answered = mix.column("asked").astype(np.int64), mix.column("answered").astype(np.int64)
    key = mix.file * 2**32 + mix.row
    _, once = np.unique(key, return_index=True)
    order = once[np.argsort(-(asked + answered)[once], kind="stable")[:LONGEST]]
    return [_named(mix, int(i)) | {"characters": int(asked[i] + answered[i])} for i in order]


def _named(mix: Mix, i: int) -> Report:
    file = mix.files[mix.file[i]]
    row = file.rows[mix.row[i]]
    return {
        "data": file.path,
        "row": int(mix.row[i]),
        "id": row.get("id"),
        "questions": int(file.questions[mix.row[i]]),
    }


def _images(images: Images) -> Report:
    sizes = images.sizes[images.good]
    ratios = sizes[:, 0] / np.maximum(sizes[:, 1], 1)
    return {
        "images": len(images.sizes),
        "missing": images.missing,
        "broken": int((~images.good).sum()) - images.missing,
        "bad": list(images.reasons.values())[:BAD],
        "width": percentiles(sizes[:, 0]),
        "height": percentiles(sizes[:, 1]),
        "landscape": int((ratios > 1).sum()),
        "square": int((ratios == 1).sum()),
        "portrait": int((ratios < 1).sum()),
        "frequent_sizes": [
            {"size": list(size), "images": n}
            for size, n in most_frequent_sizes(sizes, SIZES)
            if n >= MIN_SHARE * len(sizes)
        ],
    }


def _positions(mix: Mix, lengths: Positions) -> Report:
    model = lengths.model
    is_truncated = lengths.positions > model.max_length
    order = np.argsort(-lengths.positions, kind="stable")[:LONGEST]
    return {
        "measured": len(lengths.rows),
        "unfit": lengths.unfit,
        "template": model.template,
        "max_length": model.max_length,
        "positions": percentiles(lengths.positions),
        "truncated": int(is_truncated.sum()),
        "without_answer": int((lengths.trained == 0).sum()),
        "labels": int(lengths.total.sum()),
        "labels_truncated": int((lengths.total - lengths.trained).sum()),
        "longest": [_named(mix, int(lengths.rows[i])) | {"positions": int(lengths.positions[i])} for i in order],
    }


# ---------------------------------------------------------------- Markdown


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """The lines of a table in Markdown: the first column is text, the others are numbers."""

    def cell(value: Any) -> str:
        text = f"{value:,}" if isinstance(value, int | float) else printable(shorten(value, 80))
        return text.replace("|", "\\|")

    lines = ["| " + " | ".join(map(cell, row)) + " |" for row in (header, *rows)]
    return [lines[0], "| --- |" + " ---: |" * (len(header) - 1), *lines[1:], ""]


def share(n: int, of: int) -> str:
    return f"{n / of:.1%}".replace("%", " %") if of else "-"


def render(report: Report, plots: Sequence[str]) -> str:
    """The report in Markdown.

    Args:
      plots: the names of the files that `draw` wrote, in the order of their sections; [] for a terminal.
    """
    sections = [
        ("sources.png", _render_sources(report)),
        ("", _render_left_out(report)),
        ("texts.png", _render_rows(report)),
        ("images.png", _render_images(report["images"])),
        ("positions.png", _render_positions(report["positions"])),
    ]
    lines = ["# Data", ""]
    for plot, section in sections:
        lines += section
        if section and plot in plots:
            lines += [f"![{plot.partition('.')[0]}]({plot})", ""]
    return "\n".join(lines)


def _render_sources(report: Report) -> list[str]:
    total, sources = report["rows"], report["sources"]
    header: tuple[str, ...] = ("source", "weight", "read", "invalid", "duplicates", "bad images", "in the mix", "share")
    rows = [
        (s["data"], s["use"], s["read"], *(s[name] for name in LEFT_OUT), s["rows"], share(s["rows"], total))
        for s in sources
    ]
    text = f"{plural(total, 'row')} from {plural(report['read'], 'row')} in {plural(len(sources), 'source')}; "
    lines = [text + f"{share(report['with_image'], total)} of them have an image.", "", *table(header, rows)]
    used = {kind: n for kind, n in report["kinds"].items() if n}
    header = ("kind", *(shorten(s["data"], 40) for s in sources), "in the mix", "share")
    if len(sources) == 1 or len(sources) > 6:
        header = ("kind", "in the mix", "share")
    counts = [
        (kind, *(s["kinds"][kind] for s in sources if len(header) > 3), n, share(n, total)) for kind, n in used.items()
    ]
    meaning = "; ".join(f"*{kind}*: {text}" for kind, text in KINDS.items() if kind in used)
    return ["## Sources", "", *lines, "## Kinds", "", *table(header, counts), *[f"{meaning}.", ""] * bool(used)]


def _render_rows(report: Report) -> list[str]:
    header = ("per row", "mean", *PERCENTILES)
    rows = [
        (COLUMNS[name], found["mean"], *(found[name] for name in PERCENTILES))
        for name, found in report["per_row"].items()
        if found
    ]
    if not rows:
        return []
    return ["## Texts", "", *table(header, rows), *_longest_rows(report["longest"], "characters")]


def _longest_rows(rows: Sequence[Report], unit: str) -> list[str]:
    def cells(row: Report) -> tuple[Any, ...]:
        id = "-" if row["id"] is None else shorten(row["id"], 40)
        return f"{shorten(row['data'], 50)} row {row['row']}", id, row["questions"], row[unit]

    return table(("longest rows", "id", "questions", unit), map(cells, rows))


def _render_images(images: Report | None) -> list[str]:
    if images is None:
        return ["## Images", "", "Not checked: --image-folder was not given.", ""]
    n = images["images"]
    bad = images["missing"] + images["broken"]
    text = f"{plural(n, 'image')}, {images['missing']:,} missing and {images['broken']:,} broken."
    listed = [f"- {printable(shorten(one, 150))}" for one in images["bad"]]
    listed += [f"- and {bad - len(listed):,} more"] * (bad > len(listed)) + [""] * bool(listed)
    if n == bad:
        return ["## Images", "", text, "", *listed]
    shapes = ", ".join(f"{share(images[name], n - bad)} {name}" for name in ("landscape", "square", "portrait"))
    rows = [(name, images[name]["mean"], *(images[name][key] for key in PERCENTILES)) for name in ("width", "height")]
    sizes = [
        (f"{w} x {h}", one["images"], share(one["images"], n - bad))
        for one in images["frequent_sizes"]
        for w, h in [one["size"]]
    ]
    return [
        "## Images", "", f"{text} Of the others, {shapes}." if bad else f"{text} Of them, {shapes}.", "", *listed,
        *table(("pixels", "mean", *PERCENTILES), rows), *table(("frequent sizes", "images", "share"), sizes),
    ]  # fmt: skip


def _render_positions(found: Report | None) -> list[str]:
    if found is None:
        return []
    n, unfit = found["measured"], found["unfit"]
    lines = [f"{plural(unfit, 'row')} cannot be used with the template {found['template']}.", ""] if unfit else []
    if not n:
        return ["## Positions", "", *lines]
    lines += [
        f"Template {found['template']}, of {plural(n, 'row')}"
        f": {share(found['truncated'], n)} are longer than --max-length {found['max_length']:,} and are truncated, "
        f"{share(found['labels_truncated'], found['labels'])} of the trained tokens are lost, and "
        f"{share(found['without_answer'], n)} of the rows lose every answer.",
        "",
    ]
    lines += table(("per row", "mean", *PERCENTILES), [("positions", *found["positions"].values())])
    return ["## Positions", "", *lines, *_longest_rows(found["longest"], "positions")]


def _render_left_out(report: Report) -> list[str]:
    lines = ["## Left out", ""]
    if not any(report["left_out"].values()):
        lines += ["Nothing.", ""]
    else:
        counts = [(name.replace("_", " "), n, share(n, report["read"])) for name, n in report["left_out"].items()]
        lines += table(("rows", "number", "share of all read"), counts)
    if report["reasons"]:
        lines += table(("invalid because", "rows"), report["reasons"].items())
    if report["unread_keys"]:
        share_of_rows = share(report["rows_with_unread_keys"], report["read"])
        lines += [f"{share_of_rows} of the rows have keys that are not read:", ""]
        lines += table(("key", "rows"), report["unread_keys"].items())
    return lines

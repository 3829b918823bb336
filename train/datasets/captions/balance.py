"""Choose captions whose noun phrases are balanced, as the paper's CC3M-595K (LLaVA, Liu et al. 2023, appendix).

`find_phrases` runs spaCy; `select` is the paper's filter on its result, and needs nothing but NumPy.
"""

import array
import collections
import dataclasses
import itertools
import multiprocessing
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from llava_jax.console import InputError, first_line, note, shorten
from train.datasets.worker_processes import end_with_parent
from train.figures import label_counts, new_figure, save_figure

MODEL = "en_core_web_sm"
MIN_FREQUENCY = 3  # captions of a phrase; rarer ones are dropped
MAX_CAPTIONS = 100  # chosen for a phrase
TOP = 20  # phrases in the report
BATCH = 250  # captions that spaCy processes at once
UNUSED = (  # factories that noun phrases do not need
    *("ner", "beam_ner", "entity_linker", "entity_ruler", "span_ruler", "spancat"),
    *("lemmatizer", "trainable_lemmatizer", "textcat", "textcat_multilabel", "senter"),
)


@dataclasses.dataclass(frozen=True)
class Phrases:
    """The noun phrases of captions, each once per caption.

    names   the unique phrases, in order of appearance
    ids     int32 [n]: indices into `names`, caption by caption
    starts  int64 [captions + 1]: the phrases of caption i are ids[starts[i] : starts[i + 1]]
    """

    names: list[str]
    ids: np.ndarray
    starts: np.ndarray

    @property
    def captions(self) -> int:
        return len(self.starts) - 1

    def frequencies(self, chosen: np.ndarray | None = None) -> np.ndarray:
        """The number of captions, int64 [names], of each phrase, among all or those chosen, bool [captions]."""
        ids = self.ids if chosen is None else self.ids[np.repeat(chosen, np.diff(self.starts))]
        return np.bincount(ids, minlength=len(self.names))


def collect(phrases: Iterable[Iterable[str]]) -> Phrases:
    """Collect the phrases of each caption. They are compared in lower case, their spaces as one."""
    numbers: dict[str, int] = {}
    ids, starts = array.array("i"), array.array("q", [0])
    for of_caption in phrases:
        unique = dict.fromkeys(" ".join(phrase.lower().split()) for phrase in of_caption)
        ids.extend(numbers.setdefault(phrase, len(numbers)) for phrase in unique if phrase)
        starts.append(len(ids))
    return Phrases(list(numbers), np.array(ids, np.int32), np.array(starts, np.int64))


def select(phrases: Phrases, seed: int) -> np.ndarray:
    """The captions that the filter chooses: bool [captions].

    Phrases of fewer than `MIN_FREQUENCY` captions are dropped. From the lowest remaining frequency upwards (of equals,
    the first to appear), all captions with the phrase are added; of more than `MAX_CAPTIONS`, that many at random.
    """
    frequencies = phrases.frequencies()
    chosen = np.zeros(phrases.captions, bool)
    few = (frequencies >= MIN_FREQUENCY) & (frequencies <= MAX_CAPTIONS)
    caption_of = np.repeat(np.arange(phrases.captions, dtype=np.int32), np.diff(phrases.starts))
    chosen[caption_of[few[phrases.ids]]] = True

    is_many = (frequencies > MAX_CAPTIONS)[phrases.ids]
    ids, captions = phrases.ids[is_many], caption_of[is_many]
    captions = captions[np.argsort(ids, kind="stable")]  # by phrase, then by caption
    many = np.flatnonzero(frequencies > MAX_CAPTIONS)
    ends = np.cumsum(frequencies[many])
    rng = np.random.default_rng(seed)
    for i in np.argsort(frequencies[many], kind="stable"):
        of_phrase = captions[ends[i] - frequencies[many[i]] : ends[i]]
        chosen[rng.choice(of_phrase, MAX_CAPTIONS, replace=False)] = True
    return chosen


# ---------------------------------------------------------------- spaCy


def load_pipeline(name: str) -> Any:
    """A spaCy pipeline that finds noun phrases, without its components for anything else.

    Raises:
      InputError: spaCy or the pipeline is not installed, or it has no parser, or its language no noun phrases.
    """
    try:
        import spacy
    except ImportError:
        raise InputError("--balance needs spaCy: pip install 'llava-jax[data]'") from None
    flag = f"--spacy-model {shorten(name)}"
    try:
        pipeline = spacy.load(name)
    except OSError:
        raise InputError(
            f"{flag}: no such pipeline; install one with python -m spacy download {MODEL}, or give the directory of one"
        ) from None
    except Exception as error:  # whatever the pipeline's own code raises
        raise InputError(f"{flag}: cannot be loaded ({first_line(error)})") from None
    pipeline.select_pipes(
        disable=[pipe for pipe in pipeline.pipe_names if pipeline.get_pipe_meta(pipe).factory in UNUSED]
    )
    try:
        list(pipeline("a red bus on the street").noun_chunks)
    except NotImplementedError:
        raise InputError(f"{flag}: spaCy has no noun phrases for its language ({pipeline.lang})") from None
    except ValueError:
        raise InputError(f"{flag}: has no parser, which noun phrases need") from None
    return pipeline


def find_phrases(captions: Iterable[str], model: str, workers: int) -> Iterator[list[str]]:
    """The noun phrases of each caption, found by `workers` processes.

    The processes return phrases alone. spaCy's own (`n_process`) return whole documents, which takes longer than one
    process takes without them.

    Raises:
      InputError: as `load_pipeline`, or a process was killed.
    """
    pipeline, rest = load_pipeline(model), iter(captions)
    batches = iter(lambda: list(itertools.islice(rest, BATCH)), [])
    if workers == 1:
        for batch in batches:
            yield from _find_phrases(batch, pipeline)
        return
    spawn, pending = multiprocessing.get_context("spawn"), collections.deque[Future[list[list[str]]]]()
    pool = ProcessPoolExecutor(workers, spawn, _start_worker, (model,))
    try:
        for batch in batches:
            pending.append(pool.submit(_find_phrases, batch))
            if len(pending) > 2 * workers:
                yield from pending.popleft().result()
        for future in pending:
            yield from future.result()
    except BrokenExecutor:
        raise InputError(f"--workers {workers}: a process was killed; is there memory for fewer?") from None
    finally:
        pool.shutdown(cancel_futures=True)


_pipeline: Any = None  # of a process of `find_phrases`


def _start_worker(model: str) -> None:
    global _pipeline
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command itself is interrupted
    _pipeline = load_pipeline(model)


def _find_phrases(captions: list[str], pipeline: Any = None) -> list[list[str]]:
    docs = (pipeline or _pipeline).pipe(captions, batch_size=BATCH)
    return [[chunk.text for chunk in doc.noun_chunks] for doc in docs]


# ---------------------------------------------------------------- the report


def balance(captions: Iterable[str], directory: Path, model: str, workers: int, seed: int) -> np.ndarray:
    """Choose from captions, and write `balance.json` and `balance.png` into a directory.

    Returns:
      bool [captions].

    Raises:
      InputError: spaCy, its model or matplotlib is missing, or no phrase is frequent enough.
    """
    figure, [ax] = new_figure(1)  # before the work, in case matplotlib is missing
    phrases = collect(find_phrases(captions, model, workers))
    chosen = select(phrases, seed)
    if not chosen.any():
        raise InputError(
            f"--balance: no noun phrase is in {MIN_FREQUENCY} of the {phrases.captions:,} captions; none is chosen"
        )
    described = describe(phrases, chosen) | {"spacy_model": model, "seed": seed}
    (directory / "balance.json").write_bytes(msgspec.json.format(msgspec.json.encode(described), indent=2) + b"\n")
    draw(ax, phrases, chosen)
    figure.set_size_inches(6, 4)
    save_figure(figure, directory / "balance.png")
    for line in lines_of(described):
        note(line)
    return chosen


def describe(phrases: Phrases, chosen: np.ndarray) -> dict[str, Any]:
    """The contents of `balance.json`: counts before and after, and the most frequent phrases."""
    before, after = phrases.frequencies(), phrases.frequencies(chosen)
    top = np.argsort(-before, kind="stable")[:TOP]
    return {
        "captions": {"before": phrases.captions, "after": int(chosen.sum())},
        "unique_phrases": {"before": len(phrases.names), "after": int((after > 0).sum())},
        "frequent_phrases": int((before >= MIN_FREQUENCY).sum()),
        "top_phrases": [{"phrase": phrases.names[i], "before": int(before[i]), "after": int(after[i])} for i in top],
        "min_frequency": MIN_FREQUENCY,
        "max_captions": MAX_CAPTIONS,
    }


def lines_of(described: dict[str, Any]) -> list[str]:
    """The lines that are printed of `describe`."""
    captions, phrases = described["captions"], described["unique_phrases"]
    top = [f"{one['phrase']} {one['before']:,} -> {one['after']:,}" for one in described["top_phrases"][:8]]
    return [
        f"captions: {captions['before']:,} -> {captions['after']:,}",
        f"unique noun phrases: {phrases['before']:,} -> {phrases['after']:,} "
        f"({described['frequent_phrases']:,} are in at least {MIN_FREQUENCY} captions)",
        f"most frequent: {', '.join(map(shorten, top))}",
    ]


def draw(ax: Any, phrases: Phrases, chosen: np.ndarray) -> None:
    """Draw the frequencies of phrases, from the most frequent to the rarest, before and after."""
    for label, frequencies in (("before", phrases.frequencies()), ("after", phrases.frequencies(chosen))):
        values = np.sort(frequencies[frequencies > 0])[::-1]
        ax.step(np.arange(1, len(values) + 1), values, where="post", label=f"{label}: {len(values):,} unique phrases")
    ax.axhline(MAX_CAPTIONS, color="grey", linewidth=0.8, linestyle=":")
    ax.set(
        title="noun phrases of captions", xlabel="phrases, by frequency", ylabel="captions with the phrase",
        xscale="log", yscale="log",
    )  # fmt: skip
    for axis in (ax.xaxis, ax.yaxis):
        label_counts(axis)
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small")

"""The paper's filter by noun phrases: the selection against the paper's own words, spaCy with a small real pipeline."""

import collections
import json
import os
import random
import sys

import numpy as np
import pytest
from PIL import Image

from llava_jax.console import InputError
from train.datasets.captions import __main__ as captions
from train.datasets.captions import balance
from train.figures import new_figure

DETERMINERS, ADJECTIVES = ("a", "the"), ("red", "small", "old")
NOUNS, PREPOSITIONS = ("bus", "dog", "street", "cat", "house", "tree"), ("on", "near", "under")


# ---------------------------------------------------------------- the selection


def literal(phrases: list[list[str]], seed: int) -> set[int]:
    """The paper's text, sentence by sentence."""
    with_phrase: dict[str, list[int]] = collections.defaultdict(list)
    for caption, of_caption in enumerate(phrases):
        for phrase in dict.fromkeys(of_caption):
            with_phrase[phrase].append(caption)
    remaining = {phrase: found for phrase, found in with_phrase.items() if len(found) >= 3}
    rng, pool = np.random.default_rng(seed), set()
    for phrase in sorted(remaining, key=lambda phrase: len(remaining[phrase])):
        found = remaining[phrase]
        pool.update(found if len(found) <= 100 else rng.choice(found, 100, replace=False).tolist())
    return pool


@pytest.mark.parametrize("seed", range(6))
def test_the_selection_is_the_papers(seed):
    rng = np.random.default_rng(seed)
    drawn = [[f"p{i}" for i in rng.zipf(1.3, rng.integers(0, 6)) % 5000] for _ in range(3000)]
    chosen = balance.select(balance.collect(drawn), seed)
    assert set(np.flatnonzero(chosen).tolist()) == literal(drawn, seed)
    assert 100 < chosen.sum() < 2900
    assert (chosen != balance.select(balance.collect(drawn), seed + 1)).any()


def test_the_ends_of_the_range():
    """Two, three, a hundred and a hundred and one captions with a phrase."""
    drawn = [[name] for name, n in (("two", 2), ("three", 3), ("hundred", 100), ("more", 101)) for _ in range(n)]
    phrases = balance.collect(drawn)
    chosen = balance.select(phrases, 0)
    assert dict(zip(phrases.names, phrases.frequencies(chosen).tolist(), strict=True)) == {
        "two": 0, "three": 3, "hundred": 100, "more": 100,
    }  # fmt: skip


def test_phrases_are_counted_once_a_caption():
    phrases = balance.collect([["A  dog", "a dog", " "], [], ["a DOG", "It"]])
    assert phrases.names == ["a dog", "it"] and phrases.frequencies().tolist() == [2, 1]
    assert phrases.ids.tolist() == [0, 0, 1] and phrases.starts.tolist() == [0, 1, 1, 3]


# ---------------------------------------------------------------- spaCy


def draw_caption(pick: random.Random) -> dict[str, list]:
    """Two noun phrases with a preposition between them, annotated as spaCy's parser is trained."""

    def phrase():
        adjective = [(pick.choice(ADJECTIVES), "ADJ", "amod")] * (pick.random() < 0.5)
        return [(pick.choice(DETERMINERS), "DET", "det"), *adjective, (pick.choice(NOUNS), "NOUN", "ROOT")]

    first, second = phrase(), phrase()
    words, deps_of = [*first, (pick.choice(PREPOSITIONS), "ADP", "prep"), *second], ["words", "pos", "deps"]
    columns = {name: [word[i] for word in words] for i, name in enumerate(deps_of)}
    root, last = len(first) - 1, len(words) - 1
    columns["deps"][last] = "pobj"
    columns["heads"] = [root] * (len(first) + 1) + [last] * (len(second) - 1) + [len(first)]
    return columns


def phrases_of(caption: dict[str, list]) -> list[str]:
    at = caption["pos"].index("ADP")
    return [" ".join(caption["words"][:at]), " ".join(caption["words"][at + 1 :])]


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """Directories of spaCy pipelines: one trained to find noun phrases, one without a parser, one of a language without
    noun phrases."""
    import spacy
    from spacy.training import Example
    from thinc.api import fix_random_seed

    folder = tmp_path_factory.mktemp("pipelines")
    fix_random_seed(0)
    words = {
        "@architectures": "spacy.HashEmbedCNN.v2", "pretrained_vectors": None, "width": 32, "depth": 1,
        "embed_size": 500, "window_size": 1, "maxout_pieces": 2, "subword_features": False,
    }  # fmt: skip
    parser = {
        "@architectures": "spacy.TransitionBasedParser.v2", "state_type": "parser", "extra_state_tokens": False,
        "hidden_width": 32, "maxout_pieces": 2, "use_upper": True, "tok2vec": words,
    }  # fmt: skip
    nlp = spacy.blank("en")
    nlp.add_pipe("morphologizer", config={"model": {"@architectures": "spacy.Tagger.v2", "tok2vec": words}})
    nlp.add_pipe("parser", config={"model": parser})
    nlp.add_pipe("entity_ruler")
    pick = random.Random(0)
    drawn = [draw_caption(pick) for _ in range(60)]
    examples = [Example.from_dict(nlp.make_doc(" ".join(one["words"])), one) for one in drawn]
    optimizer = nlp.initialize(lambda: examples)
    for _ in range(8):
        for i in range(0, len(examples), 6):
            nlp.update(examples[i : i + 6], sgd=optimizer, drop=0.0)
    nlp.to_disk(folder / "english")
    spacy.blank("en").to_disk(folder / "words")
    spacy.blank("cs").to_disk(folder / "czech")
    return folder


@pytest.mark.parametrize("workers", [1, 2])
def test_spacy_finds_the_phrases(pipelines, monkeypatch, workers):
    pick = random.Random(1)
    drawn = [draw_caption(pick) for _ in range(1500)]
    monkeypatch.setattr(balance, "BATCH", 100)
    found = list(balance.find_phrases((" ".join(one["words"]) for one in drawn), str(pipelines / "english"), workers))
    assert len(found) == 1500
    assert sum(got == phrases_of(one) for got, one in zip(found, drawn, strict=True)) > 1485


def test_components_that_are_not_needed_do_not_run(pipelines):
    assert balance.load_pipeline(str(pipelines / "english")).pipe_names == ["morphologizer", "parser"]


def test_a_process_that_is_killed(pipelines, monkeypatch):
    monkeypatch.setattr(balance, "_start_worker", os._exit)
    with pytest.raises(InputError, match="^--workers 2: a process was killed"):
        list(balance.find_phrases(["a dog"], str(pipelines / "english"), 2))


@pytest.fixture
def source(tmp_path, monkeypatch):
    """Captions in a file of the current directory, some without an image: their phrases."""
    monkeypatch.chdir(tmp_path)
    pick = random.Random(2)
    different = [draw_caption(pick) for _ in range(60)]
    drawn = pick.choices(different, [1 / (1 + i) for i in range(60)], k=1200)
    rows = [{"image": f"{i}.jpg", "caption": " ".join(one["words"])} for i, one in enumerate(drawn)]
    del rows[5]["image"], drawn[5]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [phrases_of(one) for one in drawn]


def test_the_command_balances(source, pipelines, run_cli, tmp_path):
    flags = ("--captions", "c.jsonl", "--balance", "--spacy-model", pipelines / "english", "--workers", 1)
    status, _, err = run_cli(captions.main, *flags, "--output", "out", "--seed", 3)
    assert status == 0, err
    rows = json.loads((tmp_path / "out/captions.json").read_text())
    whole = json.loads("[" + (tmp_path / "c.jsonl").read_text().replace("\n", ",") + "]")
    usable = [row for row in whole if "image" in row]
    phrases = balance.find_phrases([row["caption"] for row in usable], str(pipelines / "english"), 1)
    found = [[text.lower() for text in one] for one in phrases]
    pool = literal(found, 3)
    assert [row["image"] for row in rows] == [row["image"] for i, row in enumerate(usable) if i in pool]
    assert 300 < len(rows) < 1199

    described = json.loads((tmp_path / "out/balance.json").read_text())
    before, after = (
        collections.Counter(p for one in some for p in set(one)) for some in (found, [found[i] for i in pool])
    )
    assert described["captions"] == {"before": 1199, "after": len(rows)}
    assert described["unique_phrases"] == {"before": len(before), "after": len(after)}
    assert len(described["top_phrases"]) == balance.TOP
    top = described["top_phrases"][0]
    assert top == {"phrase": top["phrase"], "before": max(before.values()), "after": after[top["phrase"]]}
    assert before[top["phrase"]] == top["before"]
    lines = err.splitlines()
    assert lines[0] == f"captions: 1,199 -> {len(rows):,}" and lines[2].startswith(f"most frequent: {top['phrase']} ")
    assert lines[-2:] == [
        "1 row left out, listed in out/left_out.jsonl", f"{len(rows):,} captions in out/captions.json"
    ]  # fmt: skip
    image = Image.open(tmp_path / "out/balance.png").convert("RGB")
    assert image.width > 400 and len(image.getcolors(10**6)) > 50


def test_the_curves_are_the_frequencies():
    phrases = balance.collect([["a", "b"], ["a"], ["a", "b"], ["c"], ["a"]])
    _, [ax] = new_figure(1)
    balance.draw(ax, phrases, np.array([True, False, True, True, False]))
    before, after, _ = ax.get_lines()
    assert list(before.get_ydata()) == [4, 2, 1] and list(after.get_ydata()) == [2, 2, 1]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "before: 3 unique phrases",
        "after: 3 unique phrases",
    ]


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("words", "has no parser, which noun phrases need"),
        ("czech", "spaCy has no noun phrases for its language (cs)"),
        (
            "none",
            "no such pipeline; install one with python -m spacy download en_core_web_sm, or give the directory of",
        ),
        ("broken", "cannot be loaded ("),
    ],
)
def test_a_pipeline_that_cannot_be_used(source, pipelines, run_cli, tmp_path, model, says):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/meta.json").write_text('{"lang": "en"}')
    (tmp_path / "broken/config.cfg").write_text("[nlp")
    path = tmp_path / model if model == "broken" else pipelines / model
    status, _, err = run_cli(
        captions.main, "--captions", "c.jsonl", "--output", "out", "--balance", "--spacy-model", path
    )
    assert (status, err.count("\n")) == (1, 1) and err.startswith(f"error: --spacy-model {path}: {says}"[:100]), err
    assert says in err and not (tmp_path / "out").exists()


def test_too_few_captions(pipelines, run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.jsonl").write_text('{"image": "a", "caption": "a dog on the street"}')
    flags = ("--captions", "c.jsonl", "--output", "out", "--balance", "--workers", 1)
    status, _, err = run_cli(captions.main, *flags, "--spacy-model", pipelines / "english")
    assert (status, err) == (1, "error: --balance: no noun phrase is in 3 of the 1 captions; none is chosen\n")


@pytest.mark.parametrize(
    ("module", "says"),
    [
        ("spacy", "--balance needs spaCy: pip install 'llava-jax[data]'"),
        ("matplotlib.figure", "plots need matplotlib: pip install 'llava-jax[plots]'"),
    ],
)
def test_without_the_libraries(source, run_cli, monkeypatch, tmp_path, module, says):
    monkeypatch.setitem(sys.modules, module, None)
    status, _, err = run_cli(captions.main, "--captions", "c.jsonl", "--output", "out", "--balance")
    assert (status, err) == (1, f"error: {says}\n") and not (tmp_path / "out").exists()

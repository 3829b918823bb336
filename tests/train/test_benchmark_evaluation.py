"""Benchmarks that are scored during training: answers are those of the weights of their steps, and change nothing."""

import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import vqa_miniatures
from helpers import one_device
from infer import evaluate
from infer.benchmarks.benchmark import Answer
from llava_jax import config as c
from llava_jax.aot.programs import compilations
from llava_jax.console import InputError
from llava_jax.models import llava
from llava_jax.sharding.mesh import inference_mesh, make_mesh, parse_mesh
from llava_jax.sharding.partition import Partition
from train import evaluation, loop, lora
from train.parameters import split_params
from training import PLAIN, random_params, read_metrics, steps_and_losses

FEW = 8  # arrays that JAX itself keeps


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A directory of benchmarks with ten questions of POPE about five images; others without labels or images."""
    root = tmp_path_factory.mktemp("eval")
    pope = vqa_miniatures.write("pope", root)
    for name, missing in (("unlabelled", "coco"), ("blind", "val2014")):
        shutil.copytree(pope, root / name / "pope", ignore=shutil.ignore_patterns(missing))
    return root


# ---------------------------------------------------------------- runs


def test_scores_are_those_of_the_weights_and_change_nothing(
    train, finished, files, on_one_device, run_cli, monkeypatch, tmp_path
):
    """A run is stopped and resumed. Its losses are those of a run without benchmarks, and at the end its answers and
    its score what the command makes of that run's model."""
    compiled, answers = [], []
    ask, score, at = evaluation.ask_all, loop.score_benchmarks, loop.StopSignal.at

    def measured(*args):
        before, held = compilations(), len(jax.live_arrays())
        scores = score(*args)
        assert len(jax.live_arrays()) <= held + FEW
        compiled.append(compilations() - before)
        return scores

    monkeypatch.setattr(loop, "score_benchmarks", measured)
    monkeypatch.setattr(evaluation, "ask_all", lambda *args: answers.append(ask(*args)) or answers[-1])

    def stop(self, step):
        if step == 5:
            signal.raise_signal(signal.SIGTERM)
        return at(self, step)

    monkeypatch.setattr(loop.StopSignal, "at", stop)
    output, few = tmp_path / "out", ("--eval-batch-size", 4)
    more = ("--eval-every", 4, "--eval-benchmarks", "pope", "--eval-data-dir", files, *few)
    assert train(output, *more)[0] == 128 + signal.SIGTERM
    monkeypatch.setattr(loop.StopSignal, "at", at)
    status, _, err = train(output, *more)
    assert status == 0
    assert steps_and_losses(output) == steps_and_losses(finished[0])
    scores = {line["step"]: line["eval_pope"] for line in read_metrics(output) if "eval_pope" in line}
    assert [*scores] == [4, 8, 10]
    assert f"evaluation after step 10: POPE, mean F1 {scores[10]:.2f}, 10 questions\n" in err
    assert sum(compiled[1:]) < compiled[0] / 4  # how many prompts are decoded at once depends on the clock

    monkeypatch.setattr("infer.engine.inference_mesh", lambda config, devices: one_device())
    flags = ("--benchmark", "pope", "--data-dir", files, "--checkpoint", finished[0] / "model", "--batch-size", 4)
    status, out, err = run_cli(evaluate.main, *flags, "--output", tmp_path / "results", "--json")
    assert status == 0, err
    assert scores[10] == json.loads(out)["value"] * 100
    wanted = map(json.loads, (tmp_path / "results" / "pope" / "answers.jsonl").read_text().splitlines())
    wanted = [(line["question_id"], line["text"]) for line in wanted]
    first, *_, last = [[(answer.id, answer.text) for answer in some] for some in answers]
    assert last == wanted and first != wanted


def test_a_signal_ends_an_evaluation(capsys):
    stop = SimpleNamespace(number=0)
    answers = evaluation.Answers(stop)
    answers.append({})
    stop.number = signal.SIGTERM
    with pytest.raises(InputError, match="a signal stops the run"):
        answers.append({})
    assert evaluation.score_benchmarks(None, 3, {}, {}, stop) == {}
    assert capsys.readouterr().err == "warning: no scores after step 3: a signal stops the run\n"


def test_processes_answer_a_share_each(files, monkeypatch, capsys):
    """All have the answers of all, in the order of the questions; of one that failed there is a warning."""
    config = PLAIN.replace(eval_benchmarks=("pope",), eval_data_dir=str(files))
    (task,) = evaluation.open_benchmarks(config)

    class Engine:
        template = SimpleNamespace(style="v1")

        def generate(self, requests, settings, *, rows):
            for i, request in reversed([*enumerate(requests)]):
                failed = "line 5" in request.name
                yield (
                    i,
                    InputError("too long") if failed else SimpleNamespace(text=request.turns[0], token_ids=[1]),
                )

    found, texts = [], []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(evaluation, "together", lambda what, work, same: work())
    monkeypatch.setattr(evaluation, "share", lambda text: texts.append(text) or texts)
    for process in (1, 0):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        found.append(evaluation.ask_all(Engine(), task, 4, SimpleNamespace(number=0)))
    assert 0 < len(found[0]) < len(found[1]) == 9
    asked = [question for question in task.questions if "line 5" not in question.name]
    assert [(one.id, one.prompt, one.text) for one in found[1]] == [(q.id, q.prompt, q.turns[0]) for q in asked]
    assert "warning: 1 of 10 questions of pope could not be asked, and count as wrong" in capsys.readouterr().err


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize(
    ("tune", "mesh", "dtype"), [("lora", "fsdp=2,tensor=2", "float32"), ("projector,decoder", "fsdp=8", "bfloat16")]
)
def test_an_engine_gets_the_weights_in_training(tune, mesh, dtype):
    """All of them, one entry per layer, cast, with LoRA merged as in the result, sharded for inference."""
    model, config, random = c.tiny(), PLAIN.replace(tune=tune, dtype=dtype), np.random.default_rng(0)
    sizes = parse_mesh(mesh)
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    frozen, trained = split_params(random_params(model), config, Partition(model, mesh))
    factors = {path: random.standard_normal(x.shape, np.float32) for path, x in trained.items() if "lora" in path}
    trained |= {path: jax.device_put(x, trained[path].sharding) for path, x in factors.items()}
    got, local = evaluation.local_params(*(unflatten_dict(x, sep="/") for x in (frozen, trained)), model, config, mesh)
    assert local.shape == inference_mesh(model, list(mesh.devices.flat)).shape
    shardings = flatten_dict(Partition(model, local).shardings(llava.param_shapes(model)), sep="/")
    got, want = flatten_dict(got, sep="/"), flatten_dict(random_params(model), sep="/")
    assert got.keys() == want.keys()
    for path, x in got.items():
        head, _, tail = path.partition("/layers/")
        number, _, tail = tail.partition("/")
        base = f"{head}/layers/{tail}".removesuffix("kernel")
        if base + "lora_a" in factors:
            a, b = (factors[base + name][int(number)] for name in lora.FACTORS)
            want[path] = lora.merged(want[path], a, b, config)
        assert x.dtype == dtype and x.sharding == shardings[path], path
        np.testing.assert_allclose(np.asarray(x), np.asarray(want[path].astype(x.dtype)), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- before a run


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--eval-benchmarks", "pope"], "--eval-benchmarks needs --eval-data-dir"),
        (["--eval-limit", "3"], "--eval-limit: is for --eval-benchmarks, which is not given"),
        (["--eval-benchmarks", "poe", "--eval-data-dir", "FILES"], "benchmark 'poe': is not known"),
        (["--eval-benchmarks", "pope,pope", "--eval-data-dir", "FILES"], "names a benchmark twice"),
        (["--eval-benchmarks", "mm-vet", "--eval-data-dir", "FILES"], "a language model scores its answers"),
        (["--eval-benchmarks", "pope", "--eval-data-dir", "FILES/missing"], "llava_pope_test.jsonl: not found"),
        (["--eval-benchmarks", "pope", "--eval-data-dir", "FILES/unlabelled"], "coco_pope_random.json: not found"),
        (["--eval-benchmarks", "pope", "--eval-data-dir", "FILES/blind"], "no question can be asked"),
    ],
)
def test_errors_come_before_training(train, files, tmp_path, more, says):
    status, _, err = train(tmp_path / "out", *(word.replace("FILES", str(files)) for word in more))
    assert (status, err.count("\n")) == (1, 1) and says in err, err
    assert not (tmp_path / "out").exists()


def test_questions_and_answers_of_different_releases(tmp_path):
    """The line of the question is named."""
    path = vqa_miniatures.write("gqa", tmp_path) / "data/testdev_balanced_questions.json"
    path.write_text(path.read_text().replace('"200000004": {', '"300000004": {'))
    config = PLAIN.replace(eval_benchmarks=("gqa",), eval_data_dir=str(tmp_path))
    with pytest.raises(InputError, match=r"balanced\.jsonl line 5: the files that it is scored by have no question"):
        evaluation.open_benchmarks(config)


def test_some_questions_of_a_benchmark(files, tmp_path, capsys):
    """The first ones, which have a score of their own; of images that are missing there is a warning."""
    shutil.copytree(files / "pope", tmp_path / "pope")
    config = PLAIN.replace(eval_benchmarks=("pope",), eval_data_dir=str(tmp_path), eval_limit=6)
    (task,) = evaluation.open_benchmarks(config)
    assert task.key == "eval_pope_first_6" and not capsys.readouterr().err
    Path(task.questions[0].images[0]).unlink()
    evaluation.open_benchmarks(config)
    assert " of 6 questions of pope cannot be asked, and count as wrong; the first: " in capsys.readouterr().err
    score = task.score([Answer(question.id, question.prompt, "yes") for question in task.questions])
    assert 0 < score.value < 1 and len(score.marks) == 6 and score.unanswered == 0

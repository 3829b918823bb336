"""The engine as a model of lmms-eval, in the harness's own process.

    python -m lmms_eval --model llava_jax --model_args checkpoint=DIR --tasks pope,mme --batch_size 32

The package's entry point in the group `lmms_eval.models` is `manifest`, by which lmms-eval 0.7 finds the model.
`LlavaJax` answers chat tasks; `--force_simple` selects `LlavaJaxSimple`, which has the tasks' likelihoods as well (the
harness has none of chat tasks) and questions whose text says where their images belong.
"""

import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms

from infer.lmms_eval_requests import read_messages, read_settings, read_visuals
from infer.prompt import Request
from infer.sampling import Sampling
from llava_jax.console import InputError, Progress, enable_compilation_cache, integer, note, plural, show_value
from llava_jax.data.buckets import MAX_SLOTS

MAX_SHOWN = 10  # failed questions that are logged; the rest are counted
DTYPES = ("bfloat16", "float32")


def manifest():
    """The model as lmms-eval registers it (lmms_eval/models/registry_v2.py)."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="llava_jax",
        simple_class_path=f"{__name__}.{LlavaJaxSimple.__name__}",
        chat_class_path=f"{__name__}.{LlavaJax.__name__}",
    )


class LlavaJax(lmms):
    """A LLaVA checkpoint that answers lmms-eval's chat tasks: images and text, in one turn or several.

    Questions are asked in the harness's order, `batch_size` at a time; those whose generation settings differ are asked
    one setting after another. A question that cannot be asked is logged, has the answer "", and so counts as wrong.
    Video, audio, and settings that are not implemented end the evaluation with an error that names them.
    """

    is_simple = False

    def __init__(
        self,
        checkpoint: str,
        *,
        mesh: str | None = None,
        dtype: str | None = None,
        int8_cache: bool = False,
        template: str | None = None,
        vision_tower: str | None = None,
        image_rules: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        """The values of `--model_args`, which are those of `Engine.load`, and three flags of lmms-eval.

        Args:
          mesh: with several axes in quotes, `mesh="data=2,tensor=4"`, since a comma separates arguments.
          batch_size: `--batch_size`, how many questions are answered at once.

        Raises:
          InputError: an argument is invalid, or a flag is set that has no meaning here.
        """
        super().__init__()
        if dtype not in (None, *DTYPES):
            raise InputError(f"dtype {show_value(dtype)}: must be {' or '.join(DTYPES)}")
        if not isinstance(int8_cache, bool):
            raise InputError(f"int8_cache {show_value(int8_cache)}: must be true or false")
        if device is not None or max_batch_size is not None:
            flag, use = ("--device", "JAX_PLATFORMS") if device is not None else ("--max_batch_size", "--batch_size")
            raise InputError(f"{flag}: is not implemented by llava_jax; use {use}")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise InputError("llava_jax uses all devices in one process; run `python -m lmms_eval` without a launcher")
        integer(1, MAX_SLOTS).check("--batch_size", int(batch_size) if str(batch_size).isdecimal() else batch_size)
        self.rows = int(batch_size)
        self._logged: set[str] = set()
        self._failed = 0

        enable_compilation_cache()
        from infer.engine import Engine  # imports JAX, which lmms-eval's other models need not wait for

        self.engine = Engine.load(
            str(checkpoint), mesh=mesh and mesh.strip("\"'"), dtype=dtype, int8_cache=int8_cache, template=template,
            vision_tower=vision_tower, image_rules=image_rules,
        )  # fmt: skip

    # ------------------------------------------------------------ answers

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Answer questions; results are in their order, with the numbers of their tokens."""
        results = [GenerationResult("", TokenCounts(0, 0)) for _ in requests]
        settings = [self._settings(request) for request in requests]
        start, tokens = time.monotonic(), 0
        with Progress("answering", len(requests), "questions") as bar:
            for i, answer in self._ask(settings, lambda i: self._question(requests[i], i)):
                bar.advance()
                if answer is not None:
                    counts = TokenCounts(answer.prompt_tokens, len(answer.token_ids))
                    results[i] = GenerationResult(answer.text, counts)
                    tokens += len(answer.token_ids)
        self._log_failed(len(requests))
        _log_throughput(tokens, time.monotonic() - start)
        return results

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """Ask questions that depend on the answers before, until the task ends; an answer is a text per round.

        The task's `doc_to_messages` is given the answers so far, as by lmms_eval/models/chat/vllm.py, and makes the
        whole prompt of a round of them.
        """
        rounds: list[list[str]] = []
        with Progress("answering", len(requests), "questions") as bar:
            for start in range(0, len(requests), self.rows):  # few, whose images are in memory
                some = requests[start : start + self.rows]
                rounds += self._ask_in_rounds(some, start)
                bar.advance(len(some))
        self._log_failed(len(requests))
        return rounds

    def loglikelihood(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Score continuations: (cross entropy per token, whether greedy decoding gives the continuation).

        Each is in a `GenerationResult`, since lmms-eval 0.7.3 makes a string of a tuple (lmms_eval/api/instance.py
        `unwrap_generation_output`).

        It is a loss, not a likelihood, since the harness chooses the least one (lmms_eval/api/task.py
        `process_results`) and all models of lmms-eval return it. What ends the answer is not part of it. Consecutive
        requests with the same question share its computation.

        Raises:
          InputError: a question cannot be asked. A loss in its place might be chosen.
        """
        results: list[GenerationResult] = []
        with Progress("scoring", len(requests), "continuations") as bar:
            for _, group in itertools.groupby(requests, key=_asked):
                same = list(group)
                for score in self._score(same):
                    loss = -score.logprob / len(score.token_ids)
                    results.append(GenerationResult((loss, score.is_greedy)))
                bar.advance(len(same))
        return results

    # ------------------------------------------------------------ questions

    def _question(self, request: Any, number: int) -> Request:
        """The question of a chat task."""
        _, doc_to_messages, _, *_ = request.args
        return read_messages(doc_to_messages(self._document(request)), _name(request), number)

    def _round(self, request: Any, number: int, answers: list[str], memory: Any) -> tuple[list | None, Any]:
        """The messages of a round, None if the task has ended, and what it wants to be given with the next one."""
        _, doc_to_messages, _, *_ = request.args
        if number == 0:
            return doc_to_messages(self._document(request)), None
        found = doc_to_messages(
            self._document(request), round_idx=number, previous_output=list(answers), previous_round_info=memory
        )
        if not isinstance(found, tuple) or len(found) != 4:  # a task with a single round
            return None, None
        messages, ended, _, memory = found
        return (None if ended else messages), memory

    def _document(self, request: Any) -> Any:
        *_, document, task, split = request.args
        return self.task_dict[task][split][document]

    def _settings(self, request: Any) -> Sampling:
        settings: Mapping[str, Any] = next((argument for argument in request.args if isinstance(argument, Mapping)), {})
        try:
            sampling, warnings = read_settings(settings)
        except InputError as error:
            raise InputError(f"{_name(request)}: {error}") from None
        if sampling.max_new_tokens > self.engine.context:
            warnings.append(
                f"max_new_tokens {sampling.max_new_tokens}: answers end with the context, {self.engine.context} tokens"
            )
        for warning in warnings:
            if warning not in self._logged:
                note(f"warning: {_task(request)}: {warning}")
        self._logged.update(warnings)
        return sampling

    def _ask(self, settings: Sequence[Sampling], read: Callable[[int], Request]) -> Iterator[tuple[int, Any]]:
        """Answer questions: one for each of `settings`, which `read` reads when it is about to be asked.

        Yields:
          The index of a question and its answer, or None if it failed, in the order in which they finish.
        """
        for sampling in dict.fromkeys(settings):
            numbers = [i for i, one in enumerate(settings) if one == sampling]
            for k, answer in self.engine.generate(map(read, numbers), sampling, rows=self.rows):
                if isinstance(answer, InputError):
                    self._failed += 1
                    if self._failed <= MAX_SHOWN:
                        note(f"error: {answer}")
                yield numbers[k], None if isinstance(answer, InputError) else answer

    def _ask_in_rounds(self, requests: Sequence[Any], first: int) -> list[list[str]]:
        """All answers to each request; in every round all are asked at once. `first` is the number of the first one."""
        answers: list[list[str]] = [[] for _ in requests]
        memory: list[Any] = [None] * len(requests)
        running = list(range(len(requests)))
        for number in itertools.count():
            asked: dict[int, Request] = {}
            for i in running:
                messages, memory[i] = self._round(requests[i], number, answers[i], memory[i])
                if messages is not None:
                    asked[i] = read_messages(messages, _name(requests[i]), first + i)
            if not (running := list(asked)):
                break
            settings = [self._settings(requests[i]) for i in running]
            for k, answer in self._ask(settings, list(asked.values()).__getitem__):
                answers[running[k]].append(answer.text if answer else "")
        return answers

    def _score(self, requests: list[Any]) -> list[Any]:
        """Score the continuations of one question, those of `requests`."""
        name, arguments = _name(requests[0]), requests[0].args
        if len(arguments) == 2:
            raise InputError(f"{name}: acc_mutual_info, which needs answers without a question, is not implemented")
        context, _, doc_to_visual, *_ = arguments
        images = read_visuals(doc_to_visual(self._document(requests[0])), name)
        targets = (request.args[1] for request in requests)
        texts = [target(self._document(requests[0])) if callable(target) else target for target in targets]
        # The template puts a space, or none, before the answer.
        candidates = [text.strip() if isinstance(text, str) else text for text in texts]
        try:
            return self.engine.score(context, candidates, images)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None

    def _log_failed(self, asked: int) -> None:
        if self._failed:
            note(f"error: {self._failed:,} of {plural(asked, 'question')} could not be asked, and count as wrong")
        self._failed = 0


class LlavaJaxSimple(LlavaJax):
    """The same for lmms-eval's simple tasks, of a text and images, and for likelihoods."""

    is_simple = True

    def _question(self, request: Any, number: int) -> Request:
        """The question of a simple task: images are where its text has `<image>`, or, if it has none, in front."""
        context, _, doc_to_visual, *_ = request.args
        name = _name(request)
        return Request(
            (context,), tuple(read_visuals(doc_to_visual(self._document(request)), name)), None, name, number
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        raise InputError(f"{_task(requests[0])}: several rounds need chat tasks; run it without --force_simple")


# ---------------------------------------------------------------- requests


def _task(request: Any) -> str:
    return str(request.args[-2]) if len(request.args) > 2 else str(request.task_name)


def _name(request: Any) -> str:
    """A document's name in errors."""
    number = request.args[-3] if len(request.args) > 2 else request.doc_id
    return f"{_task(request)} document {number}"


def _asked(request: Any) -> tuple:
    """What is equal for continuations of the same question."""
    return request.args[0], *request.args[3:]


def _log_throughput(tokens: int, seconds: float) -> None:
    """Add to the throughput that lmms-eval reports with its results."""
    from lmms_eval.models.model_utils.gen_metrics import log_metrics

    speed = tokens / seconds if seconds else 0.0
    log_metrics(total_elapsed_time=seconds, total_gen_tokens=tokens, avg_speed=speed)

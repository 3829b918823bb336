"""The engine: answers questions about images in batches, with every shape rounded up to one of a few buckets.

A batch goes through the functions of `infer.compiled`, whose static shapes all come from `Buckets`. After warm-up no
image and no prompt compiles anything.
"""

import bisect
import concurrent.futures
import dataclasses
import os
import time
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from infer import compiled
from infer.next_token import row_keys
from infer.sampling import Sampling
from llava_jax.aot.programs import compilations, limit_programs
from llava_jax.checkpoints.checkpoint import default_dtype, open_checkpoint
from llava_jax.config import LlavaConfig
from llava_jax.console import InputError, integer
from llava_jax.data.buckets import Buckets
from llava_jax.data.images import image_size, read_tiles, tile_layout
from llava_jax.data.prompts import add_image_tokens, encode_prompt, end_ids, prepare_tokenizer
from llava_jax.data.splice import IMAGE, TEXT, Batch, Row, splice, spliced_length
from llava_jax.data.templates import choose_template, get_template
from llava_jax.data.tokenizer import Tokenizer
from llava_jax.data.urls import fetch
from llava_jax.models import llava
from llava_jax.sharding.mesh import inference_mesh, make_mesh, parse_mesh
from llava_jax.sharding.partition import Partition, put_rows

STEPS = 64  # decode steps between checks for a stop string
STREAM_STEPS = 8  # the same when streaming


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt. `turns` is question, answer, ..., question; `images` are paths, URLs, bytes or Pillow images."""

    turns: tuple[str | None, ...]
    images: tuple = ()
    system: str | None = None
    name: str = ""  # for errors
    number: int = 0  # selects the row's random key


@dataclasses.dataclass(frozen=True)
class Answer:
    text: str
    token_ids: list[int]  # as generated, the end token included
    prompt_tokens: int  # positions of the prompt, image features included
    image_tokens: int  # those of them that are image features
    bucket: int  # positions that the prompt was padded to
    compilations: int  # functions compiled for the batch that this answer came from
    prefill_seconds: float  # of that batch, from tiles and token ids to the first token
    decode_tokens_per_second: float  # of that batch, summed over rows, after the first token
    stopped_by: str  # "end" token, "stop" string, or "length"


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """A tokenized request: its row has everything except pixels."""

    request: Request
    row: Row
    length: int

    @property
    def image_tokens(self) -> int:
        return self.length - int((self.row.ids != IMAGE).sum())


# ---------------------------------------------------------------- the engine


class Engine:
    """A model on its devices, with its tokenizer and template, ready to answer questions.

    >>> engine = Engine.load("llava-v1.5-7b")
    >>> engine.ask("What is in this image?", ["photo.jpg"]).text
    """

    def __init__(
        self,
        params: llava.Params,
        config: LlavaConfig,
        tokenizer: Tokenizer,
        mesh: Mesh,
        *,
        int8_cache: bool = False,
        template: str | None = None,
        buckets: Buckets | None = None,
    ):
        self.params, self.config, self.tokenizer, self.mesh = params, config, tokenizer, mesh
        self.partition = Partition(config, mesh)
        self.int8_cache = int8_cache
        self.template_name = template or choose_template(config)
        self.template = get_template(self.template_name)
        self.buckets = buckets or Buckets()
        prepare_tokenizer(tokenizer, config)
        self.eos_ids = end_ids(config, tokenizer, self.template)

    @classmethod
    def load(
        cls,
        checkpoint: str | os.PathLike,
        *,
        mesh: str | Mesh | None = None,
        dtype=None,
        int8_cache: bool = False,
        template: str | None = None,
        vision_tower: str | os.PathLike | None = None,
        image_rules: str | None = None,
        buckets: Buckets | None = None,
    ) -> "Engine":
        """Load a checkpoint onto the devices.

        Args:
          checkpoint: an Orbax directory, a directory of safetensors, or a hub name.
          mesh: `"data=1,fsdp=1,tensor=4"` or a mesh of those axes; None for the largest `tensor` that divides
            the key/value heads.
          dtype: of weights and activations; None for bfloat16 on accelerators and float32 on CPUs.
          int8_cache: quantize the KV cache, which takes half the memory of bfloat16; answers may change.
          template: a conversation template by name; None for the checkpoint's own.
          vision_tower: a CLIP directory, for originals that come without their tower.
          image_rules: "original" or "transformers", which differ in how they tile some images.

        Raises:
          InputError: any of these is invalid.
        """
        found = open_checkpoint(checkpoint, vision_tower=vision_tower)
        config = found.config.with_image_rules(image_rules) if image_rules else found.config
        get_template(template or choose_template(config))  # raises before the weights are read
        mesh = mesh or inference_mesh(config)
        mesh = make_mesh(parse_mesh(mesh)) if isinstance(mesh, str) else mesh
        params = found.load(mesh, dtype or default_dtype(mesh))
        return cls(params, config, found.tokenizer, mesh, int8_cache=int8_cache, template=template, buckets=buckets)

    @property
    def context(self) -> int:
        """The decoder's maximum number of positions."""
        return self.config.text.max_positions

    # ------------------------------------------------------------ questions

    def ask(
        self, prompt: str | Sequence[str], images: Sequence = (), *, system: str | None = None, **sampling
    ) -> Answer:
        """Answer one question.

        Args:
          prompt: the question, or a conversation: question, answer, ..., question. Images are placed at its `<image>`
            marks, or, without marks, before it.
          images: paths, `http(s):`, `data:` or `file:` URLs, bytes of files, or Pillow images.
          system: a system message instead of the template's.
          **sampling: fields of `Sampling`.

        Raises:
          InputError: an image cannot be read, the numbers of marks and images differ, or the prompt is too long.
        """
        request = _request(prompt, images, system)
        [(_, answer)] = self.generate([request], Sampling(**sampling), rows=1)
        if isinstance(answer, InputError):
            raise answer
        return answer

    def stream(self, prompt, images: Sequence = (), *, system: str | None = None, **sampling) -> Iterator[str | Answer]:
        """Like `ask`, but yields the text as it is generated, and the whole `Answer` at the end."""
        settings = Sampling(**sampling)
        prepared = self._prepare(_request(prompt, images, system))
        shown = ""
        for answers in self._run([prepared], [self._pixels(prepared)], settings, steps=STREAM_STEPS):
            text = self._settled(answers[0])
            if len(text) > len(shown):
                yield text[len(shown) :]
                shown = text
        answer = answers[0]
        if len(answer.text) > len(shown):
            yield answer.text[len(shown) :]
        yield answer

    def _settled(self, answer: Answer) -> str:
        """The prefix of an unfinished answer's text that further tokens cannot change."""
        if answer.stopped_by:
            return answer.text
        text, stop = self.tokenizer.decode_settled(answer.token_ids).strip(), self.template.stop
        if stop:
            held = max((n for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
            text = text[: len(text) - held]
        return text

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, rows: int = 8
    ) -> Iterator[tuple[int, Answer | InputError]]:
        """Answer many questions, batched by size, in the order in which they finish.

        While the device works on a batch, threads read the images of the next.

        Args:
          rows: the maximum batch size, up to the largest bucket.

        Raises:
          InputError: `rows` is out of range.

        Yields:
          The index of a question and its answer, or the error that made it fail; other questions are not affected.
        """
        integer(1, self.buckets.rows[-1]).check("--batch-size", rows)
        prepared: list[tuple[int, _Prepared]] = []
        for i, request in enumerate(requests):
            try:
                prepared.append((i, self._prepare(request)))
            except InputError as error:
                yield i, error
        prepared.sort(key=lambda item: (self.buckets.up("tiles", item[1].row.tile_count), item[1].length))
        batches = [prepared[i : i + rows] for i in range(0, len(prepared), rows)]
        with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            read = lambda batch: [pool.submit(self._pixels, item) for _, item in batch]  # noqa: E731
            ahead = read(batches[0]) if batches else []
            for n, batch in enumerate(batches):
                futures, ahead = ahead, read(batches[n + 1]) if n + 1 < len(batches) else []
                good, pixels = [], []
                for (i, item), future in zip(batch, futures, strict=True):
                    try:
                        pixels.append(future.result())
                        good.append((i, item))
                    except InputError as error:
                        yield i, error
                if not good:
                    continue
                *_, answers = self._run([item for _, item in good], pixels, sampling, steps=STEPS)
                yield from ((i, answer) for (i, _), answer in zip(good, answers, strict=True))

    def logits(
        self, turns: str | Sequence[str | None], images: Sequence = (), *, system: str | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Logits for every position of a conversation.

        Args:
          turns: question, answer, ...; None at the end for a prompt that the model would continue.

        Returns:
          The logits, float32 [n, V], and for each position, int32 [n], a token id or `splice.IMAGE`.
        """
        turns = (turns, None) if isinstance(turns, str) else tuple(turns)
        item = self._prepare(Request(turns, tuple(images), system), reply=False)
        batch = self._batch([item], [self._pixels(item)])
        x_BSD, lengths = self._embed(batch), self._put(batch.lengths)
        logits = compiled.logits(self.params, x_BSD, lengths, partition=self.partition)
        ids = np.where(batch.feature_rows[0] == TEXT, batch.ids[0], IMAGE)
        return np.asarray(logits)[0, : item.length], ids[: item.length]

    def warm_up(self, shapes: Iterable[tuple[int, int]], sampling: Sampling | None = None, *, rows: int = 1) -> int:
        """Compile for prompts of the given (positions, tiles), each rounded up to its bucket.

        Returns:
          How many functions were compiled.
        """
        before = compilations()
        sampling = sampling or Sampling()
        for length, tile_count in shapes:
            batch = splice(
                [],
                self.config,
                length=self.buckets.up("lengths", length),
                tiles=self.buckets.up("tiles", tile_count),
                batch=self._rows(rows),
            )
            state = self._start(batch, np.ones(len(batch.ids), np.int32), [0] * len(batch.ids), sampling)
            self._continue(state, np.zeros(len(batch.ids), bool), 1, sampling).done.block_until_ready()
        return compilations() - before

    # ------------------------------------------------------------ a batch

    def _prepare(self, request: Request, *, reply: bool = True) -> _Prepared:
        """Tokenize a request and lay out its images, from their sizes alone."""
        try:
            request = dataclasses.replace(request, images=tuple(fetch(image) for image in request.images))
            turns = add_image_tokens(request.turns, len(request.images), self.config)
            ids = encode_prompt(
                self.template, [*turns, None] if reply else turns, self.tokenizer, system=request.system
            )
            if (highest := int(ids.max(initial=0))) >= self.config.text.vocab_size:
                raise InputError(
                    f"the tokenizer returns the id {highest}, but the model has {self.config.text.vocab_size} "
                    "embeddings: the tokenizer is not the model's"
                )
            layouts = tuple(tile_layout(image_size(image), self.config) for image in request.images)
            row = Row(ids, layouts)
            length = spliced_length(row, self.config)
            room = self.context - (1 if reply else 0)
            if length > room:
                images = length - int((ids != IMAGE).sum())
                raise InputError(
                    f"the prompt takes {length} positions ({images} of them for images); at most {room} fit the "
                    f"model's context of {self.context}{', which leaves one to answer' * reply}"
                )
            self.buckets.up("lengths", length), self.buckets.up("tiles", row.tile_count)  # raises beyond the largest
            return _Prepared(request, row, length)
        except InputError as error:
            raise InputError(f"{request.name}: {error}" if request.name else str(error)) from None

    def _pixels(self, item: _Prepared) -> tuple[np.ndarray, ...]:
        try:
            pairs = zip(item.request.images, item.row.layouts, strict=True)
            return tuple(read_tiles(image, place, self.config) for image, place in pairs)
        except MemoryError:
            raise InputError(f"{item.request.name or 'image'}: not enough memory for its pixels") from None
        except InputError as error:
            raise InputError(f"{item.request.name}: {error}" if item.request.name else str(error)) from None

    def _rows(self, n: int) -> int:
        """B for a batch of `n`: a bucket that the mesh divides."""
        shards = self.partition.row_shards
        return self.buckets.up("rows", -(-n // shards)) * shards

    def _batch(self, items: list[_Prepared], pixels: list[tuple[np.ndarray, ...]]) -> Batch:
        return splice(
            [dataclasses.replace(item.row, tiles=p) for item, p in zip(items, pixels, strict=True)],
            self.config,
            length=self.buckets.up("lengths", max(item.length for item in items)),
            tiles=self.buckets.up("tiles", max(item.row.tile_count for item in items)),
            batch=self._rows(len(items)),
        )

    def _put(self, rows: np.ndarray) -> jax.Array:
        return put_rows(np.asarray(rows), self.mesh)

    def _embed(self, batch: Batch) -> jax.Array:
        """Input embeddings [B, S, D]."""
        limit_programs()
        static = dict(partition=self.partition)
        features = compiled.encode(self.params, self._put(batch.tiles), **static) if batch.tiles.shape[1] else None
        return compiled.splice(self.params, features, self._put(batch.ids), self._put(batch.feature_rows), **static)

    def _start(self, batch: Batch, limits: np.ndarray, numbers: Sequence[int], sampling: Sampling) -> compiled.State:
        return compiled.prefill(
            self.params, self._embed(batch), self._put(batch.lengths), self._put(limits),
            row_keys(sampling.seed, numbers), sampling.params(), partition=self.partition,
            eos_ids=self.eos_ids, int8_cache=self.int8_cache,
            new_tokens=self.buckets.up("new_tokens", min(sampling.max_new_tokens, self.context)),
        )  # fmt: skip

    def _continue(self, state: compiled.State, stopped: np.ndarray, steps: int, sampling: Sampling) -> compiled.State:
        return compiled.decode_on(self.partition.platform)(
            self.params, state, self._put(stopped), jnp.int32(steps), sampling.params(),
            partition=self.partition, eos_ids=self.eos_ids,
        )  # fmt: skip

    def _run(self, items: list[_Prepared], pixels: list, sampling: Sampling, *, steps: int) -> Iterator[list[Answer]]:
        """Answer a batch, yielding the answers so far after every `steps` decode steps; the last are complete."""
        before, start = compilations(), time.perf_counter()
        batch = self._batch(items, pixels)
        B, S = batch.ids.shape
        limits = np.minimum(sampling.max_new_tokens, self.context - batch.lengths)
        numbers = [item.request.number for item in items] + [0] * (B - len(items))
        state = self._start(batch, limits, numbers, sampling)
        state.tokens.block_until_ready()
        prefilled = time.perf_counter()
        stopped = np.zeros(B, bool)
        while True:
            out, done, step = jax.device_get((state.out, state.done, state.step))
            seconds = time.perf_counter() - prefilled
            read = [self._read(out[b, : min(step + 1, limits[b])], limits[b]) for b in range(len(items))]
            generated = sum(len(ids) - 1 for _, ids, _ in read)
            yield [
                Answer(
                    text=text,
                    token_ids=ids,
                    prompt_tokens=item.length,
                    image_tokens=item.image_tokens,
                    bucket=S,
                    compilations=compilations() - before,
                    prefill_seconds=prefilled - start,
                    decode_tokens_per_second=generated / seconds if generated else 0.0,
                    stopped_by=by,
                )
                for item, (text, ids, by) in zip(items, read, strict=True)
            ]
            stopped[: len(items)] |= [by == "stop" for _, _, by in read]
            if np.all(done | stopped):
                return
            state = self._continue(state, stopped, steps, sampling)

    def _read(self, out: np.ndarray, limit: int) -> tuple[str, list[int], str]:
        """Text and token ids of a row so far, and why it stopped ("" while it runs)."""
        ids, by = out.tolist(), "length" if len(out) == limit else ""
        if ends := [i for i, token in enumerate(ids) if token in self.eos_ids]:
            ids, by = ids[: ends[0] + 1], "end"
        text, stop = self.tokenizer.decode(ids), self.template.stop
        if stop and stop in text:
            has_stop = lambda n: stop in self.tokenizer.decode(ids[:n])  # noqa: E731
            ids = ids[: bisect.bisect_left(range(len(ids)), True, key=has_stop)]
            text, by = text[: text.index(stop)], "stop"
        return text.strip(), ids, by


def _request(prompt: str | Sequence[str], images: Sequence, system: str | None) -> Request:
    turns = (prompt,) if isinstance(prompt, str) else tuple(prompt)
    if not turns or not all(isinstance(turn, str) for turn in turns) or len(turns) % 2 == 0:
        raise InputError("a prompt is a question, or a conversation: question, answer, ..., question")
    images = (images,) if isinstance(images, (str, bytes, os.PathLike)) or hasattr(images, "convert") else tuple(images)
    return Request(turns, images, system)

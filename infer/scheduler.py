"""The scheduler: many answers at once, in the slots of one KV cache (continuous batching with static shapes).

Requests join and leave between dispatches. One iteration of the loop (`step`) gives free slots to waiting prompts,
dispatches chunks of their prefill in turn, dispatches decode steps for all slots, and then reads the tokens of the
dispatches before: the device never waits for the host. What holds up answers between two dispatches of decode steps is
bounded: a chunk has at most `Buckets.chunks[-1]` positions, and `Pace` says how many there are, each with the images
that it begins.

One thread runs the loop; any thread may submit and cancel.
"""

import collections
import dataclasses
import queue
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from infer import compiled
from infer.features import MAX_TILES, ImageFeatures, ImageReader
from infer.generation import Generation, top_of
from infer.inputs import Chunk, inputs, rows
from infer.pace import Pace, Statistics
from infer.prompt import Prompt, PromptImage, check_length
from infer.sampling import Sampling
from infer.slots import MIN_COPY, Slot, SlotTable, common_prefix
from llava_jax.aot.programs import limit_programs
from llava_jax.console import InputError
from llava_jax.data.buckets import Buckets, round_up
from llava_jax.data.tokenizer import Tokenizer
from llava_jax.models import llava
from llava_jax.sharding.partition import Partition, put_rows


@dataclasses.dataclass
class _Filling:
    """A prompt that is being prefilled into its slot."""

    generation: Generation
    slot: Slot
    start: int  # positions that are there
    images: dict[int, jax.Array] = dataclasses.field(default_factory=dict)  # feature tables by the image's number


@dataclasses.dataclass(frozen=True)
class _Dispatched:
    """Tokens that the device will have chosen: column j of row i of `chosen` belongs to `owners[i]`."""

    chosen: compiled.Chosen
    owners: list[tuple[int, Generation]]  # row, generation
    steps: int  # of decoding; 0 for a prefill


class Scheduler:
    """Slots on the devices, and the prompts that wait for one.

    Args:
      params: the model's parameters.
      slots: how many answers are generated at once; rounded up to a multiple of `partition.row_shards`.
      context: positions of a slot, for a prompt and its answer.
      dispatch_seconds: how long a dispatch of decode steps should take, which is how often tokens arrive; None for
        dispatches of `compiled.STEPS` steps.
    """

    def __init__(
        self,
        params: llava.Params,
        partition: Partition,
        tokenizer: Tokenizer,
        features: ImageFeatures,
        *,
        slots: int,
        context: int,
        eos_ids: tuple[int, ...],
        stop: str | None = None,
        int8_cache: bool = False,
        buckets: Buckets | None = None,
        dispatch_seconds: float | None = None,
    ):
        self.params, self.partition, self.tokenizer, self.features = params, partition, tokenizer, features
        self.eos_ids, self.stop, self.buckets = eos_ids, stop, buckets or Buckets()
        self.pace, self.context = Pace(dispatch_seconds), context
        self.shards, self.requested_slots = partition.row_shards, slots
        # Elsewhere the weights take the time of a decode step, not its rows.
        self.decodes_some = partition.platform == "cpu" and self.shards == 1
        self.table = SlotTable(-(-slots // self.shards) * self.shards, self.shards)
        self.statistics = Statistics()
        self.slots = compiled.new_slots(
            slots=len(self.table.slots), positions=context, dtype=params["decoder"]["embed"]["embedding"].dtype,
            int8=int8_cache, partition=partition,
        )  # fmt: skip
        self._submitted: queue.SimpleQueue[Generation] = queue.SimpleQueue()
        self._waiting: collections.deque[Generation] = collections.deque()
        self._filling: list[_Filling] = []
        self._decoding: dict[int, Generation] = {}  # by slot
        self._unread: collections.deque[_Dispatched] = collections.deque()
        self._dispatched: dict[int, int] = {}  # tokens that were dispatched for each decoding slot
        self._stopped = np.zeros(len(self.table.slots), bool)  # slots that the device has yet to stop
        self._reader = ImageReader()

    # ------------------------------------------------------------ from any thread

    def submit(
        self, prompt: Prompt, sampling: Sampling, on_update: Callable[[Generation], object] = lambda generation: None
    ) -> Generation:
        """Queue a prompt.

        Args:
          on_update: called on the scheduler's thread whenever tokens have arrived, and at the end.

        Raises:
          InputError: the prompt leaves no room for an answer, or an option does not suit the model.
        """
        check_length(prompt, self.context, "a slot's context")
        sampling.bias_row(self.partition.config.text.vocab_size)  # raises
        generation = Generation(
            prompt, sampling, self.tokenizer, eos_ids=self.eos_ids, stop=self.stop, on_update=on_update,
            limit=min(sampling.max_new_tokens, self.context - prompt.length),
        )  # fmt: skip
        self._submitted.put(generation)
        return generation

    @property
    def waiting(self) -> int:
        """Prompts without a slot."""
        return self._submitted.qsize() + len(self._waiting)

    @property
    def running(self) -> int:
        """Prompts with a slot."""
        return sum(slot.owner is not None for slot in self.table.slots)

    @property
    def cache_usage(self) -> float:
        """The fraction of the cache that running answers fill."""
        used = sum(len(slot.keys) for slot in self.table.slots if slot.owner is not None)
        return used / (len(self.table.slots) * self.context)

    @property
    def idle(self) -> bool:
        """Whether nothing runs or waits."""
        return not (self.waiting or self.running)

    # ------------------------------------------------------------ the loop

    def step(self) -> bool:
        """One iteration. Returns False if there is nothing to do."""
        while not self._submitted.empty():
            self._waiting.append(self._submitted.get())
        self._drop_cancelled()
        self._admit()
        before = len(self._unread)
        for _ in range(self.pace.chunks(len(self._decoding), len(self.table.slots))):
            if not self._prefill():
                break
        self._decode()
        dispatched = len(self._unread) - before
        while len(self._unread) > dispatched:
            self._read(self._unread.popleft())
        if not dispatched:
            self._reader.wait([images[0] for filling in self._filling if (images := self._missing(filling))])
            return bool(self._filling or self._waiting or self._decoding)
        return True

    def run(self, generations: Sequence[Generation] = ()) -> None:
        """Run until all `generations` are done."""
        while not all(generation.done for generation in generations):
            self.step()

    def grow(self, context: int) -> None:
        """Give every slot at least `context` positions. What slots hold stays."""
        if context > self.context:
            self.slots = compiled.grow(self.slots, positions=context, partition=self.partition)
            self.context = context

    def forget(self) -> None:
        """Forget what slots without an answer hold, and the features of images."""
        for slot in self.table.slots:
            if slot.owner is None:
                slot.keys = slot.keys[:0]
        self.features.clear()

    def close(self) -> None:
        """Fail what is running, and release the devices' memory."""
        self.fail(InputError("the engine was closed"))
        self._reader.close()
        del self.slots

    def fail(self, error: Exception) -> None:
        """End everything that runs or waits with an error."""
        while not self._submitted.empty():
            self._waiting.append(self._submitted.get())
        owners = [slot.owner for slot in self.table.slots if slot.owner is not None]
        for generation in (*owners, *self._waiting):
            self._end(generation, "error", error)
        self._waiting.clear()
        self._unread.clear()

    # ------------------------------------------------------------ joining and leaving

    def _drop_cancelled(self) -> None:
        owners = [slot.owner for slot in self.table.slots if slot.owner is not None]
        for generation in [*owners, *self._waiting]:
            if generation.is_cancelled:
                self._end(generation, "cancelled")
        self._waiting = collections.deque(generation for generation in self._waiting if not generation.done)

    def _end(self, generation: Generation, by: str, error: Exception | None = None) -> None:
        if not generation.done:
            generation.end(by, error)
        self._release(generation)
        generation.on_update(generation)

    def _release(self, generation: Generation) -> None:
        """Free the slot of a generation that has ended."""
        for slot in self.table.slots:
            if slot.owner is generation:
                self.table.release(slot)
                self._stopped[slot.index] = True
                self._decoding.pop(slot.index, None)
        self._filling = [filling for filling in self._filling if filling.generation is not generation]

    def _admit(self) -> None:
        """Give free slots to waiting prompts, in order. One whose prefix is being prefilled in another slot waits."""
        later: list[Generation] = []
        while self._waiting and (place := self.table.find(keys := self._waiting[0].prompt.keys)):
            limit_programs()  # here, since a prompt may need another shape
            generation = self._waiting.popleft()
            soon = [common_prefix(filling.generation.prompt.keys, keys) for filling in self._filling]
            if max(soon, default=0) - place.reused >= MIN_COPY:
                later.append(generation)
                continue
            if place.source:
                place.slot.keys = keys[:0]  # until the copy is there
                self._copy(place.source, place.slot, place.reused)
            self.table.take(place, generation, keys)
            generation.started_at, generation.cached_tokens = time.perf_counter(), place.reused
            self.statistics.prompt_tokens += len(keys)
            self.statistics.cached_tokens += place.reused
            self._filling.append(filling := _Filling(generation, place.slot, place.reused))
            missing = self._missing(filling)
            self.statistics.image_queries += len(missing)
            self.statistics.image_hits += sum(image in self.features for image in missing)
        self._waiting.extendleft(reversed(later))
        self._reader.want(image for image in self._images_to_read() if image not in self.features)

    def _images_to_read(self) -> list[PromptImage]:
        """The images that are needed next: of prompts in slots, and of as many that wait."""
        ahead = [self._waiting[i].prompt for i in range(min(len(self._waiting), len(self.table.slots)))]
        needed = [self._missing(filling) for filling in self._filling]
        return [*(image for images in needed for image in images), *(image for p in ahead for image in p.images)]

    @staticmethod
    def _missing(filling: _Filling) -> list[PromptImage]:
        """The images of a prompt that are still to be placed."""
        prompt = filling.generation.prompt
        return [prompt.images[i] for i in prompt.images_in(filling.start, prompt.length) if i not in filling.images]

    # ------------------------------------------------------------ dispatches

    def _copy(self, source: Slot, target: Slot, count: int) -> None:
        rows = np.zeros((3, self.shards), np.int32)
        shard, per_shard = self.table.shard(target), self.table.per_shard
        rows[:, shard] = source.index % per_shard, target.index % per_shard, count
        sources, targets, counts = map(self._put, rows)
        span = round_up(self.buckets.prefill_spans(self.context), count)
        self.slots = compiled.copy(self.slots, sources, targets, counts, span=span, partition=self.partition)

    def _prefill(self) -> bool:
        """Dispatch a chunk for the first prompt of each shard whose images are there. False if there is none."""
        fillings: dict[int, _Filling] = {}
        for filling in list(self._filling):
            shard = self.table.shard(filling.slot)
            if shard not in fillings and self._has_features(filling):
                fillings[shard] = filling
        if not fillings:
            return False
        chosen = self._dispatch_prefill({shard: self._chunk(filling) for shard, filling in fillings.items()})
        finished = []
        for shard, filling in fillings.items():
            generation, slot = filling.generation, filling.slot
            filling.start = self._chunk(filling).end
            slot.keys = generation.prompt.keys[: filling.start]
            self._filling.remove(filling)
            if filling.start < generation.prompt.length:
                self._filling.append(filling)  # others come before its next chunk
            else:
                finished.append((shard, generation))
                self._decoding[slot.index], self._dispatched[slot.index] = generation, 1
                self._stopped[slot.index] = False
        self._unread.append(_Dispatched(chosen, finished, steps=0))
        return True

    def _chunk(self, filling: _Filling) -> Chunk:
        """The next chunk of a prompt."""
        generation, slot = filling.generation, filling.slot.index % self.table.per_shard
        end = min(filling.start + self.buckets.chunk_sizes(self.context)[-1], generation.prompt.length)
        return Chunk(generation.prompt, filling.start, end, filling.images, slot, generation.sampling, generation.limit)

    def _dispatch_prefill(self, chunks: dict[int, Chunk]) -> compiled.Chosen:
        S = round_up(self.buckets.chunk_sizes(self.context), max(chunk.count for chunk in chunks.values()))
        span = round_up(self.buckets.prefill_spans(self.context), max(chunk.start for chunk in chunks.values()))
        self.slots, chosen = compiled.prefill(
            self.params, self.slots, inputs(self.params, self.partition, chunks, S), rows(self.partition, chunks),
            span=span, eos_ids=self.eos_ids, partition=self.partition,
        )  # fmt: skip
        self.statistics.dispatches += 1
        return chosen

    def _has_features(self, filling: _Filling) -> bool:
        """Whether the features of the next chunk's images are there; encode them if their tiles are."""
        prompt, start = filling.generation.prompt, filling.start
        for i in prompt.images_in(start, start + self.buckets.chunks[-1]):
            if i in filling.images:
                continue
            image = prompt.images[i]
            if (table := self.features.find(image)) is None:
                if not self._reader.is_ready(image):
                    return False
                try:
                    tiles = self._reader.take(image)
                except Exception as error:
                    self._end(filling.generation, "error", error)
                    return False
                others = self._reader.take_good(self._images_to_read(), MAX_TILES - len(tiles))
                table, *_ = self.features.encode([image, *others], [tiles, *others.values()])
            filling.images[i] = table
        return True

    def _decode(self) -> None:
        """Dispatch decode steps for all slots that may not have ended."""
        left = {i: generation.limit - self._dispatched[i] for i, generation in self._decoding.items()}
        if not any(n > 0 for n in left.values()):
            return
        running = {i: generation for i, generation in self._decoding.items() if left[i] > 0}
        longest = max(generation.prompt.length + self._dispatched[i] for i, generation in running.items())
        span = round_up(self.buckets.decode_spans(self.context), longest)
        rows = round_up(self.buckets.decode_rows(len(self.table.slots)), len(running))
        some = self.table.some(running, rows) if self.decodes_some else None
        copied = compiled.copied(self.params, self.slots, rows, span) if self.decodes_some else 0
        steps = min(self.pace.steps(copied), max(left.values()))
        self.slots, chosen = compiled.decode(
            self.params, self.slots, self._put(self._stopped), jnp.int32(steps),
            None if some is None else self._put(some),
            span=span, eos_ids=self.eos_ids, partition=self.partition,
        )  # fmt: skip
        self._stopped = np.zeros_like(self._stopped)  # on a CPU the device may read the array itself
        self.statistics.dispatches += 1
        self.statistics.decode_steps += steps
        row_of = {int(i): row for row, i in enumerate(some)} if some is not None else {i: i for i in running}
        for i, generation in running.items():
            self._dispatched[i] = min(self._dispatched[i] + steps, generation.limit)
        owners = [(row_of[i], generation) for i, generation in running.items()]
        self._unread.append(_Dispatched(chosen, owners, steps))

    # ------------------------------------------------------------ results

    def _read(self, dispatched: _Dispatched) -> None:
        """Wait for the tokens of a dispatch, and give them to their generations."""
        tokens = np.asarray(dispatched.chosen.tokens)
        tokens = tokens.reshape(len(tokens), -1)
        self.pace.has_read(dispatched.steps)
        owners = [(row, generation) for row, generation in dispatched.owners if not generation.done]
        logprobs = None
        if any(generation.sampling.top_logprobs is not None for _, generation in owners):
            arrays = jax.device_get(dispatched.chosen.logprobs)
            logprobs = [x.reshape(*tokens.shape, *x.shape[dispatched.chosen.tokens.ndim :]) for x in arrays]
        for row, generation in owners:
            self._give(generation, tokens[row], logprobs and [x[row] for x in logprobs])

    def _give(self, generation: Generation, tokens: np.ndarray, logprobs: list[np.ndarray] | None) -> None:
        """Append tokens to an answer, and free its slot if that ends it."""
        n = generation.sampling.top_logprobs
        for j, token in enumerate(tokens.tolist()):
            if token == compiled.NONE or generation.done:
                break
            details: tuple = ()
            if n is not None and logprobs is not None:
                chosen, ids, top = (x[j] for x in logprobs)
                details = float(chosen), top_of(ids, top, n)
            try:
                generation.add(token, *details)
            except InputError as error:  # a tokenizer that runs within limits has exceeded them
                return self._end(generation, "error", error)
            self.statistics.generated_tokens += 1
        for slot in self.table.slots:
            if slot.owner is generation:  # all but the last token are in the cache
                known = len(slot.keys) - generation.prompt.length
                new = np.array([token.id for token in generation.tokens[known:-1]], np.int64)
                slot.keys = np.concatenate([slot.keys, new])
        if generation.done:
            self._release(generation)
        generation.on_update(generation)

    def _put(self, rows: np.ndarray) -> jax.Array:
        assert self.partition.mesh is not None
        return put_rows(np.asarray(rows), self.partition.mesh)

"""Batches of an evaluation, and their division among the ranks.

    batches = make_batches(lengths, batch_size=None, cost=count_tokens, budget=8192)
    found = BatchRun(batches, measure, task, report, is_stopped).run(is_sharded=False)      # on every rank

Batches follow from the examples and the settings alone, never from the number of ranks, and so do the results. A rank
takes the next batch when it is done with one, so that no rank waits for a slower one except at the end. The longest
targets come first, whose predictions take the most steps to generate. If memory runs out, the rank halves the batch.

Under ZeRO-3 each forward pass gathers weights from all ranks. There, all ranks make the same number of passes.
"""

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch

from t5tune.distributed.collectives import all_gather, any_rank, get_rank_and_size
from t5tune.distributed.work_queue import WorkQueue
from t5tune.errors import OutOfMemory
from t5tune.model.device import is_out_of_memory
from t5tune.progress import Note, Report, count_done

# A batch has at most this share of the examples that are left, so that the last batches, for which ranks may wait for
# each other, are small. But batches of fewer examples than SMALL_BATCH take longer for each example.
LARGEST_SHARE, SMALL_BATCH = 1 / 32, 48

Found = TypeVar("Found")
Cost = Callable[[int, int, int], int]
"""(number of examples, length of the longest source, length of the longest target) -> cost of a batch."""


class EvaluationStopped(Exception):
    """A signal has asked to stop; raised on all ranks together."""


class Lengths(NamedTuple):
    """The lengths of an example, in tokens."""

    target: int
    source: int


@dataclass(frozen=True)
class Batches:
    """Lists of indices of examples, those of the longest targets first, and what each costs.

    Args:
        lengths: of all examples.
    """

    batches: list[list[int]]
    lengths: Sequence[Lengths]
    cost: Cost

    def compute_cost(self, batch: list[int]) -> int:
        return self.cost(len(batch), *self._find_longest(batch))

    def describe(self, batch: list[int]) -> str:
        source, target = self._find_longest(batch)
        examples = "one example of" if len(batch) == 1 else f"{len(batch)} examples of up to"
        return f"{examples} {source} source and {target} target tokens"

    def _find_longest(self, batch: list[int]) -> tuple[int, int]:
        return max(self.lengths[i].source for i in batch), max(self.lengths[i].target for i in batch)


def make_batches(lengths: Sequence[Lengths], batch_size: int | None, cost: Cost, budget: int) -> Batches:
    """Divide the examples, longest targets first, into batches.

    Args:
        batch_size: maximum number of examples per batch; None: any.
        budget: maximum cost of a batch. An example that costs more is alone.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    batches: list[list[int]] = []
    most, longest = 0, Lengths(0, 0)
    for position, index in enumerate(order):
        added = Lengths(max(longest.target, lengths[index].target), max(longest.source, lengths[index].source))
        count = len(batches[-1]) + 1 if batches else 1
        if batches and count <= most and cost(count, added.source, added.target) <= budget:
            batches[-1].append(index)
            longest = added
        else:
            most = min(batch_size or len(order), max(SMALL_BATCH, int((len(order) - position) * LARGEST_SHARE)))
            batches.append([index])
            longest = lengths[index]
    return Batches(batches, lengths, cost)


@dataclass(frozen=True)
class BatchRun(Generic[Found]):
    """How batches are measured.

    Args:
        batches: the same on every rank.
        measure: computes the result of each example of a batch.
        task: what it is, for messages.
        report: receives progress, and which batches didn't fit into memory.
        is_stopped: whether this rank has been asked to stop.
    """

    batches: Batches
    measure: Callable[[list[int]], dict[int, Found]]
    task: str
    report: Report
    is_stopped: Callable[[], bool]

    def run(self, is_sharded: bool) -> list[Found]:
        """Measure all examples. Call on every rank.

        Args:
            is_sharded: whether each forward pass gathers weights from all ranks.

        Returns:
            The result for each example, on every rank.

        Raises:
            OutOfMemory: a single example doesn't fit into memory, or under ZeRO-3 a batch.
            EvaluationStopped: a rank has been asked to stop.
            RankLost: a rank hasn't finished its batch in the time that a collective may wait.
        """
        found = self._measure_in_step() if is_sharded else self._measure_freely()
        merged = {index: value for part in all_gather(found) for index, value in part.items()}
        return [merged[index] for index in range(len(self.batches.lengths))]

    def _measure_freely(self) -> dict[int, Found]:
        """Measure one batch after the other that no other rank has taken."""
        batches, halving = self.batches.batches, _Halving(self)
        queue, found = WorkQueue(len(batches)), dict[int, Found]()
        shown, failure = 0, None
        with count_done(self.task, self.report, len(self.batches.lengths), "examples") as advance:

            def show_progress() -> None:
                nonlocal shown
                if (done := queue.sum_done()) > shown:
                    advance(done - shown)
                    shown = done

            try:
                while not self.is_stopped() and (number := queue.take()) is not None:
                    found |= halving.measure(batches[number])
                    queue.count_done(len(batches[number]))
                    show_progress()
            except OutOfMemory as error:
                failure = error
            if failure is not None or self.is_stopped():
                queue.close()
            queue.wait_for_all_ranks(show_progress)
        self._compare_ends(halving.notes, failure)
        return found

    def _compare_ends(self, notes: list[Note], failure: OutOfMemory | None) -> None:
        """Report the notes of the other ranks, and raise the error of any rank on all of them."""
        ends = all_gather((notes, failure))
        rank, _ = get_rank_and_size()
        for note in [note for other, (notes, _) in enumerate(ends) if other != rank for note in notes]:
            self.report(note)
        if failure is not None:
            raise failure
        for _, failure in ends:
            if failure is not None:
                raise failure
        if any_rank(self.is_stopped()):
            raise EvaluationStopped

    def _measure_in_step(self) -> dict[int, Found]:
        """Measure as many batches at a time as there are ranks."""
        found: dict[int, Found] = {}
        rank, num_ranks = get_rank_and_size()
        with count_done(self.task, self.report, len(self.batches.lengths), "examples") as advance:
            for start in range(0, len(self.batches.batches), num_ranks):
                together = self.batches.batches[start : start + num_ranks]
                # if fewer batches than ranks are left, the other ranks repeat the last one
                batch = together[min(rank, len(together) - 1)]
                results, error = try_batch(self.measure, batch)
                # The other ranks are now waiting in their forward pass for this rank's shards: no retry is possible, so
                # this rank fails, and its exit ends their waiting.
                if error is not None:
                    raise self.make_memory_error(batch) from error
                found |= results
                advance(sum(map(len, together)))
                if any_rank(self.is_stopped()):
                    raise EvaluationStopped
        return found

    def make_memory_error(self, batch: list[int]) -> OutOfMemory:
        smaller = "shorten examples with model_max_length" if len(batch) == 1 else "set per_device_eval_batch_size to 1"
        return OutOfMemory(
            f"out of memory: {self.task}: {self.batches.describe(batch)}",
            hint=f"{smaller}, or load the base in four bits with --q-lora if it isn't yet",
        )


class _Halving(Generic[Found]):
    """Measures the batches of one rank, and halves those that don't fit into its memory.

    Attributes:
        notes: which batches those were.
    """

    def __init__(self, run: BatchRun[Found]) -> None:
        self.run = run
        self.notes: list[Note] = []
        self._too_expensive: float = math.inf

    def measure(self, batch: list[int]) -> dict[int, Found]:
        found: dict[int, Found] = {}
        pending = [batch]
        while pending:
            part = pending.pop()
            # one that costs as much as another that didn't fit isn't tried
            if len(part) == 1 or self.run.batches.compute_cost(part) < self._too_expensive:
                results, error = try_batch(self.run.measure, part)
                if error is None:
                    found |= results
                    continue
                if len(part) == 1:
                    raise self.run.make_memory_error(part) from error
                del results, error  # the error's frames keep the batch's tensors in memory
                gc.collect()
                torch.cuda.empty_cache()
                self._note(part)
            half = -(-len(part) // 2)
            pending += [part[half:], part[:half]]
        return found

    def _note(self, batch: list[int]) -> None:
        self._too_expensive = self.run.batches.compute_cost(batch)
        rank, num_ranks = get_rank_and_size()
        where = f" on rank {rank}" if num_ranks > 1 else ""
        text = f"{self.run.task}: out of memory{where} with {self.run.batches.describe(batch)}"
        note = Note(f"{text}; continuing with {-(-len(batch) // 2)} at a time", warning=True)
        self.notes.append(note)
        self.run.report(note)


def try_batch(
    measure: Callable[[list[int]], dict[int, Found]], batch: list[int]
) -> tuple[dict[int, Found], Exception | None]:
    """Measure a batch; if memory runs out, return the error."""
    try:
        return measure(batch), None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return {}, error

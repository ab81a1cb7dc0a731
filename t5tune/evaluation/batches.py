"""Batches of an evaluation, and their division among the ranks.

    batches = make_batches(lengths, batch_size=None, cost=count_tokens, budget=8192)
    found = BatchRun(batches, measure, task, report, is_stopped).run(is_sharded=False)      # on every rank

Batches follow from the examples and the settings alone, never from the number of ranks, and so do the results. The
longest targets come first, whose predictions take the most steps to generate. The ranks take batches in turn: those of
a turn cost about the same, so that ranks hardly wait for each other, and every rank measures the same number of
batches, since under ZeRO-3 each forward pass gathers weights from all of them.

If memory runs out, the rank halves the batch. Under ZeRO-3 it can't, because the others make no further pass.
"""

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch

from t5tune.distributed.collectives import all_gather, any_rank, get_rank_and_size
from t5tune.errors import OutOfMemory
from t5tune.model.device import is_out_of_memory
from t5tune.progress import Note, Report, count_done

# A batch has at most this share of the examples that are left, so that there are batches for many ranks, and the last
# turn, in which some have nothing to do, is short. But batches of fewer examples than SMALL_BATCH take longer for each.
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
        """
        found, halving = dict[int, Found](), _Halving(self, can_halve=not is_sharded)
        failure, is_over = None, False
        rank, num_ranks = get_rank_and_size()
        with count_done(self.task, self.report, len(self.batches.lengths), "examples") as advance:
            for start in range(0, len(self.batches.batches), num_ranks):
                turn = self.batches.batches[start : start + num_ranks]
                try:
                    # if fewer batches than ranks are left, the other ranks repeat the last one
                    found |= halving.measure(turn[min(rank, len(turn) - 1)])
                except OutOfMemory as error:
                    if is_sharded:  # the others wait in their pass for this rank's shards, until it exits
                        raise
                    failure = error
                advance(sum(map(len, turn)))
                if is_over := any_rank(failure is not None or self.is_stopped()):
                    break
        found = self._merge(found, halving.notes, failure)
        if is_over:
            raise EvaluationStopped
        return [found[index] for index in range(len(self.batches.lengths))]

    def _merge(self, found: dict[int, Found], notes: list[Note], failure: OutOfMemory | None) -> dict[int, Found]:
        """Return the results of all ranks, and report the notes of the others. If one has failed, all raise."""
        own_rank, _ = get_rank_and_size()
        merged: dict[int, Found] = {}
        for rank, (results, noted, error) in enumerate(all_gather((found, notes, failure))):
            merged |= results
            failure = failure or error
            for note in noted if rank != own_rank else ():
                self.report(note)
        if failure is not None:
            raise failure
        return merged

    def make_memory_error(self, batch: list[int]) -> OutOfMemory:
        smaller = "shorten examples with model_max_length" if len(batch) == 1 else "set per_device_eval_batch_size to 1"
        return OutOfMemory(
            f"out of memory: {self.task}: {self.batches.describe(batch)}",
            hint=f"{smaller}, or load the base in four bits with --q-lora if it isn't yet",
        )


class _Halving(Generic[Found]):
    """Measures the batches of one rank, and halves those that don't fit into its memory, if it can.

    Attributes:
        notes: which batches those were.
    """

    def __init__(self, run: BatchRun[Found], can_halve: bool) -> None:
        self.run = run
        self.can_halve = can_halve
        self.notes: list[Note] = []
        self._too_expensive: float = math.inf

    def measure(self, batch: list[int]) -> dict[int, Found]:
        found: dict[int, Found] = {}
        pending = [batch]
        while pending:
            part = pending.pop()
            # one that costs as much as another that didn't fit isn't tried
            if len(part) == 1 or self.run.batches.compute_cost(part) < self._too_expensive:
                results, error = _try_batch(self.run.measure, part)
                if error is None:
                    found |= results
                    continue
                if len(part) == 1 or not self.can_halve:
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


def _try_batch(
    measure: Callable[[list[int]], dict[int, Found]], batch: list[int]
) -> tuple[dict[int, Found], Exception | None]:
    """Measure a batch; if memory runs out, return the error."""
    try:
        return measure(batch), None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return {}, error

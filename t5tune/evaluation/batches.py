"""Batches of an evaluation, and their division among the ranks.

    batches = make_batches(lengths, batch_size=None, cost=count_tokens, budget=8192)
    found = BatchRun(batches, measure, task, report, is_stopped).run(is_sharded=False)      # on every rank

Batches depend only on the examples and the settings, never on the number of ranks, and so do the results. The longest
targets come first, because their predictions take the most steps to generate. The ranks take batches in turn. The
batches of a turn cost about the same, so that ranks hardly wait for each other. Every rank measures the same number of
batches, because under ZeRO-3 each forward pass gathers weights from all ranks.

If memory runs out, the rank halves the batch. Under ZeRO-3 it can't, because the remaining ranks make no further pass.
"""

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import torch

from t5tune.distributed.collectives import all_gather, any_rank, get_rank_and_size
from t5tune.errors import OutOfMemory
from t5tune.model.device import is_out_of_memory
from t5tune.progress import Note, Report, count_done

# A batch has at most this share of the remaining examples, so that there are batches for many ranks, and the last turn,
# when some ranks are idle, is short. But batches of fewer examples than SMALL_BATCH take longer per example.
LARGEST_SHARE, SMALL_BATCH = 1 / 32, 48

Found = TypeVar("Found")
Cost = Callable[[int, int, int], int]
"""(number of examples, length of the longest source, length of the longest target) -> cost of a batch."""


class EvaluationStopped(Exception):
    """A signal asked to stop; raised on all ranks together."""


class Lengths(NamedTuple):
    """The lengths of an example, in tokens."""

    target: int
    source: int


@dataclass(frozen=True)
class Batches:
    """Lists of indices of examples, the longest targets first. `lengths` has an entry per example."""

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
        batch_size: maximum number of examples per batch; None: no limit.
        budget: maximum cost of a batch. An example that costs more gets a separate batch.
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


@dataclass
class BatchRun(Generic[Found]):
    """How batches are measured. All ranks have the same batches.

    Args:
        measure: computes the result of each example of a batch.
        task: its name in messages.
        report: receives progress, and which batches didn't fit into memory.
        is_stopped: whether a signal asked this rank to stop.
    """

    batches: Batches
    measure: Callable[[list[int]], dict[int, Found]]
    task: str
    report: Report
    is_stopped: Callable[[], bool]
    _notes: list[Note] = field(default_factory=list)  # which batches didn't fit
    _too_expensive: float = math.inf

    def run(self, is_sharded: bool) -> list[Found]:
        """Measure all examples, and return the result for each, on every rank. Call on every rank.

        Args:
            is_sharded: whether each forward pass gathers weights from all ranks.

        Raises:
            OutOfMemory: a single example doesn't fit into memory, or under ZeRO-3 a batch.
            EvaluationStopped: a signal asked a rank to stop.
        """
        found: dict[int, Found] = {}
        failure, is_over = None, False
        rank, num_ranks = get_rank_and_size()
        with count_done(self.task, self.report, len(self.batches.lengths), "examples") as advance:
            for start in range(0, len(self.batches.batches), num_ranks):
                turn = self.batches.batches[start : start + num_ranks]
                try:
                    # if fewer batches than ranks are left, the remaining ranks repeat the last batch
                    found |= self._measure_in_parts(turn[min(rank, len(turn) - 1)], can_halve=not is_sharded)
                except OutOfMemory as error:
                    if is_sharded:  # all ranks wait in their pass for this rank's shards, until it exits
                        raise
                    failure = error
                advance(sum(map(len, turn)))
                if is_over := any_rank(failure is not None or self.is_stopped()):
                    break
        found = self._merge(found, failure)
        if is_over:
            raise EvaluationStopped
        return [found[index] for index in range(len(self.batches.lengths))]

    def _merge(self, found: dict[int, Found], failure: OutOfMemory | None) -> dict[int, Found]:
        """Return the results of all ranks, and report their notes. If one rank has failed, all raise."""
        this_rank, _ = get_rank_and_size()
        merged: dict[int, Found] = {}
        for rank, (results, notes, error) in enumerate(all_gather((found, self._notes, failure))):
            merged |= results
            failure = failure or error
            for note in notes if rank != this_rank else ():
                self.report(note)
        if failure is not None:
            raise failure
        return merged

    def _measure_in_parts(self, batch: list[int], can_halve: bool) -> dict[int, Found]:
        found: dict[int, Found] = {}
        pending = [batch]
        while pending:
            part = pending.pop()
            # skip the attempt if the batch costs as much as an earlier one that didn't fit
            if len(part) == 1 or self.batches.compute_cost(part) < self._too_expensive:
                try:
                    found |= self.measure(part)
                    continue
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    if len(part) == 1 or not can_halve:
                        raise self._make_memory_error(part) from error
                # only after the handler: the error's frames keep the batch's tensors in memory
                gc.collect()
                torch.cuda.empty_cache()
                self._note(part)
            half = -(-len(part) // 2)
            pending += [part[half:], part[:half]]
        return found

    def _note(self, batch: list[int]) -> None:
        self._too_expensive = self.batches.compute_cost(batch)
        rank, num_ranks = get_rank_and_size()
        where = f" on rank {rank}" if num_ranks > 1 else ""
        text = f"{self.task}: out of memory{where} with {self.batches.describe(batch)}"
        note = Note(f"{text}; continuing with {-(-len(batch) // 2)} at a time", warning=True)
        self._notes.append(note)
        self.report(note)

    def _make_memory_error(self, batch: list[int]) -> OutOfMemory:
        smaller = "shorten examples with model_max_length" if len(batch) == 1 else "set per_device_eval_batch_size to 1"
        return OutOfMemory(
            f"out of memory: {self.task}: {self.batches.describe(batch)}",
            hint=f"{smaller}, or load the base in four bits with --q-lora if it isn't yet",
        )

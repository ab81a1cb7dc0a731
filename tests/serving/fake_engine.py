"""An engine that replies with numbers, and requests for its replies."""

import threading
from collections.abc import Callable, Hashable, Sequence

from t5tune.serving.generation import DecodingOptions, Generation, OnToken

END = 1
LONG_WAIT = 60.0


class FakeEngine:
    """Replies with the first id of the source, counted up, as many times as the option says.

    Attributes:
        batches: the first ids of the sources of each batch.
        ended: the first ids of the batches that have ended.
        gate: each batch waits until it is set.
        on_step: called before each token of a batch.
        fits: the largest batch that fits into memory.
    """

    name = "fake"
    stop_ids = frozenset({END})
    has_seeds = False
    can_constrain_top_p = True
    num_rows = 100

    def can_read(self, source: list[int]) -> bool:
        return True

    def __init__(self, max_batches: int = 1) -> None:
        self.max_batches = max_batches
        self.batches: list[list[int]] = []
        self.ended: list[list[int]] = []
        self.on_step: Callable[[], None] = lambda: None
        self.entered = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()
        self.fits = 1000
        self.fail_after: int | None = None
        self.failure: Exception = ValueError("broken")
        self.halves_differ = False  # whether a batch that fits gives different tokens than a batch that doesn't

    def get_group(self, options: DecodingOptions) -> Hashable:
        return options.temperature

    def generate(self, generations: Sequence[Generation], on_token: OnToken) -> None:
        firsts = [generation.source[0] for generation in generations]
        self.batches.append(firsts)
        self.entered.release()
        assert self.gate.wait(LONG_WAIT)
        going = list(range(len(generations)))
        for step in range(max(generation.options.max_new_tokens for generation in generations)):
            if len(generations) > self.fits and step == 2:
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
            if self.fail_after == step:
                raise self.failure
            self.on_step()
            other = 500 if self.halves_differ and len(generations) <= self.fits else 0
            going = [row for row in going if not on_token(row, firsts[row] + step + other)]
            if not going:
                break
        self.ended.append(firsts)


class Asked:
    """A requested reply, and an event that is set at its end."""

    def __init__(
        self, engine: FakeEngine, first: int, length: int = 4, size: int = 3, follows: bool = True, **options: float
    ) -> None:
        self.done = threading.Event()
        self.lengths: list[int] = []
        self.generation = Generation(
            engine, [first] * size, DecodingOptions(max_new_tokens=length, **options), self.note, follows
        )

    def note(self) -> None:
        self.lengths.append(len(self.generation.ids))
        if self.generation.ended is not None:
            self.done.set()

    def wait(self) -> list[int]:
        assert self.done.wait(LONG_WAIT)
        return self.generation.ids

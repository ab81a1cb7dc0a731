"""Called in each rank of a run: stop it, kill it or let it fail at a moment that a test chooses.

    on_ranks(2, "train", …, calls=["tests.support.ranks.faults:stop_in_step(3)"])

From the call on, the process behaves as the function's docstring says.
"""

import os
import signal
import sys
import weakref
from collections.abc import Callable
from typing import Any


def get_rank() -> int:
    return int(os.environ.get("RANK", "0"))


def call_before_steps(act: Callable[[Any, dict[str, Any]], None]) -> None:
    """Call a function with the trainer and the inputs before each micro-step."""
    from t5tune.training.trainer import T5Trainer

    train = T5Trainer.training_step

    def act_and_train(self: T5Trainer, model: Any, inputs: dict[str, Any], *given: Any, **options: Any) -> Any:
        act(self, inputs)
        return train(self, model, inputs, *given, **options)

    T5Trainer.training_step = act_and_train  # type: ignore[method-assign]


def stop_in_step(step: int) -> None:
    """Rank 0 gets one SIGTERM at the beginning of this step, after which the run stops."""
    is_sent = False

    def stop(trainer: Any, _: object) -> None:
        nonlocal is_sent  # this is called before each micro-batch
        if trainer.state.global_step == step - 1 and get_rank() == 0 and not is_sent:
            is_sent = True
            os.kill(os.getpid(), signal.SIGTERM)

    call_before_steps(stop)


def kill_at(event: str, name: str) -> None:
    """The first audit event of this kind whose arguments contain the name ends this process."""

    def watch(happened: str, arguments: tuple[Any, ...]) -> None:
        if happened == event and name in str(arguments):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def kill_after(folder: str, number: int) -> None:
    """This process is killed when it opens, renames, creates or removes its Nth file of the folder."""
    touched = 0

    def watch(happened: str, arguments: tuple[Any, ...]) -> None:
        nonlocal touched
        if happened.startswith(("open", "os.", "shutil.")) and folder in str(arguments):
            touched += 1
            if touched == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def save_after_loading(folder: str) -> None:
    """DeepSpeed's engine saves a separate checkpoint in this folder when a run has resumed, before its first step."""
    from t5tune.training.flow import TrainingFlow

    catch_up = TrainingFlow.catch_up

    def save(self: TrainingFlow) -> None:
        self.trainer.model_wrapped.save_checkpoint(folder)
        catch_up(self)

    TrainingFlow.catch_up = save  # type: ignore[method-assign]


def set_on_rank_1(name: str, value: str) -> None:
    """Rank 1 has this environment variable."""
    if get_rank() == 1:
        os.environ[name] = value


def overflow_at(counts: list[int], rank: int = 0) -> None:
    """The losses of this rank's micro-batches with these numbers (from 1) are infinite."""
    from t5tune.training.trainer import T5Trainer

    if get_rank() != rank:
        return
    steps = 0
    compute = T5Trainer.compute_loss

    def overflow(self: T5Trainer, *arguments: Any, **options: Any) -> Any:
        nonlocal steps
        steps += 1
        loss = compute(self, *arguments, **options)
        return loss * float("inf") if steps in counts else loss

    T5Trainer.compute_loss = overflow  # type: ignore[method-assign]


def limit_memory(count: int) -> None:
    """Evaluation runs out of memory in batches of more than `count` examples, as on a small GPU."""
    import torch

    from t5tune.evaluation import scoring as evaluation
    from t5tune.model.loss import TargetLoss

    generate = evaluation.generate
    compute_losses = TargetLoss.forward
    live_batches: list[weakref.ref[torch.Tensor]] = []

    def check(examples: int) -> None:
        assert not any(tensor() is not None for tensor in live_batches), "the batch that failed still uses its memory"
        batch = torch.ones(max(examples, 1))
        if examples > count:
            live_batches.append(weakref.ref(batch))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def generate_or_fail(model: Any, sources: list[list[int]], *arguments: Any, **options: Any) -> Any:
        check(len(sources))
        return generate(model, sources, *arguments, **options)

    def compute_or_fail(
        self: TargetLoss, hidden: Any, shape: Any, head: Any, reduction: str, criterion: Any, *rest: Any
    ) -> Any:
        if reduction == "none":  # evaluation
            check(int((criterion.labels_N == 1).sum()))  # each target has one EOS token
        return compute_losses(self, hidden, shape, head, reduction, criterion, *rest)

    evaluation.generate = generate_or_fail
    TargetLoss.forward = compute_or_fail  # type: ignore[method-assign]

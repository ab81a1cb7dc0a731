"""Called in each rank of a run: save what DeepSpeed's engine has just loaded, before the first step."""

from typing import Any


def save_after_loading(folder: str) -> None:
    """From here on, the engine saves a checkpoint of its own in this folder as soon as a run has resumed."""
    from t5tune.training.trainer import T5Trainer

    catch_up = T5Trainer.catch_up

    def save(self: T5Trainer, steps_per_epoch: int) -> Any:
        self.model_wrapped.save_checkpoint(folder)
        return catch_up(self, steps_per_epoch)

    T5Trainer.catch_up = save  # type: ignore[method-assign]

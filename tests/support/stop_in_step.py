"""Called in each rank of a run: stop it with a signal in the middle of a step."""

import os
import signal


def stop_in_step(step: int) -> None:
    """From here on, rank 0 gets a SIGTERM in the middle of this step, after which the run stops."""
    from t5tune.training.trainer import T5Trainer

    train = T5Trainer.training_step

    def stop(self: T5Trainer, *given: object, **options: object) -> object:
        if self.state.global_step == step - 1 and os.environ.get("RANK", "0") == "0":
            os.kill(os.getpid(), signal.SIGTERM)
        return train(self, *given, **options)

    T5Trainer.training_step = stop  # type: ignore[assignment, method-assign]

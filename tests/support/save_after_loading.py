"""Called in each rank of a run: save what DeepSpeed's engine has just loaded, before the first step."""


def save_after_loading(folder: str) -> None:
    """From here on, the engine saves a checkpoint of its own in this folder as soon as a run has resumed."""
    from t5tune.training.flow import TrainingFlow

    catch_up = TrainingFlow.catch_up

    def save(self: TrainingFlow) -> None:
        self.trainer.model_wrapped.save_checkpoint(folder)
        catch_up(self)

    TrainingFlow.catch_up = save  # type: ignore[method-assign]

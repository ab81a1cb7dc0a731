"""A report that keeps the notes."""

from t5tune.progress import Event, Note


class Notes(list[str]):
    """The texts of all notes; `warnings` has the texts of warnings only."""

    def __init__(self) -> None:
        super().__init__()
        self.warnings: list[str] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, Note):
            self.append(event.text)
            self.warnings += [event.text] if event.warning else []

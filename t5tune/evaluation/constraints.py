"""Check a constraint on predictions before anything is computed."""

from t5tune.constraints import Constraint
from t5tune.errors import SettingsError
from t5tune.evaluation.examples import EvaluationSet
from t5tune.inference.loading import LoadedModel, make_compiler
from t5tune.progress import Note, Report


def check_constraint(
    constraint: Constraint | None, chosen: EvaluationSet, loaded: LoadedModel, report: Report
) -> Constraint | None:
    """Compile a constraint for the model and its base, and return the base's; None: its predictions are free.

    Raises:
        SettingsError: the constraint is invalid, or a model can't write the only possible answers.
    """
    if constraint is None:
        return None
    make_compiler(loaded.model, loaded.tokenizer, "").start(constraint)
    if constraint.answers:
        chosen.check_targets({*constraint.answers}, constraint.place, report)
    if chosen.base is None:
        return constraint
    try:
        make_compiler(loaded.model, chosen.base.tokenizer, "").start(constraint)
    except SettingsError as error:
        if constraint.answers:  # both models choose from them
            raise
        report(Note(f"the base's predictions are free: {error.problems[0]}", warning=True))
        return None
    return constraint

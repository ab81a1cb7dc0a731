"""A running server starts `python -m t5tune.commands.serve` to convert a model."""

from t5tune.compat.quiet import quiet_libraries

with quiet_libraries():  # also while they are imported
    from t5tune.commands.serve.convert_model import answer_parent

    answer_parent()

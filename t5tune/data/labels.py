"""What a model with labels predicts: the classes of a text or of each word, or numbers.

task = LabelTask("tag", per_token=True, several=False, names=("C", "E", "H"), source_words="residues")
task.num_outputs, task.problem_type    # 3, "single_label_classification"
"""

from dataclasses import dataclass

from t5tune.settings.groups.record_format import LabelObjectiveName, SourceWords


@dataclass(frozen=True)
class LabelTask:
    """The outputs of a model with labels.

    Args:
        per_token: whether each word has a label or a number, which its first token predicts; otherwise a text has.
        several: whether a text may have several labels, or no label.
        names: the classes, in the order of the logits; empty for numbers.
    """

    objective: LabelObjectiveName
    per_token: bool
    several: bool
    names: tuple[str, ...]
    source_words: SourceWords

    @property
    def num_outputs(self) -> int:
        """The number of logits of a text or a token."""
        return len(self.names) or 1

    @property
    def problem_type(self) -> str:
        """The problem in transformers' words."""
        if self.objective == "regress":
            return "regression"
        return "multi_label_classification" if self.several else "single_label_classification"

"""Compare the targets of training with a JSON schema that replies will follow."""

from collections import defaultdict

from t5tune.constraints import Constraint
from t5tune.constraints.compiler import Compiler
from t5tune.data.caches.examples import Examples
from t5tune.data.tokens.tokenizer import Tokenizer, decode_reference
from t5tune.errors import SettingsError
from t5tune.progress import Note, Report
from t5tune.settings.messages import shorten_value


def report_violations(schema: Constraint, tokenizer: Tokenizer, examples: Examples, report: Report) -> None:
    """Count the targets that violate a schema, and report the first.

    Raises:
        SettingsError: all targets violate it, or it can't be enforced with this tokenizer.
    """
    by_suffix: dict[str, list[int]] = defaultdict(list)
    for index in range(len(examples)):
        by_suffix[examples.get_template(index).answer_suffix].append(index)
    violating = []
    for suffix, indices in by_suffix.items():
        compiler = Compiler(tokenizer, len(tokenizer), [tokenizer.eos_token_id], suffix)
        for index in indices:
            matcher = compiler.start(schema)
            if not all(map(matcher.accept, examples[index].target_T.tolist())):
                violating.append(index)
    if not violating:
        return
    first = min(violating)
    text = decode_reference(tokenizer, examples[first].target_T, examples.get_template(first).answer_suffix)
    found = f"{schema.place}: {len(violating):,} of {len(examples):,} targets violate it"
    found += f", such as example {examples.name_example(first)}'s: {shorten_value(text)}"
    if len(violating) == len(examples):
        raise SettingsError(found, hint="correct the schema; its properties must be in the targets' order")
    report(Note(f"{found}; replies will follow it nevertheless", warning=True))

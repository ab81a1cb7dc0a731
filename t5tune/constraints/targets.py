"""Compare the targets of training with a JSON schema that replies will follow."""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from t5tune.constraints import Constraint
from t5tune.constraints.compiler import Compiler
from t5tune.constraints.json_grammar import ESCAPES, NON_ASCII, SLASH
from t5tune.data.caches.examples import Examples
from t5tune.data.tokens.tokenizer import Tokenizer, decode_reference
from t5tune.errors import SettingsError
from t5tune.formatting import format_count
from t5tune.progress import Note, Report
from t5tune.settings.messages import shorten_value

ESCAPE = re.compile(r"\\(?:u([0-9a-f]{4})|.)", re.DOTALL)
LAST_ASCII = 0x7E  # JSON may have U+007F as it is, but some writers escape it


def fit_schema(schema: Constraint, tokenizer: Tokenizer, examples: Examples, report: Report) -> Constraint:
    r"""Return the schema that replies will follow, and report the targets that violate it.

    JSON has several spellings of a text. Replies have the shortest; if targets of the data have escapes that need not
    be, such as `\/` or `\u00e9`, the returned schema allows these, too.

    Raises:
        SettingsError: all targets violate it, or it can't be enforced with this tokenizer.
    """
    targets = _Targets(tokenizer, examples)
    violating = targets.find_violating(schema, range(len(examples)))
    if escapes := _find_escapes(map(targets.decode, violating)):
        allowing = _allow_escapes(schema, escapes)
        remaining = targets.find_violating(allowing, violating)
        if len(remaining) < len(violating):
            count = format_count(len(violating) - len(remaining), "target")
            report(Note(f"{schema.place}: {count} with escapes such as \\/ or \\u00e9; replies may have them, too"))
            schema, violating = allowing, remaining
    if violating:
        _report_violations(schema, targets, violating, report)
    return schema


@dataclass(frozen=True)
class _Targets:
    tokenizer: Tokenizer
    examples: Examples

    def find_violating(self, schema: Constraint, indices: Iterable[int]) -> list[int]:
        """List the indices whose targets violate a schema."""
        by_suffix: dict[str, list[int]] = defaultdict(list)
        for index in indices:
            by_suffix[self.examples.get_template(index).answer_suffix].append(index)
        violating = []
        for suffix, some in by_suffix.items():
            compiler = Compiler(self.tokenizer, len(self.tokenizer), [self.tokenizer.eos_token_id], suffix)
            for index in some:
                matcher = compiler.start(schema)
                if not all(map(matcher.accept, self.examples[index].target_T.tolist())):
                    violating.append(index)
        return sorted(violating)

    def decode(self, index: int) -> str:
        suffix = self.examples.get_template(index).answer_suffix
        return decode_reference(self.tokenizer, self.examples[index].target_T, suffix)


def _find_escapes(texts: Iterable[str]) -> str:
    """Find the escapes that need not be in JSON texts, as the schema's keyword has them."""
    found = set()
    for text in texts:
        for escape in ESCAPE.finditer(text):
            if escape[0] == r"\/":
                found.add(SLASH)
            elif escape[1] and int(escape[1], 16) > LAST_ASCII:
                found.add(NON_ASCII)
    return "".join(sorted(found))


def _allow_escapes(schema: Constraint, escapes: str) -> Constraint:
    keywords = json.loads(schema.text)
    allowed = "".join(sorted({*keywords.get(ESCAPES, ""), *escapes}))
    return replace(schema, text=json.dumps({**keywords, ESCAPES: allowed}, ensure_ascii=False))


def _report_violations(schema: Constraint, targets: _Targets, violating: Sequence[int], report: Report) -> None:
    examples, first = targets.examples, violating[0]
    found = f"{schema.place}: {len(violating):,} of {len(examples):,} targets violate it"
    found += f", such as example {examples.name_example(first)}'s: {shorten_value(targets.decode(first))}"
    if len(violating) == len(examples):
        raise SettingsError(found, hint="correct the schema; its properties must be in the targets' order")
    report(Note(f"{found}; replies will follow it nevertheless", warning=True))

"""Which examples are held out: that follows from the conversations, eval_fraction and split_seed alone."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from t5tune.commands.evaluate import evaluate
from t5tune.commands.prepare import prepare
from t5tune.commands.train import set_up_run_folder
from t5tune.commands.train.run_plan import make_run_plan
from t5tune.data.caches.examples import Examples
from t5tune.data.caches.prepared import open_examples
from t5tune.data.tokens.tokenizer import decode_reference, load_tokenizer
from t5tune.runs.data import open_data
from t5tune.settings import EvaluateSettings, PrepareSettings, TrainSettings
from tests.support.caches import find_cache
from tests.support.prose import english_text

FRACTION = 0.25
NUM_CONVERSATIONS = 40


def list_pairs(count: int = NUM_CONVERSATIONS, name: str = "sums") -> list[dict[str, str]]:
    return [{"source": f"{name}: add {number} and 1", "target": f"{name} {number + 1}"} for number in range(count)]


def write_lines(path: Path, records: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def split_for_training(base: Path, data: Any, run: Path, /, **changes: Any) -> tuple[Examples, Examples]:
    values = {"model_name_or_path": str(base), "data_path": data, "output_dir": run, "eval_fraction": FRACTION}
    settings = TrainSettings(**{**values, **changes})
    with ExitStack() as stack:
        set_up_run_folder(settings, stack)
    plan = make_run_plan(settings)
    examples, held_out = open_data(plan, None)
    assert held_out is not None
    return examples, held_out


def list_targets(examples: Examples) -> list[tuple[int, ...]]:
    return sorted(tuple(map(int, example.target_T)) for example in examples)


def list_held_out(base: Path, data: Any, run: Path, /, **changes: Any) -> list[tuple[int, ...]]:
    return list_targets(split_for_training(base, data, run, **changes)[1])


@pytest.fixture
def forms(tmp_path: Path) -> dict[str, Any]:
    """The same conversations: a file, in a different order, in memory, two datasets, and a mixture with weights."""
    pairs = list_pairs()
    file = write_lines(tmp_path / "pairs.jsonl", pairs)
    half = write_lines(tmp_path / "half.jsonl", pairs[:20]), write_lines(tmp_path / "rest.jsonl", pairs[20:])
    return {
        "file": [file], "reversed": [write_lines(tmp_path / "reversed.jsonl", pairs[::-1])], "memory": pairs,
        "two files": list(half),
    }  # fmt: skip


@pytest.mark.slow
def test_the_split_follows_from_the_conversations_and_split_seed(
    forms: dict[str, Any], untied_base: Path, tied_base: Path, tmp_path: Path
) -> None:
    folders = (tmp_path / f"run-{number}" for number in range(100))
    expected = list_held_out(untied_base, forms["file"], next(folders))
    assert len(expected) == FRACTION * NUM_CONVERSATIONS
    for seed in (1, 2, 3):
        assert list_held_out(untied_base, forms["file"], next(folders), seed=seed) == expected
    for data in forms.values():
        assert list_held_out(untied_base, data, next(folders)) == expected
    assert list_held_out(tied_base, forms["file"], next(folders)) == expected
    assert list_held_out(untied_base, forms["file"], next(folders), split_seed=1) != expected


@pytest.mark.slow
def test_datasets_of_a_mixture_hold_out_equally_with_any_seed(untied_base: Path, tmp_path: Path) -> None:
    files = [write_lines(tmp_path / f"{name}.jsonl", list_pairs(20, name)) for name in ("sums", "words")]
    weighted = [f"{files[0]}:3", f"{files[1]}:1"]
    found = [list_held_out(untied_base, weighted, tmp_path / f"run-{seed}", seed=seed) for seed in (1, 2)]
    assert found[0] == found[1]
    for number, file in enumerate(files):  # each file alone has the same held-out examples
        alone = list_held_out(untied_base, [file], tmp_path / f"alone-{number}")
        assert set(alone) < set(found[0])


@pytest.mark.slow
def test_prepare_its_parts_and_evaluate_hold_out_what_train_does(
    forms: dict[str, Any], untied_base: Path, tmp_path: Path
) -> None:
    expected = list_held_out(untied_base, forms["file"], tmp_path / "run", seed=5)
    values = {"model_name_or_path": str(untied_base), "data_path": forms["file"], "eval_fraction": FRACTION}
    prepare(PrepareSettings(**values, output_dir=tmp_path / "cache", seed=6))
    for part in range(2):
        prepare(PrepareSettings(**values, output_dir=tmp_path / "parts", seed=7, shard=f"{part}/2"))
    for name in ("cache", "parts"):
        _, held_out = open_examples(tmp_path / name).split_as_prepared()
        assert list_targets(held_out) == expected
    chosen = {"model_name_or_path": str(untied_base), "data_path": tmp_path / "cache", "use_cpu": True}
    result = evaluate(EvaluateSettings(**chosen, output_dir=tmp_path / "scores"))
    targets = sorted(json.loads(line)["target"] for line in result.predictions.read_text().splitlines())
    tokenizer = load_tokenizer(find_cache(tmp_path / "cache") / "tokenizer")
    assert targets == sorted(decode_reference(tokenizer, ids, "") for ids in expected)


def test_more_data_moves_few_conversations_to_the_other_side(untied_base: Path, tmp_path: Path) -> None:
    run = tmp_path / "after"
    before = set(list_held_out(untied_base, list_pairs(40), tmp_path / "before"))
    trained_on, after = (set(list_targets(part)) for part in split_for_training(untied_base, list_pairs(48), run))
    assert (len(before), len(after)) == (10, 12)
    assert len(before & trained_on) <= 2  # at most the number of newly held-out examples


@pytest.mark.slow
def test_held_out_raw_text_is_masked_alike_with_any_seed(untied_base: Path, tmp_path: Path) -> None:
    paragraphs = [part for part in english_text().split("\n\n") if len(part) > 200][:12]
    texts = [{"text": part} for part in paragraphs]
    data, other = (
        write_lines(tmp_path / name, part) for name, part in (("a.jsonl", texts[:8]), ("b.jsonl", texts[8:]))
    )
    common = {"objective": "span-corruption", "model_max_length": 64, "denoisers": ["ul2"]}
    for name, changes in {"part": {}, "file": {"eval_data_path": [other], "eval_fraction": 0.0}}.items():
        trained_on, held_out = zip(
            *(
                map(list_targets, split_for_training(untied_base, [data], tmp_path / f"{name}-{seed}", **values))
                for seed in (1, 2)
                if (values := common | changes | {"seed": seed})
            ),
            strict=True,
        )
        assert trained_on[0] != trained_on[1]
        assert held_out[0] == held_out[1]

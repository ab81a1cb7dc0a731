"""Runs that learn labels with an encoder: ranks, ZeRO, resuming, evaluations, mixtures, and stock transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from seqeval.metrics import f1_score
from seqeval.scheme import IOB2
from sklearn import metrics as sklearn_metrics
from torch.nn import functional
from transformers import AutoModelForTokenClassification

from t5tune.commands.evaluate import evaluate
from t5tune.commands.merge import merge
from t5tune.commands.train import train
from t5tune.data.caches.prepared import open_examples
from t5tune.data.tokens.encoding import LabeledExample
from t5tune.errors import DataError, SettingsError, Stopped
from t5tune.progress import Advanced, Event, Note
from t5tune.settings import EvaluateSettings, MergeSettings, TrainSettings
from tests.support.processes.command_line import OnRanks
from tests.support.processes.runs import stop_at
from tests.support.train_runs import make_settings as make_run_settings
from tests.support.train_runs import read_losses, read_metrics_lines

pytestmark = pytest.mark.slow

OBJECTIVES = ["classify", "several", "regress", "numbers", "tag"]
WORDS = ["three", "four", "cups", "plates", "to", "the", "table", "and", "please"]


def label_words(kind: str, words: list[str]) -> Any:
    """Return the label, the labels or the numbers of a text."""
    tags = ["B-amount" if word in WORDS[:2] else "B-thing" if word in WORDS[2:4] else "O" for word in words]
    match kind:
        case "classify":
            return "many" if tags.count("O") < len(tags) / 2 else "few"
        case "several":
            return sorted({*tags} - {"O"})
        case "regress":
            return 1000.0 * tags.count("O")
        case "numbers":
            return [float(len(word)) for word in words]
    return tags


def write_data(path: Path, kind: str, count: int = 48, seed: int = 3) -> Path:
    """Write random texts with labels that their words determine."""
    rng, lines = np.random.default_rng(seed), []
    for _ in range(count):
        words = [WORDS[index] for index in rng.integers(0, len(WORDS), rng.integers(3, 12))]
        text = words if kind in ("numbers", "tag") else " ".join(words)
        lines.append(json.dumps({"text": text, "label": label_words(kind, words)}))
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("labels")
    return {kind: write_data(folder / f"{kind}.jsonl", kind) for kind in OBJECTIVES}


def get_objective(kind: str) -> str:
    return {"several": "classify", "numbers": "regress"}.get(kind, kind)


def make_settings(base: Path, data: Path, run: Path, **changes: Any) -> TrainSettings:
    return make_run_settings(
        base, data, run, **{"objective": get_objective(data.stem), "eval_fraction": 0.25, "eval_steps": 3} | changes
    )


def read_evaluations(run: Path) -> list[dict[str, float]]:
    return [line for line in read_metrics_lines(run) if "eval_loss" in line]


def read_predictions(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize(
    "options", [["--packing=off"], ["--num-processes=2"], ["--num-processes=2", "--deepspeed=zero2"],
                ["--num-processes=2", "--deepspeed=zero3", "--gradient-checkpointing"]],
    ids=["padded", "ranks", "zero2", "zero3"],
)  # fmt: skip
@pytest.mark.variants("zero3-tag", "padded-several", "ranks-classify")
def test_each_way_has_the_losses_of_one_process(
    options: list[str], kind: str, base_without_dropout: Path, data: dict[str, Path], tmp_path: Path, on_ranks: OnRanks
) -> None:
    ranks = 2 if "--num-processes=2" in options else 1
    arguments = [
        "train", f"--model-name-or-path={base_without_dropout}", f"--data-path={data[kind]}",
        f"--objective={get_objective(kind)}", "--max-steps=5", "--learning-rate=1e-2", "--logging-steps=1", "--use-cpu",
        "--eval-fraction=0.25", "--eval-steps=5", "--gradient-accumulation-steps=2", "--lora-dropout=0",
        "--report-samples=2",
    ]  # fmt: skip
    runs = tmp_path / "one", tmp_path / "other"
    done = on_ranks(1, *arguments, f"--output-dir={runs[0]}", "--per-device-train-batch-size=4")
    assert done.code == 0, done.stderr
    others = [option for option in options if not option.startswith("--num-processes")]
    done = on_ranks(
        ranks, *arguments, f"--output-dir={runs[1]}", f"--per-device-train-batch-size={4 // ranks}", *others
    )
    assert done.code == 0, done.stderr
    np.testing.assert_allclose(read_losses(runs[1]), read_losses(runs[0]), rtol=2e-4)
    assert len({*read_losses(runs[0])}) == 5
    one, other = (read_evaluations(each)[-1] for each in runs)
    assert other["eval_loss"] == pytest.approx(one["eval_loss"], rel=2e-3)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("regress", {}),
        ("tag", {"q_lora": True}),
        ("numbers", {"train_mode": "full", "learning_rate": 1e-3}),
        ("several", {"packing": "off", "tokens_per_batch": 300}),
    ],
)
@pytest.mark.variants("regress-options0", "tag-options1")
def test_a_run_that_is_stopped_ends_with_the_same_bits(
    kind: str, options: dict[str, Any], untied_base: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    runs = tmp_path / "whole", tmp_path / "stopped"
    train(make_settings(untied_base, data[kind], runs[0], **options))
    settings = make_settings(untied_base, data[kind], runs[1], **options)
    with pytest.raises(Stopped):
        train(settings, stop_at(Advanced("train", 4)))
    train(settings)
    file = "model.safetensors" if options.get("train_mode") == "full" else "adapter_model.safetensors"
    assert (runs[0] / file).read_bytes() == (runs[1] / file).read_bytes()
    assert read_losses(runs[1]) == read_losses(runs[0])


@pytest.fixture(scope="module")
def classifier(untied_base: Path, data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run, and the merged checkpoint."""
    folder = tmp_path_factory.mktemp("classifier")
    settings = make_settings(untied_base, data["classify"], folder / "run", report_samples=2, max_steps=12)
    train(settings)
    merge(MergeSettings(adapter=folder / "run", output_dir=folder / "merged"))
    return folder / "run", folder / "merged"


def compute_stock_logits(folder: Path, examples: list[LabeledExample]) -> torch.Tensor:
    """Average the tokens' logits of each text with stock transformers: (N, K)."""
    model = AutoModelForTokenClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        return torch.stack([model(torch.from_numpy(each.source_S)[None]).logits[0].mean(0) for each in examples])


def test_held_out_metrics_equal_the_merged_model(classifier: tuple[Path, Path]) -> None:
    run, merged = classifier
    _, held_out = open_examples(run / "data").split(0.25, 42)
    examples = [each for each in held_out if isinstance(each, LabeledExample)]
    logits_NK = compute_stock_logits(merged, examples)
    labels_N = torch.tensor([int(each.values[0]) for each in examples])
    last = read_evaluations(run)[-1]
    assert last["eval_loss"] == pytest.approx(float(functional.cross_entropy(logits_NK, labels_N)), abs=1e-5)
    f1 = sklearn_metrics.f1_score(labels_N, logits_NK.argmax(1), average="macro")
    assert last["eval_macro_f1"] == pytest.approx(100 * f1, abs=1e-3)
    result = json.loads((run / "result.json").read_text())
    assert [*result["labels"]["all"]["classes"]] == ["few", "many"] or [*result["labels"]["all"]["classes"]] == [
        "many",
        "few",
    ]
    assert "Confusion matrix" in (run / "report.html").read_text()


def test_evaluate_gives_the_labels_of_stock_transformers(
    classifier: tuple[Path, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    run, merged = classifier
    file = write_data(tmp_path / "more.jsonl", "classify", 20, seed=8)
    found = []
    for name, model in (("run", run), ("merged", merged)):
        settings = EvaluateSettings(model_name_or_path=str(model), data_path=str(file), output_dir=tmp_path / name)
        result = evaluate(settings)
        found.append(read_predictions(tmp_path / name))
        assert result.accuracy is not None
        assert result.labels is not None
        assert result.bleu is None
        hits = sum(line["prediction"] == line["target"] for line in found[-1])
        assert result.accuracy == pytest.approx(100 * hits / len(found[-1]), abs=1e-3)
    assert [line["prediction"] for line in found[0]] == [line["prediction"] for line in found[1]]
    for line in found[0]:
        assert line["probability"] == max(line["probabilities"].values())
        assert sum(line["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    labels = [json.loads(text)["label"] for text in file.read_text().splitlines()]
    assert [line["target"] for line in found[0]] == labels


def test_entities_of_predictions_are_scored_as_seqeval_does(
    untied_base: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    train(make_settings(untied_base, data["tag"], tmp_path / "run", max_steps=4))
    settings = EvaluateSettings(
        model_name_or_path=str(tmp_path / "run"), data_path=str(data["tag"]), output_dir=tmp_path / "scores"
    )
    result = evaluate(settings)
    lines = read_predictions(tmp_path / "scores")
    targets, predictions = ([line[key] for line in lines] for key in ("target", "prediction"))
    assert targets == [json.loads(text)["label"] for text in data["tag"].read_text().splitlines()]
    expected = f1_score(targets, predictions, mode="strict", scheme=IOB2, zero_division=0)
    assert result.entity_f1 == pytest.approx(100 * expected, abs=1e-3)
    assert read_evaluations(tmp_path / "run")[-1]["eval_entity_f1"] >= 0


def correlate(lines: list[dict[str, Any]], targets: list[float]) -> dict[str, float]:
    """Compute the metrics of numbers with scipy, from lines of predictions.jsonl."""
    found = np.array([line["prediction"] for line in lines])
    return {
        "spearman": pytest.approx(100 * stats.spearmanr(found, targets)[0], rel=1e-12),
        "pearson": pytest.approx(100 * stats.pearsonr(found, targets)[0], rel=1e-12),
        "rmse": pytest.approx(np.sqrt(np.mean((found - targets) ** 2)), rel=1e-12),
    }


def test_numbers_near_a_million_are_scored_as_scipy_does(untied_base: Path, tmp_path: Path) -> None:
    """Rounded to six digits or to fp32, most of these numbers would be others."""
    rng, texts = np.random.default_rng(5), write_data(tmp_path / "texts.jsonl", "regress", 60)
    records = [json.loads(line) for line in texts.read_text().splitlines()]
    targets = [1e6 + 0.004 * record["label"] + rng.normal(0, 2) for record in records]
    data = tmp_path / "regress.jsonl"
    pairs = zip(records, targets, strict=True)
    data.write_text("\n".join(json.dumps(record | {"label": target}) for record, target in pairs))
    train(make_settings(untied_base, data, tmp_path / "run", max_steps=6, learning_rate=3e-2))
    settings = EvaluateSettings(model_name_or_path=str(tmp_path / "run"), data_path=str(data))
    result = evaluate(settings.model_copy(update={"output_dir": tmp_path / "scores"}))
    lines = read_predictions(tmp_path / "scores")
    assert [line["target"] for line in lines] == targets
    assert len({line["prediction"] for line in lines}) > 10
    expected = correlate(lines, targets)
    assert {name: getattr(result, name) for name in expected} == expected
    assert result.rmse is not None
    assert result.loss == pytest.approx(result.rmse**2, rel=1e-12)
    # the last evaluation of training, on the same weights
    held_out = settings.model_copy(update={"data_path": [str(tmp_path / "run" / "data")]})
    evaluate(held_out.model_copy(update={"output_dir": tmp_path / "held-out"}))
    lines = read_predictions(tmp_path / "held-out")
    last = read_evaluations(tmp_path / "run")[-1]
    expected = correlate(lines, [line["target"] for line in lines])
    assert {name: last[f"eval_{name}"] for name in expected} == expected


def test_datasets_with_different_labels_share_a_head(untied_base: Path, tmp_path: Path) -> None:
    files = {"one": ["few", "many"], "two": ["none", "few"]}
    for name, labels in files.items():
        rows = [f"{word} {number} {name},{labels[number % 2]}" for number, word in enumerate(WORDS * 3)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["text,label", *rows]))
    settings = make_settings(
        untied_base, tmp_path / "one.csv", tmp_path / "run", objective="classify",
        data_path=[f"{tmp_path / 'one.csv'}:3", f"{tmp_path / 'two.csv'}:1"], metric_for_best_model="macro_f1",
        early_stopping_patience=1,
    )  # fmt: skip
    train(settings)
    found = json.loads((tmp_path / "run" / "training_data.json").read_text())
    assert found["labels"]["names"] == ["few", "many", "none"]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert {*result["labels"]} == {"all", "one", "two"}
    assert all("macro_f1" in each for each in (result["eval"], *result["datasets"].values()))


def test_unknown_labels_are_rejected_with_a_count(classifier: tuple[Path, Path], tmp_path: Path) -> None:
    run, _ = classifier
    file = write_data(tmp_path / "more.jsonl", "classify", 20, seed=8)
    file.write_text(file.read_text().replace('"few"', '"a few"'))
    events: list[Event] = []
    settings = EvaluateSettings(model_name_or_path=str(run), data_path=str(file), output_dir=tmp_path / "scores")
    result = evaluate(settings, events.append)
    lines = read_predictions(tmp_path / "scores")
    assert result.examples == len(lines) == file.read_text().count('"many"')
    notes = [event.text for event in events if isinstance(event, Note)]
    count = 20 - result.examples
    first = next(number for number, line in enumerate(file.read_text().splitlines(), 1) if '"a few"' in line)
    assert any(f"{count} records rejected, the first: {file}:{first}" in note and "a few" in note for note in notes), (
        notes
    )


@pytest.mark.parametrize(("name", "value"), [("choices", ["few"]), ("max_new_tokens", 7), ("compare_base", True)])
def test_settings_of_texts_are_refused(
    name: str, value: Any, classifier: tuple[Path, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    settings = EvaluateSettings(
        model_name_or_path=str(classifier[0]),
        data_path=str(data["classify"]),
        output_dir=tmp_path / "scores",
        **{name: value},
    )
    with pytest.raises(SettingsError, match=f"^{name}: .*predicts labels, and writes no text"):
        evaluate(settings)


def test_data_with_several_labels_is_refused_by_a_classifier(
    classifier: tuple[Path, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    settings = EvaluateSettings(
        model_name_or_path=str(classifier[0]), data_path=str(data["several"]), output_dir=tmp_path / "scores"
    )
    with pytest.raises(DataError):
        evaluate(settings)

"""Scored choices, answers from a file, and probabilities of replies, compared with stock transformers."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from t5tune.commands.evaluate import EvaluateResult, evaluate
from t5tune.errors import SettingsError
from t5tune.progress import Event, Note
from t5tune.settings import EvaluateSettings
from tests.commands.evaluate.outputs import read_predictions, run_evaluate
from tests.support.processes.command_line import CommandResult, t5tune_in_fork

pytestmark = pytest.mark.slow

CHOICES = ["six teas", "a cake", "coffee", "soup for Tom"]
NATS = 2e-5


def write_records(path: Path, targets: list[str]) -> Path:
    path.write_text("".join(json.dumps({"source": f"guess {n}", "target": t}) + "\n" for n, t in enumerate(targets)))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 records; none of them is the last choice."""
    return write_records(tmp_path_factory.mktemp("choices") / "data.jsonl", [*CHOICES[:2], *CHOICES[:3]] * 6)


@pytest.fixture(scope="module")
def scored(untied_base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> EvaluateResult:
    return run_evaluate(untied_base, data, tmp_path_factory.mktemp("choices") / "out", choices=CHOICES)


@pytest.fixture(scope="module")
def measure(untied_base: Path) -> Callable[[str, str, bool], list[float]]:
    """Compute the log-probabilities of a target's tokens with stock transformers in fp64."""
    model = AutoModelForSeq2SeqLM.from_pretrained(untied_base).double().eval()
    tokenizer = AutoTokenizer.from_pretrained(untied_base)

    def measure(source: str, target: str, is_ended: bool = True) -> list[float]:
        inputs, labels = (tokenizer(text, return_tensors="pt").input_ids for text in (source, target))
        with torch.no_grad():
            logprobs = model(input_ids=inputs, labels=labels).logits.log_softmax(-1)
        found = logprobs[0].gather(1, labels[0][:, None])[:, 0].tolist()
        return found if is_ended else found[:-1]

    return measure


def test_choices_have_the_log_probabilities_of_stock_transformers(scored: EvaluateResult, measure: Any) -> None:
    for line in read_predictions(scored):
        expected = {choice: sum(measure(line["source"], choice)) for choice in CHOICES}
        assert line["choice_logprobs"] == pytest.approx(expected, abs=NATS)
        best = max(expected, key=expected.__getitem__)
        assert (line["prediction"], line["logprob"]) == (best, line["choice_logprobs"][best])
        values = np.array([*expected.values()])
        assert line["probability"] == pytest.approx(np.exp(values).max() / np.exp(values).sum(), rel=1e-4)
        # the loss is of the same target, encoded as in training
        length = len(measure(line["source"], line["target"]))
        assert -line["loss"] * length == pytest.approx(expected[line["target"]], abs=1e-4)


def test_choices_are_compared_by_their_means_per_token(
    scored: EvaluateResult, untied_base: Path, data: Path, measure: Any, tmp_path: Path
) -> None:
    result = run_evaluate(untied_base, data, tmp_path / "mean", choices=CHOICES, choices_by="mean")
    for line, by_sum in zip(read_predictions(result), read_predictions(scored), strict=True):
        means = np.array([np.mean(measure(line["source"], choice)) for choice in CHOICES])
        assert line["prediction"] == CHOICES[int(means.argmax())]
        assert line["probability"] == pytest.approx(np.exp(means).max() / np.exp(means).sum(), rel=1e-4)
        assert line["choice_logprobs"] == by_sum["choice_logprobs"]


def compute_calibration_error(confidences: list[float], are_right: list[bool]) -> float:
    """Compute it as Guo et al. 2017 define it, by numpy."""
    confidence, is_right = np.array(confidences), np.array(are_right)
    edges, error = np.linspace(0, 1, 16), 0.0
    for low, high in zip(edges, edges[1:], strict=False):
        within = (confidence > low) & (confidence <= high)
        if within.any():
            error += within.mean() * abs(is_right[within].mean() - confidence[within].mean())
    return 100 * error


def test_the_scores_have_classes_and_the_calibration_error(scored: EvaluateResult) -> None:
    lines = read_predictions(scored)
    are_right = [line["prediction"] == line["target"] for line in lines]
    assert scored.ece == pytest.approx(compute_calibration_error([each["probability"] for each in lines], are_right))
    assert scored.accuracy == pytest.approx(100 * np.mean(are_right), abs=1e-4)
    assert scored.exact_match is scored.rougeL is scored.recall is None
    assert scored.labels is not None
    table = scored.labels["all"]
    assert {label: each["support"] for label, each in table["classes"].items()} == dict(
        zip(CHOICES, [12, 12, 6, 0], strict=True)
    )
    assert all(each["no_label"] == 0 for each in table["classes"].values())
    assert sum(each["count"] for each in table["calibration"]) == len(lines)
    saved = json.loads((scored.predictions.parent / "scores.json").read_text())
    assert (saved["ece"], saved["labels"], saved["settings"]["choices"]) == (scored.ece, scored.labels, CHOICES)
    page = (scored.predictions.parent / "report.html").read_text()
    dots = re.findall(r"<title>accuracy \(%\): (\S+) at probability \(%\) (\S+)</title>", page)
    assert len(dots) == len(table["calibration"])


def test_each_of_several_datasets_has_a_calibration_error(untied_base: Path, data: Path, tmp_path: Path) -> None:
    other = write_records(tmp_path / "other.jsonl", CHOICES[2:])
    sets = [{"path": str(path), "name": name} for path, name in ((data, "many"), (other, "few"))]
    result = run_evaluate(untied_base, data, tmp_path / "out", data_path=None, data=sets, choices=CHOICES)
    lines = read_predictions(result)
    assert result.datasets is not None
    assert result.labels is not None
    for name, values in result.datasets.items():
        chosen = [line for line in lines if line["dataset"] == name]
        are_right = [line["prediction"] == line["target"] for line in chosen]
        expected = compute_calibration_error([line["probability"] for line in chosen], are_right)
        assert values["ece"] == pytest.approx(expected)
        assert len(result.labels[name]["classes"]) == len(CHOICES)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_each_reply_has_its_probability(
    num_beams: int, untied_base: Path, data: Path, measure: Any, tmp_path: Path
) -> None:
    """Also if the reply didn't end: then without the token that would end it."""
    result = run_evaluate(untied_base, data, tmp_path / "out", num_beams=num_beams, num_data=6, max_new_tokens=3)
    lines = read_predictions(result)
    assert result.cut_off == len(lines)  # it is random
    model = AutoModelForSeq2SeqLM.from_pretrained(untied_base).double()
    tokenizer = AutoTokenizer.from_pretrained(untied_base)
    for line in lines:
        source = tokenizer(line["source"], return_tensors="pt").input_ids
        stock = model.generate(
            source, max_new_tokens=3, num_beams=num_beams, output_logits=True, return_dict_in_generate=True
        )
        assert line["prediction"] == tokenizer.decode(stock.sequences[0], skip_special_tokens=True)
        with torch.no_grad():
            logits = model(input_ids=source, decoder_input_ids=stock.sequences[:, :-1]).logits
        logprobs = logits.log_softmax(-1)[0].gather(1, stock.sequences[0, 1:, None])
        assert line["logprob"] == pytest.approx(logprobs.sum().item(), abs=NATS)
        assert line["probability"] == pytest.approx(logprobs.sum().exp().item(), rel=1e-4)


def test_the_probability_includes_the_token_that_ended_a_reply(untied_base: Path, data: Path, tmp_path: Path) -> None:
    """Here a second token of generation_config.json, which ends the first reply after one token."""
    base = shutil.copytree(untied_base, tmp_path / "base")
    model = AutoModelForSeq2SeqLM.from_pretrained(base).double()
    tokenizer = AutoTokenizer.from_pretrained(base)
    source = tokenizer("guess 0", return_tensors="pt").input_ids
    reply = model.generate(source, max_new_tokens=2, do_sample=False)
    first, end = reply[0, 1:].tolist()
    assert first != end
    config = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [1, end]}))
    line = read_predictions(result := run_evaluate(base, data, tmp_path / "out", num_data=1))[0]
    assert (line["prediction"], result.cut_off) == (tokenizer.decode([first]), 0)
    with torch.no_grad():
        logprobs = model(input_ids=source, decoder_input_ids=reply[:, :-1]).logits.log_softmax(-1)
    expected = logprobs[0].gather(1, reply[0, 1:, None]).sum().item()
    assert line["logprob"] == pytest.approx(expected, abs=NATS)


def test_answers_of_a_file_are_ranked_by_beams(untied_base: Path, data: Path, tmp_path: Path) -> None:
    answers = tmp_path / "answers.txt"
    answers.write_text("\n".join([*CHOICES, "six teas for Tom", "a long answer with many more tokens for Lena"]))
    result = run_evaluate(untied_base, data, tmp_path / "out", choices_file=answers, num_beams=5, max_new_tokens=None)
    lines = read_predictions(result)
    known = set(answers.read_text().splitlines())
    for line in lines:
        assert line["prediction"] == line["ranking"][0]
        assert len(set(line["ranking"])) == len(line["ranking"]) > 1
        assert set(line["ranking"]) <= known
    for cutoff in (1, 5):
        found = np.mean([line["target"] in line["ranking"][:cutoff] for line in lines])
        assert result.recall is not None
        assert result.recall[f"recall_at_{cutoff}"] == pytest.approx(100 * found, abs=1e-4)
    assert set(result.recall or ()) == {"recall_at_1", "recall_at_5"}
    assert result.recall["recall_at_5"] > result.recall["recall_at_1"]
    assert result.cut_off == 0


def test_more_beams_than_answers_rank_each_answer_once(untied_base: Path, data: Path, tmp_path: Path) -> None:
    answers = tmp_path / "answers.txt"
    answers.write_text("\n".join(CHOICES[:3]))
    result = run_evaluate(untied_base, data, tmp_path / "out", choices_file=answers, num_beams=6, max_new_tokens=None)
    assert {tuple(sorted(line["ranking"])) for line in read_predictions(result)} == {tuple(sorted(CHOICES[:3]))}
    assert result.recall is not None
    assert result.recall["recall_at_6"] == 100
    cut = run_evaluate(untied_base, data, tmp_path / "cut", choices_file=answers, num_beams=2, max_new_tokens=1)
    assert all(line["ranking"] == [] for line in read_predictions(cut))


def test_targets_that_are_no_choice_are_reported(untied_base: Path, data: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    values = {"model_name_or_path": untied_base, "data_path": data, "use_cpu": True, "output_dir": tmp_path / "out"}
    evaluate(EvaluateSettings(**values, choices=CHOICES[1:]), events.append)
    assert [event.text for event in events if isinstance(event, Note) and event.warning] == [
        "choices: lacks 12 of 30 targets, such as 'six teas'; their predictions can't be right"
    ]
    with pytest.raises(SettingsError, match="choices: lacks 30 of 30 targets"):
        run_evaluate(untied_base, data, tmp_path / "none", choices=["x", "y"])


def test_more_choices_than_can_be_scored_are_refused(untied_base: Path, data: Path) -> None:
    with pytest.raises(SettingsError, match="choices: 1,001: evaluate scores at most 1,000; use choices_file"):
        EvaluateSettings(model_name_or_path=untied_base, data_path=data, choices=[*map(str, range(1001))])


def test_the_terminal_shows_the_calibration_error_of_both_models(untied_base: Path, data: Path, tmp_path: Path) -> None:
    arguments = ("evaluate", untied_base, "--data-path", data, "--use-cpu", "--choices", *CHOICES)
    done = t5tune_in_fork(*arguments, "--output-dir", tmp_path / "out")
    assert done.code == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("calibration error  ")]


@pytest.mark.long
@pytest.mark.distributed
def test_ranks_and_partitions_give_the_same_scores(
    untied_base: Path, data: Path, tmp_path: Path, on_ranks: Callable[..., CommandResult]
) -> None:
    answers = tmp_path / "answers.txt"
    answers.write_text("\n".join(CHOICES))
    common = ("evaluate", untied_base, "--data-path", data, "--use-cpu", "--per-device-eval-batch-size", 4, "--json")
    for kind, more in (("scored", ("--choices", *CHOICES)), ("ranked", ("--choices-file", answers, "--num-beams", 3))):
        found = {}
        for ranks, extra in ((1, ()), (2, ("--deepspeed", "zero3"))):
            folder = tmp_path / f"{kind} {ranks}"
            done = on_ranks(ranks, *common, *more, *extra, "--output-dir", folder)
            assert done.code == 0, done.stderr
            values = {name: value for name, value in done.json.items() if name not in ("predictions", "seconds")}
            found[ranks] = values, (folder / "predictions.jsonl").read_text()
        assert found[1] == found[2]

"""Several datasets in one run: what is trained on, what is evaluated, and what the result says of each."""

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml

from t5tune.checkpoints.training_data import read_training_data
from t5tune.commands.evaluate import evaluate
from t5tune.commands.prepare import prepare
from t5tune.commands.train import train
from t5tune.commands.train.run_plan import make_run_plan
from t5tune.data.caches.prepared import open_examples
from t5tune.data.tokens.tokenizer import load_tokenizer
from t5tune.errors import SettingsError
from t5tune.inference.loading import read_model_files
from t5tune.inference.prompts import make_prompts
from t5tune.progress import Evaluated, Event, Note
from t5tune.runs.data import open_data
from t5tune.runs.result import TrainResult, read_result
from t5tune.settings import EvaluateSettings, PrepareSettings, TrainSettings, load_settings
from tests.support.caches import find_cache
from tests.support.processes.command_line import OnRanks, t5tune_in_fork
from tests.support.processes.runs import read_adapter
from tests.support.train_runs import read_metrics_lines, run_recorded, write_config
from tests.training.mixtures.datasets import SIZES, list_datasets, make_prepare_settings, make_settings, read_tree

pytestmark = pytest.mark.slow


def count_by_dataset(steps: dict[int, list[list[int]]], tokenizer_folder: Path) -> Counter[str]:
    """Count the trained examples by the first word of each target."""
    tokenizer = load_tokenizer(tokenizer_folder)
    texts = [tokenizer.decode(row) for rows in steps.values() for row in rows]
    return Counter(text.split()[0] for text in texts)


@pytest.mark.distributed
@pytest.mark.parametrize("batching", [{}, {"tokens_per_batch": 256, "per_device_train_batch_size": 1}])
@pytest.mark.variants("batching0")
def test_the_shares_are_the_weights_on_any_number_of_ranks(
    batching: dict[str, int], untied_base: Path, data: Path, tmp_path: Path, on_ranks: OnRanks
) -> None:
    steps = {}
    for ranks in (1, 2):
        size = {"gradient_accumulation_steps": 2 // ranks}
        run = tmp_path / f"run-{ranks}"
        settings = make_settings(untied_base, data, run, packing="off", **batching, **size)
        steps[ranks] = run_recorded(on_ranks, ranks, settings, tmp_path / f"steps-{ranks}")
    assert steps[1] == steps[2]
    total = sum(SIZES.values())
    counted = count_by_dataset(steps[1], tmp_path / "run-1")
    assert counted == {"sums": 2 * total // 2, "notes": 2 * total // 4, "chats": 2 * total // 4}
    result = json.loads((tmp_path / "run-1" / "result.json").read_text())
    assert {name: facts["examples_per_epoch"] for name, facts in result["datasets"].items()} == {
        "sums": total // 2, "notes": total // 4, "chats": total // 4,
    }  # fmt: skip
    mixture = open_examples(tmp_path / "run-1" / "data")
    assert [(dataset["name"], dataset["share"]) for dataset in mixture.manifest["datasets"]] == [
        ("sums", 0.5), ("notes", 0.25), ("chats", 0.25),
    ]  # fmt: skip


def test_a_small_dataset_repeats_and_weight_0_is_left_out(
    untied_base: Path, data: Path, tmp_path: Path, on_ranks: OnRanks
) -> None:
    settings = make_settings(untied_base, data, tmp_path / "run", packing="off", num_train_epochs=1)
    settings = settings.replace(data=list_datasets(data, (0, 3, 1)))
    steps = run_recorded(on_ranks, 1, settings, tmp_path / "steps")
    counted = count_by_dataset(steps, tmp_path / "run")
    assert counted == {"notes": 21, "chats": 7}  # of the 28 examples of both
    tokenizer = load_tokenizer(tmp_path / "run")
    times = Counter(tokenizer.decode(row) for rows in steps.values() for row in rows)
    assert sorted(count for text, count in times.items() if text.startswith("notes")) == [1] * 3 + [2] * 9


@pytest.mark.parametrize("batching", [{}, {"tokens_per_batch": 256}])
@pytest.mark.variants("batching1")
def test_a_mixture_stopped_later_resumes_to_equal_bits(
    batching: dict[str, int], untied_base: Path, data: Path, tmp_path: Path, on_ranks: OnRanks
) -> None:
    whole = make_settings(untied_base, data, tmp_path / "whole", **batching)
    train(whole)
    config = write_config(whole.replace(output_dir=tmp_path / "run"), tmp_path / "run.yaml")
    step = 7 if batching else 23  # in the second epoch, which has different examples
    stopped = on_ranks(1, "train", "--config", config, calls=[f"tests.support.ranks.faults:stop_in_step({step})"])
    assert stopped.code == 143, stopped.stderr[-3000:]
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert checkpoint.name == f"checkpoint-{step}"
    assert on_ranks(1, "train", "--config", config).code == 0
    assert read_adapter(tmp_path / "whole") == read_adapter(tmp_path / "run")
    problem = r"this run has already finished, with different settings:\s+data\[0\].weight: 2.0 before, 3.0 now"
    with pytest.raises(SettingsError, match=problem):
        train(whole.replace(data=list_datasets(data, (3, 1, 1))))


def test_a_run_refuses_changed_dataset_weights(
    untied_base: Path, data: Path, tmp_path: Path, on_ranks: OnRanks
) -> None:
    settings = make_settings(untied_base, data, tmp_path / "run")
    config = write_config(settings, tmp_path / "run.yaml")
    assert on_ranks(1, "train", "--config", config, calls=["tests.support.ranks.faults:stop_in_step(2)"]).code == 143
    for changes, problem in (
        ({"data": list_datasets(data, (3, 1, 1))}, r'mixing: \{"sums": 34, .* before, \{"sums": 40.8, .* now'),
        ({"data": list_datasets(data)[:2]}, "the datasets were sums, notes, chats before, and are sums, notes now"),
    ):
        with pytest.raises(SettingsError, match=problem):
            train(settings.replace(**changes))
    assert train(settings).steps == 34


def test_each_dataset_has_the_metrics_of_a_separate_evaluation(
    trained: tuple[TrainResult, list[Event]], data: Path, tmp_path: Path
) -> None:
    result, events = trained
    (evaluation,) = (event for event in events if isinstance(event, Evaluated))
    assert set(evaluation.datasets) == set(SIZES)
    for name, file, count, template in (
        ("sums", "sums.jsonl", 9, "plain"), ("notes", "notes.csv", 7, "notes"), ("chats", "talk.json", 5, "chats"),
    ):  # fmt: skip
        separate = evaluate(
            EvaluateSettings(
                model_name_or_path=str(result.run), data_path=str(data / file), num_data=count, use_cpu=True,
                output_dir=tmp_path / name, conversation_template=template,
            )
        )  # fmt: skip
        found = result.datasets[name]
        assert found["loss"] == pytest.approx(separate.loss, abs=1e-5)
        for metric in ("exact_match", "rouge1", "rougeL", "bleu", "chrf"):
            assert found[metric] == getattr(separate, metric)
        assert evaluation.datasets[name]["loss"] == found["loss"]
        (logged,) = (line for line in read_metrics_lines(result.run) if "eval_loss" in line)
        assert logged[f"eval_{name}_loss"] == found["loss"]
    assert result.eval.keys() >= {"loss", "perplexity", "chrf"}
    assert not any(name.endswith("_loss") for name in result.eval)


@pytest.mark.parametrize("is_prepared", [False, True])
def test_data_named_like_a_token_cache_uses_its_record_format(
    is_prepared: bool, untied_base: Path, data: Path, tmp_path: Path
) -> None:
    common = {"model_name_or_path": str(untied_base), "add_tokens": ["none"]}
    reading = {"source_prefix": "sum: ", "model_max_length": 64, "train_on": "last", "conversation_template": "plain"}
    notes = {"path": str(data / "notes.csv"), "source_column": "text", "target_column": "summary"}
    own = {"path": str(data / "sums.jsonl"), "name": "sums", **reading}
    if is_prepared:
        prepare(PrepareSettings(**common, data=[notes, own], output_dir=tmp_path / "mixture"))
        cache, trained = tmp_path / "mixture" / "sums", {"data_path": [tmp_path / "mixture"]}
    else:
        prepare(PrepareSettings(**common, data_path=own["path"], **reading, output_dir=tmp_path / "sums"))
        cache, trained = tmp_path / "sums", {"data": [notes, str(tmp_path / "sums")]}
    evaluated = [{"name": "sums", "path": str(data / "sums.jsonl")}, {"path": str(data / "talk.json")}]
    train(TrainSettings(**common, **trained, eval_data=evaluated, output_dir=tmp_path / "run", max_steps=1))
    folders = (cache, tmp_path / "run" / "eval-data" / "sums")
    made, measured = (json.loads((find_cache(folder) / "manifest.json").read_text())["inputs"] for folder in folders)
    assert made["source_prefix"] == "sum: "
    assert measured == {**made, "seed": 0, "split_seed": 0}  # the seeds don't affect this cache
    other = open_examples(tmp_path / "run" / "eval-data").datasets[1].cache.manifest["inputs"]
    assert (other["source_prefix"], other["model_max_length"], other["train_on"]) == ("", 2048, "all")


def test_data_named_like_a_token_cache_may_override_columns(untied_base: Path, data: Path, tmp_path: Path) -> None:
    common = {"model_name_or_path": str(untied_base), "add_tokens": ["none"]}
    columns = {"source_column": "text", "target_column": "summary", "source_prefix": "sum: ", "model_max_length": 64}
    prepare(PrepareSettings(**common, data_path=str(data / "notes.csv"), **columns, output_dir=tmp_path / "notes"))
    (tmp_path / "other.csv").write_text("text,target\nA long text,Short\n")
    trained = [str(tmp_path / "notes"), str(data / "talk.json")]
    evaluated = [
        {"name": "notes", "path": str(tmp_path / "other.csv"), "source_column": "text"},
        {"name": "talk", "path": str(data / "talk.json")},
    ]
    train(TrainSettings(**common, data=trained, eval_data=evaluated, output_dir=tmp_path / "run", max_steps=1))
    cache = open_examples(tmp_path / "run" / "eval-data").datasets[0].cache
    assert len(cache) == 1
    names = ("source_column", "target_column", "source_prefix", "model_max_length")
    assert [cache.manifest["inputs"][name] for name in names] == ["text", None, "sum: ", 64]


def test_evaluate_scores_each_of_several_datasets(
    trained: tuple[TrainResult, list[Event]], data: Path, tmp_path: Path
) -> None:
    result, _ = trained
    notes: list[Event] = []
    datasets = [
        {"path": str(data / "talk.json"), "name": "chats", "num_data": 5},
        {"path": str(data / "notes.csv"), "num_data": 7},
    ]
    settings = EvaluateSettings(
        model_name_or_path=str(result.run), data=datasets, output_dir=tmp_path / "both", use_cpu=True, compare_base=True
    )
    both = evaluate(settings, notes.append)
    assert list(both.datasets) == ["chats", "notes"]
    tokens = 0
    for name, found in both.datasets.items():
        assert found["loss"] == pytest.approx(result.datasets[name]["loss"], abs=1e-5)
        assert found["chrf"] == result.datasets[name]["chrf"]
        assert found["base_loss"] != found["loss"]
        tokens += int(found["examples"])
    assert both.examples == tokens == 12
    lines = [json.loads(line) for line in both.predictions.read_text().splitlines()]
    assert [line["dataset"] for line in lines] == ["chats"] * 5 + ["notes"] * 7
    assert lines[0]["source"].startswith("A chat between")
    assert lines[5]["source"] == "summarize: the value is 0"
    texts = [note.text for note in notes if isinstance(note, Note)]
    reading = "source_column 'text', target_column 'summary', source_prefix 'summarize: '"
    assert f"dataset notes: as in training: {reading}" in texts


def test_the_result_the_card_and_the_report_name_the_datasets(trained: tuple[TrainResult, list[Event]]) -> None:
    result, events = trained
    card = (result.run / "README.md").read_text()
    assert "Mixture: 50.0% sums (40 examples), 25.0% notes (12 examples), 25.0% chats (16 examples)." in card
    assert "Evaluation on held-out data of chats: loss " in card
    report = (result.run / "report.html").read_text()
    for cell in ("<td>notes</td><td>12</td><td>25.0%</td><td>17</td><td>1.42</td>", "Held-out loss by dataset"):
        assert cell in report
    assert "&quot;notes.csv" not in report  # the command is complete: settings without a flag follow as YAML
    assert "# and in YAML, given with --config: data: [{" in report
    notes = [event.text for event in events if isinstance(event, Note)]
    expected = "sums 50.0% (34 of 40 examples), notes 25.0% (17 of 12 examples), chats 25.0% (17 of 16 examples)"
    assert f"an epoch has 68 examples: {expected}" in notes


def test_the_adapter_records_the_record_format_of_each_dataset(
    trained: tuple[TrainResult, list[Event]], untied_base: Path
) -> None:
    result, _ = trained
    made = read_training_data(result.adapter)
    assert [(each.name, each.share, each.source_prefix) for each in made.datasets] == [
        ("sums", 0.5, ""), ("notes", 0.25, "summarize: "), ("chats", 0.25, ""),
    ]  # fmt: skip
    assert made.datasets[2].conversation_template["system_message"].startswith("A chat between")
    assert [each.has_earlier_turns for each in made.datasets] == [False, False, True]
    files = read_model_files(untied_base, result.adapter)
    for dataset, keeps_history in ((None, False), ("sums", False), ("chats", True)):
        assert make_prompts(files, dataset, None, 2048).keeps_history == keeps_history
    for flags, note in (
        ((), "prompts follow the training dataset sums; for notes or chats, use --conversation-template NAME"),
        (("--conversation-template", "notes"), "each message is prefixed with 'summarize: ', as in training"),
    ):
        done = t5tune_in_fork("chat", result.run, "--prompt", "the value is 3", "--max-new-tokens", 3, *flags)
        assert done.code == 0
        assert note in done.stderr
    with pytest.raises(SettingsError, match="note: no file or template of that name; did you mean notes?"):
        make_prompts(files, "note", None, 2048)
    with pytest.raises(SettingsError, match="plain, turns; the training datasets are sums, notes, chats$"):
        make_prompts(files, "nowhere", None, 2048)


def test_a_dataset_metric_can_choose_the_best_step(untied_base: Path, data: Path, tmp_path: Path) -> None:
    settings = make_settings(
        untied_base, data, tmp_path / "run", eval_fraction=0.3, max_steps=4, eval_steps=2, save_steps=2,
        metric_for_best_model="notes_loss",
    )  # fmt: skip
    train(settings)
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    losses = {line["step"]: line["eval_notes_loss"] for line in state["log_history"] if "eval_notes_loss" in line}
    assert state["best_global_step"] == min(losses, key=losses.__getitem__)
    with pytest.raises(SettingsError, match="metric_for_best_model: note_loss: not among.*did you mean notes_loss"):
        train(settings.replace(metric_for_best_model="note_loss", output_dir=tmp_path / "other"))


def test_held_out_examples_of_token_caches_are_evaluated(untied_base: Path, data: Path, tmp_path: Path) -> None:
    for name, file in (("sums", "sums.jsonl"), ("talk", "talk.json")):
        single = make_prepare_settings(untied_base, data, tmp_path / name, data_path=[data / file], add_tokens="none")
        prepare(single.replace(eval_fraction=0.25 if name == "sums" else 0.0))
    paths = [f"{tmp_path / 'talk'}:1", f"{tmp_path / 'sums'}:1"]
    settings = make_settings(
        untied_base, data, tmp_path / "run", data_path=paths, eval_strategy="steps", eval_steps=1, max_steps=1
    )
    result = train(settings)
    assert result.examples == SIZES["chats"] + 30
    assert ["loss" in result.datasets[name] for name in ("talk", "sums")] == [False, True]
    without = settings.replace(data_path=paths[:1], output_dir=tmp_path / "other")
    with pytest.raises(SettingsError, match="eval_steps: 1: there are no held-out examples to evaluate on"):
        train(without)


@pytest.mark.parametrize("changes", [{}, {"source_prefix": "sum: "}], ids=["a part", "a prefix"])
def test_a_held_out_text_is_held_out_in_all_datasets(
    changes: dict[str, str], untied_base: Path, data: Path, tmp_path: Path
) -> None:
    lines = (data / "sums.jsonl").read_text().splitlines()
    (tmp_path / "sums.jsonl").write_text("\n".join(lines if changes else lines[10:30]))
    datasets = [{"path": str(data / "sums.jsonl")}, {"path": str(tmp_path / "sums.jsonl"), **changes}]
    prepare(make_prepare_settings(untied_base, data, tmp_path / "mixture", data=datasets, eval_fraction=0.3))
    mixture = open_examples(tmp_path / "mixture")
    assert [dataset.name for dataset in mixture.datasets] == ["sums", "sums-2"]
    training, held_out = mixture.split_as_prepared()
    trained_on, evaluated_on = ({example.target_T.tobytes() for example in part} for part in (training, held_out))
    assert len(trained_on | evaluated_on) == 40
    assert not trained_on & evaluated_on


def test_each_dataset_has_its_own_number_of_examples(untied_base: Path, data: Path, tmp_path: Path) -> None:
    datasets = [{"path": str(data / "sums.jsonl"), "num_data": 30}, {"path": str(data / "talk.json")}]
    settings = make_settings(untied_base, data, tmp_path / "run", data=datasets, num_data=7, max_steps=1)
    result = train(settings)
    assert {name: facts["examples"] for name, facts in result.datasets.items()} == {"sums": 30, "talk": 7}


@pytest.mark.parametrize(("paths", "sizes"), [(["sums.jsonl"], (3, 40)), (["sums.jsonl:1", "talk.json:1"], (6, 56))])
def test_num_data_does_not_limit_what_is_evaluated_on(
    paths: list[str], sizes: tuple[int, int], untied_base: Path, data: Path, tmp_path: Path
) -> None:
    found = [str(data / path) for path in paths]
    settings = make_settings(
        untied_base, data, tmp_path / "run", data_path=found, eval_data_path=found, num_data=3, max_steps=1
    )
    assert (train(settings).examples, len(open_examples(tmp_path / "run" / "eval-data"))) == sizes


def test_num_data_counts_what_no_dataset_holds_out(untied_base: Path, data: Path, tmp_path: Path) -> None:
    """One cache holds out half of its texts; the other has half of the same texts, and holds out nothing itself."""
    (tmp_path / "part.jsonl").write_text("\n".join((data / "sums.jsonl").read_text().splitlines()[10:30]))
    for name, file in (("sums", data / "sums.jsonl"), ("part", tmp_path / "part.jsonl")):
        single = make_prepare_settings(untied_base, data, tmp_path / name, data_path=[file], add_tokens="none")
        prepare(single.replace(eval_fraction=0.5 if name == "sums" else 0.0))
    caches = [f"{tmp_path / name}:1" for name in ("sums", "part")]
    for name, num_data in (("whole", None), ("limited", 8)):
        prepare(make_prepare_settings(untied_base, data, tmp_path / name, data_path=caches, num_data=num_data))
    _, expected = open_examples(tmp_path / "whole").split_as_prepared()
    for run, paths, num_data in (
        ("caches", caches, 8), ("mixture", [tmp_path / "whole"], 8), ("prepared", [tmp_path / "limited"], None),
    ):  # fmt: skip
        settings = make_settings(untied_base, data, tmp_path / run, data_path=paths, num_data=num_data, max_steps=1)
        result = train(settings)
        assert {name: facts["examples"] for name, facts in result.datasets.items()} == {"sums": 8, "part": 8}
        plan = make_run_plan(settings)
        _, held_out = open_data(plan, None)
        assert held_out is not None
        assert held_out.identify() == expected.identify()


def test_another_spelling_of_the_paths_is_the_same_finished_run(
    untied_base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data)
    settings = make_settings(untied_base, data, tmp_path / "run", max_steps=1)
    first = train(settings)
    spelled = [dataset.replace(path=f"./{Path(dataset.path[0]).name}") for dataset in settings.data]
    assert train(settings.replace(data=spelled)) == first


def test_a_run_refuses_a_changed_order_of_datasets(
    untied_base: Path, data: Path, tmp_path: Path, on_ranks: OnRanks
) -> None:
    prepared = make_prepare_settings(untied_base, data, tmp_path / "mixture")
    prepare(prepared)
    settings = make_settings(untied_base, data, tmp_path / "run", data_path=[tmp_path / "mixture"])
    config = write_config(settings, tmp_path / "run.yaml")
    assert on_ranks(1, "train", "--config", config, calls=["tests.support.ranks.faults:stop_in_step(2)"]).code == 143
    prepare(prepared.replace(data=list_datasets(data)[::-1]))
    with pytest.raises(SettingsError, match="data: .* before, .* now"):
        train(settings)


def test_records_in_memory_are_kept_and_resumed(untied_base: Path, data: Path, tmp_path: Path) -> None:
    records = [{"source": f"say {number}", "target": f"own {number}"} for number in range(12)]
    datasets = [{"path": records, "weight": 2}, {"path": str(data / "sums.jsonl"), "weight": 1}]
    settings = make_settings(untied_base, data, tmp_path / "run", data=datasets, max_steps=2)
    result = train(settings)
    assert list(result.datasets) == ["records", "sums"]
    again, _ = load_settings(TrainSettings, str(tmp_path / "run" / "settings.yaml"))
    assert train(again) == result


@pytest.mark.parametrize("is_prepared", [False, True])
@pytest.mark.variants("True")
def test_saved_settings_repeat_a_run_on_different_token_caches(
    is_prepared: bool, untied_base: Path, data: Path, tmp_path: Path
) -> None:
    prepare(make_prepare_settings(untied_base, data, tmp_path / "mixture", model_max_length=64))
    caches = [str(tmp_path / "mixture" / name) for name in SIZES]
    given = {"data_path": [tmp_path / "mixture"]} if is_prepared else {"data": caches}
    settings = make_settings(untied_base, data, tmp_path / "run", conversation_template=None, max_steps=1, **given)
    first = train(settings)
    again, _ = load_settings(TrainSettings, str(tmp_path / "run" / "settings.yaml"))
    assert again.model_max_length == 64
    assert train(again) == first
    assert train(again.replace(fresh=True)).train_loss == first.train_loss
    shown = t5tune_in_fork("train", "--config", tmp_path / "run" / "settings.yaml", "--dry-run")
    (tmp_path / "shown.yaml").write_text(shown.stdout)
    assert train(load_settings(TrainSettings, str(tmp_path / "shown.yaml"))[0]) == read_result(tmp_path / "run")


def test_the_command_line_and_yaml_give_the_same_mixture(untied_base: Path, data: Path, tmp_path: Path) -> None:
    paths = [f"{data / 'sums.jsonl'}:3", str(data / "talk.json")]
    flags = ("--model-name-or-path", untied_base, "--output-dir", tmp_path / "flags", "--data-path", *paths)
    done = t5tune_in_fork("prepare", *flags, "--json")
    assert done.code == 0, done.stderr
    assert done.json["datasets"] == {"sums": 40, "talk": 16}
    assert "an epoch has 56 examples: sums 75.0% (42 of 40 examples), talk 25.0% (14 of 16 examples)" in done.stderr
    yaml_file = tmp_path / "run.yaml"
    yaml_file.write_text(yaml.safe_dump({"data": [{"path": str(data / "sums.jsonl"), "weight": 3}, paths[1]]}))
    settings, _ = load_settings(
        PrepareSettings, str(yaml_file), flags={"model_name_or_path": str(untied_base), "output_dir": tmp_path / "yaml"}
    )
    prepare(settings)
    assert read_tree(tmp_path / "yaml") == read_tree(tmp_path / "flags")

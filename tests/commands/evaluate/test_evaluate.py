"""Evaluate: metrics compared with plain transformers, for all forms of model and data."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from t5tune.commands.evaluate import evaluate
from t5tune.commands.merge import merge
from t5tune.commands.prepare import prepare
from t5tune.commands.train import train
from t5tune.errors import DataError, ModelError, SettingsError
from t5tune.inference.loading import load_for_inference
from t5tune.label_metrics import HEAD_METRICS
from t5tune.metrics import choose_metrics, score
from t5tune.preparing import sample
from t5tune.progress import Event, Note
from t5tune.settings import (
    EvaluateSettings,
    MergeSettings,
    PrepareSettings,
    load_settings,
)
from tests.commands.evaluate.outputs import (
    METRICS,
    get_metrics,
    make_short_settings,
    read_predictions,
    run_evaluate,
    write_answers,
)
from tests.support.caches import find_cache, open_only
from tests.support.processes.command_line import t5tune_in_fork

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.variants("3")
def test_metrics_equal_plain_transformers_one_example_at_a_time(
    untied_base: Path, conversations: Path, tmp_path: Path, num_beams: int
) -> None:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    cache, values = tmp_path / "cache", {"model_name_or_path": str(untied_base), "data_path": str(conversations)}
    prepare(PrepareSettings(**values, output_dir=cache, add_tokens=["none"], num_data=24))
    result = run_evaluate(untied_base, cache, tmp_path / "out", num_beams=num_beams, per_device_eval_batch_size=7)
    model = AutoModelForSeq2SeqLM.from_pretrained(untied_base).eval()
    tokenizer = AutoTokenizer.from_pretrained(find_cache(cache) / "tokenizer")
    total = count = 0.0
    texts = []
    for example in open_only(cache):
        source, target = torch.from_numpy(example.source_S)[None], torch.from_numpy(example.target_T)[None]
        with torch.no_grad():
            total += float(model(input_ids=source, labels=target).loss) * target.numel()
            reply = model.generate(input_ids=source, max_new_tokens=12, num_beams=num_beams, do_sample=False)
        count += target.numel()
        texts.append(tokenizer.decode(reply[0], skip_special_tokens=True).removesuffix("\n"))
    lines = read_predictions(result)
    assert result.examples == len(texts) > 20
    assert result.loss == pytest.approx(total / count, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(total / count), rel=1e-4)
    assert [line["prediction"] for line in lines] == texts
    targets = [line["target"] for line in lines]
    wanted = score(texts, targets, choose_metrics(None, targets))
    assert {name: getattr(result, name) for name in wanted} == wanted


@pytest.mark.long
def test_the_batch_size_does_not_change_the_metrics(untied_base: Path, cache: Path, tmp_path: Path) -> None:
    one = run_evaluate(untied_base, cache, tmp_path / "one", per_device_eval_batch_size=1)
    many = run_evaluate(untied_base, cache, tmp_path / "many", per_device_eval_batch_size=64)
    assert [line["prediction"] for line in read_predictions(one)] == [
        line["prediction"] for line in read_predictions(many)
    ]
    assert get_metrics(one) == pytest.approx(get_metrics(many), rel=1e-5)


def test_it_works_where_deepspeed_is_not_installed(
    untied_base: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # importing it fails
    assert run_evaluate(untied_base, cache, tmp_path / "out", num_data=2).examples == 2


def test_cache_and_conversations_give_the_same_metrics(
    run: Path, cache: Path, conversations: Path, tmp_path: Path
) -> None:
    a = run_evaluate(run, cache, tmp_path / "a")
    b = run_evaluate(run, conversations, tmp_path / "b")
    assert get_metrics(a) == get_metrics(b)
    # a token cache has no prompts
    assert read_predictions(a) == [
        {name: value for name, value in line.items() if name != "prompt"} for line in read_predictions(b)
    ]


def test_adapter_run_and_merged_checkpoint_give_the_same_metrics(
    run: Path, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    merge(MergeSettings(model_name_or_path=str(untied_base), adapter=run, output_dir=tmp_path / "merged"))
    merged = run_evaluate(tmp_path / "merged", conversations, tmp_path / "a")
    adapter = run_evaluate(untied_base, conversations, tmp_path / "b", adapter=run)
    alone = run_evaluate(run, conversations, tmp_path / "c")
    assert get_metrics(merged) == pytest.approx(get_metrics(adapter), rel=1e-4)
    assert [line["prediction"] for line in read_predictions(merged)] == [
        line["prediction"] for line in read_predictions(alone)
    ]
    assert get_metrics(adapter) == get_metrics(alone)
    assert adapter.loss != run_evaluate(untied_base, conversations, tmp_path / "d").loss


def test_pairs_of_source_and_target_are_evaluated(untied_base: Path, tmp_path: Path) -> None:
    pairs = [("translate: Haus", "house"), ("translate: {Baum}", "tree\n  and leaf")]
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps({"source": a, "target": b}) for a, b in pairs))
    result = run_evaluate(untied_base, tmp_path / "pairs.jsonl", tmp_path / "out", conversation_template="plain")
    read = [(line["prompt"], line["target"]) for line in read_predictions(result)]
    assert read == pairs


def test_a_run_reads_the_columns_that_it_was_trained_on(untied_base: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"dialogue": f"count {n}", "summary": f"{n} lamps"}) for n in range(6)]
    data = tmp_path / "named.jsonl"
    data.write_text("\n".join(lines))
    columns = {"source_column": "dialogue", "target_column": "summary", "source_prefix": "summarize: "}
    train(make_short_settings(untied_base, data, tmp_path / "run", max_steps=1, **columns))
    merge(MergeSettings(model_name_or_path=str(untied_base), adapter=tmp_path / "run", output_dir=tmp_path / "merged"))
    for name in ("run", "merged"):
        events: list[Event] = []
        values = {"model_name_or_path": str(tmp_path / name), "data_path": str(data), "max_new_tokens": 4}
        result = evaluate(EvaluateSettings(**values, output_dir=tmp_path / f"of {name}", use_cpu=True), events.append)
        note = "as in training: source_column 'dialogue', target_column 'summary', source_prefix 'summarize: '"
        assert Note(note) in events
        trained = Note("the run was trained on all 6 examples; scores of other data say more", warning=True)
        assert (trained in events) == (name == "run")  # a merged checkpoint has no record of the data
        assert read_predictions(result)[0]["source"] == "summarize: count 0"
    events = []
    several = {"model_name_or_path": str(tmp_path / "run"), "data_path": [f"{data}:1", f"{data}:1"], "use_cpu": True}
    result = evaluate(EvaluateSettings(**several, output_dir=tmp_path / "several", max_new_tokens=4), events.append)
    assert {Note(f"dataset named: {note}"), Note(f"dataset named-2: {note}")} <= {*events}
    assert [line["source"] for line in read_predictions(result)[::6]] == ["summarize: count 0"] * 2
    without = run_evaluate(tmp_path / "run", data, tmp_path / "a", source_prefix="")
    assert read_predictions(without)[0]["source"] == "count 0"
    with pytest.raises(DataError):
        run_evaluate(untied_base, data, tmp_path / "b")
    with pytest.raises(DataError):
        run_evaluate(tmp_path / "run", data, tmp_path / "c", source_column="question")


def test_a_run_is_evaluated_with_the_tokens_of_training(untied_base: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"source": f"count\n{n}", "target": f"{n}\nlamps"}) for n in range(6)))
    result = train(make_short_settings(untied_base, data, tmp_path / "run", max_steps=1, add_tokens="none"))
    merge(MergeSettings(model_name_or_path=str(untied_base), adapter=result.run, output_dir=tmp_path / "merged"))
    trained = run_evaluate(result.run, result.run / "data", tmp_path / "of the cache")
    for name in ("run", "merged"):
        found = run_evaluate(tmp_path / name, data, tmp_path / f"of {name}")
        assert found.loss == pytest.approx(trained.loss, abs=1e-5)
        assert read_predictions(found)[0]["source"] == "count 0"
    added = run_evaluate(result.run, data, tmp_path / "added", add_tokens="auto")
    assert read_predictions(added)[0]["source"] == "count\n0"
    of_base = run_evaluate(untied_base, data, tmp_path / "of the base")
    assert read_predictions(of_base)[0]["source"] == "count 0"

    values = {"model_name_or_path": str(untied_base), "data_path": str(data)}
    cache = prepare(PrepareSettings(**values, output_dir=tmp_path / "cache")).cache
    for model, is_noted in ((result.run, True), (untied_base, False)):
        notes: list[Event] = []
        values = {"model_name_or_path": str(model), "data_path": str(cache), "max_new_tokens": 2, "use_cpu": True}
        evaluate(EvaluateSettings(**values, output_dir=tmp_path / f"noted {is_noted}"), notes.append)
        warnings = [event.text for event in notes if isinstance(event, Note) and event.warning]
        assert sum(" tokens that the model wasn't trained with, such as " in each for each in warnings) == is_noted


def test_each_line_has_its_own_scores_and_loss(run: Path, conversations: Path, tmp_path: Path) -> None:
    result = run_evaluate(run, conversations, tmp_path / "out", num_data=10)
    lines = read_predictions(result)
    assert len(lines) == result.examples == 10
    assert result.rougeL == pytest.approx(sum(line["rougeL"] for line in lines) / 10, abs=1e-3)
    names = {
        "exact_match",
        "rouge1",
        "rouge2",
        "rougeL",
        "chrf",
        "chrf_pp",
        "valid_json",
        "field_f1",
    }  # the target is JSON
    numbers = {"logprob", "probability", "loss"}
    assert set(lines[0]) == {"source", "target", "prediction", "prompt", *numbers, *names}
    assert lines[0]["source"].count(lines[0]["prompt"]) == 1


def test_an_adapter_of_the_head_made_by_peft_is_applied(untied_base: Path, cache: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import T5ForConditionalGeneration

    torch.manual_seed(0)
    model = T5ForConditionalGeneration.from_pretrained(untied_base)
    model.config.tie_word_embeddings = False
    config = LoraConfig(r=4, target_modules=["q", "lm_head"], init_lora_weights=False, task_type="SEQ_2_SEQ_LM")
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    result = run_evaluate(untied_base, cache, tmp_path / "out", adapter=tmp_path / "adapter", max_new_tokens=1)
    plain = load_for_inference(
        EvaluateSettings(
            model_name_or_path=str(untied_base), adapter=tmp_path / "adapter", data_path="none", use_cpu=True
        )
    ).model
    total = count = 0.0
    for example in open_only(cache):
        source, target = torch.from_numpy(example.source_S)[None], torch.from_numpy(example.target_T)[None]
        with torch.no_grad():
            total += float(plain(input_ids=source, labels=target).loss) * target.numel()
        count += target.numel()
    assert result.loss == pytest.approx(total / count, rel=1e-5)
    assert result.loss != pytest.approx(
        run_evaluate(untied_base, cache, tmp_path / "b", max_new_tokens=1).loss, rel=1e-3
    )


def test_a_given_data_format_overrides_the_columns_of_training(untied_base: Path, tmp_path: Path) -> None:
    named = tmp_path / "named.jsonl"
    named.write_text("\n".join(json.dumps({"dialogue": f"count {n}", "summary": f"{n} lamps"}) for n in range(6)))
    columns = {"source_column": "dialogue", "target_column": "summary"}
    train(make_short_settings(untied_base, named, tmp_path / "run", max_steps=1, **columns))
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"source": "count 1", "target": "1 lamp"}))
    with pytest.raises(DataError, match="no examples to evaluate on"):
        run_evaluate(tmp_path / "run", pairs, tmp_path / "a")
    assert run_evaluate(tmp_path / "run", pairs, tmp_path / "b", data_format="auto").examples == 1


def test_a_target_with_unknown_tokens_never_counts_as_matched(untied_base: Path, tmp_path: Path) -> None:
    from t5tune.data.tokens.tokenizer import decode_prediction, decode_reference, load_tokenizer

    tokenizer = load_tokenizer(untied_base)
    ids = tokenizer.encode("a 猫")
    assert tokenizer.unk_token_id in ids
    assert decode_prediction(tokenizer, ids, "") != decode_reference(tokenizer, ids, "")
    (tmp_path / "data.jsonl").write_text(json.dumps({"source": "a", "target": "{\n猫"}))
    without = run_evaluate(untied_base, tmp_path / "data.jsonl", tmp_path / "out", add_tokens=["none"])
    assert read_predictions(without)[0]["target"] == "{\n猫"


def test_a_cache_of_another_tokenizer_is_refused(
    run: Path, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    other = PrepareSettings(
        model_name_or_path=str(untied_base),
        data_path=str(conversations),
        output_dir=tmp_path / "other",
        add_tokens=["fastchat"],
    )
    prepare(other)
    with pytest.raises(DataError, match="prepared with a different tokenizer"):
        run_evaluate(run, tmp_path / "other", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_settings_that_would_not_change_a_token_cache_are_refused(
    run: Path, cache: Path, conversations: Path, tmp_path: Path
) -> None:
    given = {"source_prefix": "x: ", "model_max_length": 128, "conversation_template": "plain"}
    with pytest.raises(SettingsError) as refused:
        run_evaluate(run, cache, tmp_path / "out", **given)
    step = "leave it out, or give the data in place of the cache"
    place = find_cache(cache)
    assert set(refused.value.problems) == {
        f"source_prefix: 'x: ' here, '' in the cache {place}; {step}",
        f"model_max_length: 128 here, 2048 in the cache {place}; {step}",
        f"conversation_template: plain: the cache {place} uses a different template; {step}",
    }
    for own in ({"source_prefix": "x: "}, {"data_split": "x: "}):
        datasets = [{"path": str(cache), **own}, {"path": str(conversations), "num_data": 1}]
        with pytest.raises(SettingsError, match=f"{next(iter(own))}: .*x: .* cache"):
            run_evaluate(run, cache, tmp_path / "out", data_path=None, data=datasets)
    # the command's settings apply to the dataset that isn't a cache
    datasets = [{"path": str(cache), "num_data": 1}, {"path": str(conversations), "num_data": 1}]
    assert run_evaluate(run, cache, tmp_path / "out", data_path=None, data=datasets, **given).examples == 2


def test_saved_settings_repeat_an_evaluation_of_a_token_cache(
    untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    made = {"model_max_length": 64, "conversation_template": "plain"}
    values = {"model_name_or_path": str(untied_base), "data_path": str(conversations), **made}
    prepare(PrepareSettings(**values, output_dir=tmp_path / "cache"))
    same = run_evaluate(untied_base, tmp_path / "cache", tmp_path / "same", num_data=2, **made)
    run_evaluate(untied_base, tmp_path / "cache", tmp_path / "out", num_data=2)
    again, _ = load_settings(EvaluateSettings, str(tmp_path / "out" / "settings.yaml"))
    assert get_metrics(evaluate(again.replace(overwrite=True))) == get_metrics(same)


def test_caches_with_different_tokens_are_refused_together(untied_base: Path, tmp_path: Path) -> None:
    caches = []
    for name, answer in (("first", "日本"), ("second", "月")):
        data = write_answers(tmp_path / f"{name}.jsonl", answer)
        values = {"model_name_or_path": str(untied_base), "data_path": str(data), "output_dir": tmp_path / name}
        caches.append(f"{prepare(PrepareSettings(**values)).cache}:1")
    run = tmp_path / "run"
    train(make_short_settings(untied_base, tmp_path / "first.jsonl", run, add_tokens=["none"], max_steps=1))
    refused = "data_path: second and first have different tokenizers: .* has id .* only in second"
    with pytest.raises(DataError, match=refused):
        run_evaluate(run, tmp_path, tmp_path / "out", data_path=caches)
    # a bare base reads both with its own tokenizer
    assert run_evaluate(untied_base, tmp_path, tmp_path / "base", data_path=caches).examples == 24


def test_several_datasets_are_decoded_with_the_tokens_of_all(untied_base: Path, tmp_path: Path) -> None:
    """The tokens of --add-tokens are added for pairs, but not for raw text."""
    (tmp_path / "text.txt").write_text("The sun is a star in the middle of the solar system. " * 4)
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"source": "{a}\nb", "target": "b"}))
    datasets = [
        {"path": str(tmp_path / "text.txt"), "objective": "span-corruption"}, {"path": str(tmp_path / "pairs.jsonl")}
    ]  # fmt: skip
    values = {"model_name_or_path": str(untied_base), "max_new_tokens": 2, "use_cpu": True, "add_tokens": ["auto"]}
    result = evaluate(EvaluateSettings(**values, data=datasets, output_dir=tmp_path / "out"))
    assert read_predictions(result)[-1]["source"] == "{a}\nb"


def test_a_damaged_model_is_refused(untied_base: Path, cache: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    shutil.copytree(untied_base, tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors["lm_head.weight"][:, 0] = float("nan")
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="its loss is nan"):
        run_evaluate(tmp_path / "base", cache, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rejected_records_are_reported(untied_base: Path, tmp_path: Path) -> None:
    good = {"source": "a", "target": "b"}
    (tmp_path / "data.jsonl").write_text(json.dumps(good) + "\n" + json.dumps({"conversations": 3}) + "\n")
    notes: list[Event] = []
    values = {"model_name_or_path": str(untied_base), "data_path": str(tmp_path / "data.jsonl"), "use_cpu": True}
    result = evaluate(EvaluateSettings(**values, output_dir=tmp_path / "out"), notes.append)
    assert result.examples == 1
    warnings = [event.text for event in notes if isinstance(event, Note) and event.warning]
    assert len(warnings) == 1
    assert "data.jsonl:2" in warnings[0]
    (tmp_path / "data.jsonl").write_text(json.dumps({"conversations": 3}))
    with pytest.raises(DataError, match="no examples to evaluate on"):
        run_evaluate(untied_base, tmp_path / "data.jsonl", tmp_path / "none")


def test_a_template_for_pairs_is_not_used_for_conversations(
    untied_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "SAMPLE_BYTES", 1)
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    pair, chat, path = {"source": "a", "target": "b"}, {"conversations": turns}, tmp_path / "data.jsonl"
    values = {"model_name_or_path": str(untied_base), "data_path": str(path), "use_cpu": True, "max_new_tokens": 2}
    for name, records, expected in (
        ("pairs", [pair, pair], "plain: the data is"),
        ("mixed", [chat, pair], "fastchat-t5: 1 of 2 examples are"),
    ):
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        notes: list[Event] = []
        evaluate(EvaluateSettings(**values, output_dir=tmp_path / name), notes.append)
        texts = [event.text for event in notes if isinstance(event, Note) and "template" in event.text]
        advice = "source/target pairs; --conversation-template chooses a different template"
        assert texts == [f"conversation template {expected} {advice}"]
    path.write_text("".join(json.dumps(record) + "\n" for record in (pair, pair, chat)))
    with pytest.raises(DataError, match=r"data\.jsonl:3: a conversation, after 2 source/target pairs"):
        evaluate(EvaluateSettings(**values, output_dir=tmp_path / "refused"))


def test_a_record_with_a_too_long_word_is_rejected(untied_base: Path, tmp_path: Path) -> None:
    records = [{"source": "x" * 100_001, "target": "b"}, {"source": "a", "target": "b"}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    notes: list[Event] = []
    values = {"model_name_or_path": str(untied_base), "data_path": str(tmp_path / "data.jsonl"), "use_cpu": True}
    settings = EvaluateSettings(**values, output_dir=tmp_path / "scores", max_new_tokens=2)
    assert evaluate(settings, notes.append).examples == 1
    place = f"{tmp_path / 'data.jsonl'}:1"
    rejected = f"1 record rejected, the first: {place}: a word of 100,001 characters, more than 100,000"
    assert Note(rejected, True) in notes


def test_only_records_and_examples_that_were_evaluated_are_counted(untied_base: Path, tmp_path: Path) -> None:
    """num_data ends the second conversation after its first answer; its second answer would be truncated."""
    bad = {"conversations": 3}
    turns = [("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "long answer " * 40)]
    long = {"conversations": [{"from": speaker, "value": text} for speaker, text in turns]}
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, [{"source": "a", "target": "b"}, bad, long, bad, bad])))

    def list_warnings(num_data: int) -> list[str]:
        notes: list[Event] = []
        values = {"model_name_or_path": str(untied_base), "data_path": str(data), "use_cpu": True, "max_new_tokens": 2}
        output = tmp_path / str(num_data)
        values |= {"conversation_template": "plain", "model_max_length": 48}
        settings = EvaluateSettings(**values, output_dir=output, num_data=num_data)
        assert evaluate(settings, notes.append).examples == min(num_data, 3)
        return [event.text for event in notes if isinstance(event, Note) and event.warning]

    rejected = f"rejected, the first: {data}:2: conversations: expected a list of turns, found a number"
    truncated = "1 example truncated to model_max_length 48"
    assert list_warnings(1) == []
    assert list_warnings(2) == [f"1 record {rejected}"]
    lacks = "characters that the model's vocabulary lacks, so it can't be compared between models"
    partial = f"the model's bits_per_character: 1 of 3 targets are truncated or have {lacks}"
    assert list_warnings(3) == [f"1 record {rejected}", truncated, partial]
    assert list_warnings(4) == [f"3 records {rejected}", truncated, partial]


def test_the_command_prints_one_json_object_and_numbers_its_folders(
    untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    arguments = ("evaluate", "--model-name-or-path", untied_base, "--data-path", conversations, "--num-data", "2")
    arguments += ("--max-new-tokens", "4")
    first = t5tune_in_fork(*arguments, "--json", cwd=tmp_path)
    second = t5tune_in_fork(*arguments, cwd=tmp_path)
    assert first.code == second.code == 0
    added = {"valid_json", "field_f1", "ece", "recall", "custom_metrics", "base", "datasets", "labels", *HEAD_METRICS}
    assert set(first.json) == {*METRICS, *added, "predictions", "seconds", "cut_off", "signatures"}
    assert first.json["predictions"] == "evaluation/predictions.jsonl"
    assert second.stdout.strip() == "evaluation.1/predictions.jsonl"
    assert "exact match" in second.stderr
    full = t5tune_in_fork(*arguments, "--output-dir", "evaluation", cwd=tmp_path)
    assert full.code == 2
    assert "--overwrite" in full.errors[0]
    again = t5tune_in_fork(*arguments, "--overwrite", cwd=tmp_path)
    assert again.stdout.strip() == "evaluation/predictions.jsonl"

"""A trimmed base computes what its base computes, and all commands take it like any base."""

import errno
import json
import os
import resource
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForTokenClassification

from t5tune.checkpoints.pocket import pocket_folder
from t5tune.commands.chat import Chatter, Labeler
from t5tune.commands.merge import merge
from t5tune.commands.prepare import prepare
from t5tune.commands.serve import serve
from t5tune.commands.train import train
from t5tune.commands.trim import TrimResult, trim
from t5tune.data.tokens.tokenizer import load_tokenizer
from t5tune.errors import CheckpointError, DataError, ModelError, SettingsError, WriteError
from t5tune.families import FAMILIES
from t5tune.progress import Event, Started
from t5tune.settings import ChatSettings, MergeSettings, PrepareSettings, ServeSettings, TrainSettings, TrimSettings
from tests.serving.raw_http import ask, make_chat
from tests.support.caches import find_cache, open_only
from tests.support.label_runs import ORDERS, train_labels
from tests.support.models.bases import make_base
from tests.support.models.model_types import load_stock, make_checkpoint, read_tensors, write_pairs
from tests.support.notes import Notes

pytestmark = pytest.mark.slow

SETTINGS_FILES = {"settings.yaml", "trim.json"}  # which name folders


def run_trim(base: Path | str, data: Any, output: Path, report: Any = None, **changes: Any) -> TrimResult:
    values = {"model_name_or_path": str(base), "data_path": data, "output_dir": output}
    return trim(TrimSettings(**values, **changes), Notes() if report is None else report)


def read_rows(trimmed: Path) -> torch.Tensor:
    return torch.tensor(json.loads((trimmed / "trim.json").read_text())["rows"])


def check_same_computation(base: Path, result: TrimResult) -> None:
    """Compare stock transformers' logits of all rows and hidden states, bit by bit."""
    rows = read_rows(result.checkpoint)
    torch.manual_seed(0)
    source, target = (torch.randint(result.tokens, (3, length)) for length in (11, 7))
    with torch.inference_mode():
        before = load_stock(base)(rows[source], decoder_input_ids=rows[target], output_hidden_states=True)
        after = load_stock(result.checkpoint)(source, decoder_input_ids=target, output_hidden_states=True)
    assert torch.equal(before.encoder_last_hidden_state, after.encoder_last_hidden_state)
    assert torch.equal(before.decoder_hidden_states[-1], after.decoder_hidden_states[-1])
    assert torch.equal(before.logits[..., rows], after.logits)
    assert len(rows) == result.rows


def check_vocabulary(base: Path, result: TrimResult) -> None:
    """Check that the row of each token is its row of the base."""
    rows, before = read_rows(result.checkpoint), load_tokenizer(base).get_vocab()
    after = load_tokenizer(result.checkpoint).get_vocab()
    assert sorted(after.values()) == [*range(result.tokens)]
    assert {token: before[token] for token in after} == {token: int(rows[index]) for token, index in after.items()}


def read_folder(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name not in SETTINGS_FILES}


@pytest.mark.parametrize("key", [key for key in FAMILIES if key != "byt5"])
@pytest.mark.variants("t5", "flan-t5", "mt5", "codet5", "longt5", "t5gemma2")
def test_each_family_computes_the_same_with_fewer_rows(key: str, tmp_path: Path) -> None:
    base, data = make_checkpoint(key, tmp_path / "base"), write_pairs(tmp_path / "pairs.jsonl")
    result = run_trim(base, data, tmp_path / "trimmed")
    assert (result.kept_share, result.rows % 128) == (1, 0)
    assert result.tokens < result.base_tokens
    assert result.rows >= result.tokens + 28
    check_same_computation(base, result)
    check_vocabulary(base, result)
    again = run_trim(result.checkpoint, data, tmp_path / "again")
    assert read_folder(again.checkpoint) == read_folder(result.checkpoint)
    assert (again.tokens, again.rows) == (result.tokens, result.rows)


def test_prepared_data_keeps_its_tokens_and_texts(tmp_path: Path) -> None:
    result = run_trim("pocket", "pocket", tmp_path / "trimmed")
    caches = []
    for base in (pocket_folder(), result.checkpoint):
        values = {"model_name_or_path": str(base), "data_path": "pocket", "output_dir": tmp_path / f"cache-{base.name}"}
        caches.append(open_only(prepare(PrepareSettings(**values)).cache))
    rows, before, after = read_rows(result.checkpoint), *caches
    added = {old: new for old, new in zip(*(each.manifest["added_token_ids"] for each in caches), strict=True)}
    assert before.added_tokens == after.added_tokens != []
    new_ids = {int(old): new for new, old in enumerate(rows[: result.tokens])} | added
    for old, new in zip(before, after, strict=True):
        assert [new_ids[index] for index in old.source_S] == new.source_S.tolist()
        assert [new_ids[index] for index in old.target_T] == new.target_T.tolist()


def test_all_commands_take_a_trimmed_base(tmp_path: Path) -> None:
    trimmed = run_trim("pocket", "pocket", tmp_path / "trimmed", vocab_size=600)
    assert (trimmed.rows, trimmed.tokens) == (640, 612)
    values = {"model_name_or_path": str(trimmed.checkpoint), "data_path": "pocket", "output_dir": tmp_path / "run"}
    options = {"max_steps": 20, "learning_rate": 3e-3, "lora_target_modules": ["attention"], "report_samples": 0}
    run = train(TrainSettings(**values, **options, use_cpu=True)).run
    merged = merge(MergeSettings(adapter=[run], output_dir=tmp_path / "merged")).checkpoint
    chatters = [Chatter.load(ChatSettings(model_name_or_path=str(each), use_cpu=True)) for each in (run, merged)]
    prompt = "Could you bring six coffees and six teas to Aida?"
    replies = [chatter.reply(prompt).reply for chatter in chatters]
    assert replies[0] == replies[1] != ""
    pytest.importorskip("starlette")
    pytest.importorskip("ctranslate2")
    with serve(ServeSettings(models={"base": str(run)}, port=0, use_cpu=True, engine="transformers")) as server:
        assert ask(server.url, make_chat(prompt)) == replies[0]
    values = {"adapter": [run], "output_dir": tmp_path / "converted", "to": "ctranslate2"}
    converted = merge(MergeSettings(**values))
    assert (converted.replies, converted.same_replies) == (4, 4)
    again = run_trim(merged, "pocket", tmp_path / "small")
    check_same_computation(merged, again)
    chatter = Chatter.load(ChatSettings(model_name_or_path=str(again.checkpoint), use_cpu=True))
    assert chatter.reply(prompt).reply == replies[0]
    configs = [json.loads((each / "tokenizer_config.json").read_text()) for each in (merged, again.checkpoint)]
    assert configs[0]["chat_template"] == configs[1]["chat_template"]


def test_vocab_size_takes_frequent_tokens_first(tmp_path: Path) -> None:
    text = "one lamp, two lamps and a red hat"
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"source": text, "target": word}) + "\n" for word in ["lamp"] * 9 + ["Aida"]))
    tokenizer = load_tokenizer(pocket_folder())
    ids = {*tokenizer.encode(text)}
    smallest = run_trim("pocket", str(data), tmp_path / "smallest")
    assert ids <= {*read_rows(smallest.checkpoint)[: smallest.tokens].tolist()}
    required = "use at least ([0-9]+)"
    with pytest.raises(SettingsError, match=required) as refused:
        run_trim("pocket", str(data), tmp_path / "small", vocab_size=128)
    size = int(str(refused.value).partition("use at least ")[2].split(",")[0])
    exact = run_trim("pocket", str(data), tmp_path / "exact", vocab_size=size)
    assert exact.rows == size + -size % 128
    larger = run_trim("pocket", str(data), tmp_path / "larger", vocab_size=1024)
    # the base's order decides among tokens that the data doesn't use
    assert (larger.rows, larger.tokens) == (1024, 996)
    kept = {*read_rows(larger.checkpoint)[:996].tolist()}
    assert {*range(600)} | ids <= kept


def test_data_that_needs_all_tokens_is_refused(tmp_path: Path) -> None:
    base = make_checkpoint("codet5", tmp_path / "base")  # without unused rows
    data = tmp_path / "all.txt"
    texts = (load_tokenizer(base).decode([index]) for index in range(700))
    data.write_text("\n".join(text for text in texts if text.isprintable()), encoding="utf-8")
    with pytest.raises(SettingsError, match="data_path: needs [0-9]+ of the 800 tokens, so no row can go"):
        run_trim(base, str(data), tmp_path / "trimmed", objective="span-corruption")


def test_token_caches_count_like_their_data(tmp_path: Path, conversations: Path, untied_base: Path) -> None:
    values = {"model_name_or_path": str(untied_base), "data_path": str(conversations), "output_dir": tmp_path / "cache"}
    cache = prepare(PrepareSettings(**values)).cache
    of_data = run_trim(untied_base, str(conversations), tmp_path / "data")
    for name, path in (("folder", cache), ("single", find_cache(cache))):
        of_cache = run_trim(untied_base, str(path), tmp_path / name)
        assert read_folder(of_cache.checkpoint) == read_folder(of_data.checkpoint)
    other = make_checkpoint("flan-t5", tmp_path / "other")
    with pytest.raises(DataError, match="prepared with a different tokenizer"):
        run_trim(other, str(cache), tmp_path / "refused")


def test_train_refuses_the_token_cache_of_the_untrimmed_base(tmp_path: Path, conversations: Path) -> None:
    cache = prepare(
        PrepareSettings(model_name_or_path="pocket", data_path=str(conversations), output_dir=tmp_path / "c")
    )
    trimmed = run_trim("pocket", str(cache.cache), tmp_path / "trimmed").checkpoint
    values = {"model_name_or_path": str(trimmed), "output_dir": tmp_path / "run", "max_steps": 1, "use_cpu": True}
    with pytest.raises(
        DataError, match=r"c/.*: prepared with a different tokenizer: '<extra_id_0>' is token [0-9]+ of"
    ):
        train(TrainSettings(**values, data_path=str(cache.cache)))
    assert not (tmp_path / "run").exists()


def test_text_files_are_raw_text(tmp_path: Path, conversations: Path) -> None:
    text = tmp_path / "tea.txt"
    text.write_text("Zwölf Kannen Zitronentee für Zoë\n", encoding="utf-8")
    wanted = {*load_tokenizer(pocket_folder()).encode(text.read_text(encoding="utf-8").strip())}
    for number, data in enumerate(([str(text), str(conversations)], str(text), f"{conversations}:1 {text}:3".split())):
        kept = read_rows(run_trim("pocket", data, tmp_path / f"{number}").checkpoint).tolist()
        assert wanted <= {*kept[: len(kept) - 28]}
    with pytest.raises(DataError, match=r"tea.txt: .txt: raw text"):  # as in the other commands
        run_trim("pocket", str(text), tmp_path / "refused", objective="sft")


def test_datasets_with_weights_count_once(tmp_path: Path, conversations: Path) -> None:
    (tmp_path / "more.jsonl").write_text('{"source": "Zwölf Kannen", "target": "Zitronentee"}\n')
    paths = [str(conversations), str(tmp_path / "more.jsonl")]
    expected = read_folder(run_trim("pocket", paths, tmp_path / "expected").checkpoint)
    weighted = [f"{path}:{weight}" for path, weight in zip(paths, (2, 0.5), strict=True)]
    cache = prepare(PrepareSettings(model_name_or_path="pocket", data_path=weighted, output_dir=tmp_path / "cache"))
    for data, name in ((weighted, "weighted"), (str(cache.cache), "from_cache")):
        assert read_folder(run_trim("pocket", data, tmp_path / name, notes := Notes()).checkpoint) == expected
        assert [note for note in notes if "epoch" in note] == []
    of_first = run_trim("pocket", paths[0], tmp_path / "first").checkpoint
    without_second = run_trim("pocket", [paths[0], f"{paths[1]}:0"], tmp_path / "without").checkpoint
    assert read_folder(without_second) == read_folder(of_first) != expected
    with pytest.raises(SettingsError, match="every weight is 0"):
        run_trim("pocket", [f"{path}:0" for path in paths], tmp_path / "refused")


@pytest.mark.parametrize("objective", ["dpo", "span-corruption", "classify"])
def test_the_tokens_of_every_objective_are_kept(objective: str, tmp_path: Path, untied_base: Path) -> None:
    records = {
        "dpo": {"prompt": "One lamp", "chosen": "a red lamp", "rejected": "two hats"},
        "span-corruption": {"text": "One lamp is a red lamp, and two hats are hats"},
        "classify": {"text": "One lamp is red, and two hats", "label": "hats"},
    }
    data = tmp_path / "data.jsonl"
    data.write_text((json.dumps(records[objective]) + "\n") * 3)
    result = run_trim(untied_base, str(data), tmp_path / "trimmed", objective=objective)
    kept, tokenizer = {*read_rows(result.checkpoint)[: result.tokens].tolist()}, load_tokenizer(untied_base)
    assert result.kept_share == 1
    for text in ("lamp", "two hats", "red"):
        assert {*tokenizer.encode(text)} <= kept


def test_an_encoder_with_labels_is_trimmed(tmp_path: Path, untied_base: Path) -> None:
    run = train_labels(untied_base, tmp_path, "classify")
    merged = merge(MergeSettings(adapter=[run], output_dir=tmp_path / "merged", verify=False)).checkpoint
    result = run_trim(merged, str(tmp_path / "data.jsonl"), tmp_path / "trimmed")  # reads the data like training
    rows = read_rows(result.checkpoint)
    models = [AutoModelForTokenClassification.from_pretrained(each).eval() for each in (merged, result.checkpoint)]
    ids = torch.arange(result.tokens)[None, :40]
    with torch.inference_mode():
        logits = [model(each).logits for model, each in zip(models, (rows[ids], ids), strict=True)]
    assert torch.equal(*logits)
    folders = merged, result.checkpoint
    labelers = [Labeler.load(ChatSettings(model_name_or_path=str(folder), use_cpu=True)) for folder in folders]
    found = [replace(labeler.label(ORDERS[0]), seconds=0) for labeler in labelers]
    assert found[0] == found[1]


def test_ids_in_configs_are_renumbered(tmp_path: Path, conversations: Path) -> None:
    base = make_base(tmp_path / "base", tied=True)
    config = json.loads((base / "config.json").read_text())
    tokenizer = load_tokenizer(base)
    unused = len(tokenizer) + 5
    config |= {
        "pad_token_id": None,
        "decoder_start_token_id": None,
        "image_token_index": unused,
        "sep_token_id": 40_000,
    }
    (base / "config.json").write_text(json.dumps(config))
    generation = {
        "bad_words_ids": [[1401], [1402, 3]], "suppress_tokens": [1403], "forced_bos_token_id": 1404,
        "eos_token_id": [1, 1405], "max_length": 1401, "num_beams": 3,
    }  # fmt: skip
    (base / "generation_config.json").write_text(json.dumps(generation))
    result = run_trim(base, str(conversations), tmp_path / "trimmed")
    rows = read_rows(result.checkpoint).tolist()
    new = json.loads((result.checkpoint / "generation_config.json").read_text())
    assert [rows[index] for index in (*new["suppress_tokens"], new["forced_bos_token_id"])] == [1403, 1404]
    assert [[rows[index] for index in word] for word in new["bad_words_ids"]] == [[1401], [1402, 3]]
    assert [rows[index] for index in new["eos_token_id"]] == [1, 1405]
    assert (new["max_length"], new["num_beams"]) == (1401, 3)
    config = json.loads((result.checkpoint / "config.json").read_text())
    assert (config["pad_token_id"], config["decoder_start_token_id"], config["sep_token_id"]) == (0, 0, 40_000)
    assert (rows[config["image_token_index"]], config["image_token_index"]) == (unused, result.tokens)
    assert config["vocab_size"] == result.rows
    (base / "generation_config.json").write_text('{"sequence_bias": [[[5], 2]]}')
    with pytest.raises(CheckpointError, match="generation_config.json: sequence_bias: its ids can't be converted"):
        run_trim(base, str(conversations), tmp_path / "refused")


def test_unused_rows_that_configs_name_stay(tmp_path: Path, conversations: Path) -> None:
    base = make_checkpoint("codet5", tmp_path / "base", vocab_size=900)
    unused = [*range(800, 900)]
    (base / "generation_config.json").write_text(json.dumps({"suppress_tokens": unused, "pad_token_id": -1}))
    result = run_trim(base, str(conversations), tmp_path / "trimmed", vocab_size=800)
    rows = read_rows(result.checkpoint).tolist()
    new = json.loads((result.checkpoint / "generation_config.json").read_text())
    assert [rows[index] for index in new["suppress_tokens"]] == unused
    assert new["pad_token_id"] == -1


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [("generation_config", "eos_token_id", "1"), ("generation_config", "bad_words_ids", [[5.0]])]
    + [("config", "pad_token_id", True), ("config", "eos_token_id", {"a": 1})]
    + [("config", "decoder_start_token_id", value) for value in (-1, 1536)],
)
def test_values_that_are_no_ids_are_refused(
    file: str, key: str, value: Any, tmp_path: Path, conversations: Path
) -> None:
    base = make_base(tmp_path / "base", tied=True)
    path = base / f"{file}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(CheckpointError, match=rf"{path.name}: {key}: .*: expected the id of a token"):
        run_trim(base, str(conversations), tmp_path / "trimmed")


@pytest.mark.parametrize("kind", ["bin", "shards", "all embeddings"])
def test_other_files_of_weights_give_the_same_rows(
    kind: str, tmp_path: Path, untied_base: Path, conversations: Path
) -> None:
    expected = read_tensors(run_trim(untied_base, str(conversations), tmp_path / "expected").checkpoint)
    base, weights = tmp_path / "base", read_tensors(untied_base)
    shutil.copytree(untied_base, base)
    (base / "model.safetensors").unlink()
    if kind == "shards":
        load_stock(untied_base).save_pretrained(base, max_shard_size="100KB")
        shutil.copy(untied_base / "config.json", base)
    else:
        copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight") if kind == "all embeddings" else ()
        torch.save(weights | dict.fromkeys(copies, weights["shared.weight"]), base / "pytorch_model.bin")
    result = run_trim(base, str(conversations), tmp_path / "trimmed")
    tensors = read_tensors(result.checkpoint)
    assert all(torch.equal(tensors.pop(name), value) for name, value in expected.items())
    assert all(torch.equal(value, expected["shared.weight"]) for value in tensors.values())
    assert len(tensors) == (2 if kind == "all embeddings" else 0)
    assert (len([*result.checkpoint.glob("*.safetensors")]) > 1) == (kind == "shards")
    assert result.base_parameters == sum(value.numel() for value in weights.values())


def test_a_base_whose_files_disagree_is_refused(tmp_path: Path, conversations: Path) -> None:
    base = make_checkpoint("flan-t5", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    for rows, message in (
        (801, ".weight: shape \\[828, 32\\] in the file, \\[801, 32\\] by config.json"),
        (828, "its tokenizer has a token 828, but the embedding has only 828 rows"),
    ):
        (base / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
        added = {f"<new_{number}>": 800 + number for number in range(29)}
        (base / "added_tokens.json").write_text(json.dumps(added))
        with pytest.raises(ModelError, match=message):
            run_trim(base, str(conversations), tmp_path / "trimmed")


def test_weights_without_a_tensor_are_refused(tmp_path: Path, conversations: Path, untied_base: Path) -> None:
    base, name = tmp_path / "base", "decoder.final_layer_norm.weight"
    shutil.copytree(untied_base, base)
    weights = read_tensors(base)
    save_file({key: value for key, value in weights.items() if key != name}, base / "model.safetensors")
    refused = pytest.raises(ModelError, match=rf"base: {name}: missing from the weights \(1 of 1 missing tensors\)")
    with refused:
        run_trim(base, str(conversations), tmp_path / "trimmed")
    pytest.importorskip("ctranslate2")
    with refused:
        merge(MergeSettings(adapter=[base], to="ctranslate2", output_dir=tmp_path / "converted"))
    save_file(weights | {name: weights[name][1:].clone()}, base / "model.safetensors")
    with pytest.raises(ModelError, match=rf"{name}: shape \[31\] in the file, \[32\] by config.json"):
        run_trim(base, str(conversations), tmp_path / "trimmed")


@pytest.mark.parametrize("name", ["encoder.embed_tokens.weight", "shared.weight"])
def test_wrong_embeddings_are_refused(name: str, tmp_path: Path, conversations: Path) -> None:
    base, is_copy = make_base(tmp_path / "base", tied=True), name != "shared.weight"
    weights = read_tensors(base)
    weights[name] = weights["shared.weight"] + 1 if is_copy else weights["shared.weight"].flatten()
    save_file(weights, base / "model.safetensors")
    message = f"{name}: {'differs from shared.weight' if is_copy else 'shape'}"
    with pytest.raises(ModelError, match=message):
        run_trim(base, str(conversations), tmp_path / "trimmed")


def test_an_interruption_or_a_refusal_leaves_no_files(tmp_path: Path, conversations: Path) -> None:
    def interrupt(event: Event) -> None:
        if event == Started("trim", event.total if isinstance(event, Started) else None, "bytes"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_trim("pocket", str(conversations), tmp_path / "new" / "trimmed", interrupt)
    with pytest.raises(DataError, match="no such file"):
        run_trim("pocket", str(tmp_path / "missing.jsonl"), tmp_path / "new" / "trimmed")
    assert [*tmp_path.iterdir()] == []


def test_a_full_disk_leaves_no_files(tmp_path: Path, conversations: Path) -> None:
    (tmp_path / "trimmed").mkdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (1 << 20, limits[1])
    )  # the weights have more bytes, the token cache fewer
    try:
        with pytest.raises(WriteError, match="File too large"):
            run_trim("pocket", str(conversations), tmp_path / "trimmed")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [*tmp_path.rglob("*")] == [tmp_path / "trimmed"]


def test_a_read_only_disk_is_named_by_the_output(
    tmp_path: Path, conversations: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str, *_: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(WriteError, match="/trimmed: Read-only file system"):
        run_trim("pocket", str(conversations), tmp_path / "trimmed")


def test_an_output_that_links_to_itself_is_refused(tmp_path: Path, conversations: Path) -> None:
    (tmp_path / "trimmed").symlink_to("trimmed")
    with pytest.raises(SettingsError, match="trimmed: is a file, not a folder"):
        run_trim("pocket", str(conversations), tmp_path / "trimmed")


def test_the_base_is_never_replaced(tmp_path: Path, conversations: Path) -> None:
    base = make_base(tmp_path / "base", tied=True)
    for overwrite, message in ((False, "already contains files"), (True, "which this command reads")):
        with pytest.raises(SettingsError, match=message):
            run_trim(base, str(conversations), base, overwrite=overwrite)
    first = run_trim(base, str(conversations), tmp_path / "trimmed")
    assert run_trim(base, str(conversations), first.checkpoint, overwrite=True, vocab_size=1024).rows == 1024

"""Each model family trains, exports, merges and chats; and the table of families recognizes each of them."""

import json
import typing
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForSeq2SeqLM, AutoModelForTokenClassification, AutoTokenizer

from t5tune.checkpoints.base import read_config
from t5tune.commands.chat import Chatter, Labeler, chat
from t5tune.commands.evaluate import evaluate
from t5tune.commands.merge import merge
from t5tune.commands.plan import plan
from t5tune.commands.train import train
from t5tune.data.caches.prepared import open_examples
from t5tune.data.reading.formats import Turn
from t5tune.data.tokens.encoding import LabeledExample
from t5tune.data.tokens.tokenizer import decode_prediction, load_tokenizer
from t5tune.errors import SettingsError
from t5tune.families import (
    BYTE_FALLBACK,
    BYTE_LEVEL_BPE,
    BYTES,
    FAMILIES,
    FASTCHAT_TOKENS,
    find_architecture,
    find_family,
)
from t5tune.families.t5 import T5
from t5tune.inference.loading import load_adapter
from t5tune.model.load import load_base
from t5tune.planning.known_configs import KNOWN_CONFIGS
from t5tune.settings import (
    ChatSettings,
    EvaluateSettings,
    MergeSettings,
    PlanSettings,
)
from t5tune.settings.groups.base import FamilyName
from tests.support.caches import open_only
from tests.support.models.gemma_models import EOI
from tests.support.models.model_types import (
    PIECES,
    Chain,
    compute_logits,
    load_stock,
    make_checkpoint,
    run_chain,
    write_pairs,
)
from tests.support.models.other_python import ask_transformers_4, needs_transformers_4
from tests.support.models.tokenizer_kinds import make_gemma_tokenizer, read_corpus
from tests.support.processes.command_line import CommandResult, t5tune
from tests.support.train_runs import make_settings, read_steps

pytestmark = pytest.mark.slow

ANSWERS = ["a line,\nand {another}", "two teas", "naïve"]
CPU = torch.device("cpu")
KEYS = [key for key, family in FAMILIES.items() if issubclass(family.architecture, T5)]
# one key for each architecture: families that share it differ only in the tokenizer and the number of rows
ARCHITECTURES = {(FAMILIES[key].model_type, FAMILIES[key].feed_forward, FAMILIES[key].tied): key for key in KEYS}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    return {key: make_checkpoint(key, folder / key) for key in KEYS}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    questions = ("Say it.", "What for Mira?", "How is it?")
    return write_pairs(tmp_path_factory.mktemp("data") / "data.jsonl", zip(questions, ANSWERS, strict=True))


@pytest.fixture(scope="module", params=[f"{key} {mode}" for key in KEYS for mode in ("lora", "q_lora")])
def made(
    request: pytest.FixtureRequest, bases: dict[str, Path], data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Chain:
    key, mode = request.param.split()
    chain = run_chain(bases[key], data, tmp_path_factory.mktemp("made"), q_lora=mode == "q_lora", max_steps=3)
    assert chain.result.adapted_tensors > 0
    return chain


@pytest.mark.variants("flan-t5 lora", "t5 q_lora", "mt5 lora", "longt5 lora")
def test_each_family_trains_exports_merges_and_replies(made: Chain) -> None:
    family = find_family(json.loads((made.base / "config.json").read_text()), made.base)
    cache = open_only(made.run / "data")
    tokenizer = load_tokenizer(made.run)
    answers = [decode_prediction(tokenizer, example.target_T, "\n") for example in cache]
    assert answers[:2] == ANSWERS[:2]
    if family.tokenizer in (BYTES, BYTE_FALLBACK, BYTE_LEVEL_BPE):
        assert answers[2] == ANSWERS[2]
    assert ("\n" in cache.manifest["added_tokens"]) == (family.num_unused_rows > 0)

    before = compute_logits(load_base(made.base, torch.float32, CPU), made.run / "data")
    adapted = compute_logits(load_adapter(load_base(made.base, torch.float32, CPU), made.adapter), made.run / "data")
    assert float((adapted - before).abs().max()) > 1e-2  # it learned something

    stock = PeftModel.from_pretrained(load_stock(made.base), made.adapter)
    torch.testing.assert_close(compute_logits(stock, made.run / "data"), adapted, rtol=1e-4, atol=1e-4)

    merged = compute_logits(load_stock(made.merged), made.run / "data")
    if not made.q_lora:
        torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)
    ours = compute_logits(load_base(made.merged, torch.float32, CPU), made.run / "data")
    torch.testing.assert_close(merged, ours, rtol=1e-4, atol=1e-4)

    ask: dict[str, Any] = {"prompt": "Say it.", "max_new_tokens": 5, "use_cpu": True}
    reply = chat(ChatSettings(model_name_or_path=str(made.merged), **ask))
    assert reply.reply_tokens > 0
    if not made.q_lora:
        assert chat(ChatSettings(model_name_or_path=str(made.run), **ask)).reply == reply.reply
    assert (made.merged / "spiece.model").is_file() == (family.tokenizer not in (BYTES, BYTE_LEVEL_BPE))
    assert ("llama.cpp" in (made.merged / "README.md").read_text()) == ("llama.cpp" in family.converters)


@pytest.mark.variants("flan-t5 lora", "t5 q_lora", "mt5 lora", "longt5 lora")
def test_ctranslate2_gives_the_replies_of_the_merged_model(made: Chain, tmp_path: Path) -> None:
    pytest.importorskip("ctranslate2", reason="CTranslate2 is not installed: pip install ctranslate2")
    family = find_family(json.loads((made.base / "config.json").read_text()), made.base)
    if "CTranslate2" not in family.converters:
        pytest.skip("CTranslate2 doesn't convert this model type")
    values = {"model_name_or_path": str(made.base), "adapter": made.adapter, "output_dir": tmp_path / "converted"}
    onto = "nf4" if made.q_lora else "base"
    found = merge(MergeSettings(**values, onto=onto, to="ctranslate2", verify=False))
    assert found.replies is not None
    assert found.same_replies == found.replies > 0
    tokens = json.loads((tmp_path / "converted" / "shared_vocabulary.json").read_text())
    assert len(set(tokens)) == len(tokens) == load_file(made.base / "model.safetensors")["shared.weight"].shape[0]
    assert all(tokens[index] == token for token, index in load_tokenizer(made.merged).get_vocab().items())


@pytest.mark.variants("flan-t5 lora", "mt5 lora")
def test_onnx_gives_the_replies_of_the_merged_model(made: Chain, tmp_path: Path) -> None:
    family = find_family(json.loads((made.base / "config.json").read_text()), made.base)
    values = {"model_name_or_path": str(made.base), "adapter": made.adapter, "output_dir": tmp_path / "converted"}
    settings = MergeSettings(
        **values, onto="nf4" if made.q_lora else "base", to="onnx", quantization="float32", verify=False
    )
    if "ONNX" not in family.converters:
        with pytest.raises(SettingsError, match=f"to: onnx: {family.name} can't be converted"):
            merge(settings)
        return
    found = merge(settings)
    assert found.replies is not None
    assert found.same_replies == found.replies > 0
    stock = AutoTokenizer.from_pretrained(tmp_path / "converted")
    tokenizer = load_tokenizer(made.merged)
    for text in ANSWERS:
        assert stock(text).input_ids == tokenizer.special_ids.surround_source(tokenizer.encode(text))


@needs_transformers_4
@pytest.mark.parametrize("made", [f"{key} lora" for key in KEYS], indirect=True)
def test_transformers_4_has_the_logits_and_ids_of_merged_models(made: Chain, tmp_path: Path) -> None:
    source, target = [[3, 210, 17, 203, 1]], [[0, 203, 31, 7]]
    found = ask_transformers_4(made.merged, tmp_path, inputs=source, decoder_inputs=target, texts=ANSWERS)
    model = load_base(made.merged, torch.float32, CPU)
    with torch.inference_mode():
        ours = model(input_ids=torch.tensor(source), decoder_input_ids=torch.tensor(target), use_cache=False).logits
    torch.testing.assert_close(torch.tensor(found["logits"]), ours, rtol=0, atol=1e-5)
    tokenizer = load_tokenizer(made.run)
    assert found["ids"] == [tokenizer.special_ids.surround_source(tokenizer.encode(text)) for text in ANSWERS]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.variants("flan-t5", "longt5", "byt5")
def test_each_family_trains_in_full(key: str, bases: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """The run folder is a checkpoint with every tensor changed, and stock transformers computes its logits."""
    base, run = bases[key], tmp_path / "run"
    train(make_settings(base, data, run, train_mode="full", max_steps=2, report_samples=0))
    before, after = load_file(base / "model.safetensors"), load_file(run / "model.safetensors")
    assert [name for name, tensor in before.items() if tensor.equal(after[name])] == []
    ours = compute_logits(load_base(run, torch.float32, CPU), run / "data")
    torch.testing.assert_close(compute_logits(load_stock(run), run / "data"), ours, rtol=1e-4, atol=1e-4)


@pytest.mark.distributed
@pytest.mark.parametrize("key", ARCHITECTURES.values())
@pytest.mark.variants("mt5")
def test_each_architecture_has_the_losses_of_one_process_under_zero3(
    key: str, bases: dict[str, Path], data: Path, tmp_path: Path, on_ranks: Callable[..., CommandResult]
) -> None:
    """Two steps of three examples on each of two ranks, between which the base is sharded."""
    twice = {"max_steps": 2, "learning_rate": 3e-2, "lora_dropout": 0.0, "report_samples": 0}
    alone = {"data_path": [str(data), str(data)], "per_device_train_batch_size": 6}
    train(make_settings(bases[key], data, tmp_path / "alone", **alone, **twice))
    done = on_ranks(
        *(2, "train", "--model-name-or-path", bases[key], "--data-path", data, data),
        *("--output-dir", tmp_path / "ranks", "--deepspeed", "zero3", "--per-device-train-batch-size", 3),
        *("--logging-steps", 1, *chain.from_iterable((f"--{name}", value) for name, value in twice.items())),
    )
    assert done.code == 0, done.stderr
    for found, expected in zip(read_steps(tmp_path / "ranks"), read_steps(tmp_path / "alone"), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("key", KEYS)
def test_base_shapes_derived_from_the_config_match_every_weight(key: str, bases: dict[str, Path]) -> None:
    shapes = find_architecture(read_config(bases[key]), bases[key]).derive_shapes()
    actual = {name: tuple(tensor.shape) for name, tensor in load_file(bases[key] / "model.safetensors").items()}
    assert actual.items() <= shapes.items()
    aliases = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}
    assert shapes.keys() - actual.keys() <= aliases


def test_the_added_tokens_of_fastchat_t5_keep_their_ids(bases: dict[str, Path], data: Path, tmp_path: Path) -> None:
    arguments = ("--data-path", data, "--output-dir", tmp_path / "cache", "--conversation-template", "fastchat-t5")
    assert t5tune("prepare", "--model-name-or-path", bases["fastchat-t5"], *arguments).code == 0
    cache = open_only(tmp_path / "cache")
    assert cache.manifest["added_tokens"] == []
    target = cache[0].target_T.tolist()
    first = PIECES + 100
    # the template ends a target with a newline
    places = [FASTCHAT_TOKENS.index(text) for text in ("\n", "{", "}", "\n")]
    assert [i - first for i in target if i >= first and FASTCHAT_TOKENS[i - first] != " "] == places


def test_published_checkpoints_are_recognized_as_their_family() -> None:
    for name, config in KNOWN_CONFIGS.items():
        family = find_family(config, Path(name))
        kind = name.rpartition("/")[2].lower().replace("v1_1", "v1.1").replace("-", " ")
        # Aya-101 is a trained mT5
        kind = kind.replace("madlad400", "madlad 400").replace("long t5", "longt5").replace("aya 101", "mt5")
        assert any(kind.startswith(member.lower().replace("-", " ")) for member in family.name.split(", ")), name


def test_the_table_of_families_matches_the_configs_on_the_hub(shared: Any) -> None:
    for file in sorted(shared("configs").glob("*.json")):
        config = json.loads(file.read_text())
        family = find_family(config, file)
        assert family == find_family(KNOWN_CONFIGS[next(n for n in KNOWN_CONFIGS if n.endswith(f"/{file.stem}"))], file)
        assert config["vocab_size"] == family.num_rows, file.stem
        assert config.get("tie_word_embeddings", True) == family.tied, file.stem
        default = family.architecture.default_feed_forward
        assert config.get("feed_forward_proj", default) == family.feed_forward, file.stem
        assert family.complete_config(config).items() >= {k: v for k, v in config.items() if v is not None}.items()
        for name in ("decoder_start_token_id", "pad_token_id", "eos_token_id"):
            assert config[name] == family.complete_config({})[name], file.stem


def test_the_family_setting_takes_the_keys_of_the_table() -> None:
    assert set(typing.get_args(FamilyName)) == set(FAMILIES)
    assert find_family({"model_type": "mt5"}, Path("base"), "mt5").name == "mT5"


@pytest.fixture(scope="module")
def unknown_base(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Flan-T5 with an unknown model_type, whose config.json leaves the special token ids out."""
    folder = tmp_path_factory.mktemp("unknown") / "base"
    folder.mkdir()
    for file in bases["flan-t5"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    for name in ("decoder_start_token_id", "pad_token_id", "eos_token_id"):
        del config[name]
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "our_t5"}))
    return folder


@pytest.mark.long
def test_an_unknown_encoder_decoder_trains_as_a_known_family(
    unknown_base: Path, bases: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    """The run records the family that was chosen, and the merged checkpoint has its model type."""
    changes: dict[str, Any] = {"max_steps": 2, "learning_rate": 3e-2}
    for base, family, name in ((unknown_base, "flan-t5", "tried"), (bases["flan-t5"], None, "known")):
        train(make_settings(base, data, tmp_path / name, family=family, **changes))
    tried, known = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("tried", "known"))
    assert all(tried[name].equal(known[name]) for name in known)
    chatter = Chatter.load(ChatSettings(model_name_or_path=str(tmp_path / "tried"), max_new_tokens=3, use_cpu=True))
    assert chatter.reply([Turn("human", "Say it.")]).reply_tokens > 0
    merged = tmp_path / "merged"
    values = {"model_name_or_path": str(unknown_base), "adapter": tmp_path / "tried", "output_dir": merged}
    merge(MergeSettings(**values, verify=True))
    assert json.loads((merged / "config.json").read_text())["model_type"] == "t5"
    assert type(AutoModelForSeq2SeqLM.from_pretrained(merged)).__name__ == "T5ForConditionalGeneration"
    changes["teacher_model_name_or_path"] = str(tmp_path / "tried")
    train(make_settings(bases["flan-t5"], data, tmp_path / "student", **changes))
    found = plan(PlanSettings(model_name_or_path=str(unknown_base), family="flan-t5"))
    assert found.total_parameters == plan(PlanSettings(model_name_or_path=str(bases["flan-t5"]))).total_parameters


@pytest.mark.parametrize("key", [key for key in KEYS if FAMILIES[key].model_type != "longt5"])
@pytest.mark.variants("flan-t5", "byt5")
def test_each_familys_encoder_learns_to_tag_words(key: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """Stock transformers computes the logits of the merged checkpoint, and each word has one label."""
    words, run = [f"plate {number}".split() for number in range(12)], tmp_path / "run"
    lines = [json.dumps({"tokens": pair, "ner_tags": ["thing", "number"]}) for pair in words]
    (tmp_path / "tags.jsonl").write_text("\n".join(lines))
    train(make_settings(bases[key], tmp_path / "tags.jsonl", run, objective="tag", max_steps=3, report_samples=0))
    merge(MergeSettings(adapter=run, output_dir=tmp_path / "merged"))
    stock = AutoModelForTokenClassification.from_pretrained(tmp_path / "merged").eval()
    settings = EvaluateSettings(
        model_name_or_path=str(run), data_path=str(tmp_path / "tags.jsonl"), output_dir=tmp_path / "scores", bf16=False
    )
    result = evaluate(settings)
    losses = []
    for example in open_examples(run / "data"):
        assert isinstance(example, LabeledExample)
        assert np.count_nonzero(~np.isnan(example.values)) == 2
        is_labeled = ~np.isnan(example.values)
        with torch.inference_mode():
            logits_SK = stock(torch.from_numpy(example.source_S)[None]).logits[0]
        labels = torch.from_numpy(example.values[is_labeled]).long()
        losses.append(functional.cross_entropy(logits_SK[is_labeled], labels))
    assert result.loss == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)


def test_stock_transformers_gives_the_same_tags_where_tokens_have_spaces(tmp_path: Path) -> None:
    base = make_checkpoint("t5gemma", tmp_path / "base")
    make_gemma_tokenizer(base, EOI, ["<end_of_image>"], splits_words=False)
    texts = [line.split() for line in read_corpus() if line]
    records = [{"tokens": words, "tags": ["short" if len(word) < 5 else "long" for word in words]} for words in texts]
    (tmp_path / "tags.jsonl").write_text("\n".join(map(json.dumps, records)))
    changes = {"objective": "tag", "max_rejected_fraction": None, "report_samples": 0}
    train(make_settings(base, tmp_path / "tags.jsonl", tmp_path / "run", **changes, max_steps=3, learning_rate=3e-2))
    rejected = open_only(tmp_path / "run" / "data").manifest["rejected_by_reason"]
    merged = tmp_path / "merged"
    merge(MergeSettings(adapter=tmp_path / "run", output_dir=merged))
    stock = AutoModelForTokenClassification.from_pretrained(merged).eval()
    tokenizer = AutoTokenizer.from_pretrained(merged)
    tagger = Labeler.load(ChatSettings(model_name_or_path=str(merged), use_cpu=True))
    unaligned = 0
    for words in texts:
        inputs = tokenizer(" ".join(words), return_tensors="pt")
        with torch.inference_mode():
            probabilities_SK = stock(**inputs).logits[0].softmax(-1)
        found, expected, start = tagger.label(words).probabilities, [], 0
        for word in words:
            token = inputs.char_to_token(start)
            is_inside = start and inputs.char_to_token(start - 2) == token
            expected.append(None if is_inside else pytest.approx(float(probabilities_SK[token].max()), rel=1e-4))
            start += len(word) + 1
        assert found == expected
        unaligned += None in expected
    assert rejected == {"unaligned_word": unaligned}
    assert 10 < unaligned < len(texts) / 2

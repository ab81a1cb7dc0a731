"""T5s with other special tokens and shapes than the original ones: MADLAD-400, CodeT5, and an mT5 with other ids."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForSeq2SeqLM

from t5tune.commands.chat import chat
from t5tune.commands.evaluate import evaluate
from t5tune.commands.merge import merge
from t5tune.commands.prepare import prepare
from t5tune.commands.train import train
from t5tune.data.tokens.tokenizer import decode_prediction, load_tokenizer
from t5tune.families import find_family
from t5tune.inference.generation import Decoding, generate
from t5tune.model.load import load_base
from t5tune.progress import Event, Note
from t5tune.settings import ChatSettings, EvaluateSettings, MergeSettings, PrepareSettings
from tests.support.caches import open_only
from tests.support.models.model_types import write_pairs
from tests.support.models.tokenizer_kinds import make_codet5_tokenizer, make_madlad_tokenizer
from tests.support.train_runs import make_settings, read_losses

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
TARGETS = ["zwei  Tees,\n\tund {eins}", "naïve 😀 <s></s>", "ja"]
SOURCES = ["<2de> two teas, and one", "<2de> naïve", "<2de> yes, that is a longer sentence than the others"]
SHAPE = {"d_model": 36, "d_kv": 6, "num_heads": 5, "d_ff": 50, "num_layers": 2, "num_decoder_layers": 1}
IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
# model_type, pad, bos, eos and start, and the rest of config.json; the embedding has no unused row
KINDS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "MADLAD-400": ("t5", (1, None, 2, 0), {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "CodeT5": ("t5", (0, 1, 2, 0), {"feed_forward_proj": "relu"}),
    "mT5": ("mt5", (1, None, 2, 0), {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
}


@pytest.fixture(scope="module", params=KINDS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base whose weights are only in pytorch_model.bin."""
    folder: Path = tmp_path_factory.mktemp("base") / request.param
    folder.mkdir()
    num_tokens = (make_codet5_tokenizer if request.param == "CodeT5" else make_madlad_tokenizer)(folder)
    model_type, ids, more = KINDS[request.param]
    given = {name: value for name, value in zip(IDS, ids, strict=True) if value is not None}
    config = {**SHAPE, **given, **more, "vocab_size": num_tokens, "dropout_rate": 0.0}
    torch.manual_seed(11)
    model = AutoModelForSeq2SeqLM.from_config(CONFIG_MAPPING[model_type].from_dict(config))
    tensors = model.state_dict()
    if more.get("tie_word_embeddings") is False:
        tensors["lm_head.weight"] = torch.randn(num_tokens, 36) * 0.2
    torch.save(tensors, folder / "pytorch_model.bin")
    values = {"model_type": model_type, "is_encoder_decoder": True, "architectures": [type(model).__name__], **config}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "data.jsonl", zip(SOURCES, TARGETS, strict=True))


def test_the_table_recognizes_it(base: Path) -> None:
    assert find_family(json.loads((base / "config.json").read_text()), base).name == base.name


def test_targets_decode_to_the_original_text_without_added_tokens(base: Path, data: Path, tmp_path: Path) -> None:
    notes: list[Event] = []
    prepare(PrepareSettings(model_name_or_path=str(base), data_path=str(data), output_dir=tmp_path), notes.append)
    cache = open_only(tmp_path)
    tokenizer = load_tokenizer(cache.tokenizer_folder)
    assert [decode_prediction(tokenizer, example.target_T, "") for example in cache] == TARGETS
    assert cache.manifest["added_tokens"] == []
    texts = [note.text for note in notes if isinstance(note, Note)]
    assert "no tokens added: the base's tokenizer writes every character of the targets" in texts
    start = [1] if base.name == "CodeT5" else []
    for example, source in zip(cache, SOURCES, strict=True):
        assert example.source_S.tolist() == [*start, *tokenizer.encode(source), 2]
        assert example.target_T[-1] == 2


def test_packed_and_padded_runs_have_the_same_losses(base: Path, data: Path, tmp_path: Path) -> None:
    for packing in ("on", "off"):
        train(make_settings(base, data, tmp_path / packing, packing=packing, max_steps=3, lora_dropout=0.0))
    assert read_losses(tmp_path / "on") == pytest.approx(read_losses(tmp_path / "off"), rel=1e-5)
    # evaluation pads in generation, and packs for the loss
    measure = {"model_name_or_path": str(tmp_path / "on"), "data_path": str(data), "use_cpu": True, "max_new_tokens": 4}
    assert evaluate(EvaluateSettings(**measure, output_dir=tmp_path / "scores")).loss > 0


def test_padding_does_not_change_replies(base: Path) -> None:
    model, tokenizer = load_base(base, torch.float64, CPU), load_tokenizer(base)
    decoding = Decoding(tokenizer.eos_token_id, tokenizer.pad_token_id, 8)
    sources = [tokenizer.special_ids.surround_source(tokenizer.encode(source)) for source in SOURCES]
    replies = generate(model, sources, decoding)
    assert replies == [generate(model, [source], decoding)[0] for source in sources]


# transformers 5 marks every T5 as tied
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied")
def test_a_merged_checkpoint_has_the_logits_of_stock_peft(base: Path, data: Path, tmp_path: Path) -> None:
    settings = {"max_steps": 3, "learning_rate": 3e-2, "lora_target_modules": ["q", "v"]}
    train(make_settings(base, data, tmp_path / "run", **settings))
    merged = tmp_path / "merged"
    merge(MergeSettings(model_name_or_path=str(base), adapter=tmp_path / "run", output_dir=merged, verify=True))
    before, after = torch.load(base / "pytorch_model.bin", weights_only=True), load_file(merged / "model.safetensors")
    changed = [name for name, tensor in after.items() if not tensor.equal(before[name])]
    assert changed
    assert all(name.endswith((".q.weight", ".v.weight")) for name in changed)
    config = json.loads((merged / "config.json").read_text())
    assert [config.get(name) for name in IDS] == [*KINDS[base.name][1]]

    stock = AutoModelForSeq2SeqLM.from_pretrained(base)
    stock = PeftModel.from_pretrained(stock, tmp_path / "run").merge_and_unload().eval()
    example = open_only(tmp_path / "run" / "data")[0]
    inputs = {
        "input_ids": torch.tensor([example.source_S.tolist()]),
        "decoder_input_ids": torch.tensor([[0, *example.target_T.tolist()[:-1]]]),
        "use_cache": False,
    }
    with torch.no_grad():
        expected = stock(**inputs).logits
        found = AutoModelForSeq2SeqLM.from_pretrained(merged).eval()(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    ask: dict[str, Any] = {"prompt": SOURCES[0], "max_new_tokens": 5, "use_cpu": True}
    reply = chat(ChatSettings(model_name_or_path=str(merged), **ask))
    assert reply.reply_tokens > 0
    assert chat(ChatSettings(model_name_or_path=str(tmp_path / "run"), **ask)).reply == reply.reply

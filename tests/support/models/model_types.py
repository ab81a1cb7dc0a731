"""A tiny random checkpoint of each row in the table of families, saved by stock transformers, with a tokenizer.

base = make_checkpoint("mt5", tmp_path / "mt5")
chain = run_chain(base, data, tmp_path / "chain", q_lora=False)
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import transformers
from safetensors.torch import load_file
from torch.nn import functional
from transformers import CONFIG_MAPPING, AutoModelForSeq2SeqLM

from t5tune.commands.export import export
from t5tune.commands.merge import MergeResult, merge
from t5tune.commands.train import train
from t5tune.compat.requirements import is_older
from t5tune.families import BYTE_FALLBACK, BYTE_LEVEL_BPE, BYTES, FAMILIES, FASTCHAT_TOKENS, Family, find_architecture
from t5tune.families.t5gemma import T5Gemma
from t5tune.settings import ExportSettings, MergeSettings
from tests.support.caches import open_only
from tests.support.models.gemma_models import EOI, make_gemma
from tests.support.models.tokenizer_kinds import make_codet5_tokenizer, make_gemma_tokenizer, make_madlad_tokenizer
from tests.support.prose import english_text
from tests.support.train_runs import make_settings

PIECES = 700
# pairs of a source and a target, of different lengths
TEXTS = [
    ("Say it in one line, and then a second time.", "a line,\nand {another}"),
    ("What for Mira?", "two teas, and a piece of that cake over there"),
    ("How is it?", "naïve"),
    ("Where did they go when it began to rain in the park?", "home"),
    ("Who was that?", "no one that we know"),
    ("When?", "at six"),
]


def make_checkpoint(key: str, folder: Path, **changes: Any) -> Path:
    """Make a checkpoint of a row of FAMILIES, with a config.json like those on the Hub.

    Args:
        changes: of config.json, for a model like T5.
    """
    family = FAMILIES[key]
    if issubclass(family.architecture, T5Gemma):
        assert not changes
        make_gemma("t5gemma-9b-2b" if key == "t5gemma" else key, folder, shard_size="120KB")
        make_gemma_tokenizer(folder, EOI, ["<end_of_image>"])
        return folder
    folder.mkdir()
    num_tokens = make_t5_tokenizer(family, folder)
    rows = family.identified_by.get("vocab_size", (num_tokens + family.num_unused_rows,))[0]
    config = {
        "model_type": family.model_type, "is_encoder_decoder": True, "vocab_size": rows, "d_model": 32, "d_kv": 8,
        "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "dropout_rate": 0.0,
        "feed_forward_proj": family.feed_forward, "tie_word_embeddings": family.tied,
        "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
        **{name: values[0] for name, values in family.identified_by.items() if name.endswith("_id")},
    }  # fmt: skip
    if key == "longt5":  # as published: untied by its config.json, tied by its files
        config |= {"tie_word_embeddings": False, "encoder_attention_type": "transient-global"}
        config |= {"local_radius": 3, "global_block_size": 2}
    config |= changes
    torch.manual_seed(7)
    model = AutoModelForSeq2SeqLM.from_config(CONFIG_MAPPING[family.model_type].from_dict(config))
    if not family.tied:
        model.lm_head.weight = torch.nn.Parameter(torch.randn(rows, 32) * 0.2)
        model.config.tie_word_embeddings = False
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_t5_tokenizer(family: Family, folder: Path) -> int:
    """Write the tokenizer files that this family has on the Hub; return the number of tokens."""
    if family.tokenizer == BYTES:
        special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
        config = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125, **special}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return 384
    if family.tokenizer == BYTE_LEVEL_BPE:
        return make_codet5_tokenizer(folder, PIECES)
    if family.name == "MADLAD-400":
        return make_madlad_tokenizer(folder, PIECES)
    corpus = folder.with_name(f"{folder.name}-corpus.txt")
    # T5's training text had none of these characters
    text = re.sub(r"[<{}`\\^~]", "", english_text())
    corpus.write_text("\n".join(text.splitlines()[:300]))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "spiece"), vocab_size=PIECES, model_type="unigram",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, byte_fallback=family.tokenizer == BYTE_FALLBACK,
        minloglevel=2, num_threads=1,
    )  # fmt: skip
    (folder / "spiece.vocab").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 100}')
    if family.name != "fastchat-t5":
        return PIECES + 100
    (folder / "added_tokens.json").write_text(
        json.dumps({token: PIECES + 100 + i for i, token in enumerate(FASTCHAT_TOKENS)})
    )
    return PIECES + 100 + len(FASTCHAT_TOKENS)


def write_pairs(path: Path, pairs: Iterable[tuple[str, str]] = TEXTS) -> Path:
    """Write pairs of a source and a target as JSON lines."""
    path.write_text("".join(json.dumps({"source": source, "target": target}) + "\n" for source, target in pairs))
    return path


@dataclass(frozen=True)
class Chain:
    """The outputs of train, export and merge for a base."""

    base: Path
    run: Path
    adapter: Path
    merged: Path
    result: MergeResult
    q_lora: bool


def run_chain(base: Path, data: Path, folder: Path, q_lora: bool, **changes: Any) -> Chain:
    """Train LoRA or QLoRA on all linear layers, export the adapter, and merge it."""
    run, adapter, merged = (folder / name for name in ("run", "adapter", "merged"))
    options = {"q_lora": q_lora, "bf16": False, "learning_rate": 3e-2, "lora_target_modules": ["all-linear"]}
    train(make_settings(base, data, run, **options, **changes))
    export(ExportSettings(checkpoint=run, output_dir=adapter))
    onto = "nf4" if q_lora else "base"
    values = {"model_name_or_path": str(base), "adapter": adapter, "output_dir": merged}
    return Chain(base, run, adapter, merged, merge(MergeSettings(**values, onto=onto, verify=True)), q_lora)


def load_stock(folder: Path) -> Any:
    """Load a checkpoint with stock transformers."""
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, attn_implementation="eager").eval()
    if model.config.model_type == "umt5" and is_older(transformers.__version__, "5.24"):
        # up to 5.23 transformers scales the decoder's output of every umT5 as if its head were tied
        model.config.tie_word_embeddings = json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    return model


def compute_logits(model: Any, cache: Path) -> torch.Tensor:
    """Compute the logits of all target tokens of a cache, one example at a time."""
    start = find_architecture(model.config.to_dict(), cache).start_token_id
    logits = []
    for example in open_only(cache):
        source, target = (torch.from_numpy(ids.astype("int64"))[None] for ids in (example.source_S, example.target_T))
        inputs = {"input_ids": source, "decoder_input_ids": functional.pad(target[:, :-1], (1, 0), value=start)}
        with torch.inference_mode():
            logits.append(model.eval()(**inputs, use_cache=False).logits[0])
    return torch.cat(logits)


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a checkpoint by their names in the files."""
    return {name: value for file in folder.glob("model*.safetensors") for name, value in load_file(file).items()}

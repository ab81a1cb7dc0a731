"""Convert a merged checkpoint to ONNX for transformers.js and onnxruntime, with a page that runs it in a browser.

convert_and_check(checkpoint, adapter, folder, "int8", report).same

config.json, generation_config.json, tokenizer.json, …     as transformers.js reads them
onnx/encoder_model.onnx, onnx/decoder_model_merged.onnx     in fp32; in int8: …_quantized.onnx
index.html, README.md                                       with the prompt of the model's conversation template
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from t5tune.checkpoints.base import read_config
from t5tune.checkpoints.model_folder import LICENSE_PREFIXES
from t5tune.checkpoints.tokenizer_files import TOKENIZER_FILES
from t5tune.converting import replies
from t5tune.converting.generation_config import read_generation_config
from t5tune.converting.onnx_graph import DATA_SUFFIX, write_graph
from t5tune.data.reading.formats import Conversation, Turn
from t5tune.data.reading.rejections import RecordLocation
from t5tune.data.tokens.templates import render_answer_prefix, render_conversation
from t5tune.data.tokens.tokenizer import save_tokenizer
from t5tune.file_names import (
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    MODEL_CARD_FILE,
    ONNX_FOLDER,
    ONNX_PAGE_FILE,
    TOKENIZER_FILE,
)
from t5tune.inference.generation import find_stop_ids
from t5tune.inference.loading import read_model_files
from t5tune.inference.prompts import Prompts, make_prompts
from t5tune.io.atomic import write_json
from t5tune.merging.verify import read_example_ids
from t5tune.model.device import choose_device
from t5tune.model.load import load_base
from t5tune.progress import Note, Report

LIBRARY = "onnxruntime"
PAGE = Path(__file__).with_name("onnx_page.html")
KINDS = {"float32": ("", "fp32"), "int8": ("_quantized", "q8")}  # end of the files' names, transformers.js's dtype
NUM_PROMPTS = 20
MAX_CHANGED = 0.05  # share of the replies that int8 may change without a warning
EXAMPLE = "Could you bring six coffees and six teas to Aida?"  # which pocket learns
MESSAGE = "\0"  # a message that no template contains
PREFIX_KEYS = ("prefix", "task_specific_params")  # of config.json: transformers.js would put them before each text
SIZES = ("num_layers", "num_decoder_layers", "num_heads", "d_kv")


def convert_and_check(
    checkpoint: Path, adapter: Path, folder: Path, quantization: str | None, report: Report
) -> replies.Agreement:
    """Write files in fp32 and int8, or only in `quantization`, and compare replies: in fp32, all must be the same.

    Args:
        adapter: the folder of the merged adapter or run; its token cache has the prompts to compare.
        folder: the output folder, which must exist.

    Returns:
        The agreement of the last files: int8, unless `quantization` says otherwise.
    """
    kinds = list(KINDS) if quantization is None else [quantization]
    files = read_model_files(checkpoint, None)
    model = load_base(checkpoint, torch.float32, choose_device(use_cpu=True))
    start, end = model.architecture.start_token_id, files.tokenizer.eos_token_id
    (folder / ONNX_FOLDER).mkdir()
    for kind in kinds:
        for stack, path in zip((model.encoder, model.decoder), _list_files(folder, kind), strict=True):
            write_graph(model, stack, path, quantized=kind == "int8")
    ids = {"decoder_start_token_id": start, "pad_token_id": files.tokenizer.pad_token_id}
    _write_configs(checkpoint, folder, model.config, {**ids, "eos_token_id": find_stop_ids(model, end)})
    for file in checkpoint.iterdir():
        if file.name in TOKENIZER_FILES or file.name.startswith(LICENSE_PREFIXES):
            shutil.copyfile(file, folder / file.name)
    if not (folder / TOKENIZER_FILE).is_file():  # the only tokenizer file that transformers.js reads
        save_tokenizer(files.tokenizer, folder)
    _write_page_and_card(checkpoint, folder, make_prompts(files, None, None, 0, report), kinds[-1], start)
    sources = [source for source, _ in read_example_ids(checkpoint, adapter, NUM_PROMPTS)]
    ours = replies.generate_replies(model, files.tokenizer, sources)
    del model  # onnxruntime needs its memory
    for kind in kinds:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        sessions = [onnxruntime.InferenceSession(path, options) for path in _list_files(folder, kind)]
        theirs = [_reply(sessions, source, reply, start, end) for source, reply in zip(sources, ours, strict=True)]
        found = replies.compare_replies(ours, theirs)
        if kind == "float32":
            found.check_exact(LIBRARY)
        is_changed = found.replies - found.same > MAX_CHANGED * found.replies
        advice = "; --quantization float32 changes no reply" if is_changed else ""
        report(Note(f"{kind}: {found.describe(LIBRARY)}{advice}", warning=is_changed))
    return found


def _list_files(folder: Path, kind: str) -> list[Path]:
    names = ("encoder_model", "decoder_model_merged")
    return [folder / ONNX_FOLDER / f"{name}{KINDS[kind][0]}.onnx" for name in names]


def _write_configs(checkpoint: Path, folder: Path, model_config: Any, ids: dict[str, Any]) -> None:
    """Write the configs with the sizes that transformers.js needs, and with t5tune's `ids`."""
    config = {name: value for name, value in read_config(checkpoint).items() if name not in PREFIX_KEYS}
    config |= {name: getattr(model_config, name) for name in SIZES}
    if config["model_type"] == "umt5":  # transformers.js doesn't know it, and computes mT5 the same way
        config["model_type"] = "mt5"
    if data_files := sorted((folder / ONNX_FOLDER).glob(f"*{DATA_SUFFIX}")):
        has_data = {file.name.removesuffix(DATA_SUFFIX): True for file in data_files}
        config["transformers.js_config"] = {"use_external_data_format": has_data}
    write_json(folder / CONFIG_FILE, config)
    write_json(folder / GENERATION_CONFIG_FILE, read_generation_config(checkpoint) | ids)


def _write_page_and_card(checkpoint: Path, folder: Path, prompts: Prompts, kind: str, start: int) -> None:
    before, after = split_prompt(prompts)
    suffix, dtype = KINDS[kind]
    page = {"before": before, "after": after, "ending": prompts.template.answer_suffix, "dtype": dtype}
    example = json.dumps(f"{before}{EXAMPLE}{after}", ensure_ascii=False)
    values = {
        "__MODEL__": json.dumps(page).replace("<", "\\u003c"),  # a template may contain </script>
        "__PROMPT__": example, "__DTYPE__": dtype, "__SUFFIX__": suffix, "__START__": str(start),
    }  # fmt: skip
    for source, name in ((PAGE, ONNX_PAGE_FILE), (checkpoint / MODEL_CARD_FILE, MODEL_CARD_FILE)):
        text = source.read_text(encoding="utf-8")
        for placeholder, value in values.items():
            text = text.replace(placeholder, value)
        (folder / name).write_text(text, encoding="utf-8")


def split_prompt(prompts: Prompts) -> tuple[str, str]:
    """Return the text before and after the first message of a conversation."""
    message = Turn("human", prompts.source_prefix + MESSAGE)
    conversation = Conversation(RecordLocation("prompt", 1, 0, 0), None, (message,))
    pieces = render_conversation(conversation, prompts.template) + render_answer_prefix(prompts.template, 1)
    before, after = "".join(piece.text for piece in pieces if piece.kind != "gap").split(MESSAGE)
    return before, after


def _reply(sessions: list[Any], source: list[int], ours: replies.Reply, start: int, end: int) -> replies.Reply:
    """Reply greedily, one token at a time, and score our reply in one step."""
    encoder, decoder = sessions
    mask = np.ones((1, len(source)), np.int64)
    (states,) = encoder.run(None, {"input_ids": np.array([source]), "attention_mask": mask})
    given = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
    past = [each for each in decoder.get_inputs() if each.name.startswith("past_key_values.")]
    empty = {each.name: np.zeros((1, each.shape[1], 0, each.shape[3]), np.float32) for each in past}

    def decode(ids: list[int], cache: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        logits_BTV, *present = decoder.run(None, {"input_ids": np.array([ids]), **given, **cache})
        return torch.from_numpy(logits_BTV[0]), dict(zip(cache, present, strict=True))

    ids, cache = [start], empty
    while len(ids) <= replies.MAX_REPLY_TOKENS:
        logits_TV, cache = decode(ids[-1:], cache)
        if (following := int(logits_TV[-1].argmax())) == end:
            break
        ids.append(following)
    return replies.Reply(ids[1:], replies.select_log_probs(decode([start, *ours.ids], empty)[0], [*ours.ids, end]))

"""Load a checkpoint with transformers 4 and CTranslate2, for end_to_end/test_other_tools.py.

Run with the Python of an environment that has both packages, and no t5tune:

    python tests/support/models/transformers_4.py CHECKPOINT REQUEST.json RESULT.json

Reads {"inputs": [[…]], "decoder_inputs": [[…]], "texts": […], "messages": […] or null, "converted": folder or null}
and writes what plain transformers finds: its version, whether the head is tied, logits, ids of the texts, the source
ids of the messages, and the greedy replies of the checkpoint itself and of the checkpoint as converted by CTranslate2's
own converter.
"""

import json
import sys
from pathlib import Path

import torch
import transformers


def main(checkpoint: str, request_file: str, result_file: str) -> None:
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(checkpoint, torch_dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    source, target = torch.tensor(request["inputs"]), torch.tensor(request["decoder_inputs"])
    with torch.inference_mode():
        logits = model(input_ids=source, decoder_input_ids=target, use_cache=False).logits
        reply = model.generate(source, max_new_tokens=12, do_sample=False, num_beams=1)
    result = {
        "version": transformers.__version__,
        "tied": model.lm_head.weight.data_ptr() == model.shared.weight.data_ptr(),
        "logits": logits.tolist(),
        "ids": [tokenizer(text).input_ids for text in request["texts"]],
        "replies": reply[:, 1:].tolist(),
    }
    if request["messages"]:
        result["source"] = tokenizer.apply_chat_template(request["messages"], add_generation_prompt=True)
    if request["converted"]:
        result["converted_replies"] = generate_with_converted(checkpoint, request["converted"], request["inputs"])
    Path(result_file).write_text(json.dumps(result), encoding="utf-8")


def generate_with_converted(checkpoint: str, folder: str, sources: list) -> list:
    import ctranslate2

    ctranslate2.converters.TransformersConverter(checkpoint).convert(folder)
    translator = ctranslate2.Translator(folder, compute_type="float32")
    tokens = json.loads(Path(folder, "shared_vocabulary.json").read_text(encoding="utf-8"))
    results = translator.translate_batch(
        [[tokens[index] for index in source] for source in sources], beam_size=1, max_decoding_length=12
    )
    return [[tokens.index(token) for token in result.hypotheses[0]] for result in results]


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Train, merge and compare published checkpoints, one of each model type, with stock transformers. Needs a network.

    python benchmarks/published.py [--only mt5 t5gemma2] [--max-gb 8] [--folder SCRATCH]

For each row of the table of families, the first checkpoint that isn't larger than --max-gb is downloaded to the Hub's
cache. Its conversations are prepared, an adapter is trained for five steps and merged. Prints a Markdown table:

- tied: whether the weights say that the head is tied, and whether stock transformers ties it
- base: the largest difference between the base's logits and stock transformers', over the largest logit, in fp32
- merged: the same for base and adapter in t5tune, and the merged checkpoint in stock transformers
- replies: how many of the greedy replies of the merged checkpoint are the same in both

A row that fails has the error in place of its values, and the exit code is 1. Gated models need `hf auth login`.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sides import t5tune

QUESTIONS = ["What is the capital of France?", "Translate to German: The house is small.", "Hello, how are you?"]
ROWS = [{"source": question, "target": f"{question} Yes, {number} times."} for number, question in enumerate(QUESTIONS)]
MAX_LOGITS_ERROR = 1e-4  # of the largest logit: both sides compute in fp32, but sum in a different order
HEAD = ["model type", "checkpoint", "tied: files / stock", "base", "merged", "replies"]


def main() -> None:
    from t5tune.families import FAMILIES

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(FAMILIES), default=list(FAMILIES), metavar="FAMILY")
    parser.add_argument("--max-gb", type=float, default=8.0, help="leave out larger checkpoints")
    parser.add_argument("--folder", type=Path, help="scratch folder for runs and merged checkpoints")
    options = parser.parse_args()
    is_failed = False
    print(_format_row(HEAD), _format_row(["---"] * len(HEAD)), sep="\n", flush=True)
    for key in options.only:
        for name in FAMILIES[key].checkpoints:
            with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
                try:
                    cells = [*try_checkpoint(name, options.max_gb, Path(scratch))]
                except (Exception, SystemExit) as error:  # whatever a download or a library raises
                    cells = [" ".join(f"{type(error).__name__}: {error}".split())[:200]]
                    is_failed = True
            print(_format_row([FAMILIES[key].name, f"`{name}`", *cells]), flush=True)
    sys.exit(1 if is_failed else 0)


def try_checkpoint(name: str, max_gb: float, scratch: Path) -> Iterator[str]:
    """Yield the cells of a checkpoint's row.

    Raises:
        AssertionError: logits or ties differ.
    """
    import torch
    from transformers import AutoModelForSeq2SeqLM

    from t5tune.checkpoints.base import find_base, open_base
    from t5tune.inference.loading import load_adapter
    from t5tune.model.load import load_base
    from t5tune.settings.groups.base import BaseModelSettings

    size = measure_size(name)
    if size > max_gb * 1e9:
        yield f"not tried: {size / 1e9:.0f} GB"
        return
    base, cpu = find_base(BaseModelSettings(model_name_or_path=name)), torch.device("cpu")
    (scratch / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    run, merged = scratch / "run", scratch / "merged"
    t5tune(
        "train", "--model-name-or-path", name, "--data-path", scratch / "data.jsonl", "--output-dir", run,
        "--max-steps", 5, "--learning-rate", "1e-3", "--no-bf16", "--report-samples", 0, "--use-cpu",
    )  # fmt: skip
    t5tune("merge", run, "--output-dir", merged, "--no-verify")
    stock = AutoModelForSeq2SeqLM.from_pretrained(base, dtype="float32").eval()
    is_tied, stock_ties = open_base(base).is_tied(), _is_tied(stock)
    yield f"{_format_bool(is_tied)} / {_format_bool(stock_ties)}"
    ours = load_base(base, torch.float32, cpu)
    examples = read_examples(run)
    error = compare_logits(ours, stock, examples)
    yield f"{error:.1e}"
    assert error < MAX_LOGITS_ERROR, f"the base's logits differ by {error:.1e} of the largest"
    del stock
    tuned, stock_merged = load_adapter(ours, run), AutoModelForSeq2SeqLM.from_pretrained(merged, dtype="float32").eval()
    error = compare_logits(tuned, stock_merged, examples)
    yield f"{error:.1e}"
    assert error < MAX_LOGITS_ERROR, f"the merged logits differ by {error:.1e} of the largest"
    del tuned, ours
    yield f"{count_same_replies(merged, stock_merged)} of {len(QUESTIONS)}"


def measure_size(name: str) -> int:
    """Return the bytes of the weights that would be downloaded; 0 if the checkpoint is in the local cache."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return 0
    files = HfApi().model_info(name, files_metadata=True).siblings or []
    sizes = {file.rfilename: file.size or 0 for file in files}
    for suffix in (".safetensors", ".bin"):
        if found := sum(size for file, size in sizes.items() if file.endswith(suffix)):
            return found
    return 0


def read_examples(run: Path) -> list[tuple[list[int], list[int]]]:
    from t5tune.data.caches.prepared import open_examples

    return [(example.source_S.tolist(), example.target_T.tolist()) for example in open_examples(run / "data")]


def compare_logits(ours: Any, stock: Any, examples: list[tuple[list[int], list[int]]]) -> float:
    """Return the largest difference of logits, as a share of the largest logit."""
    import torch

    errors, start = [], ours.architecture.start_token_id
    for source, target in examples:
        inputs = {
            "input_ids": torch.tensor([source]),
            "attention_mask": torch.ones(1, len(source), dtype=torch.int64),
            "decoder_input_ids": torch.tensor([[start, *target[:-1]]]),
            "use_cache": False,
        }
        with torch.inference_mode():
            expected = stock(**inputs).logits
            errors.append(float((ours(**inputs).logits - expected).abs().max() / expected.abs().max()))
    return max(errors)


def count_same_replies(merged: Path, stock: Any) -> int:
    """Count the questions with the same reply from `t5tune chat` and from stock transformers with its tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(merged)
    same = 0
    for question in QUESTIONS:
        options = ["--prompt", question, "--max-new-tokens", 16, "--use-cpu", "--no-bf16"]
        reply = t5tune("chat", merged, *options)["reply"]
        messages = [{"role": "user", "content": question}]
        source = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = stock.generate(**source, max_new_tokens=16, do_sample=False)
        same += tokenizer.decode(ids[0], skip_special_tokens=True).strip() == reply.strip()
    return same


def _is_tied(model: Any) -> bool:
    head, embedding = model.get_output_embeddings(), model.get_decoder().get_input_embeddings()
    return bool(head.weight.data_ptr() == embedding.weight.data_ptr())


def _format_bool(value: bool) -> str:
    return "yes" if value else "no"


def _format_row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()

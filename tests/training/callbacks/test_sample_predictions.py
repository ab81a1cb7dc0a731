"""The sample predictions of report.html: which examples are chosen, and their predictions."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, BitsAndBytesConfig

from t5tune.checkpoints.pocket import pocket_folder
from t5tune.commands.train import train
from t5tune.training.callbacks.sample_predictions import choose_samples
from tests.support.train_runs import make_settings


def test_half_of_the_samples_are_the_worst() -> None:
    losses = [0.1] * 20
    losses[3], losses[7], losses[12] = 5.0, 9.0, 7.0
    others, worst = choose_samples(losses, 6)
    assert worst == [7, 12, 3]
    assert others == [0, 10, 19]


@pytest.mark.parametrize(
    ("num_examples", "count", "num_others", "num_worst"), [(4, 10, 2, 2), (1, 10, 1, 0), (9, 1, 1, 0)]
)
def test_few_examples_are_shown_once_each(num_examples: int, count: int, num_others: int, num_worst: int) -> None:
    others, worst = choose_samples([float(number) for number in range(num_examples)], count)
    assert (len(others), len(worst)) == (num_others, num_worst)
    assert len({*others, *worst}) == num_others + num_worst


def test_a_loss_that_is_not_finite_is_the_worst() -> None:
    assert choose_samples([1.0, math.nan, 3.0, 2.0], 2)[1] == [1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "quantized"),
    [("final_layer_norm", False), ("final_layer_norm", True), ("layer_norm", False), ("layer_norm", True)]
    + [("relative_attention_bias", False), ("wo", False), ("SelfAttention", False)],
)
@pytest.mark.variants("layer_norm-True")
def test_samples_in_bf16_equal_stock_peft_with_modules_to_save(module: str, quantized: bool, tmp_path: Path) -> None:
    """Without DeepSpeed they are fp32 in a bf16 base, which needs autocast also where Trainer doesn't apply it."""
    names, things = ("Mira", "Otto", "Ruth", "Karl"), ("tea", "coffee", "bread")
    records = [{"source": f"{name} would like some {thing}", "target": thing} for name in names for thing in things]
    data, run = tmp_path / "data.jsonl", tmp_path / "run"
    data.write_text("\n".join(map(json.dumps, records)))
    changes: dict[str, Any] = {"modules_to_save": [module], "q_lora": quantized, "bf16": True}
    changes |= {"conversation_template": "plain", "add_tokens": "none", "eval_data_path": str(data)}
    result = train(make_settings(pocket_folder(), data, run, **changes, eval_generate=12, report_samples=12))
    samples = json.loads((run / "samples.json").read_text())
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=["lm_head"],
    )  # fmt: skip
    options: dict[str, Any] = {"quantization_config": quantization} if quantized else {}
    base = AutoModelForSeq2SeqLM.from_pretrained(pocket_folder(), dtype=torch.bfloat16, **options)
    model = get_peft_model(base, PeftConfig.from_pretrained(run)).eval()
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data = parameter.data.float()
    tokenizer = AutoTokenizer.from_pretrained(pocket_folder())
    longest = max(len(tokenizer(thing).input_ids) for thing in things)

    def predict() -> list[str]:
        batches = (tokenizer(sample["source"], return_tensors="pt") for sample in samples)
        with torch.autocast("cpu", torch.bfloat16):
            rows = [model.generate(**batch, max_new_tokens=longest, do_sample=False)[0] for batch in batches]
        return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]

    before = predict()
    assert [sample["before"] for sample in samples] == before
    set_peft_model_state_dict(model, load_file(run / "adapter_model.safetensors"))
    after = predict()
    assert [sample["after"] for sample in samples] == after
    assert after != before
    correct = [sample["target"] == prediction for sample, prediction in zip(samples, after, strict=True)]
    assert result.eval["exact_match"] == pytest.approx(100 * sum(correct) / len(records), abs=0.01)
    assert any(correct)

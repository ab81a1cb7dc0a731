"""Training that starts from an adapter."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from t5tune.commands.chat import chat
from t5tune.commands.prepare import prepare
from t5tune.commands.train import train
from t5tune.errors import CheckpointError
from t5tune.progress import Event, Note
from t5tune.settings import ChatSettings, PrepareSettings
from tests.end_to_end.lora_runs import NORMS, make_settings, trained_adapter
from tests.support.caches import open_only
from tests.support.models.adapters import compute_logits, load_stock_base
from tests.support.processes.command_line import CommandResult


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ways", "kind"),
    [({}, "untied"), ({"use_dora": True, "modules_to_save": NORMS}, "tied")],
    ids=["lora", "dora and norms"],
)
@pytest.mark.variants("dora and norms")
def test_training_starts_from_the_exact_weights_of_an_adapter(
    ways: dict[str, Any], kind: str, request: pytest.FixtureRequest, conversations: Path, tmp_path: Path
) -> None:
    base: Path = request.getfixturevalue(f"{kind}_base")
    train(make_settings(base, conversations, tmp_path / "first", **ways))
    ways = {**ways, "adapter": tmp_path / "first", "eval_data_path": None, "max_steps": 1}
    train(make_settings(base, conversations, tmp_path / "same", **ways, learning_rate=0))
    train(make_settings(base, conversations, tmp_path / "more", **ways, learning_rate=1e-3))
    first, same, more = (trained_adapter(tmp_path / name) for name in ("first", "same", "more"))
    assert first.keys() == same.keys() == more.keys()
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not any(torch.equal(first[name], more[name]) for name in first)


@pytest.mark.slow
def test_a_base_other_than_that_of_the_adapter_is_named(
    first_adapter: Path, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(untied_base, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({name: 1.1 * value for name, value in weights.items()}, other / "model.safetensors", {"format": "pt"})
    for base, count in ((untied_base, 0), (other, 1)):
        notes: list[str] = []

        def report(event: Event, notes: list[str] = notes) -> None:
            if isinstance(event, Note) and event.warning:
                notes.append(event.text)

        run = tmp_path / f"from-{base.name}"
        train(make_settings(base, conversations, run, adapter=first_adapter, max_steps=1, eval_data_path=None), report)
        said = f"adapter: {first_adapter}: trained on a different base ({untied_base})"
        assert [text for text in notes if "different base" in text] == [said] * count
        notes.clear()
        chat(ChatSettings(model_name_or_path=str(base), adapter=first_adapter, prompt="Hi", max_new_tokens=1), report)
        said = f"{first_adapter}: trained on {untied_base}, but loaded onto {base}; predictions may be wrong"
        assert [text for text in notes if "trained on" in text] == [said] * count


@pytest.mark.slow
@pytest.mark.distributed
def test_zero3_training_starts_from_the_exact_adapter_weights(
    first_adapter: Path, untied_base: Path, conversations: Path, tmp_path: Path, on_ranks: Callable[..., CommandResult]
) -> None:
    done = on_ranks(
        *(2, "train", "--model-name-or-path", untied_base, "--data-path", conversations),
        *("--output-dir", tmp_path / "run", "--adapter", first_adapter, "--deepspeed", "zero3"),
        *("--max-steps", "1", "--learning-rate", "0", "--report-samples", "0"),
    )
    assert done.code == 0, done.stderr
    first, same = trained_adapter(first_adapter), trained_adapter(tmp_path / "run")
    assert first.keys() == same.keys()
    assert all(torch.equal(first[name], same[name]) for name in first)


@pytest.mark.slow
def test_token_rows_of_the_initial_adapter_keep_their_tokens(untied_base: Path, tmp_path: Path) -> None:
    files = []
    for name, answer in (("first", "日本 日"), ("other", "月水 月")):
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("\n".join(json.dumps({"source": f"{n}?", "target": answer}) for n in range(8)))
    more = {"eval_data_path": None, "max_steps": 1}
    train(make_settings(untied_base, files[0], tmp_path / "first", **more, conversation_template="plain"))
    more["adapter"] = tmp_path / "first"
    train(make_settings(untied_base, files[1], tmp_path / "same", **more, learning_rate=0))
    first, same = (trained_adapter(tmp_path / name) for name in ("first", "same"))
    assert all(torch.equal(first[name], same[name]) for name in first)
    for name in ("tokenizer.json", "template.yaml"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "same" / name).read_bytes()
    added = [open_only(tmp_path / name / "data").added_tokens for name in ("first", "same")]
    assert added[0] == added[1]
    assert "日" in added[0]
    values = {"model_name_or_path": str(untied_base), "data_path": str(files[1]), "output_dir": tmp_path / "cache"}
    cache = prepare(PrepareSettings(**values)).cache
    with pytest.raises(CheckpointError, match="row [0-9]+ belongs to '.+', which this run's tokenizer lacks"):
        train(make_settings(untied_base, cache, tmp_path / "refused", **more))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:(PiSSA|OLoRA) changes the base weights:UserWarning")
@pytest.mark.parametrize("initialization", ["pissa", "olora", "pissa_niter_4"])
def test_only_converted_pissa_and_olora_adapters_start_a_run(
    initialization: str, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    options = {"lora_alpha": 8, "target_modules": ["q", "v"], "init_lora_weights": initialization}
    model = get_peft_model(load_stock_base(untied_base), LoraConfig(**{"r": 4, **options}, task_type="SEQ_2_SEQ_LM"))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initialization")
    model.peft_config["default"].init_lora_weights = initialization
    for parameter in filter(lambda each: each.requires_grad, model.parameters()):
        parameter.data += 0.1
    expected = compute_logits(model.eval())
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "initialization")
    model.save_pretrained(tmp_path / "adapter")
    changes = {"lora_r": 8, "lora_alpha": 16, "add_tokens": "none", "max_steps": 1, "learning_rate": 0}
    changes |= {"bf16": False, "eval_data_path": None}
    train(make_settings(untied_base, conversations, tmp_path / "run", adapter=tmp_path / "plain", **changes))
    trained = PeftModel.from_pretrained(load_stock_base(untied_base), tmp_path / "run").eval()
    assert torch.allclose(compute_logits(trained), expected, atol=1e-4)
    changes |= {"lora_r": 4, "lora_alpha": 8, "adapter": tmp_path / "adapter"}
    with pytest.raises(CheckpointError, match=f"adapter: .*: init_lora_weights: {initialization}: ") as refused:
        train(make_settings(untied_base, conversations, tmp_path / "refused", **changes))
    assert "path_initial_model_for_weight_conversion" in (refused.value.hint or "")


@pytest.fixture(scope="module")
def first_adapter(untied_base: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first") / "run"
    train(make_settings(untied_base, conversations, folder, max_steps=1, eval_data_path=None))
    return folder

"""T5Gemma and T5Gemma 2 from a file of data to a merged checkpoint, compared with stock transformers and stock PEFT."""

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import CONFIG_MAPPING

from t5tune.checkpoints.base import open_base
from t5tune.checkpoints.model_folder import write_config
from t5tune.commands.chat import chat
from t5tune.commands.evaluate import evaluate
from t5tune.commands.merge import merge
from t5tune.commands.train import train
from t5tune.errors import CheckpointError, ModelError, SettingsError, Stopped
from t5tune.families import find_architecture
from t5tune.inference.loading import load_adapter
from t5tune.model.load import load_base
from t5tune.model.lora import add_lora
from t5tune.progress import Advanced
from t5tune.settings import ChatSettings, EvaluateSettings, MergeSettings, QuantizationSettings
from t5tune.settings.groups.lora import LoraSettings
from tests.end_to_end.lora_runs import loss_of
from tests.support.caches import open_only
from tests.support.models.adapters import make_stock_adapter
from tests.support.models.gemma_models import EOI, WINDOW
from tests.support.models.model_types import (
    TEXTS,
    Chain,
    compute_logits,
    load_stock,
    make_checkpoint,
    read_tensors,
    run_chain,
    write_pairs,
)
from tests.support.processes.command_line import CommandResult
from tests.support.processes.runs import LONG, stop_at
from tests.support.train_runs import make_settings, read_steps

pytestmark = pytest.mark.slow

KINDS = ("t5gemma2", "t5gemma")
CPU = torch.device("cpu")
SKIPPED = ("vision_tower", "multi_modal_projector")
VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"lora_target_modules": ["attention"], "use_rslora": True},
    "dora": {"use_dora": True, "lora_target_modules": ["feed-forward", "q"]},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "norms": {"modules_to_save": ["pre_self_attn_layernorm", "post_feedforward_layernorm"]},
    "loftq": {"init_lora_weights": "loftq", "q_lora": True, "bf16": False},
    "int8": {"q_lora": True, "quant_type": "int8", "bf16": False},
    "padded": {"packing": "off"},
}
WAYS: dict[str, tuple[int, tuple[str, ...]]] = {
    "ZeRO-3": (3, ()),
    "ZeRO-3, full": (3, ("--train-mode", "full")),
    "ZeRO-3, q_lora": (3, ("--q-lora",)),
    **({f"ZeRO-{stage}": (stage, ()) for stage in range(3)} if LONG else {"ZeRO-2": (2, ())}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Base checkpoints, each in several shards."""
    folder = tmp_path_factory.mktemp("gemma")
    made = {kind: make_checkpoint(kind, folder / kind) for kind in KINDS}
    assert all((base / "model.safetensors.index.json").is_file() for base in made.values())
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "data.jsonl")


@pytest.fixture(scope="module", params=[f"{kind} {mode}" for kind in KINDS for mode in ("lora", "q_lora")])
def made(
    request: pytest.FixtureRequest, bases: dict[str, Path], data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Chain:
    kind, mode = request.param.split()
    return run_chain(bases[kind], data, tmp_path_factory.mktemp("made"), q_lora=mode == "q_lora", max_steps=4)


def is_adapted(name: str) -> bool:
    return "_proj." in name and ".layers." in name and "vision" not in name


@pytest.mark.variants("t5gemma lora", "t5gemma2 q_lora")
def test_the_data_has_the_special_tokens_of_gemma(made: Chain) -> None:
    example = open_only(made.run / "data")[0]
    source, target = example.source_S.tolist(), example.target_T.tolist()
    assert (source[0], target[-1]) == (2, 1)
    assert 1 not in source
    assert 2 not in target
    assert max(len(each.source_S) for each in open_only(made.run / "data")) > 2 * WINDOW
    assert open_only(made.run / "data").manifest["added_tokens"] == []


@pytest.mark.variants("t5gemma lora", "t5gemma2 q_lora")
def test_stock_peft_loads_the_adapter_without_touching_the_vision_tower(made: Chain) -> None:
    ours = load_adapter(load_base(made.base, torch.float32, CPU), made.adapter)
    stock = PeftModel.from_pretrained(load_stock(made.base), made.adapter)
    layers = [name for name, module in stock.named_modules() if isinstance(module, LoraLayer)]
    assert layers == [name for name, module in ours.named_modules() if isinstance(module, LoraLayer)]
    assert len(layers) > 20
    assert not any(part in name for name in layers for part in SKIPPED)
    logits = compute_logits(ours, made.run / "data")
    torch.testing.assert_close(compute_logits(stock, made.run / "data"), logits, rtol=1e-4, atol=1e-4)
    assert (logits - compute_logits(load_base(made.base, torch.float32, CPU), made.run / "data")).abs().max() > 1e-2


# T5Gemma's encoder embedding is never tied
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied")
def test_the_merged_checkpoint_has_the_bits_of_pefts_merge(made: Chain) -> None:
    before, after = read_tensors(made.base), read_tensors(made.merged)
    assert before.keys() == after.keys()
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed == {name for name in before if is_adapted(name)}
    assert any(part in name for name in before for part in SKIPPED) == ("t5gemma2" in made.base.name)
    assert made.result.adapted_tensors == len(changed)
    for name in ("config.json", "model.safetensors.index.json", "generation_config.json"):
        found, expected = (json.loads((folder / name).read_text()) for folder in (made.merged, made.base))
        assert found == expected, name
    files = sorted(file.name for file in made.merged.glob("*.safetensors"))
    assert files == sorted(file.name for file in made.base.glob("*.safetensors"))
    if made.q_lora:
        return
    expected = PeftModel.from_pretrained(load_stock(made.base), made.adapter).merge_and_unload().state_dict()
    loaded = load_stock(made.merged).state_dict()
    assert loaded.keys() == expected.keys()
    assert [name for name in expected if not expected[name].equal(loaded[name])] == []


@pytest.mark.variants("t5gemma lora", "t5gemma2 q_lora")
def test_stock_transformers_has_the_logits_of_the_merged_checkpoint(made: Chain) -> None:
    merged = compute_logits(load_stock(made.merged), made.run / "data")
    torch.testing.assert_close(
        compute_logits(load_base(made.merged, torch.float32, CPU), made.run / "data"), merged, rtol=1e-4, atol=1e-4
    )
    quantization = QuantizationSettings(q_lora=True) if made.q_lora else None
    adapted = load_adapter(load_base(made.base, torch.float32, CPU, quantization), made.adapter)
    torch.testing.assert_close(compute_logits(adapted, made.run / "data"), merged, rtol=1e-3, atol=1e-3)


def test_only_the_layers_of_the_text_are_quantized(made: Chain) -> None:
    model = load_base(made.base, torch.float32, CPU, QuantizationSettings(q_lora=True))
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    quantized = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    assert linear - quantized == {"lm_head.out_proj"}
    assert not any(part in name for name, _ in model.named_modules() for part in SKIPPED)


@pytest.mark.parametrize("kind", KINDS)
def test_the_feed_forward_output_is_quantized_only_with_quantize_wo(kind: str, bases: dict[str, Path]) -> None:
    quantized = {
        with_wo: {
            name.rpartition(".")[2]
            for name, module in load_base(
                bases[kind], torch.float32, CPU, QuantizationSettings(q_lora=True, quantize_wo=with_wo)
            ).named_modules()
            if type(module).__name__ == "Linear4bit"
        }
        for with_wo in (True, False)
    }
    assert quantized[True] - quantized[False] == {"down_proj"}
    assert "up_proj" in quantized[False]


@pytest.mark.variants("t5gemma lora", "t5gemma2 q_lora")
def test_chat_and_evaluate_reply_like_stock_transformers(made: Chain, data: Path, tmp_path: Path) -> None:
    stock = load_stock(made.merged)
    source = open_only(made.run / "data")[3].source_S
    ids = stock.generate(torch.from_numpy(source)[None].long(), max_new_tokens=12, do_sample=False)[0].tolist()
    asked: dict[str, Any] = {"prompt": TEXTS[3][0], "max_new_tokens": 12, "use_cpu": True}
    reply = chat(ChatSettings(model_name_or_path=str(made.merged), **asked))
    assert reply.reply_tokens == len(ids[1:]) - (1 in ids)
    if not made.q_lora:
        assert chat(ChatSettings(model_name_or_path=str(made.run), **asked)).reply == reply.reply
    scored = {"model_name_or_path": str(made.merged), "data_path": str(data), "output_dir": tmp_path / "out"}
    found = evaluate(EvaluateSettings(**scored, use_cpu=True, max_new_tokens=12))
    logits = compute_logits(stock, made.run / "data")
    targets = torch.cat([torch.from_numpy(example.target_T).long() for example in open_only(made.run / "data")])
    assert found.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item(), rel=1e-4)
    predictions = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert reply.reply.strip() in (prediction["prediction"].strip() for prediction in predictions)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.variants("t5gemma-norms", "t5gemma2-rslora")
def test_live_model_saved_adapter_and_merged_checkpoint_agree(
    kind: str, name: str, bases: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    changes = {"bf16": False, **VARIANTS[name]}
    settings = make_settings(bases[kind], data, tmp_path / "run", max_steps=3, eval_data_path=str(data), **changes)
    result = train(settings)
    quantization = {key: changes[key] for key in ("q_lora", "quant_type") if key in changes}
    saved = loss_of(tmp_path / "run", data, tmp_path / "a", bf16=False, **quantization)
    # int8 scales activations by the largest value of a batch, so different batches round differently
    assert result.eval["loss"] == pytest.approx(saved, rel=3e-3 if name == "int8" else 1e-4)
    assert abs(saved - loss_of(bases[kind], data, tmp_path / "c", bf16=False, **quantization)) > 1e-2
    onto = changes.get("quant_type", "nf4") if quantization else "base"
    values = {"model_name_or_path": str(bases[kind]), "adapter": tmp_path / "run", "output_dir": tmp_path / "merged"}
    # int8 also rounds activations, and T5Gemma's capped logits are small
    merge(MergeSettings(**values, onto=onto, verify_tolerance=0.1))
    folded = loss_of(tmp_path / "merged", data, tmp_path / "b", bf16=False)
    assert folded == pytest.approx(saved, rel=2e-2 if quantization else 1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.variants("t5gemma2")
def test_a_padded_run_has_the_losses_of_a_packed_one(
    kind: str, bases: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    steps = []
    for packing in ("on", "off"):
        run = tmp_path / packing
        train(make_settings(bases[kind], data, run, max_steps=2, packing=packing, lora_dropout=0.0, bf16=False))
        steps.append(read_steps(run))
    for packed, padded in zip(*steps, strict=True):
        assert packed["loss"] == pytest.approx(padded["loss"], rel=1e-5)
        assert packed["grad_norm"] == pytest.approx(padded["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.variants("t5gemma")
def test_a_full_run_resumes_and_ends_with_a_complete_checkpoint(
    kind: str, bases: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"train_mode": "full", "max_steps": 4, "bf16": False}
    stopped = make_settings(bases[kind], data, tmp_path / "parts", **changes)
    with pytest.raises(Stopped):
        train(stopped, stop_at(Advanced("train", 2)))
    train(stopped)
    train(make_settings(bases[kind], data, tmp_path / "whole", **changes))
    before, after = read_tensors(bases[kind]), read_tensors(tmp_path / "whole")
    assert after.keys() == before.keys()
    unchanged = {name for name, tensor in before.items() if tensor.equal(after[name])}
    assert unchanged - {name for name in before if any(part in name for part in SKIPPED)} <= {
        "model.encoder.embed_tokens.eoi_embedding"
    }
    again = read_tensors(tmp_path / "parts")
    assert all(again[name].equal(tensor) for name, tensor in after.items())
    ours = compute_logits(load_base(tmp_path / "whole", torch.float32, CPU), tmp_path / "whole" / "data")
    torch.testing.assert_close(
        compute_logits(load_stock(tmp_path / "whole"), tmp_path / "whole" / "data"), ours, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_layers_and_added_tokens_are_refused(kind: str, bases: dict[str, Path]) -> None:
    refused: list[tuple[LoraSettings, list[int], str]] = [
        (make_lora(["wo"]), [], "lora_target_modules: wo: no such linear layer"),
        (make_lora(["out_proj"]), [], "lora_target_modules: out_proj: no such"),
        (LoraSettings(modules_to_save=["decoder"]), [], "modules_to_save: decoder: contains .*share"),
        (make_lora(["q"]), [EOI - 1], "train_token_rows: .*t5gemma.* can't get rows"),
    ]
    for name in ("norm", "q_proj") if kind == "t5gemma2" else ():
        problem = f"modules_to_save: {name}: also the name of .*(vision_tower|multi_modal_projector)"
        refused.append((LoraSettings(modules_to_save=[name]), [], problem))
    for settings, token_ids, problem in refused:
        with pytest.raises(SettingsError, match=problem):
            add_lora(load_base(bases[kind], torch.float32, CPU), bases[kind], settings, token_ids, torch.float32)
    with pytest.raises(SettingsError, match="out_proj: PEFT's copy of a shared embedding gets no gradient"):
        LoraSettings(modules_to_save=["out_proj"])


@pytest.mark.parametrize("module", ["decoder.embed_tokens", "embed_tokens", "encoder.embed_tokens"])
def test_token_rows_that_peft_trained_are_refused(module: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """PEFT trains rows of one or both embeddings, but not the head's rows, which merge would change, too."""
    base, adapter = bases["t5gemma"], tmp_path / "adapter"
    make_stock_adapter(base, adapter, target_modules=["q_proj"], trainable_token_indices={module: [7, 5]})
    values = {"model_name_or_path": str(base), "adapter": adapter, "output_dir": tmp_path / "merged"}
    with pytest.raises(CheckpointError, match="embedding rows of t5gemma can't be merged: PEFT trains them without"):
        merge(MergeSettings(**values, verify=False))
    assert not (tmp_path / "merged").exists()


def make_lora(names: list[str]) -> LoraSettings:
    return LoraSettings(lora_target_modules=names)


@pytest.mark.parametrize("names", [["q", "v"], ["q_proj"], ["attention"], ["feed-forward"], ["all-linear"]])
@pytest.mark.parametrize("kind", KINDS)
def test_the_targets_of_lora_are_layers_of_the_text(kind: str, names: list[str], bases: dict[str, Path]) -> None:
    base = bases[kind]
    model, _ = add_lora(load_base(base, torch.float32, CPU), base, make_lora(names), [], torch.float32)
    found = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    wanted = {
        "q": ("q_proj",), "v": ("v_proj",), "q_proj": ("q_proj",),
        "attention": ("q_proj", "k_proj", "v_proj", "o_proj"), "feed-forward": ("gate_proj", "up_proj", "down_proj"),
        "all-linear": ("_proj",),
    }  # fmt: skip
    endings = tuple(chain.from_iterable(wanted[name] for name in names))
    shapes = model.architecture.derive_shapes()
    linear = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2 and ".layers." in name]
    assert found == {f"base_model.model.{name}" for name in linear if name.endswith(endings)}


@pytest.mark.parametrize("renamed", [False, True])
def test_names_of_files_are_converted_as_transformers_does(renamed: bool, bases: dict[str, Path]) -> None:
    """The table is transformers'. It has the names in files and the model's names, which some releases wrote."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import rename_source_key

    stock = load_stock(bases["t5gemma2"])
    names = list(read_tensors(bases["t5gemma2"]))
    architecture = open_base(bases["t5gemma2"]).architecture
    assert sum(architecture.to_model_name(name) != name for name in names) > 20
    conversions = get_model_conversion_mapping(stock)
    for name in names:
        given = architecture.to_model_name(name) if renamed else name
        expected = rename_source_key(given, conversions, [])[0]
        assert architecture.to_model_name(given) == expected
        assert expected in stock.state_dict()


def test_a_conversion_to_ctranslate2_is_refused_by_name(made: Chain, tmp_path: Path) -> None:
    name = "T5Gemma 2" if made.base.name == "t5gemma2" else "T5Gemma"
    settings = MergeSettings(
        model_name_or_path=str(made.base), adapter=made.adapter, output_dir=tmp_path / "out", to="ctranslate2"
    )
    with pytest.raises(SettingsError, match=f"to: ctranslate2: {name} can't be converted"):
        merge(settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.variants("t5gemma lora", "t5gemma2 q_lora")
def test_a_merge_does_not_import_torch(made: Chain, tmp_path: Path) -> None:
    settings = {"model_name_or_path": str(made.base), "adapter": str(made.adapter), "output_dir": str(tmp_path / "out")}
    code = (
        "import sys; from t5tune.commands.merge import merge; from t5tune.settings import MergeSettings;"
        f"merge(MergeSettings(**{settings!r}, onto='base', verify=False));"
        "print(any(m in sys.modules for m in ('torch', 'peft')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.distributed
@pytest.mark.parametrize(("stage", "mode"), WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.variants("t5gemma2-ZeRO-3, q_lora")
def test_two_ranks_have_the_losses_of_one_process(
    kind: str,
    stage: int,
    mode: tuple[str, ...],
    bases: dict[str, Path],
    data: Path,
    tmp_path: Path,
    on_ranks: Callable[..., CommandResult],
) -> None:
    # under ZeRO-0 in fp32, the norm is logged after clipping
    options = {"max_steps": 2, "learning_rate": 3e-2, "lora_dropout": 0.0, "report_samples": 0, "max_grad_norm": 100}
    alone: dict[str, Any] = {"per_device_train_batch_size": 6, "bf16": False, "q_lora": "--q-lora" in mode}
    if "full" in mode:
        alone["train_mode"] = "full"
    train(make_settings(bases[kind], data, tmp_path / "alone", **alone, **options))
    done = on_ranks(
        *(2, "train", "--model-name-or-path", bases[kind], "--data-path", data, "--no-bf16", "--use-cpu"),
        *("--output-dir", tmp_path / "ranks", "--deepspeed", f"zero{stage}", "--per-device-train-batch-size", 3),
        *("--logging-steps", 1, "--eval-data-path", data, "--eval-generate", 2),
        *chain.from_iterable((f"--{name}", value) for name, value in options.items()),
        *("--eval-steps", 2, *mode),
    )
    assert done.code == 0, done.stderr
    for found, expected in zip(read_steps(tmp_path / "ranks"), read_steps(tmp_path / "alone"), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    if "full" in mode:
        assert read_tensors(tmp_path / "ranks").keys() == read_tensors(bases[kind]).keys()


@pytest.mark.distributed
@pytest.mark.parametrize("made", [f"{kind} lora" for kind in KINDS], indirect=True)
@pytest.mark.variants("t5gemma2 lora")
def test_a_partitioned_evaluation_has_the_result_of_one_process(
    made: Chain, data: Path, tmp_path: Path, on_ranks: Callable[..., CommandResult]
) -> None:
    common = ("evaluate", made.run, "--data-path", data, "--max-new-tokens", 6, "--use-cpu", "--no-bf16", "--json")
    one = on_ranks(1, *common, "--output-dir", tmp_path / "one")
    two = on_ranks(2, *common, "--output-dir", tmp_path / "two", "--deepspeed", "zero3")
    assert (one.code, two.code) == (0, 0), two.stderr
    assert two.json["loss"] == pytest.approx(one.json["loss"], rel=1e-5)
    assert len({(tmp_path / name / "predictions.jsonl").read_bytes() for name in ("one", "two")}) == 1


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"attention_bias": True}, "attention_bias: true: projections with biases can't be trained"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type: dynamic: it depends on other texts"),
        ({"rope_parameters": {"full_attention": {"rope_type": "longrope"}}}, "rope_type: longrope: it depends on"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_config_that_packing_or_quantization_cannot_compute_is_refused(
    kind: str, changes: dict[str, Any], problem: str, bases: dict[str, Path]
) -> None:
    config = json.loads((bases[kind] / "config.json").read_text())
    config["decoder"] |= changes
    with pytest.raises(ModelError, match=problem):
        find_architecture(config, bases[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_config_leaves_out_is_what_transformers_takes(kind: str, bases: dict[str, Path]) -> None:
    config = json.loads((bases[kind] / "config.json").read_text())
    for name in ("bos_token_id", "final_logit_softcapping"):
        config["decoder"].pop(name, None)
    architecture = find_architecture(config, bases[kind])
    stock = CONFIG_MAPPING[config["model_type"]].from_dict(config).decoder
    assert architecture.start_token_id == stock.bos_token_id
    assert architecture.logit_cap == stock.final_logit_softcapping


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_without_a_head_setting_does_not_change(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    for file in bases[kind].iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((bases[kind] / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_config(tmp_path, tmp_path.parent, tied=True)
    assert json.loads((tmp_path.parent / "config.json").read_text()) == config


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_whose_parts_are_no_objects_is_refused(kind: str, bases: dict[str, Path]) -> None:
    config = json.loads((bases[kind] / "config.json").read_text())
    with pytest.raises(CheckpointError, match="encoder: 7: expected an object"):
        find_architecture({**config, "encoder": 7}, bases[kind])


def test_an_untied_t5gemma_2_is_refused(bases: dict[str, Path]) -> None:
    config = json.loads((bases["t5gemma2"] / "config.json").read_text())
    with pytest.raises(CheckpointError, match="the base's head isn't tied"):
        find_architecture(config, bases["t5gemma2"]).list_shared(tied=False)

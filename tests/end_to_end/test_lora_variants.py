"""LoRA variants, quantized bases and full training: the saved and the merged weights equal the trained model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from t5tune.checkpoints.adapter import read_base_metadata
from t5tune.commands.export import export
from t5tune.commands.merge import merge
from t5tune.commands.train import train
from t5tune.errors import SettingsError
from t5tune.inference.loading import load_for_inference
from t5tune.io.atomic import hash_file
from t5tune.model.load import load_base
from t5tune.model.lora import add_lora
from t5tune.settings import ExportSettings, MergeSettings, QuantizationSettings
from t5tune.settings.groups.base import InferenceSettings
from t5tune.settings.groups.lora import LoraSettings
from tests.end_to_end.lora_runs import NORMS, loss_of, make_settings, trained_adapter
from tests.support.caches import open_only
from tests.support.models.adapters import compute_logits, load_stock_base, make_stock_adapter
from tests.support.processes.command_line import CommandResult
from tests.support.processes.runs import LONG

pytestmark = pytest.mark.slow
VARIANTS: dict[str, dict[str, Any]] = {
    "all-linear": {"lora_target_modules": ["all-linear"]},
    "rslora": {"lora_target_modules": ["attention"], "use_rslora": True, "lora_r": 16},
    "dora": {"use_dora": True, "lora_target_modules": ["feed-forward", "q"]},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa fast": {"init_lora_weights": "pissa_niter_4", "lora_r": 4},
    "olora": {"init_lora_weights": "olora", "use_rslora": True},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "lora+": {"loraplus_lr_ratio": 8},
    "modules to save": {"modules_to_save": NORMS},
}
KINDS = ("untied", "tied")
NF4: dict[str, Any] = {"q_lora": True, "bf16": False}
# each variant with one of the bases; LONG_TESTS=1: with both
CASES = [(name, kind) for number, name in enumerate(VARIANTS) for kind in (KINDS if LONG else (KINDS[number % 2],))]
QUANTIZED: dict[str, dict[str, Any]] = {
    "nf4": {"double_quant": False},
    "nf4 dq": {},
    "fp4": {"quant_type": "fp4"},
    "int8": {"quant_type": "int8"},
    "loftq": {"init_lora_weights": "loftq"},
    "dora": {"use_dora": True},
    "int8 dora": {"quant_type": "int8", "use_dora": True},
}


@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.variants("dora-untied", "pissa-tied")
def test_live_model_saved_adapter_and_merged_checkpoint_agree(
    name: str, kind: str, request: pytest.FixtureRequest, conversations: Path, tmp_path: Path
) -> None:
    """Compare the loss of the live model, of the saved adapter on the unchanged base, and of the merged checkpoint."""
    base: Path = request.getfixturevalue(f"{kind}_base")
    result = train(make_settings(base, conversations, tmp_path / "run", **VARIANTS[name]))
    saved = loss_of(tmp_path / "run", conversations, tmp_path / "a")
    merged = MergeSettings(model_name_or_path=str(base), adapter=tmp_path / "run", output_dir=tmp_path / "merged")
    assert merge(merged).max_error < 1e-3
    folded = loss_of(tmp_path / "merged", conversations, tmp_path / "b")
    assert result.eval["loss"] == pytest.approx(saved, rel=1e-4)
    assert folded == pytest.approx(saved, rel=1e-4)
    assert abs(saved - loss_of(base, conversations, tmp_path / "c")) > 1e-2


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.variants("nf4 dq")
def test_a_loaded_qlora_adapter_has_the_loss_of_training(
    name: str, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    changes = {"q_lora": True, "bf16": False, **QUANTIZED[name]}
    result = train(make_settings(untied_base, conversations, tmp_path / "run", **changes))
    again = {key: changes[key] for key in ("q_lora", "quant_type", "double_quant") if key in changes}
    saved = loss_of(tmp_path / "run", conversations, tmp_path / "a", **again)
    # int8 scales activations by the largest value of a batch, so different batches round differently
    assert result.eval["loss"] == pytest.approx(saved, rel=3e-3 if name.startswith("int8") else 1e-4)
    assert saved < loss_of(untied_base, conversations, tmp_path / "b", **again) - 0.05


def test_quantization_errors_grow_from_int8_to_nf4_to_fp4(untied_base: Path) -> None:
    file = load_file(untied_base / "model.safetensors")
    name = "encoder.block.0.layer.1.DenseReluDense.wi_0"
    x = torch.randn(50, file[f"{name}.weight"].shape[1], generator=torch.Generator().manual_seed(0))
    exact = x @ file[f"{name}.weight"].T
    errors = {}
    for kind in ("int8", "nf4", "fp4"):
        quantisation = QuantizationSettings(q_lora=True, quant_type=kind)
        model = load_base(untied_base, torch.float32, torch.device("cpu"), quantisation)
        with torch.inference_mode():
            errors[kind] = float((model.get_submodule(name)(x) - exact).norm() / exact.norm())
    assert 0 < errors["int8"] < 0.03 < errors["nf4"] < errors["fp4"] < 0.5


def test_int8_is_quantized_from_values_on_the_cpu(untied_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes quantizes a weight when it moves from the CPU to a GPU; a weight on the GPU would stay in bf16."""
    from bitsandbytes.nn import Int8Params

    stock = Int8Params.to
    came_from = []

    def to(self: Int8Params, device: torch.device) -> Int8Params:
        came_from.append((self.data.device.type, device.type))
        return stock(self, "cpu")

    monkeypatch.setattr(Int8Params, "to", to)
    quantisation = QuantizationSettings(q_lora=True, quant_type="int8")
    elsewhere = torch.device("meta")  # a substitute for a GPU
    model = load_base(untied_base, torch.bfloat16, elsewhere, quantisation)
    layers = [module for module in model.modules() if type(module).__name__ == "Linear8bitLt"]
    assert came_from == [("cpu", "meta")] * len(layers)
    assert {module.weight.dtype for module in layers} == {torch.int8}
    assert model.shared.weight.device == elsewhere


def test_loftq_initialization_is_closer_to_the_base_than_quantization_alone(
    untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    file = load_file(untied_base / "model.safetensors")
    needed = make_settings(untied_base, conversations, tmp_path, q_lora=True, bf16=False, lora_r=4)
    models = {}
    for initialization in ("default", "loftq"):
        chosen = needed.model_copy(update={"init_lora_weights": initialization})
        model = load_base(untied_base, torch.float32, torch.device("cpu"), chosen)
        model, _ = add_lora(model, untied_base, chosen, [], torch.float32)
        models[initialization] = model.eval()
    name = "encoder.block.1.layer.0.SelfAttention.q"
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    exact = x @ file[f"{name}.weight"].T
    with torch.inference_mode():
        errors = {
            initialization: float((model.base_model.model.get_submodule(name)(x) - exact).norm() / exact.norm())
            for initialization, model in models.items()
        }
    assert errors["loftq"] < 0.9 * errors["default"]
    with torch.inference_mode():
        quantized, corrected = (
            models[initialization].base_model.model.get_submodule(name)(torch.eye(32)).T
            for initialization in ("default", "loftq")
        )
    # the error of the best approximation of rank 4
    left_out = torch.linalg.svdvals(file[f"{name}.weight"] - quantized)[4:].norm()
    assert (file[f"{name}.weight"] - corrected).norm() < 1.001 * left_out


def test_target_module_groups_are_resolved_to_layers_of_the_model(
    untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    train(make_settings(untied_base, conversations, tmp_path / "run", max_steps=1, lora_target_modules=["all_linear"]))
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["k", "o", "q", "v", "wi_0", "wi_1", "wo"]


def test_loraplus_gives_b_its_own_learning_rate(untied_base: Path, conversations: Path, tmp_path: Path) -> None:
    """Adam's first step changes each value by the learning rate, whatever its gradient."""
    changes = {"max_steps": 1, "lora_dropout": 0.0, "learning_rate": 1e-3, "loraplus_lr_ratio": 16}
    train(make_settings(untied_base, conversations, tmp_path / "run", **changes))
    b = [value for name, value in trained_adapter(tmp_path / "run").items() if "lora_B" in name]
    moved = torch.cat([value.abs().flatten() for value in b])
    assert moved[moved > 0].median() == pytest.approx(16e-3, rel=1e-3)


@pytest.mark.parametrize("loraplus", [{}, {"loraplus_lr_ratio": 4.0}], ids=str)
def test_layer_norms_have_no_weight_decay(
    loraplus: dict[str, Any], untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    changes = {"max_steps": 2, "modules_to_save": ["final_layer_norm"], "save_steps": 1, **loraplus}
    without, with_decay = (tmp_path / name for name in ("without", "with"))
    train(make_settings(untied_base, conversations, without, **changes))
    train(make_settings(untied_base, conversations, with_decay, **changes, weight_decay=0.5))
    # later steps differ, because the other weights do
    plain, decayed = (trained_adapter(run / "checkpoint-1") for run in (without, with_decay))
    equal = {name for name, value in plain.items() if value.equal(decayed[name])}
    norms = {name for name in plain if "final_layer_norm" in name}
    assert norms
    assert norms <= equal
    assert not any("lora_A" in name for name in equal)


@pytest.fixture(scope="module")
def loraplus_start(untied_base: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter with token rows and nonzero B matrices, on a base without dropout."""
    folder = tmp_path_factory.mktemp("loraplus")
    base = shutil.copytree(untied_base, folder / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "dropout_rate": 0.0}))
    train(make_settings(base, conversations, folder / "start", max_steps=3))
    return folder / "start"


LORAPLUS = {
    "max_steps": 6,
    "save_steps": 6,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "lora_dropout": 0.0,
    "loraplus_lr_ratio": 16,
    "num_data": 8,
    "max_grad_norm": 0,
}


@pytest.fixture(scope="module")
def loraplus_by_hand(loraplus_start: Path, conversations: Path) -> dict[str, torch.Tensor]:
    """The result of six steps on the same eight examples, with transformers' model, PEFT's adapter, torch's loss."""
    from transformers import T5ForConditionalGeneration

    base = loraplus_start.parent / "base"
    model = T5ForConditionalGeneration.from_pretrained(base)
    model.config.tie_word_embeddings = False
    model = PeftModel.from_pretrained(model, str(loraplus_start), is_trainable=True).eval()
    encoder, decoder = model.base_model.model.encoder.embed_tokens, model.base_model.model.decoder.embed_tokens
    decoder.token_adapter.trainable_tokens_delta = encoder.token_adapter.trainable_tokens_delta  # T5 has one embedding
    named = {name: value for name, value in model.named_parameters() if value.requires_grad}
    fast = [value for name, value in named.items() if ".lora_B." in name]
    slow = [value for name, value in named.items() if ".lora_B." not in name]
    assert any("trainable_tokens_delta" in name for name in named)
    optimizer = torch.optim.AdamW([{"params": slow, "lr": 1e-3}, {"params": fast, "lr": 16e-3}], weight_decay=0.0)
    examples = [example for example in open_only(loraplus_start / "data")][:8]
    for _ in range(6):
        losses = []
        for example in examples:
            source_1S, target_1T = (torch.from_numpy(ids)[None] for ids in (example.source_S, example.target_T))
            logits_1TV = model(input_ids=source_1S, labels=target_1T).logits
            losses.append(torch.nn.functional.cross_entropy(logits_1TV[0], target_1T[0], reduction="sum"))
        (sum(losses) / sum(len(example.target_T) for example in examples)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name.replace(".default", ""): value.detach() for name, value in named.items()}


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [None, "zero0", "zero1", "zero2", "zero3"])
@pytest.mark.variants("None")
def test_loraplus_gives_the_weights_of_an_independent_training_loop(
    stage: str | None,
    loraplus_start: Path,
    loraplus_by_hand: dict[str, torch.Tensor],
    conversations: Path,
    tmp_path: Path,
    on_ranks: Callable[..., CommandResult],
) -> None:
    """Under ZeRO-3 all placeholders are one-dimensional, like DoRA's magnitudes, which have B's learning rate."""
    flags = [part for name, value in LORAPLUS.items() for part in (f"--{name}", value)]
    done = on_ranks(
        2 if stage else 1, "train", "--model-name-or-path", loraplus_start.parent / "base", "--data-path",
        loraplus_start / "data", "--adapter", loraplus_start, "--output-dir", tmp_path / "run", "--use-cpu",
        "--per-device-train-batch-size", "4" if stage else "8", "--report-samples", "0", "--json", *flags,
        *(["--deepspeed", stage] if stage else []),
    )  # fmt: skip
    assert done.code == 0, done.stderr
    before, after = trained_adapter(loraplus_start), trained_adapter(tmp_path / "run")
    shared_with_encoder = {name for name in after if name.startswith("base_model.model.decoder.embed_tokens.")}
    assert loraplus_by_hand.keys() == after.keys() - shared_with_encoder
    for name, value in loraplus_by_hand.items():
        error = (after[name] - value).norm() / (value - before[name]).norm()
        assert error < 1e-3, name
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rates = {json.loads(line).get("learning_rate") for line in lines}
    assert rates - {None} == {1e-3}


@pytest.mark.parametrize(
    "changes",
    [VARIANTS["dora"], VARIANTS["pissa"], VARIANTS["lora+"], VARIANTS["modules to save"], {"train_mode": "full"}],
    ids=["dora", "pissa", "lora+", "modules to save", "full"],
)
@pytest.mark.variants("pissa", "full")
def test_resuming_gives_the_bits_of_an_uninterrupted_run(
    changes: dict[str, Any], untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(make_settings(untied_base, conversations, run, **changes))
    file = "model.safetensors" if "train_mode" in changes else "adapter_model.safetensors"
    straight = (run / file).read_bytes()
    (run / "result.json").unlink()
    shutil.rmtree(run / "checkpoint-6")
    result = train(make_settings(untied_base, conversations, run, **changes))
    assert result.resumed_from == run / "checkpoint-3"
    assert (run / file).read_bytes() == straight


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["dora", "pissa", "modules to save", "lora+"])
@pytest.mark.variants("dora")
def test_exported_shards_equal_the_adapter_that_training_saved(
    name: str, untied_base: Path, conversations: Path, tmp_path: Path, on_ranks: Callable[..., CommandResult]
) -> None:
    options = []
    for key, value in VARIANTS[name].items():
        options += [f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    done = on_ranks(
        2, "train", "--model-name-or-path", untied_base, "--data-path", conversations, "--output-dir", tmp_path / "run",
        "--eval-data-path", conversations, "--max-steps", "2", "--learning-rate", "1e-2", "--deepspeed", "zero3",
        "--report-samples", "0", "--json", *options,
    )  # fmt: skip
    assert done.code == 0, done.stderr
    export(ExportSettings(checkpoint=tmp_path / "run", output_dir=tmp_path / "adapter"))
    live, exported = trained_adapter(tmp_path / "run"), trained_adapter(tmp_path / "adapter")
    assert live.keys() == exported.keys()
    assert all(torch.equal(live[key], exported[key]) for key in live)
    assert done.json["eval"]["loss"] == pytest.approx(
        loss_of(tmp_path / "adapter", conversations, tmp_path / "out"), rel=1e-4
    )
    # shards that `latest` doesn't name, such as older ones or DeepSpeed's universal ones
    others = shutil.copytree(
        tmp_path / "run" / "checkpoint-2" / "global_step2", tmp_path / "run" / "checkpoint-2" / "global_step1"
    )
    export(ExportSettings(checkpoint=others, output_dir=tmp_path / "others"))
    files = ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "template.yaml", "README.md")
    assert [hash_file(tmp_path / "others" / file) for file in files] == [
        hash_file(tmp_path / "adapter" / file) for file in files
    ]
    assert read_base_metadata(tmp_path / "others")["fingerprint"]


def test_loftq_leaves_adapters_of_unquantized_layers_at_zero(untied_base: Path) -> None:
    settings = LoraSettings(init_lora_weights="loftq", lora_target_modules=["all-linear"])
    quantization = QuantizationSettings(q_lora=True, quantize_wo=False)
    model = load_base(untied_base, torch.float32, torch.device("cpu"), quantization)
    model, _ = add_lora(model, untied_base, settings, [], torch.float32)
    b = {name: parameter for name, parameter in model.named_parameters() if ".lora_B." in name}
    assert {name for name, parameter in b.items() if not parameter.any()} == {name for name in b if ".wo." in name}


@pytest.mark.parametrize(
    "method", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"init_lora_weights": "loftq", **NF4}]
)
def test_a_rank_too_large_for_an_initialization_is_refused(
    method: dict[str, Any], untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    changes = {"lora_target_modules": ["all-linear"], "max_steps": 1, **method}
    with pytest.raises(
        SettingsError, match=r"lora_r: 40: .* smaller side: 32 for encoder\.block\.0\..*; use lora_r 32"
    ):
        train(make_settings(untied_base, conversations, tmp_path / "a", lora_r=40, **changes))
    train(make_settings(untied_base, conversations, tmp_path / "b", lora_r=32, **changes))
    saved = trained_adapter(tmp_path / "b")
    # PiSSA and OLoRA are saved as plain LoRA, of twice the rank
    assert {value.shape[0] for name, value in saved.items() if "lora_A" in name} <= {32, 64}


@pytest.mark.parametrize("saved", ["SelfAttention.o", "wo", "DenseReluDense"])
def test_a_layer_is_either_adapted_or_trained_in_full(saved: str, untied_base: Path) -> None:
    model = load_base(untied_base, torch.float32, torch.device("cpu"))
    settings = LoraSettings(modules_to_save=[saved], lora_target_modules=["all-linear"])
    model, _ = add_lora(model, untied_base, settings, [], torch.float32)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any(f"{saved}.modules_to_save." in name for name in trained)
    assert any(".lora_A." in name for name in trained)
    assert not any(".lora_A." in name and ".modules_to_save." in name for name in trained)


@pytest.mark.parametrize(("saved", "targets"), [("wo", ["all-linear"]), ("SelfAttention", ["q", "v"])])
@pytest.mark.parametrize("trained_by", ["t5tune", "PEFT"])
def test_modules_to_save_layers_get_no_adapter_as_in_peft(
    trained_by: str, saved: str, targets: list[str], untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "run"
    if trained_by == "t5tune":
        changes = {"lora_target_modules": targets, "modules_to_save": [saved], "bf16": False, "eval_data_path": None}
        train(make_settings(untied_base, conversations, adapter, **changes, max_steps=2))
    else:
        layers = ["q", "k", "v", "o", "wi_0", "wi_1", "wo"] if targets == ["all-linear"] else targets
        make_stock_adapter(untied_base, adapter, target_modules=layers, modules_to_save=[saved])
    names = [name.removeprefix("base_model.model.") for name in trained_adapter(adapter)]
    assert {".lora_" in name for name in names if f".{saved}." in name} == {False}
    expected = compute_logits(PeftModel.from_pretrained(load_stock_base(untied_base), adapter).eval())
    assert not torch.allclose(expected, compute_logits(load_stock_base(untied_base)), atol=1e-2)
    values = {"model_name_or_path": str(untied_base), "adapter": adapter, "use_cpu": True, "bf16": False}
    loaded = load_for_inference(InferenceSettings(**values))
    assert torch.allclose(compute_logits(loaded.model), expected, atol=1e-4)
    export(ExportSettings(checkpoint=adapter, output_dir=tmp_path / "exported"))
    live, exported = trained_adapter(adapter), trained_adapter(tmp_path / "exported")
    assert live.keys() == exported.keys()
    assert all(torch.equal(live[name], exported[name]) for name in live)
    merged = {"model_name_or_path": str(untied_base), "adapter": adapter, "output_dir": tmp_path / "merged"}
    merge(MergeSettings(**merged, verify=False))
    assert torch.allclose(compute_logits(load_stock_base(tmp_path / "merged")), expected, atol=1e-4)


@pytest.mark.parametrize("quantize_wo", [True, False])
def test_merging_onto_nf4_quantizes_the_weights_that_training_quantized(
    quantize_wo: bool, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    changes = {"q_lora": True, "bf16": False, "quantize_wo": quantize_wo, "max_steps": 2}
    train(make_settings(untied_base, conversations, tmp_path / "run", **changes))
    values = {"model_name_or_path": str(untied_base), "adapter": tmp_path / "run", "output_dir": tmp_path / "merged"}
    result = merge(MergeSettings(**values, onto="nf4"))
    assert result.verified
    before, after = (load_file(folder / "model.safetensors") for folder in (untied_base, tmp_path / "merged"))
    layer = "decoder.block.1.layer.2.DenseReluDense"
    assert torch.equal(before[f"{layer}.wo.weight"], after[f"{layer}.wo.weight"]) == (not quantize_wo)
    assert not torch.equal(before[f"{layer}.wi_1.weight"], after[f"{layer}.wi_1.weight"])

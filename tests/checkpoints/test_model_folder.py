"""Which files of a checkpoint belong to the trained model."""

from t5tune.checkpoints.model_folder import is_trained_file


def test_trained_files_are_told_from_files_for_resuming() -> None:
    adapter = ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "non_lora_state.safetensors"]
    model = ["model.safetensors", "config.json", "generation_config.json"]
    both = [
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "spiece.model",
        "template.yaml", "training_data.json", "README.md",
    ]  # fmt: skip
    resuming = [
        "optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "trainer_state.json", "latest",
        "global_step4", "zero_to_fp32.py", "t5tune_manifest.json", "t5tune_evaluation.json", "training_args.bin",
    ]  # fmt: skip
    assert [name for name in [*adapter, *model, *both, *resuming] if is_trained_file(name)] == adapter + model + both

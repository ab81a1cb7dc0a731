"""Start a run, or find the checkpoint that it resumes from.

base_metadata, run_identity, checkpoint = start_or_resume_run(
    run_plan, folder, examples, evaluations, base, teacher_hash, world, report
)
checkpoint      # run/checkpoint-40, or None for a new run
"""

from pathlib import Path
from typing import Any

from t5tune.checkpoints.base import open_base
from t5tune.checkpoints.fingerprint import describe_base, describe_hash, match_hash, read_file_stats
from t5tune.data.caches.examples import Examples
from t5tune.data.tokens.tokenizer import find_other_token, load_tokenizer
from t5tune.distributed.world import World
from t5tune.errors import CheckpointError
from t5tune.progress import Note, Report
from t5tune.runs.checkpoints import find_newest, read_run_identity, remove_staged
from t5tune.runs.folder import RunFolder
from t5tune.runs.plan import ModelPlan, RunPlan
from t5tune.runs.resume_guard import (
    build_run_identity,
    check_run_identity,
    describe_other_ranks,
    has_other_evaluations,
)


def start_or_resume_run(
    plan: RunPlan,
    folder: RunFolder,
    examples: Examples,
    evaluations: dict[str, Any],
    base: Path,
    teacher_hash: str | None,
    world: World,
    report: Report,
) -> tuple[dict[str, Any], dict[str, Any], Path | None]:
    """Prepare a new run, or an existing one for resuming.

    Args:
        evaluations: their examples and metric, as fields of the run identity.
        teacher_hash: hash of the teacher's weights, if there is a teacher.

    Returns:
        The base's metadata, the run identity, and the checkpoint to resume from (None for a new run).

    Raises:
        CheckpointError: all checkpoints are damaged, or the newest has state that these ranks can't use.
        SettingsError: the run was started with a different configuration.
    """
    stats = read_file_stats(base)
    base_metadata = _collect_base_metadata(base, plan.model, match_hash(folder.read_record().get("base"), stats))
    run_identity = build_run_identity(plan, examples, base_metadata["sha256"], teacher_hash, world.size) | evaluations
    resume, damaged = find_newest(folder.path)
    for problem in damaged:
        report(Note(f"skipped a damaged checkpoint: {problem}", warning=True))
    if damaged and resume is None:
        raise CheckpointError(f"{folder.path}: all of its checkpoints are damaged", hint="use --fresh to start over")
    if resume:
        for change in check_run_identity(resume, run_identity, plan):
            report(Note(f"change allowed by --allow-change: {change}", warning=True))
        _check_same_tokens(resume, examples, run_identity)
        report(Note(f"resuming from {resume}"))
        if has_other_evaluations(resume, run_identity):
            other = "the held-out examples or the metric for the best model have changed"
            report(Note(f"{other}, so earlier evaluations no longer count", warning=True))
        if (other_ranks := describe_other_ranks(resume, run_identity)) is not None:
            report(Note(other_ranks))
    remove_staged(folder.path)
    folder.save_settings(plan)
    folder.record(base=describe_hash(stats, base_metadata["sha256"]))
    return base_metadata, run_identity, resume


def _check_same_tokens(checkpoint: Path, examples: Examples, run_identity: dict[str, Any]) -> None:
    """Check that each id means the same token in the data and the checkpoint, whose embedding rows are trained."""
    if read_run_identity(checkpoint)["tokenizer"] == run_identity["tokenizer"]:
        return
    then, now = load_tokenizer(checkpoint), load_tokenizer(examples.tokenizer_folder)
    if found := find_other_token(then, now) or find_other_token(now, then):
        token, index = found
        raise CheckpointError(
            f"{checkpoint}: its tokenizer and the data's differ in token {index}, {token!r}, so trained "
            "embedding rows would belong to other tokens",
            hint="resume with the tokens of the run (the previous add_tokens), or start over with --fresh",
        )


def _collect_base_metadata(base: Path, model: ModelPlan, sha256: str | None) -> dict[str, Any]:
    """Collect an adapter's record of its base, for merge to verify the base and load it as in training."""
    family, bf16, quantization = model.base.family, model.precision.bf16, model.precision.quantization
    base_metadata: dict[str, Any] = dict(describe_base(open_base(base, family), model.base.model_name_or_path, sha256))
    if family is not None:
        base_metadata["family"] = family
    base_metadata["bf16"] = bf16
    if quantization is not None:
        compute = "bfloat16" if bf16 else "float32"
        base_metadata |= {"onto": quantization.quant_type, "double_quant": quantization.double_quant}
        base_metadata |= {"compute": compute, "quantize_wo": quantization.quantize_wo}
    return base_metadata

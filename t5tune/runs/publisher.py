"""Save checkpoints together: every rank writes its files to a staging folder, and rank 0 publishes it if all succeeded.

    publisher = CheckpointPublisher(run_folder, run_identity, keep=2, report=report)
    publisher.save(step, best_step, write)      # write(staging) puts the files under that folder

If one rank fails, all ranks raise, and the checkpoints that exist already are kept (see runs/checkpoints.py).
"""

import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from t5tune.compat.torch_patches import collect_save_errors
from t5tune.distributed.collectives import all_gather, broadcast_from_rank_0, get_rank_and_size
from t5tune.errors import CheckpointError, T5TuneError, TrainingError, WriteError
from t5tune.file_names import CHECKPOINT_MANIFEST_FILE
from t5tune.io.atomic import fsync, hash_file, write_json
from t5tune.io.reasons import join_lines
from t5tune.io.untrusted import resolve_inside
from t5tune.progress import Note, Report
from t5tune.runs.checkpoints import STAGING_PREFIX, count_bytes, get_step, list_checkpoints, write_manifest

EVALUATION_FILE = "t5tune_evaluation.json"


class CheckpointPublisher:
    """Publishes the checkpoints of a run, and rotates them.

    Args:
        run_identity: the configuration that the run depends on (see runs/resume_guard.py).
        keep: number of checkpoints to keep in addition to the best one; None: all.

    Attributes:
        last_step: step of the newest checkpoint; None before the first.
    """

    def __init__(self, run_folder: Path, run_identity: dict[str, Any], keep: int | None, report: Report) -> None:
        self.run_folder = run_folder
        self.run_identity = run_identity
        self.keep = keep
        self.report = report
        self.last_step: int | None = None
        self._failures: list[Exception] = []
        self._rank, self._num_ranks = get_rank_and_size()

    def save(self, step: int, best: int | None, write: Callable[[Path], None], rotates: bool = True) -> None:
        """Save the checkpoint of a step, unless it exists. Call on every rank.

        Args:
            write: writes this rank's files to a folder in place of the run folder.
            rotates: whether to delete old checkpoints then; False while the step's evaluation may change the best.
        """
        if self.last_step == step:
            return
        staging = self.run_folder / f"{STAGING_PREFIX}{broadcast_from_rank_0(uuid.uuid4().hex[:8])}"
        try:
            self._raise_if_any_rank_failed(self._write_staged(staging, step, write), step)
            staged = staging / f"checkpoint-{step}"
            failure = self._publish_staged(staged, step, best, rotates) if self._rank == 0 else None
            self._raise_if_any_rank_failed(failure, step)
        finally:
            if self._rank == 0:
                shutil.rmtree(staging, ignore_errors=True)
        self.last_step = step

    @contextmanager
    def collect_error(self) -> Iterator[None]:
        """Keep an error in writing a file until all ranks have written theirs: they may wait for this rank's shards."""
        try:
            yield
        except (OSError, T5TuneError) as error:
            self._failures.append(error)

    def save_evaluation(self, step: int, best: int | None, line: dict[str, Any]) -> None:
        """Add an evaluation to its step's checkpoint, so that a resumed run needn't repeat it, and rotate checkpoints.

        Args:
            line: the evaluation's entry in the Trainer's log history.
        """
        if self._rank != 0:
            return
        folder = self.run_folder / f"checkpoint-{step}"
        try:
            # the hash ties it to this checkpoint: a later checkpoint of the same step has a different manifest
            manifest = hash_file(folder / CHECKPOINT_MANIFEST_FILE)
            write_json(folder / EVALUATION_FILE, {"manifest": manifest, "line": line})
        except (WriteError, OSError) as error:
            self.report(Note(f"{join_lines(error)}; a resumed run will repeat this evaluation", warning=True))
        self._rotate(step, best)

    def read_evaluation(self, step: int) -> dict[str, Any] | None:
        """Read the evaluation that was added to the checkpoint of a step. Call on every rank.

        None: it is missing, broken or belongs to a different checkpoint.
        """
        folder = self.run_folder / f"checkpoint-{step}"
        line = None
        if self._rank == 0:
            with suppress(OSError, ValueError, KeyError, TypeError, CheckpointError):
                found = json.loads(resolve_inside(folder, EVALUATION_FILE).read_bytes())
                if found["manifest"] == hash_file(folder / CHECKPOINT_MANIFEST_FILE) and "eval_loss" in found["line"]:
                    line = dict(found["line"])
        return broadcast_from_rank_0(line)

    def _write_staged(self, staging: Path, step: int, write: Callable[[Path], None]) -> Exception | None:
        """Write this rank's files. Return the first error in writing a file, or None."""
        try:
            with collect_save_errors() as self._failures:
                staging.mkdir(exist_ok=True)
                write(staging)
        except OSError as error:
            raise self._make_error(step, join_lines(error)) from error
        return self._failures[0] if self._failures else None

    def _publish_staged(self, staged: Path, step: int, best: int | None, rotates: bool) -> Exception | None:
        final = self.run_folder / staged.name
        try:
            write_manifest(staged, step, self._num_ranks, self.run_identity)
            if final.exists():  # only a damaged checkpoint can exist: the run resumed from an earlier step
                shutil.rmtree(final)
            staged.rename(final)
            fsync(self.run_folder)
            if rotates:
                self._rotate(step, best)
        except (OSError, CheckpointError, WriteError) as error:
            return error
        return None

    def _rotate(self, step: int, best: int | None) -> None:
        """Delete all but the newest checkpoints up to this step, which was just saved, and the best one.

        Damaged checkpoints of later steps don't count and are deleted.
        """
        if self.keep is None:
            return
        kept = {*self._list_complete(step)[: self.keep], self.run_folder / f"checkpoint-{best}"}
        for old in list_checkpoints(self.run_folder):
            if old not in kept:
                shutil.rmtree(old, ignore_errors=True)

    def _list_complete(self, step: int) -> list[Path]:
        """List the checkpoints up to the newest complete one, of this step, newest first.

        Checkpoints of later steps are damaged: the run resumed from an earlier step.
        """
        return [path for path in list_checkpoints(self.run_folder) if get_step(path) <= step]

    def _raise_if_any_rank_failed(self, failure: Exception | None, step: int) -> None:
        """Exchange errors with all ranks. If one rank has failed, all ranks raise a TrainingError."""
        for rank, reason in enumerate(all_gather(None if failure is None else join_lines(failure))):
            if reason is not None:
                where = f"rank {rank}: " if self._num_ranks > 1 else ""
                raise self._make_error(step, f"{where}{reason}") from failure

    def _make_error(self, step: int, reason: str) -> TrainingError:
        kept = self._list_complete(self.last_step or 0)
        needed = f"; a checkpoint takes {count_bytes(kept[0]):,} bytes" if kept else ""
        space = f"{shutil.disk_usage(self.run_folder).free:,} bytes are free{needed}"
        return TrainingError(
            f"{self.run_folder / f'checkpoint-{step}'} couldn't be written: {reason} ({space})",
            hint=f"the last checkpoint, {kept[0]}, is complete; the same command resumes from it"
            if kept
            else "there is no earlier checkpoint; the same command starts from the beginning",
        )

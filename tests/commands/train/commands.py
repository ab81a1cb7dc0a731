"""Runs of few steps, as commands."""

from pathlib import Path

TWO = ("--num-processes", "2")


def make_command(base: Path, data: Path, run: Path, *more: str) -> list[str]:
    return [
        "train", "--model-name-or-path", str(base), "--data-path", str(data), "--output-dir", str(run),
        "--learning-rate", "1e-2", "--logging-steps", "1", "--lora-dropout", "0", "--report-samples", "0",
        "--json", *more,
    ]  # fmt: skip

"""Real tiny things for all tests: bases with a tied and an untied head, the pocket tokenizer, the command line."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.forks import Forks

# where the tests were started in the background or by nohup these are ignored, and by every process below too
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
# pytest runs a process a core, and processes of several threads each would wait for one another
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
SHARED = Path(__file__).parents[2] / "shared"
REPOSITORY = Path(__file__).parents[1]


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.stdout)

    @property
    def errors(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if line.startswith("error:")]


def t5tune(*arguments: Any, env: dict[str, str] | None = None, cwd: Path | None = None) -> Finished:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "t5tune", *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **(env or {})}, cwd=cwd, timeout=500
    )
    return Finished(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session", autouse=True)
def temporary_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Temporary files stand among pytest's, which takes away what a killed process leaves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("tmp")))
        patch.setattr("tempfile.tempdir", None)
        yield


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Where runs are forked from."""
    with Forks(tmp_path_factory.mktemp("forks")) as forks:
        yield forks


@pytest.fixture(scope="session")
def on_ranks(forks: Forks) -> Callable[..., Finished]:
    """The command line in so many processes, as a launcher would start them: `on_ranks(2, "train", …)`.

    They are forked: a rank that has to import everything itself takes longer to do it than to train.
    """

    def run(ranks: int, *arguments: Any, calls: Sequence[str] = ()) -> Finished:
        done = forks.run([*map(str, arguments)], ranks, calls)
        return Finished(max(done.codes, key=abs), done.stdout, done.log)

    return run


def make_base(folder: Path, tied: bool, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A small random T5 of Flan's or (tied) of the first T5's form, with pocket's tokenizer.

    Stock transformers saves it. Its config.json says the truth about the head, as the hub's files do.
    """
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(7)
    shape = {"vocab_size": 1536, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = T5Config(
        **shape | changes,
        feed_forward_proj="relu" if tied else "gated-gelu",
        tie_word_embeddings=tied,
        decoder_start_token_id=0,
        dropout_rate=0.1,
    )
    model = T5ForConditionalGeneration(config)
    with torch.no_grad():
        if not tied:
            model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight) * 0.2)
            model.config.tie_word_embeddings = False
        for name, parameter in model.named_parameters():
            if name.endswith("layer_norm.weight"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    for file in (REPOSITORY / "t5tune" / "pocket").glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="session")
def untied_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("bases") / "untied", tied=False)


@pytest.fixture(scope="session")
def tied_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("bases") / "tied", tied=True)


@pytest.fixture(scope="session", params=["untied", "tied"])
def base(request: pytest.FixtureRequest, untied_base: Path, tied_base: Path) -> Path:
    return untied_base if request.param == "untied" else tied_base


@pytest.fixture(scope="session")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 short conversations of the quickstart's set, 48 examples or so."""
    lines = (REPOSITORY / "examples" / "quickstart" / "train.jsonl").read_text().splitlines()[:24]
    path = tmp_path_factory.mktemp("data") / "conversations.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """A file of the real inputs, where they lie beside the repository."""

    def find(name: str) -> Path:
        if not (SHARED / name).exists():
            pytest.skip(f"{name}: the real inputs are not beside this checkout")
        return SHARED / name

    return find

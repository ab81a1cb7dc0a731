"""Run training steps, evaluation and generation on fake CUDA tensors, on a machine without a GPU.

    python -m tests.support.gpu.fake_cuda                       # all cases
    python -m tests.support.gpu.fake_cuda "packed" "padded"     # some of them
    python -m tests.support.gpu.fake_cuda --large -v            # a step of Flan-T5-large, as a table
    python -m tests.support.gpu.fake_cuda --update              # write tests/golden/launches.json

It prints one JSON line: for each case its kernel launches (`launches`, and `total`), the places that wait for the GPU
(`waits`) or copy from and to it (`copies`), the dtypes of matrix products (`products`), or the `error` that ended it.
A tensor left on the CPU is such an error. Where fake CUDA tensors can't be had, the line is {"unavailable": reason}.

A step is the second one of a real T5Trainer's `train`: fetching the batch, forward, loss, backward, clipping, update.
"""

import argparse
import collections
import gc
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests.support.gpu.fake_cuda_stubs import StubsUnavailable, load_stubs

GOLDEN_FILE = Path(__file__).parents[2] / "golden" / "launches.json"
SMALL = {"d_model": 64, "d_ff": 128, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
LARGE = {"d_model": 1024, "d_ff": 2816, "num_heads": 16}  # Flan-T5-large, which has 24 + 24 layers
LARGE_LAYERS = 24
SOURCES, TARGETS = (40, 17, 9), (12, 5, 3)


@dataclass(frozen=True)
class Case:
    """What to run, and with which settings.

    Args:
        task: "train", "losses" (an evaluation during training), "scores" (the command `evaluate`) or "generate".
        flex: attention over packed rows in one kernel; False: the loop over segments.
        deepspeed: the dtypes of DeepSpeed, trained weights in bf16 and no autocast.
        reentrant: the variant of gradient checkpointing.
        autocast: whether predictions are generated in training's mixed precision.
        mistake: a mistake to make in the forward pass; see MISTAKES.
    """

    task: str = "train"
    shape: dict[str, int] = field(default_factory=lambda: SMALL)
    sources: tuple[int, ...] = SOURCES
    targets: tuple[int, ...] = TARGETS
    flex: bool = True
    deepspeed: bool = False
    reentrant: bool = False
    autocast: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    mistake: str | None = None


CHECKPOINTING, PADDED, NF4 = {"gradient_checkpointing": True}, {"packing": "off"}, {"q_lora": True}
CASES = {
    "packed": Case(),
    "packed, loop": Case(flex=False),
    "packed, fp32": Case(settings={"bf16": False}),
    "packed, DeepSpeed": Case(deepspeed=True),
    "packed, all-linear": Case(settings={"lora_target_modules": ["all-linear"]}),
    "packed, full": Case(settings={"train_mode": "full"}, flex=False),  # the loop computes the bias' gradient
    "packed, checkpointing": Case(settings=CHECKPOINTING),
    "packed, checkpointing, DeepSpeed": Case(settings=CHECKPOINTING, deepspeed=True, reentrant=True),
    "packed, NF4": Case(settings=NF4),
    "packed, NF4, DeepSpeed": Case(settings=NF4, deepspeed=True),
    "packed, NF4, checkpointing": Case(settings=NF4 | CHECKPOINTING),
    "padded": Case(settings=PADDED),
    "padded, DeepSpeed": Case(settings=PADDED, deepspeed=True),
    "padded, checkpointing": Case(settings=PADDED | CHECKPOINTING),
    "losses, packed": Case("losses"),
    "losses, packed, loop": Case("losses", flex=False),
    "losses, packed, DeepSpeed": Case("losses", deepspeed=True),
    "losses, padded": Case("losses", settings=PADDED),
    "scores, packed": Case("scores", deepspeed=True),
    "generation": Case("generate"),
    "generation, NF4": Case("generate", settings=NF4),
    "generation, autocast": Case("generate", autocast=True),
    "generation, NF4, autocast": Case("generate", autocast=True, settings=NF4),
}
MISTAKES = ("mask on the CPU", "item", "boolean index", "hidden copy", "fp32 product")
CASES |= {f"mistake: {name}": Case(mistake=name) for name in MISTAKES}


def run_case(case: Case) -> dict[str, Any]:
    """Run a case, and return what it did."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from tests.support.gpu.fake_cuda_models import build_empty_model, make_settings, move_to_fake_gpu
    from tests.support.gpu.fake_cuda_watch import Watch, pretend_cuda

    watch = Watch()
    found: dict[str, Any] = {}
    run = {"train": _train, "losses": _measure_losses, "scores": _score, "generate": _generate}[case.task]
    with tempfile.TemporaryDirectory() as folder, pretend_cuda():
        settings = make_settings(Path(folder), **_complete_settings(case))
        model = build_empty_model(case.shape, settings, case.deepspeed)
        with (
            FakeTensorMode(allow_non_fake_inputs=True),
            _make_mistake(model, case.mistake) if case.mistake else nullcontext(),
        ):
            move_to_fake_gpu(model, settings, is_set_up=case.task != "scores")
            try:
                with watch:
                    run(model, settings, case, watch)
            except Exception as error:  # the tests look at the messages of all kinds of errors
                found["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
    launches = dict(sorted(watch.launches.items(), key=lambda item: (-item[1], item[0])))
    counts = {"launches": launches, "waits": watch.waits, "copies": watch.copies, "products": watch.products}
    return {**found, "total": sum(launches.values()), **{name: dict(value) for name, value in counts.items()}}


def _complete_settings(case: Case) -> dict[str, Any]:
    arguments: dict[str, Any] = {"bf16": False} if case.deepspeed else {}
    if case.settings.get("gradient_checkpointing"):
        arguments["activation_checkpointing_kwargs"] = {"use_reentrant": case.reentrant}
    return {**case.settings, "training_args": arguments}


def _train(model: Any, settings: Any, case: Case, watch: Any) -> None:
    """Train for two steps, and count from the end of the first step to the end of the second."""
    from transformers import TrainerCallback

    from tests.support.gpu.fake_cuda_models import make_examples, make_trainer

    class StepCounter(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step == 2:
                raise _TwoStepsMade
            watch.clear()

    trainer = make_trainer(model, settings, make_examples(case.sources, case.targets), case.flex)
    trainer.add_callback(StepCounter())
    try:
        trainer.train()
    except _TwoStepsMade:
        return
    raise AssertionError("no second step")


class _TwoStepsMade(Exception):
    pass


def _measure_losses(model: Any, settings: Any, case: Case, watch: Any) -> None:
    from t5tune.evaluation.scoring import measure_losses
    from tests.support.gpu.fake_cuda_models import make_collator, make_examples, make_trainer

    examples, collator = make_examples(case.sources, case.targets), make_collator(settings, case.flex)
    # accelerate wraps the model's forward in autocast, unless DeepSpeed's dtypes equal the run's
    model = make_trainer(model, settings, examples, case.flex).accelerator.prepare_model(model)
    for _ in range(2):  # the first one keeps the ids of added tokens on the GPU
        watch.clear()
        measure_losses(model, examples, collator, len(examples))


def _score(model: Any, settings: Any, case: Case, watch: Any) -> None:
    from types import SimpleNamespace

    from t5tune.evaluation.scoring import measure_targets
    from t5tune.inference.precision import Precision
    from t5tune.inference.target_scores import score_targets
    from t5tune.progress import silent
    from t5tune.training.attention_choice import set_up_evaluation
    from tests.support.gpu.fake_cuda_models import make_examples

    examples = make_examples(case.sources, case.targets)
    tokenizer = SimpleNamespace(pad_token_id=0)
    loaded: Any = SimpleNamespace(
        model=model.eval(), tokenizer=tokenizer, precision=Precision(bf16=True, quantization=None)
    )
    collator = set_up_evaluation(loaded, silent)
    for _ in range(2):
        watch.clear()
        measure_targets(model, examples, collator, len(examples), measure=score_targets)


def _generate(model: Any, settings: Any, case: Case, watch: Any) -> None:
    from t5tune.evaluation.scoring import generate_predictions
    from t5tune.inference.generation import Decoding
    from tests.support.gpu.fake_cuda_models import make_examples

    examples = make_examples(case.sources, case.targets)
    for _ in range(2):
        watch.clear()
        generate_predictions(model, examples, Decoding(1, 0, 3), len(examples), autocast=case.autocast)


@contextmanager
def _make_mistake(model: Any, mistake: str) -> Iterator[None]:
    """Make a mistake in the forward pass of the last layer's feed-forward, which the watch has to find."""
    import torch

    def forward(original: Callable[..., Any], hidden: torch.Tensor) -> torch.Tensor:
        if mistake == "mask on the CPU":
            hidden = hidden.masked_fill(torch.zeros(hidden.shape[1], 1, dtype=torch.bool), 0)
        elif mistake == "item":
            hidden = hidden / hidden.abs().max().item()
        elif mistake == "boolean index":
            hidden = hidden + hidden[hidden > 0].mean()
        elif mistake == "hidden copy":
            hidden = hidden * torch.tensor([2.0]).to(hidden.device)
        elif mistake == "fp32 product":
            with torch.autocast("cuda", enabled=False):
                square = torch.ones(hidden.shape[-1], hidden.shape[-1], device=hidden.device)
                hidden = (hidden.float() @ square).to(hidden.dtype)
        result: torch.Tensor = original(hidden)
        return result

    layer = [module for module in model.modules() if type(module).__name__ == "T5LayerFF"][-1]
    layer.forward = partial(forward, layer.forward)
    yield


def measure_large(**changes: Any) -> dict[str, Any]:
    """Count the launches of a step of Flan-T5-large with 16,384 tokens in 60 segments, from steps of 1 and 2 layers."""
    sources, targets = _spread(11400, 60, 8), _spread(4984, 60, 4)
    one, two = (
        run_case(Case(shape={**LARGE, "num_layers": n, "num_decoder_layers": n}, sources=sources, targets=targets,
                      **changes))
        for n in (1, 2)
    )  # fmt: skip
    if error := one.get("error") or two.get("error"):
        return {"error": error}
    first, second = collections.Counter(one["launches"]), collections.Counter(two["launches"])
    counts = {name: first[name] + (LARGE_LAYERS - 1) * (second[name] - first[name]) for name in first | second}
    launches = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
    return {"total": sum(launches.values()), "launches": launches, "waits": two["waits"], "copies": two["copies"]}


def _spread(total: int, count: int, shortest: int) -> tuple[int, ...]:
    """Different lengths that add up to about `total`."""
    return tuple(max(shortest, round(total / count * (0.2 + 1.6 * i / (count - 1)))) for i in range(count))


LARGE_CASES = {"Flan-T5-large": {}, "Flan-T5-large, loop": {"flex": False}, "Flan-T5-large, NF4": {"settings": NF4}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="default: all")
    parser.add_argument("--large", action="store_true", help="only Flan-T5-large")
    parser.add_argument("--update", action="store_true", help="write the golden file")
    parser.add_argument("-v", action="store_true", help="print a table for people instead of JSON")
    options = parser.parse_args()
    gc.disable()  # fake tensors have no memory, and looking for garbage would take a fifth of the time
    try:
        load_stubs()
    except StubsUnavailable as error:
        print(json.dumps({"unavailable": str(error)}))
        return
    import accelerate
    import torch
    import transformers
    from torch.nn.attention import flex_attention

    if not hasattr(flex_attention, "AuxRequest"):
        print(json.dumps({"unavailable": "attention in one kernel needs torch 2.9 or newer"}))
        return
    names = options.cases or ([] if options.large else [*CASES])
    found = {name: run_case(CASES[name]) for name in names}
    if options.large or not options.cases:
        found |= {name: measure_large(**changes) for name, changes in LARGE_CASES.items()}
    if options.update:
        totals = {name: case["total"] for name, case in found.items() if "mistake" not in name}
        libraries = (torch, transformers, accelerate)
        versions = {library.__name__: library.__version__.partition("+")[0] for library in libraries}
        GOLDEN_FILE.write_text(json.dumps({**versions, **totals}, indent=1) + "\n")
    if options.v:
        _print_table(found)
    else:
        print(json.dumps({"torch": torch.__version__, "cases": found}))


def _print_table(found: dict[str, Any]) -> None:
    for name, case in found.items():
        print(f"{name}: {case.get('error') or format(case['total'], ',')}")
        for kind in ("launches", "waits", "copies", "products"):
            print(f"    {kind}: " + ", ".join(f"{what} {count}" for what, count in case.get(kind, {}).items()))


if __name__ == "__main__":
    sys.exit(main())

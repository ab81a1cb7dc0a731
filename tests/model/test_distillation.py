"""The loss of distillation and its gradients, compared with whole logits of stock transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from t5tune.commands.train.run_plan import make_run_plan
from t5tune.model import loss as loss_module
from t5tune.model.attention.packing import use_packing
from t5tune.model.batches import make_collator
from t5tune.model.distillation import Distillation
from t5tune.model.load import load_base
from t5tune.model.loss import IGNORED_LABEL, CrossEntropy, HeadWeights
from t5tune.settings import TrainSettings
from t5tune.training.teacher import DistillationObjective, Teacher
from tests.support.models.gradients import make_examples
from tests.support.models.model_types import load_stock, make_checkpoint
from tests.support.train_runs import make_settings

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
EXAMPLES = make_examples([(5, 3), (41, 12), (1, 29), (70, 7)], 480, first_id=3)
WAYS: dict[str, dict[str, Any]] = {
    "forward": {},
    "reverse": {"distillation_kl": "reverse", "distillation_temperature": 1.5},
    "the teacher alone": {"distillation_alpha": 1.0, "distillation_temperature": 1.0},
    "smoothed": {"label_smoothing_factor": 0.1, "distillation_alpha": 0.2},
}
PAIRS = [("flan-t5", "t5"), ("t5", "flan-t5"), ("t5gemma", "t5gemma")]


def configure(**changes: Any) -> TrainSettings:
    return make_settings(Path("base"), Path("data"), Path("run"), teacher_model_name_or_path="teacher", **changes)


def make_teacher_checkpoint(kind: str, folder: Path) -> Path:
    """Make a checkpoint with different weights than the student's and, if possible, a different depth."""
    if kind == "t5gemma":
        base = make_checkpoint(kind, folder)
        model = load_stock(base)
        torch.manual_seed(11)
        with torch.no_grad():
            for value in model.parameters():
                value.add_(0.3 * value.std(correction=0) * torch.randn_like(value))
        model.save_pretrained(folder)
        return folder
    return make_checkpoint(kind, folder, num_layers=3, **({"d_model": 48} if kind == "t5" else {}))


def compute_by_examples(student: Any, teacher: Any, start: int, settings: TrainSettings) -> torch.Tensor:
    """Compute α·T²·KL + (1 - α)·CE from whole logits, an example at a time."""
    total = torch.zeros((), dtype=torch.float64)
    alpha, temperature = settings.distillation_alpha, settings.distillation_temperature
    for example in EXAMPLES:
        source, target = (torch.from_numpy(ids) for ids in (example.source_S, example.target_T))
        inputs = {
            "input_ids": source[None],
            "decoder_input_ids": functional.pad(target[:-1], (1, 0), value=start)[None],
        }
        logits = student(**inputs, use_cache=False).logits[0]
        with torch.no_grad():
            wanted = teacher(**inputs, use_cache=False).logits[0]
        shared = min(logits.shape[1], wanted.shape[1])
        log_q, log_p = (functional.log_softmax(each[:, :shared] / temperature, -1) for each in (logits, wanted))
        one, other = (log_q, log_p) if settings.distillation_kl == "forward" else (log_p, log_q)
        divergence = functional.kl_div(one, other, reduction="sum", log_target=True)
        cross_entropy = functional.cross_entropy(
            logits, target, reduction="sum", label_smoothing=settings.label_smoothing_factor
        )
        total = total + alpha * temperature**2 * divergence + (1 - alpha) * cross_entropy
    return total


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("student_kind", "teacher_kind"), PAIRS)
@pytest.mark.variants(
    "flan-t5-t5-forward",
    "flan-t5-t5-the teacher alone",
    "t5-flan-t5-smoothed",
    "t5-flan-t5-reverse",
    "t5gemma-t5gemma-reverse",
)
def test_loss_and_gradients_are_those_of_whole_logits(
    student_kind: str, teacher_kind: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp64, of all weights; T5's and Flan-T5's heads have different numbers of rows here, T5Gemma's logits a cap."""
    monkeypatch.setattr(loss_module, "LOGITS_PER_CHUNK", 7 * 480)
    bases = make_checkpoint(student_kind, tmp_path / "student"), make_teacher_checkpoint(teacher_kind, tmp_path / "t")
    stock, stock_teacher = (load_stock(base).double() for base in bases)
    student, teacher = (load_base(base, torch.float64, CPU) for base in bases)
    student.requires_grad_(True)
    settings = configure(**WAYS[way])
    start = student.architecture.start_token_id
    total = compute_by_examples(stock, stock_teacher, start, settings)
    total.backward()
    for model in (student, teacher):
        use_packing(model)
    for is_packed in (True, False):
        objective = DistillationObjective(make_run_plan(settings).objective, Teacher(teacher, None))
        student.zero_grad()
        batch = make_collator(start, 0, is_packed)(EXAMPLES)
        found = objective.compute_total(student, student.architecture, batch)
        assert found.item() == pytest.approx(total.item(), rel=1e-6)
        found.backward()
        expected = dict(stock.named_parameters())
        for name, value in student.named_parameters():
            error = (value.grad - expected[name].grad).norm()
            assert error <= 5e-6 * expected[name].grad.norm().clamp_min(1e-4), name
        assert all(value.grad is None for value in teacher.parameters())


def test_a_student_that_teaches_itself_has_no_divergence() -> None:
    torch.manual_seed(1)
    hidden, weight = torch.randn(9, 16, dtype=torch.float64), torch.randn(40, 16, dtype=torch.float64)
    labels = torch.tensor([1, 2, IGNORED_LABEL, 4, 5, 6, 7, 8, 9])
    head = HeadWeights(weight)
    for kl in ("forward", "reverse"):
        criterion = Distillation(CrossEntropy(labels), hidden, head, None, 0.25, 3.0, kl)  # type: ignore[arg-type]
        found = loss_module.compute_summed_loss(hidden.requires_grad_(), criterion, head)
        expected = loss_module.compute_summed_loss(hidden, loss_module.CrossEntropy(labels), head)
        assert found.item() == pytest.approx(0.75 * expected.item(), rel=1e-12)
        assert float(criterion.totals["kl"]) == pytest.approx(0, abs=1e-12)
        assert float(criterion.totals["nll"]) == pytest.approx(expected.item(), rel=1e-12)
        (grad,) = torch.autograd.grad(found, hidden)
        (wanted,) = torch.autograd.grad(expected, hidden)
        torch.testing.assert_close(grad, 0.75 * wanted, rtol=1e-10, atol=1e-12)
        hidden = hidden.detach()

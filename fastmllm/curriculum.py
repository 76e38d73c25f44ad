"""Transfer between the tasks of a recipe, by short trainings of its own model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from fastmllm.data.build import Splits
from fastmllm.data.sample import Sample
from fastmllm.data.transfer import TransferMatrix, measure_transfer
from fastmllm.infer.answer_loss import AnswerLoss
from fastmllm.models.vlm import VLM
from fastmllm.run import train_stage
from fastmllm.train.engine import EngineConfig
from fastmllm.train.stages import StageConfig


def held_out_losses(
    model: VLM, samples: Mapping[str, Sequence[Sample]], tasks: Sequence[str], *, limit: int, batch_size: int = 8
) -> dict[str, float]:
    """Return each task's mean nats an answer token on its first `limit` held-out questions."""
    loss, found = AnswerLoss(model), {}
    model.eval()
    for task in tasks:
        asked = list(samples[task])[:limit]
        each = [v for at in range(0, len(asked), batch_size) for v in loss(asked[at : at + batch_size])]
        found[task] = sum(each) / len(each)
    return found


def transfer_of(
    model: VLM, splits: Splits, stage: StageConfig, engine: EngineConfig, tasks: Sequence[str], out: Path, *,
    steps: int, limit: int = 64, console: Console | None = None,
) -> TransferMatrix:  # fmt: skip
    """Train each task alone for some steps, and score all by minus their held-out loss.

    Args:
        model: where the recipe is before the stage; put back at the end.
        splits: of the recipe.
        stage: what learns, and how.
        engine: of the recipe.
        tasks: with questions in both splits.
        out: folder of the short trainings; finished ones are reused.
        steps: of each.
        limit: held-out questions a task.
        console: where progress goes.

    Raises:
        ValueError: a task without questions.
    """
    if lacks := [task for task in tasks if not (splits.train.get(task) and splits.eval.get(task))]:
        have = ", ".join(sorted(set(splits.train) & set(splits.eval)))
        raise ValueError(f"transfer: no questions of {', '.join(lacks)} in both splits; there are {have}")
    start = {name: value.detach().clone() for name, value in model.state_dict().items()}

    def train(task: str) -> None:
        warmup = min(stage.warmup, steps // 5)
        alone = replace(stage, name=f"alone-{task}", steps=steps, warmup=warmup, mixture={task: 1.0}, phases=())
        train_stage(model, splits, alone, engine, out, on_mismatch="fresh", console=console)

    def test(task: str) -> float:
        return -held_out_losses(model, splits.eval, [task], limit=limit)[task]

    def restore() -> None:
        model.load_state_dict(start)

    return measure_transfer(tasks, train, test, restore)

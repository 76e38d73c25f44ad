"""The training loop of one stage: deterministic, resumable to the bit, weighted by target tokens."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, cast

import torch
from rich.console import Console
from torch import Tensor, nn

from fastmllm.models.recompute import recomputing
from fastmllm.train.checkpoint import (
    CheckpointError,
    atomic_file,
    differences,
    fingerprint,
    load_trainable,
    model_fingerprint,
    read_json,
    save_trainable,
    set_aside,
)
from fastmllm.train.elastic import load_checkpoint, save_checkpoint
from fastmllm.train.engine import Engine, EngineConfig, create_engine, launched_world_size
from fastmllm.train.grpo import Prompts
from fastmllm.train.inventory import (
    find_checkpoint,
    latest_checkpoint,
    read_meta,
    readable_meta,
    remove_leftovers,
)
from fastmllm.train.lora import STARTS_AT_ZERO, Adapters
from fastmllm.train.meters import MeterLog, ProgressReport, StepRecord, read_log, report_table
from fastmllm.train.prefer import PreferenceObjective
from fastmllm.train.rollouts import Rollouts
from fastmllm.train.rules import apply_rules, recomputed_by, roles_of
from fastmllm.train.sinks import Sinks, check_sinks
from fastmllm.train.stages import GradientCheck, StageConfig, set_modes
from fastmllm.train.step_meter import StepMeter
from fastmllm.train.table import stage_table
from fastmllm.train.watchdog import Watchdog
from fastmllm.train.whole_step import look_ahead

META = ("step", "seconds", "recipe", "layout")  # what a checkpoint must say
SEEING = ("vision", "connector", "cross_attention")  # roles that learn from images
BLIND_STEPS = 100  # without any image, then their gradients of zero are an error
HINTS = {
    "initial_weights": " (seed the modules that learn before making them)",
    "micro_batches": " (accumulation times ranks is a step: change one with the other)",
}


class BatchLike(Protocol):
    """Name what the trainer reads of a batch; the rest is the model's."""

    @property
    def input_ids(self) -> Tensor:
        """(T,)."""
        ...

    @property
    def num_targets(self) -> int:
        """What the loss of a step is divided by, summed over its batches: target tokens, pairs or answers."""
        ...

    @property
    def ids(self) -> Sequence[str]:
        """Names of the samples."""
        ...


class NonFiniteLossError(RuntimeError):
    """The loss or its gradient is NaN or infinite."""


class TrainingInterrupted(SystemExit):
    """A signal stopped the run after it was saved; ends the process with 128 + the signal's number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageResult:
    """Hold what a finished stage reports.

    Args:
        name: of the stage.
        steps: taken.
        loss_first, loss_last: means over the first and the last tenth of the steps, per target token.
        tokens, targets: seen by all ranks.
        seconds: of training, over all runs that it took.
        step_ms: median.
        weights: the exported .safetensors file.
        reused: True when an earlier run had finished this stage and nothing was trained.
    """

    name: str
    steps: int
    loss_first: float
    loss_last: float
    tokens: int
    targets: int
    seconds: float
    step_ms: float
    weights: str
    reused: bool = False


class Trainer:
    """Train one stage.

    Args:
        model: `model(batch)` gives the loss summed over the batch's targets (scalar, fp32), from every batch.
        stage: what learns, how fast, for how long.
        engine_config: ZeRO stage, dtype, accumulation.
        batches: index -> batch, deterministic, so that a resumed run sees what it would have seen; the index is
            (step * accumulation + micro-batch) * ranks + rank. It may run one step ahead, in a thread.
        out_dir: of this stage: log.jsonl, checkpoints/, trainable.safetensors, result.json.
        objective: model -> a module around it that gives the loss instead; rules, names and weights stay the model's.
        rollouts: what makes answers of a step's batches, which are prompts then, right before it.
        recipe: JSON-able identity of what the trainer cannot see (data, tokenizer); part of the fingerprint.
        on_mismatch: what to do when out_dir holds another recipe's run: "error", or "fresh" to rename that
            folder and start.
        save_every: steps between checkpoints, and one after the last step; 0 saves on a stop only.
        keep: newest checkpoints that stay.
        on_step: called after each step, on every rank.
        console: of rank 0's output; the standard output by default.
    """

    def __init__(
        self,
        model: nn.Module,
        stage: StageConfig,
        engine_config: EngineConfig,
        batches: Callable[[int], BatchLike],
        out_dir: Path | str,
        *,
        objective: Callable[[nn.Module], nn.Module] | None = None,
        rollouts: Rollouts | None = None,
        recipe: Mapping[str, Any] | None = None,
        on_mismatch: str = "error",
        save_every: int = 0,
        keep: int = 1,
        on_step: Callable[[StepRecord], None] | None = None,
        console: Console | None = None,
    ) -> None:
        if on_mismatch not in ("error", "fresh"):
            raise ValueError(f"trainer: on_mismatch is {on_mismatch!r}; choose error or fresh")
        if save_every < 0 or keep < 1:
            raise ValueError(f"trainer: save_every ({save_every}) must not be negative, keep ({keep}) must be positive")
        check_sinks(engine_config.meters.log)
        self.model, self.stage, self.engine_config, self.batches = model, stage, engine_config, batches
        self.module, self.rollouts = model if objective is None else objective(model), rollouts
        self.out_dir = Path(out_dir)
        self.on_mismatch, self.save_every, self.keep, self.on_step = on_mismatch, save_every, keep, on_step
        self.console = console or Console()
        self.world_size = launched_world_size()
        self.adapters = None if stage.lora is None else Adapters(model, stage.lora, stage.seed)
        self.groups = apply_rules(
            model, stage.trainable, weight_decay=stage.weight_decay, betas=stage.betas, eps=stage.eps,
            frozen=() if self.adapters is None else self.adapters.frozen(),
        )  # fmt: skip
        self._recomputed = recomputed_by(model, stage.trainable)
        # What is learned from what: equal recipes give equal results, up to rounding.
        self.recipe: dict[str, Any] = json.loads(
            json.dumps(
                {
                    "stage": stage.identity(),
                    "dtype": engine_config.dtype.replace("auto", "float32"),  # both cast nothing
                    "micro_batches": engine_config.accumulation * self.world_size,
                    "frozen_weights": model_fingerprint(model, trainable=False),
                    "initial_weights": model_fingerprint(model, trainable=True),
                    "given": dict(recipe or {}),
                }
            )
        )
        # How it is spread: may be another one when the run is resumed.
        self.layout: dict[str, Any] = {
            "zero_stage": engine_config.zero_stage,
            "ranks": self.world_size,
            "accumulation": engine_config.accumulation,
            "offload": engine_config.offload,
        }
        self.fingerprint = fingerprint(self.recipe)
        self._signal = 0
        self._seen: BatchLike | None = None

    @property
    def checkpoints(self) -> Path:
        """Folder of this run's checkpoints."""
        return self.out_dir / "checkpoints"

    def run(self) -> StageResult:
        """Train, or resume, or return the stored result of a finished stage; leaves the model in eval mode.

        Raises:
            CheckpointError: out_dir holds another recipe's run, or the disk is full (nothing saved is lost).
            NonFiniteLossError: names step and samples; the last checkpoint stays.
            TrainingInterrupted: after SIGINT or SIGTERM, once saved; says how to resume.
            RankLostError: another rank died; one that is only silent ends this process (`watchdog`).
        """
        stale = self._stale()
        if stale is None and (finished := self._finished()) is not None:
            return finished
        check = None if not stale and latest_checkpoint(self.checkpoints) else self._gradient_check()
        meter = StepMeter(self.model, self.engine_config.meters, self.engine_config.dtype)
        engine = create_engine(self.module, self.groups, self.engine_config, clip=self.stage.clip)
        try:
            with self._signals(), self._watchdog(engine):
                engine.sum_over_ranks(0)  # all have looked at out_dir before rank 0 changes it
                if engine.rank == 0:
                    if stale and self.out_dir.exists():
                        aside = set_aside(self.out_dir)
                        self.console.print(f"{self.stage.name}: other recipe ({stale}); its run is now {aside}")
                    self.checkpoints.mkdir(parents=True, exist_ok=True)
                    remove_leftovers(self.out_dir)
                    remove_leftovers(self.checkpoints)
                engine.sum_over_ranks(0)
                if self.rollouts is not None:
                    with engine.whole():
                        self.rollouts.begin()
                with recomputing([module for modules in self._recomputed.values() for module in modules]):
                    records, seconds = self._loop(engine, check, meter)
                engine.close()
                self.model.eval()
                if self.adapters is not None:
                    self._merge(engine.rank, self.adapters)
                result = self._finish(engine.rank, records, seconds)
        except BaseException:
            if check is not None:
                check.close()
            engine.abandon()
            if self.adapters is not None:
                self.adapters.remove()
            raise
        finally:
            meter.flops.close()
        if self._signal:  # it came during the last step
            raise TrainingInterrupted(128 + self._signal)
        return result

    def _watchdog(self, engine: Engine) -> Watchdog:
        def kept() -> Path | None:
            return latest_checkpoint(self.checkpoints)

        return Watchdog(engine, self.engine_config.heartbeat_s, what=self.stage.name, kept=kept)

    def _gradient_check(self) -> GradientCheck:
        gates = self.stage.may_be_zero if self.adapters is None else (*self.stage.may_be_zero, STARTS_AT_ZERO)
        return GradientCheck(self.model, self.groups, gates)

    def _tells(self, record: StepRecord) -> bool:
        """Tell whether a step's gradients show what learns.

        Equal rewards in every group teach nothing, and a step without images teaches an image path nothing: the check
        waits for the first that does, for images no longer than `BLIND_STEPS`.
        """
        if self.rollouts is not None:
            return record.grad_norm > 0
        learning = {name for group in self.groups for name in group["names"]}
        looks = any(learning.intersection(names) for role, names in roles_of(self.model).items() if role in SEEING)
        blind = looks and self.stage.kind in ("instruct", "prefer") and record.visual_tokens == 0
        return not blind or record.step >= min(BLIND_STEPS, self.stage.steps)

    def _merge(self, rank: int, adapters: Adapters) -> None:
        """Store the adapters (rank 0), then merge them; what is checked is the last batch that this rank saw."""
        if rank == 0:
            adapters.save(self.out_dir / "adapter")
        logits = getattr(self.model, "logits", None)
        batch = getattr(self._seen, "batch", self._seen) if logits else self._seen
        problem = ""
        try:
            adapters.merge(lambda: self.module(batch) if logits is None else logits(batch))
        except CheckpointError as error:
            problem = str(error)
            adapters.remove()
        problems = [problem] * self.world_size
        if self.world_size > 1:
            torch.distributed.all_gather_object(problems, problem)
        if any(problems):
            raise CheckpointError(f"{self.stage.name}: {next(filter(None, problems))}, in {self.out_dir / 'adapter'}")

    def _stale(self) -> str | None:
        """Return how out_dir's run differs from this one, None when it does not or is empty."""
        if (self.out_dir / "result.json").exists():
            lines = differences(self._read_result()["recipe"], self.recipe)
        elif (meta := readable_meta(self.checkpoints, META)) is not None:
            lines = differences(meta["recipe"], self.recipe)
        else:
            return None
        if not lines:
            return None
        if self.on_mismatch == "error":
            hint = next((text for key, text in HINTS.items() if key in lines[0]), "")
            raise CheckpointError(
                f"{self.out_dir} holds a run of another recipe: {'; '.join(lines[:6])}{hint}. Give the same recipe to "
                "resume, another out_dir to keep both, or on_mismatch=fresh to set that run aside and start"
            )
        return "; ".join(lines[:3])

    def _finished(self) -> StageResult | None:
        path = self.out_dir / "result.json"
        if not path.exists():
            return None
        result = StageResult(**self._read_result()["result"])
        weights = self.out_dir / "trainable.safetensors"
        if self.adapters is not None:
            self.adapters.remove()
        try:
            load_trainable(self.model, weights)
        except CheckpointError as error:
            raise CheckpointError(f"{error}, or {self._again()}") from error
        self.model.eval()
        if self._is_first():
            self.console.print(f"{self.stage.name}: finished before ({self.out_dir}); its weights are reused")
        return replace(result, reused=True, weights=str(weights))

    def _read_result(self) -> dict[str, Any]:
        return read_json(self.out_dir / "result.json", ("recipe", "result"), self._again())

    def _again(self) -> str:
        return f"delete {self.out_dir / 'result.json'} and run the same again: it goes on from the last checkpoint"

    def _is_first(self) -> bool:
        return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0

    def _loop(self, engine: Engine, check: GradientCheck | None, meter: StepMeter) -> tuple[list[StepRecord], float]:
        stage, quiet = self.stage, engine.rank != 0
        start, seconds = self._resume(engine)
        if not quiet:
            self.console.print(stage_table(self.model, self.groups, f"{stage.name}: what learns", self._recomputed))
        set_modes(self.model)
        written = read_log(self.out_dir / "log.jsonl")
        records = [record for record in written if record.step <= start]
        log = None if quiet else MeterLog(self.out_dir / "log.jsonl", first_step=start + 1)
        sinks = Sinks(
            () if quiet else self.engine_config.meters.log, self.out_dir, stage.name,
            fingerprint([self.fingerprint, str(self.out_dir.resolve())]), start + 1, written[-1].step if written else 0,
        )  # fmt: skip
        progress = ProgressReport(self.console, stage.name, start=start, steps=stage.steps, quiet=quiet)
        began = time.perf_counter()
        try:
            with ThreadPoolExecutor(max_workers=1) as ahead, progress:
                upcoming = ahead.submit(self._micro_batches, min(start, stage.steps - 1), engine.rank)
                for step in range(start, stage.steps):
                    tick = time.perf_counter()
                    micro = self._answered(engine, step, meter.wait(upcoming.result), meter)
                    targets, stop = engine.sum_over_ranks(sum(batch.num_targets for batch in micro), self._signal)
                    self._seen = micro[0]
                    if stop:
                        self._save(engine, step, seconds + time.perf_counter() - began)
                        self._leave(quiet, step)
                    if step + 1 < stage.steps:
                        upcoming = ahead.submit(self._micro_batches, step + 1, engine.rank)
                    record = self._step(engine, step, micro, targets, tick, meter)
                    if check is not None and self._tells(record):
                        check.verify(engine.gather(check.close()))
                        check = None
                    records.append(record)
                    if log is not None:
                        log.write(record)
                    sinks.write(record.step, record.figures())
                    progress.update(record)
                    if self.on_step is not None:
                        self.on_step(record)
                    # after the last step too: the export may find a full disk
                    if self.save_every and ((step + 1) % self.save_every == 0 or step + 1 == stage.steps):
                        self._save(engine, step + 1, seconds + time.perf_counter() - began)
                self._seen = self._seen or upcoming.result()[0]  # a run that had only its export to do
        finally:
            if log is not None:
                log.close()
            sinks.close()
        if not quiet:
            self.console.print(report_table(records, f"{stage.name}: what it took"))
        return records, seconds + time.perf_counter() - began

    def _resume(self, engine: Engine) -> tuple[int, float]:
        """Load the latest checkpoint, if any; return the steps done and the seconds that they took."""
        torch.manual_seed(self.stage.seed + engine.rank)
        checkpoint, problems = find_checkpoint(engine, self.checkpoints)
        if checkpoint is None:
            return 0, 0.0
        meta = read_meta(checkpoint)
        extra = load_checkpoint(engine, checkpoint)
        if self.rollouts is not None:
            self.rollouts.restore(extra)
        if engine.rank == 0:
            spread = "; ".join(differences(meta["layout"], self.layout))
            lines = [f"set aside: {problem}" for problem in problems]
            lines.append(f"resumes after step {meta['step']} of {self.stage.steps}{spread and f' ({spread})'}")
            for line in lines:
                self.console.print(f"{self.stage.name}: {line}", highlight=False, soft_wrap=True)
        return int(meta["step"]), float(meta["seconds"])

    def _micro_batches(self, step: int, rank: int) -> list[BatchLike]:
        accumulation = self.engine_config.accumulation
        return [self.batches((step * accumulation + micro) * self.world_size + rank) for micro in range(accumulation)]

    def _answered(self, engine: Engine, step: int, micro: list[BatchLike], meter: StepMeter) -> list[BatchLike]:
        """Return the batches to learn from: as they are, or with answers that the model gives now."""
        if self.rollouts is None:
            return micro
        with engine.whole(), meter.flops.forward():
            return list(self.rollouts(step, cast(list[Prompts], micro)))

    def _step(
        self, engine: Engine, step: int, micro: list[BatchLike], targets: int, tick: float, meter: StepMeter
    ) -> StepRecord:
        if targets == 0:
            names = [name for batch in micro for name in batch.ids]
            raise ValueError(f"{self.stage.name}: step {step + 1} has no target token; samples {', '.join(names[:8])}")
        factor = self.stage.factor(step)
        engine.set_hyperparameters(factor)
        losses = []
        for batch, compared in zip(micro, look_ahead(engine, self.module, micro, meter.flops), strict=True):
            with meter.flops.forward():
                loss = engine.loss_sum(batch, *compared)
            # The engine averages over ranks; this makes it the sum over all targets of the step / their number.
            with meter.flops.backward():
                engine.backward(loss * (engine.world_size / targets))
            engine.step()
            losses.append(loss.detach())
        total, norm = engine.read(torch.stack(losses).sum())
        loss_mean = total / targets
        if not math.isfinite(loss_mean) or not math.isfinite(norm):
            self._raise_non_finite(engine, step, micro, losses, loss_mean)
        return StepRecord(
            step=step + 1,
            loss=loss_mean,
            lr=self.groups[0]["lr"] * factor,
            targets=targets,
            grad_norm=norm,
            reward=None if self.rollouts is None else sum(engine.gather(self.rollouts.reward_sum)) / targets,
            **self._preferred(engine, targets),
            **meter.fields(engine, micro, tick),
        )

    def _preferred(self, engine: Engine, pairs: int) -> dict[str, Any]:
        """Return what a preference stage logs of a step's pairs."""
        if not isinstance(self.module, PreferenceObjective):
            return {}
        ranks = engine.gather(self.module.take_figures())
        means = {name: sum(rank[name] for rank in ranks) / pairs for name in ranks[0]}
        return means | {"margin": means["reward_chosen"] - means["reward_rejected"]}

    def _raise_non_finite(
        self, engine: Engine, step: int, micro: list[BatchLike], losses: list[Tensor], loss: float
    ) -> None:
        bad = [batch.ids for batch, value in zip(micro, losses, strict=True) if not math.isfinite(value.item())]
        names = [name for rank in engine.gather(bad) for batch in rank for name in batch]
        what = f"the loss is {loss}" if not math.isfinite(loss) else "the loss is finite but its gradient is not"
        if not names:
            names = [name for rank in engine.gather([batch.ids for batch in micro]) for batch in rank for name in batch]
        checkpoint = latest_checkpoint(self.checkpoints)
        kept = f"checkpoint {checkpoint} is kept" if checkpoint else "no checkpoint was made yet (save_every)"
        raise NonFiniteLossError(
            f"{self.stage.name}: step {step + 1}: {what}; samples {', '.join(names[:16])}"
            f"{f' and {len(names) - 16} more' if len(names) > 16 else ''}; {kept}. Look at these samples, or lower the "
            "learning rate or clip"
        )

    def _save(self, engine: Engine, step: int, seconds: float) -> None:
        meta = {
            "step": step,
            "seconds": seconds,
            "fingerprint": self.fingerprint,
            "recipe": self.recipe,
            "layout": self.layout,
            "torch": torch.__version__,
        }
        extra = None if self.rollouts is None else self.rollouts.state()
        save_checkpoint(engine, self.checkpoints, meta, keep=self.keep, extra=extra)

    def _leave(self, quiet: bool, step: int) -> None:
        name = signal.Signals(self._signal).name if self._signal else "a signal to another rank"
        if not quiet:
            self.console.print(
                f"{self.stage.name}: stopped by {name} after step {step} of {self.stage.steps}, saved in "
                f"{self.checkpoints}; run the same again to go on from there",
                highlight=False,
            )
        raise TrainingInterrupted(128 + (self._signal or signal.SIGTERM))

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Turn SIGINT and SIGTERM into a stop after the step; a second SIGINT acts at once.

        A second SIGTERM does not: Ctrl-C under torchrun sends the ranks first the one, then the other.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.getsignal(number) for number in numbers}

        def note(number: int, frame: FrameType | None) -> None:
            self._signal = self._signal or number
            if number == signal.SIGINT:
                signal.signal(number, before[signal.SIGINT])

        for number in numbers:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number in numbers:
                signal.signal(number, before[number])

    def _finish(self, rank: int, records: list[StepRecord], seconds: float) -> StageResult:
        """Export the weights and store the result (rank 0); every rank returns it."""
        weights, path = self.out_dir / "trainable.safetensors", self.out_dir / "result.json"
        if rank == 0:
            tenth = max(1, len(records) // 10)
            result = StageResult(
                name=self.stage.name,
                steps=self.stage.steps,
                loss_first=sum(record.loss for record in records[:tenth]) / tenth,
                loss_last=sum(record.loss for record in records[-tenth:]) / tenth,
                tokens=sum(record.tokens for record in records),
                targets=sum(record.targets for record in records),
                seconds=seconds,
                step_ms=sorted(record.step_ms for record in records)[len(records) // 2],
                weights=str(weights),
            )
            save_trainable(self.model, weights, metadata={"stage": self.stage.name, "fingerprint": self.fingerprint})
            with atomic_file(path) as temporary:
                temporary.write_text(json.dumps({"result": asdict(result), "recipe": self.recipe}, indent=1))
        if self.world_size > 1:
            torch.distributed.barrier()
        return StageResult(**json.loads(path.read_text(encoding="utf-8"))["result"])

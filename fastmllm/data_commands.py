"""The command line's `fastmllm data {filter, reshard, clean, shares, transfer}`, and the names of all its tools."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from fastmllm.data.filtering.rules import FilterConfig
from fastmllm.data.loss_outliers import CleanConfig
from fastmllm.data.shards import ShardSource, SourceConfig
from fastmllm.making_commands import adapt_data, losses_data, recaption_data, self_instruct_data
from fastmllm.named import imported

Pattern = Annotated[str, tyro.conf.Positional]
Thresholds = Annotated[FilterConfig, tyro.conf.arg(name="")]


def filter_data(
    source: Pattern,
    out: Path,
    thresholds: Thresholds = FilterConfig(),  # noqa: B008 (frozen)
    root: str | None = None,
    scorer: str = "",
    scale: str = "",
    workers: int = 4,
) -> None:
    """Choose samples of a source: kept.jsonl, dropped.jsonl with reasons, summary.json and report.html in a folder.

    Args:
        source: a .tar, .jsonl, .json or folder; `*` and `{000..099}` name many. Quote it.
        out: folder of the lists; measurements are kept there, so other thresholds take seconds, and an interrupted run
            goes on.
        thresholds: what is kept.
        root: folder that image names in JSON are relative to; None = the JSON file's own.
        scorer: module:callable, (images, texts) -> scores, such as a `fastmllm.infer.clip_score.ClipScorer` that a
            file of yours makes.
        scale: of its scores, for the report, such as "raw cosine".
        workers: threads that decode.
    """
    from fastmllm.bench.filter_report import render_filter
    from fastmllm.data.cache import atomic_path
    from fastmllm.data.filtering.decide import decide
    from fastmllm.data.filtering.measure import Measures, measure

    measures = Measures(scorer=imported(scorer) if scorer else None, name=scorer, workers=workers)
    made = ShardSource(SourceConfig(name="source", path=source, root=root))
    filtered = decide(measure(made, out / "measured", measures), thresholds, out)
    with atomic_path(out / "report.html") as temporary:
        temporary.write_text(render_filter(filtered, f"Filter of {source}", scale), encoding="utf-8")
    table = Table(title=f"{filtered.kept:,} of {filtered.seen:,} samples kept; list and report in {out}")
    for name in ("dropped for", "samples", "share"):
        table.add_column(name)
    for reason, count in filtered.dropped.most_common():
        table.add_row(reason, f"{count:,}", f"{count / filtered.seen:.2%}")
    Console().print(table)


def reshard_data(source: Pattern, kept: Path, to: Path, root: str | None = None, samples_per_shard: int = 5000) -> None:
    """Write the samples of a list into new WebDataset shards; an interrupted run goes on.

    Args:
        source: what the list was made from.
        kept: kept.jsonl of `fastmllm data filter`.
        to: folder of the shards.
        root: folder that image names in JSON are relative to; None = the JSON file's own.
        samples_per_shard: at most.
    """
    from fastmllm.data.filtering.reshard import reshard

    made = ShardSource(SourceConfig(name="source", path=source, root=root))
    done = reshard(made, kept, to, samples_per_shard=samples_per_shard)
    lost = f"; {done.missing} are missing: {to / 'missing.jsonl'}" if done.missing else ""
    print(f"{done.samples} samples in {len(done.shards)} shards in {to}{lost}")


def clean_data(
    source: Pattern,
    out: Path,
    config: Annotated[CleanConfig, tyro.conf.arg(name="")] = CleanConfig(),  # noqa: B008 (frozen)
    losses: Path | None = None,
    root: str | None = None,
    workers: int = 4,
) -> None:
    """Find corrupt, contradictory and outlying pairs: findings.jsonl, and kept.jsonl of the others.

    Args:
        source: a .tar, .jsonl, .json or folder; `*` and `{000..099}` name many. Quote it.
        out: folder of the lists and of measurements, which a second run and `filter` reuse.
        config: what is suspicious.
        losses: .jsonl of `fastmllm data losses`, or of your own trainer: {shard, key, loss, blind}.
        root: folder that image names in JSON are relative to; None = the JSON file's own.
        workers: threads that decode.
    """
    from fastmllm.data.clean import clean
    from fastmllm.data.filtering.measure import Measures, measure
    from fastmllm.data.loss_outliers import read_losses

    made = ShardSource(SourceConfig(name="source", path=source, root=root))
    samples = measure(made, out / "measured", Measures(workers=workers))
    done = clean(samples, out, None if losses is None else read_losses(losses), config)
    print(f"{done.kept} of {done.seen} samples without a finding; lists in {out}")
    for reason, count in done.found.most_common():
        print(f"{count} x {reason}")


def show_shares(stage: Annotated[Path, tyro.conf.Positional]) -> None:
    """Say how many tokens a stage learned from each of its sources.

    Args:
        stage: its folder, such as out/run/stages/instruct.
    """
    from fastmllm.data.token_shares import read_shares

    shares = read_shares(stage)
    total = sum(share.tokens for share in shares.values())
    table = Table(title=f"{stage}: {total:,} tokens")
    for name in ("source", "samples", "tokens", "share", "labelled", "tokens a sample"):
        table.add_column(name, justify="left" if name == "source" else "right")
    for name, share in sorted(shares.items(), key=lambda item: -item[1].tokens):
        mean = share.tokens / share.samples
        cells = (f"{share.samples:,}", f"{share.tokens:,}", f"{share.tokens / total:.1%}", f"{share.targets:,}")
        table.add_row(name, *cells, f"{mean:.1f}")
    Console().print(table)


def show_transfer(
    recipe: Annotated[Path, tyro.conf.Positional],
    tasks: tuple[str, ...],
    out: Path = Path("out/transfer"),
    overrides: tuple[str, ...] = (),
    steps: int = 30,
    limit: int = 64,
) -> None:
    """Measure which task helps which before a recipe's last stage, and say in which order to teach them.

    Args:
        recipe: a YAML file; all its stages but the last are trained first.
        tasks: to measure, such as name group exists count.
        out: folder of the run; transfer.json is written there.
        overrides: changes to the recipe.
        steps: that each task is trained alone.
        limit: held-out questions a task.
    """
    from fastmllm.curriculum import transfer_of
    from fastmllm.models.vlm import VLM
    from fastmllm.recipe import Recipe
    from fastmllm.session import Session

    whole = Recipe.load(recipe, overrides)
    session = Session(replace(whole, stages=whole.stages[:-1]), out)
    session.train()
    if not isinstance(session.model, VLM):
        raise ValueError(f"{recipe}: transfer is measured on recipes of a VLM")
    found = transfer_of(
        session.model, session.splits, whole.stages[-1], whole.engine, tasks, out / "alone", steps=steps, limit=limit
    )
    found.save(out / "transfer.json")
    table = Table(title="what training the row's task wins for the column's, 1 = what its own training wins")
    for name in ("trained", *found.skills):
        table.add_column(name)
    for name, row in zip(found.skills, found.gain(), strict=True):
        table.add_row(name, *(f"{value:+.2f}" for value in row))
    console = Console()
    console.print(table)
    console.print(f"order: {', '.join(found.order())}; numbers in {out / 'transfer.json'}")


COMMANDS: dict[str, Callable[..., Any]] = {
    "filter": filter_data,
    "reshard": reshard_data,
    "clean": clean_data,
    "losses": losses_data,
    "adapt": adapt_data,
    "self-instruct": self_instruct_data,
    "recaption": recaption_data,
    "shares": show_shares,
    "transfer": show_transfer,
}

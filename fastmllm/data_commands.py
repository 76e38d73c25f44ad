"""The command line's `fastmllm data {filter, reshard, adapt}`."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from fastmllm.data.filtering.rules import FilterConfig
from fastmllm.data.records import Written
from fastmllm.data.shards import ShardSource, SourceConfig

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


def adapt_data(
    records: Annotated[Path, tyro.conf.Positional],
    kind: Literal["vqa", "caption", "boxes"],
    to: Path,
    templates: tuple[str, ...] = (),
    seed: int = 0,
    formats: float = 1.0,
    per_image: int = 4,
) -> None:
    """Turn a question, caption or box set into instructions by templates; what cannot be asked is listed beside them.

    Args:
        records: .jsonl, .json or a folder; docs/data.md says the columns of each kind.
        kind: of the set.
        to: .jsonl to write, a source of training samples.
        templates: files, or shipped ones, one a language; by default all shipped ones of the kind.
        seed: of phrasings.
        formats: share of samples that say how to answer.
        per_image: questions about the boxes of an image.
    """
    from fastmllm.data.instruct.adapt import AdaptConfig, adapt
    from fastmllm.data.instruct.questions import labels_of
    from fastmllm.data.instruct.templates import load_templates
    from fastmllm.data.records import read_records, write_records

    loaded = [load_templates(name) for name in templates or (f"{kind}_en", f"{kind}_zh")]
    labels = labels_of(read_records(records)) if kind == "boxes" else {}
    config = AdaptConfig(kind=kind, seed=seed, formats=formats, per_image=per_image, labels=labels)
    _say(write_records(to, adapt(read_records(records), loaded, config, source=str(records))), to)


def _say(written: Written, to: Path) -> None:
    print(f"{written.records} samples in {to}")
    for reason, count in written.skipped.most_common():
        print(f"{count} left out: {reason}")


def imported(name: str) -> Callable[..., Any]:
    """Return what "module:name" names.

    Raises:
        ValueError: no such module, or nothing callable of that name in it.
    """
    module, _, attribute = name.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{name}: {error}; give module:callable, with the module on PYTHONPATH") from error
    if not callable(found):
        raise ValueError(f"{name}: a {type(found).__name__}, nothing to call")
    return found


COMMANDS: dict[str, Callable[..., Any]] = {"filter": filter_data, "reshard": reshard_data, "adapt": adapt_data}

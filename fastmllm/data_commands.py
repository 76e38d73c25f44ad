"""The command line's `fastmllm data {filter, reshard, adapt, ...}`."""

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


def self_instruct_data(
    records: Annotated[Path, tyro.conf.Positional],
    llm: str,
    model: str,
    to: Path,
    prompt: str = "conversation_en",
    seed: int = 0,
    max_repeats: int = 0,
    blind: bool = False,
) -> None:
    """Let a language model write instructions from captions and boxes; each pair is checked, the others are listed.

    Args:
        records: .jsonl, .json or a folder, with image, caption(s) and boxes.
        llm: module:callable, a list of {role, content} -> text: any model.
        model: its name and version, kept with every sample; replies are remembered under it beside `to`.
        to: .jsonl to write, a source of training samples.
        prompt: a file, or a shipped one: conversation_en, conversation_zh, detail_en, reasoning_en.
        seed: of the seeds shown.
        max_repeats: images that one question is kept for; 0 = any number.
        blind: leave out what the model answers the same without the facts; asks every question once more.
    """
    from fastmllm.data.instruct.prompt_files import load_prompt
    from fastmllm.data.instruct.questions import labels_of
    from fastmllm.data.instruct.replies import Replies
    from fastmllm.data.instruct.self_instruct import SelfInstructConfig, self_instruct
    from fastmllm.data.records import read_records, write_records

    config = SelfInstructConfig(seed=seed, max_repeats=max_repeats, blind=blind)
    labels, replies = labels_of(read_records(records)), Replies(to.with_suffix(".replies.sqlite"), model)
    made = self_instruct(
        read_records(records), load_prompt(prompt), imported(llm), replies, config, labels=labels, source=str(records)
    )
    _say(write_records(to, made), to)


def recaption_data(
    source: Pattern,
    to: Path,
    recipe: Path,
    run: Path = Path("out/demo"),
    overrides: tuple[str, ...] = (),
    root: str | None = None,
    prompt: str = "Describe the image.",
    max_new_tokens: int = 64,
    batch_size: int = 16,
) -> None:
    """Caption a source's images anew with the model of a finished run; `reshard --kept` then takes the list.

    Args:
        source: a .tar, .jsonl, .json or folder; `*` and `{000..099}` name many. Quote it.
        to: .jsonl to write: a line a sample with the new caption, the model, the prompt and the old caption.
        recipe: the YAML file of the run.
        run: its folder.
        overrides: the changes that the run was made with.
        root: folder that image names in JSON are relative to; None = the JSON file's own.
        prompt: asked about each image.
        max_new_tokens: of a caption.
        batch_size: images at a time.
    """
    from fastmllm.data.instruct.recaption import recaption
    from fastmllm.data.instruct.replies import Replies
    from fastmllm.data.records import write_records
    from fastmllm.infer.captioner import Captioner
    from fastmllm.recipe import Recipe
    from fastmllm.session import Session

    session = Session(Recipe.load(recipe, overrides), run)
    captioner = Captioner(session.responder(), prompt, max_new_tokens)
    model = f"{session.recipe.name}, weights {session.weight_digests()[-1][:12]}"
    replies = Replies(to.with_suffix(".replies.sqlite"), model)
    made = ShardSource(SourceConfig(name="source", path=source, root=root))
    _say(write_records(to, recaption(made, captioner, replies, prompt=prompt, batch_size=batch_size)), to)


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


COMMANDS: dict[str, Callable[..., Any]] = {
    "filter": filter_data,
    "reshard": reshard_data,
    "adapt": adapt_data,
    "self-instruct": self_instruct_data,
    "recaption": recaption_data,
    "shares": show_shares,
}

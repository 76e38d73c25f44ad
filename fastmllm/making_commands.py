"""The command line's `fastmllm data {adapt, self-instruct, recaption, losses}`: what makes data from data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastmllm.data.records import Written
from fastmllm.data.shards import ShardSource, SourceConfig
from fastmllm.named import imported

Pattern = Annotated[str, tyro.conf.Positional]


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


def losses_data(
    source: Pattern,
    to: Path,
    recipe: Path,
    run: Path = Path("out/demo"),
    overrides: tuple[str, ...] = (),
    root: str | None = None,
    batch_size: int = 16,
    blind: bool = True,
) -> None:
    """Score the answers of a source by the model of a finished run, for `fastmllm data clean --losses`.

    Args:
        source: a .tar, .jsonl, .json or folder; `*` and `{000..099}` name many. Quote it.
        to: .jsonl to write: nats a token of each sample's answers.
        recipe: the YAML file of the run.
        run: its folder.
        overrides: the changes that the run was made with.
        root: folder that image names in JSON are relative to; None = the JSON file's own.
        batch_size: samples at a time.
        blind: score answers without images, too.
    """
    from fastmllm.data.records import write_records
    from fastmllm.infer.answer_loss import AnswerLoss, answer_losses
    from fastmllm.recipe import Recipe
    from fastmllm.session import Session

    loss = AnswerLoss(Session(Recipe.load(recipe, overrides), run).responder().model)
    made = ShardSource(SourceConfig(name="source", path=source, root=root))
    _say(write_records(to, answer_losses(made, loss, batch_size=batch_size, blind=blind)), to)


def _say(written: Written, to: Path) -> None:
    print(f"{written.records} samples in {to}")
    for reason, count in written.skipped.most_common():
        print(f"{count} left out: {reason}")

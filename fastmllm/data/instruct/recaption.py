"""New captions for the images of a source, by a model; the old ones and where the new ones came from are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fastmllm.data.filtering.text_print import words_of
from fastmllm.data.images import ImageError, open_image
from fastmllm.data.instruct.replies import Replies
from fastmllm.data.sample import Conversation
from fastmllm.data.shard_index import Skipped
from fastmllm.data.shards import ShardSource

Captioner = Callable[[Sequence[str]], Sequence[str]]  # images -> captions


def recaption(
    source: ShardSource, captioner: Captioner, replies: Replies, *, prompt: str, batch_size: int = 16
) -> Iterator[Mapping[str, Any] | Skipped]:
    """Yield lines that `reshard` takes for a list: {shard, key, record}, the record with the new caption.

    Args:
        source: samples of one image and one turn; others are left out and listed, as are unreadable images and captions
            that are empty or go round in circles.
        captioner: images -> captions, such as an `fastmllm.infer.captioner.Captioner`; it gets at most `batch_size`.
        replies: keeps the captions: an interrupted run goes on.
        prompt: that the captioner asks with, part of what is remembered.
        batch_size: images at a time.

    Raises:
        ValueError: the captioner returns another number of captions.
    """
    waiting: list[tuple[str, str, Conversation]] = []
    for number, shard in enumerate(source.shards):
        for place in range(source.sizes[number]):
            key, sample = source.located(number, place).key, source.sample(number, place)
            if isinstance(sample, Skipped):
                yield sample
                continue
            try:
                if len(sample.images) != 1 or len(sample.turns) != 1:
                    raise ImageError(f"{len(sample.images)} images in {len(sample.turns)} turns, not one in one")
                open_image(sample.images[0])
            except ImageError as error:
                yield Skipped(shard=str(shard), key=key, reason="nothing to caption", detail=str(error))
                continue
            waiting.append((str(shard), key, sample))
            if len(waiting) == batch_size:
                yield from _captioned(waiting, captioner, replies, prompt)
                waiting = []
        yield from source.skipped_of(number)
    yield from _captioned(waiting, captioner, replies, prompt)


def _captioned(
    samples: Sequence[tuple[str, str, Conversation]], captioner: Captioner, replies: Replies, prompt: str
) -> Iterator[Mapping[str, Any] | Skipped]:
    asked = [[shard, key, prompt] for shard, key, _ in samples]
    missing = [i for i, one in enumerate(asked) if replies.get(one) is None]
    if missing:
        new = captioner([samples[i][2].images[0] for i in missing])
        if len(new) != len(missing):
            raise ValueError(f"captioner {replies.model}: {len(new)} captions for {len(missing)} images")
        for i, text in zip(missing, new, strict=True):
            replies.put(asked[i], str(text).strip())
    for (shard, key, sample), one in zip(samples, asked, strict=True):
        caption = replies.get(one) or ""
        if not caption or (circle := in_circles(caption)):
            detail = f"{circle!r} again and again" if caption else "the model says nothing"
            yield Skipped(shard=shard, key=key, reason="unusable caption", detail=detail)
            continue
        made = {"by": "recaption", "model": replies.model, "prompt": prompt, "before": sample.turns[0].answer}
        yield {"shard": shard, "key": key, "record": {"caption": caption, "made": made}}


def in_circles(text: str, times: int = 4) -> str:
    """Return the words that a text repeats `times` times in a row at its end, as a model that does not stop; or ""."""
    words = words_of(text)
    for length in range(1, len(words) // times + 1):
        tail = words[-length:]
        if words[-length * times :] == tail * times:
            return " ".join(tail)
    return ""

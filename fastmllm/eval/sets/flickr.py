"""Flickr30k captions in Karpathy's split."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fastmllm.data.sample import Sample
from fastmllm.eval.captions import CiderD
from fastmllm.eval.overlap import bleu_counts, bleu_of, rouge_l
from fastmllm.eval.sets.reading import Loaded, Reader, RowError, text_of
from fastmllm.eval.task import Task, as_it_is, mean_of, of_sums

LAYOUT = (
    "dataset_flickr30k.json (Karpathy's caption_datasets.zip, cs.stanford.edu/people/karpathy/deepimagesent) and the "
    "pictures in flickr30k-images/ (shannon.cs.illinois.edu/DenotationGraph)"
)


def load_flickr30k(folder: str | Path, images: bool = True) -> Loaded:
    """Load the 1,000 test images with five captions each: CIDEr-D, BLEU-4 and ROUGE-L of what a model writes.

    Raises:
        SetError: a file is missing, or is not what it should be.
    """
    reader = Reader("flickr30k", folder, LAYOUT, images)
    rows = reader.json(reader.file("dataset_flickr30k.json"), dict).get("images", [])
    tests = (
        (f"image {i}", row) for i, row in enumerate(rows) if not isinstance(row, dict) or row.get("split") == "test"
    )

    def make(row: Mapping) -> Sample:
        name, captions = text_of(row, "filename"), tuple(text_of(s, "raw").strip() for s in row["sentences"])
        if not captions or not all(captions):
            raise RowError("no captions, or an empty one")
        return Sample(
            id=name, prompt="Provide a one-sentence caption for the provided image.", answer=captions[0],
            references=captions, task="flickr30k", image=reader.image(f"flickr30k-images/{name}"),
        )  # fmt: skip

    samples = reader.samples(tests, make)
    reader.expect("images", len(samples), 1000)
    corpus = CiderD([s.references for s in samples])

    def score(parsed: str | None, sample: Sample) -> dict[str, float]:
        text = parsed or ""
        counts = {"CIDEr-D": corpus.score(text, sample.references), "ROUGE-L": rouge_l(text, sample.references)}
        return counts | bleu_counts(text, sample.references)

    reader.loaded.tasks = [
        Task(
            name="flickr30k", documents=samples, prompt=lambda sample: sample, parse=as_it_is, score=score, reads=False,
            max_new_tokens=64,
            metrics={"CIDEr-D": mean_of("CIDEr-D"), "BLEU-4": of_sums(bleu_of), "ROUGE-L": mean_of("ROUGE-L")},
        )
    ]  # fmt: skip
    return reader.loaded

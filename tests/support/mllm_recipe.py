"""The recipes of a small Flamingo and a small BLIP-2, with the tests' tokenizer and photographs."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console
from tiny_vlm import colour_photos, tiny_tokenizer

from fastmllm.recipe import Recipe
from fastmllm.session import Session

RECIPES = Path(__file__).parents[2] / "recipes"


def prepare(folder: Path) -> None:
    """Write photographs and a tokenizer."""
    colour_photos(folder / "photos", count=2)
    write_words(folder)


def write_words(folder: Path) -> None:
    """Write a tokenizer."""
    (folder / "words").mkdir()
    tiny_tokenizer().save(str(folder / "words" / "tokenizer.json"))


def session(folder: Path, out: Path, *overrides: str, recipe: str = "cross_attention") -> Session:
    """Return a recipe's session on what `prepare` wrote, two steps a stage."""
    made = [f"data.path={folder / 'photos'}", f"data.cache={folder / 'cache'}", f"model.tokenizer={folder / 'words'}"]
    vocabulary = tiny_tokenizer().get_vocab_size()
    made += [f"model.composition.language.vocab_size={vocabulary}"]
    if recipe == "from_pairs":
        made += [f"stages.0.contrastive.text.vocab_size={vocabulary}"]
    made += [f"stages.{stage}.{key}=2" for stage in range(4) for key in ("steps", "batch_size")]
    loaded = Recipe.load(RECIPES / f"{recipe}.yaml", [*made, *overrides])
    return Session(loaded, out, Console(file=io.StringIO()))

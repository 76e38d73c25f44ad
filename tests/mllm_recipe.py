"""The recipe of a small Flamingo, with the tests' tokenizer and photographs; as a program, its stages on two ranks."""

from __future__ import annotations

import io
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from rich.console import Console
from tiny_vlm import colour_photos, tiny_tokenizer

from fastmllm.recipe import Recipe
from fastmllm.session import Session


def prepare(folder: Path) -> None:
    """Write photographs and a tokenizer."""
    colour_photos(folder / "photos", count=2)
    (folder / "words").mkdir()
    tiny_tokenizer().save(str(folder / "words" / "tokenizer.json"))


def session(folder: Path, out: Path, *overrides: str) -> Session:
    """Return the recipe's session on what `prepare` wrote, two steps a stage."""
    made = [f"data.path={folder / 'photos'}", f"data.cache={folder / 'cache'}", f"model.tokenizer={folder / 'words'}"]
    made += [f"model.composition.language.vocab_size={tiny_tokenizer().get_vocab_size()}"]
    made += [f"stages.{stage}.{key}=2" for stage in range(4) for key in ("steps", "batch_size")]
    recipe = Recipe.load(ROOT / "recipes" / "cross_attention.yaml", [*made, *overrides])
    return Session(recipe, out, Console(file=io.StringIO()))


if __name__ == "__main__":
    base = Path(sys.argv[1])
    for zero_stage in (2, 3):
        session(base, base / f"two{zero_stage}", f"engine.zero_stage={zero_stage}").train()
    print("rank done", flush=True)

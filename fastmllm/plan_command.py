"""`fastmllm plan`: what a recipe's stages, or what one image, would cost on devices that are not there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class OfTraining:
    """Say what each stage of a recipe would hold, send and take on many accelerators; no weight is loaded.

    Args:
        recipe: a YAML file.
        overrides: changes to it, such as engine.zero_stage=3.
        gpus: ranks.
        device: a100, h100, h200, b200, or cpu (measured now).
        gpus_per_node: of them in one machine.
        model: a published model's name (llava-1.5-7b, qwen2-vl-72b, ...) or a folder with config.json, in place of the
            recipe's model.
        text_tokens: of a sample.
        images: of a sample.
        image_size: side in pixels of an image, for --model.
        utilisation: of the device's peak.
        recompute: gradient checkpointing of every layer, not only of the roles that the recipe says.
        json: for programs.
    """

    recipe: Annotated[Path, tyro.conf.Positional]
    overrides: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    gpus: int = 8
    device: str = "h100"
    gpus_per_node: int = 8
    model: str | None = None
    text_tokens: int = 256
    images: int = 1
    image_size: int = 672
    utilisation: float = 0.4
    recompute: bool = False
    json: bool = False

    def run(self) -> None:
        """Plan and print."""
        from fastmllm.plan_table import print_plan
        from fastmllm.recipe import Recipe
        from fastmllm.training_plan import Assumptions, plan_training

        assumed = Assumptions(
            utilisation=self.utilisation, text_tokens=self.text_tokens, images=self.images, image_size=self.image_size,
            recompute=self.recompute,
        )  # fmt: skip
        found = plan_training(
            Recipe.load(self.recipe, self.overrides), self.gpus, device=self.device,
            ranks_per_node=self.gpus_per_node, model=self.model, assumed=assumed,
        )  # fmt: skip
        print_plan(found, as_json=self.json)


@dataclass(frozen=True, kw_only=True)
class OfImage:
    """Say what an image costs: tiles, tokens, FLOPs by module, memory and the roofline's time; no weight is loaded.

    Args:
        image: 1920x1080, or a file.
        policy: how it is taken, and by which tower (internvl, llava-next, qwen2.5-vl, mllama, ...), perhaps with other
            sizes: internvl:max_tiles=6.
        compress: visual tokens, as fastmllm.patch does: visionzip:64, fastv:0.5, ...
        llm: qwen2.5-7b, llama-3.1-8b, ..., or a folder with config.json.
        device: a100, h100, h200, b200, or cpu (measured now).
        batch: prompts at once.
        images: of a prompt.
        text_tokens: of a prompt.
        new_tokens: of an answer.
        picture: a PNG to draw the tiles over the image into.
        json: for programs.
    """

    image: str
    policy: str = "internvl"
    compress: str | None = None
    llm: str = "qwen2.5-7b"
    device: str = "h200"
    batch: int = 1
    images: int = 1
    text_tokens: int = 64
    new_tokens: int = 128
    picture: Path | None = None
    json: bool = False

    def run(self) -> None:
        """Plan, draw and print."""
        import json

        from fastmllm.plan.cost import Batch
        from fastmllm.plan.image_plan import image_size, plan_image
        from fastmllm.plan.picture import save_picture
        from fastmllm.plan.table import notes, show

        batch = Batch(samples=self.batch, images=self.images, text_tokens=self.text_tokens, new_tokens=self.new_tokens)
        found = plan_image(
            image_size(self.image), policy=self.policy, compress=self.compress, llm=self.llm, device=self.device,
            batch=batch,
        )  # fmt: skip
        if self.picture is not None:
            save_picture(found.plan, found.tokens, self.policy, self.image, self.picture)
        if self.json:
            print(json.dumps(found.to_json() | {"notes": notes(found)}, indent=1))
        else:
            show(found, Console())


What = (
    Annotated[OfTraining, tyro.conf.subcommand("train", prefix_name=False)]
    | Annotated[OfImage, tyro.conf.subcommand("image", prefix_name=False)]
)


def plan(what: tyro.conf.OmitArgPrefixes[What]) -> None:
    """Say what a recipe's training or an image would cost; `plan --image ...` is short for `plan image --image ...`."""
    what.run()


def spelled_out(arguments: Sequence[str]) -> list[str]:
    """Return a command line with "image" behind "plan" where it is left out."""
    short = len(arguments) > 1 and arguments[0] == "plan" and arguments[1].startswith("--") and arguments[1] != "--help"
    return ["plan", "image", *arguments[1:]] if short else list(arguments)

"""The command line: fastmllm {demo, train, plan, eval, generate, bench, data, export, backends}."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

Overrides = Annotated[tuple[str, ...], tyro.conf.Positional]
RecipePath = Annotated[Path, tyro.conf.Positional]


def demo(recipe: RecipePath, overrides: Overrides = (), out: Path = Path("out/demo")) -> None:
    """Train, evaluate and sweep a recipe, and write report.html and metrics.json.

    Args:
        recipe: a YAML file, such as recipes/emoji.yaml.
        overrides: changes to it, such as data.num_concepts=24.
        out: folder of the run; a second run reuses it, an interrupted one goes on.
    """
    from fastmllm.demo import run_demo

    run_demo(_load(recipe, overrides), out)


def train(recipe: RecipePath, overrides: Overrides = (), out: Path = Path("out/demo")) -> None:
    """Train every stage of a recipe.

    Args:
        recipe: a YAML file.
        overrides: changes to it.
        out: folder of the run.
    """
    from fastmllm.session import Session

    Session(_load(recipe, overrides), out).train()


def plan(
    what: Annotated[Literal["train"], tyro.conf.Positional],
    recipe: RecipePath,
    overrides: Overrides = (),
    gpus: int = 8,
    device: str = "h100",
    gpus_per_node: int = 8,
    model: str | None = None,
    text_tokens: int = 256,
    images: int = 1,
    image_size: int = 672,
    utilisation: float = 0.4,
    recompute: bool = False,
    json: bool = False,
) -> None:
    """Say what each stage of a recipe would hold, send and take on many accelerators; no weight is loaded.

    Args:
        what: is planned.
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
    from fastmllm.plan_table import print_plan
    from fastmllm.training_plan import Assumptions, plan_training

    assumed = Assumptions(
        utilisation=utilisation, text_tokens=text_tokens, images=images, image_size=image_size, recompute=recompute
    )
    found = plan_training(
        _load(recipe, overrides), gpus, device=device, ranks_per_node=gpus_per_node, model=model, assumed=assumed
    )
    print_plan(found, as_json=json)


def evaluate(recipe: RecipePath, overrides: Overrides = (), out: Path = Path("out/demo")) -> None:
    """Train what is not trained yet, then evaluate beside blind, wrong image, majority and random.

    Args:
        recipe: a YAML file.
        overrides: changes to it.
        out: folder of the run.
    """
    from fastmllm.session import Session

    session = Session(_load(recipe, overrides), out)
    session.train()
    if session.first:
        session.console.print(session.evaluate().table())


def generate(
    recipe: RecipePath, image: Path, prompt: str, overrides: Overrides = (), out: Path = Path("out/demo")
) -> None:
    """Ask the model of a finished run one question about one image.

    Args:
        recipe: the YAML file of the run.
        image: a PNG or JPEG file.
        prompt: the question.
        overrides: the changes that the run was made with.
        out: folder of the run.
    """
    from fastmllm.session import Session

    print(Session(_load(recipe, overrides), out).ask(str(image), prompt))


def bench(recipe: RecipePath, overrides: Overrides = (), out: Path = Path("out/demo")) -> None:
    """Train what is not trained yet, then sweep resolution x visual tokens x compressor.

    Args:
        recipe: a YAML file.
        overrides: changes to it.
        out: folder of the run.
    """
    from fastmllm.bench.sweep import table
    from fastmllm.session import Session

    session = Session(_load(recipe, overrides), out)
    session.train()
    if session.first:
        session.console.print(table(session.sweep()))


def data(recipe: RecipePath, overrides: Overrides = ()) -> None:
    """Build a recipe's data and say what is there, what was skipped and under which licences.

    Work on data itself: fastmllm data {filter, reshard, clean, losses, adapt, self-instruct,
    recaption, shares, transfer} --help.

    Args:
        recipe: a YAML file.
        overrides: changes to it.
    """
    from fastmllm.demo import describe_data

    describe_data(_load(recipe, overrides), Console())


def export(recipe: RecipePath, to: Path, overrides: Overrides = (), out: Path = Path("out/demo")) -> None:
    """Write the model of a finished run as a folder, in transformers' layout where it is a family of transformers.

    Args:
        recipe: the YAML file of the run.
        to: folder to write.
        overrides: the changes that the run was made with.
        out: folder of the run.
    """
    from fastmllm.session import Session

    Session(_load(recipe, overrides), out).export(to)


def show_backends() -> None:
    """Say which kernels and engines are there, or why not."""
    from fastmllm.backends import backends

    for name, state in backends().items():
        print(f"{name:14s} {state}")


def _load(recipe: Path, overrides: tuple[str, ...]):
    from fastmllm.recipe import Recipe

    return Recipe.load(recipe, overrides)


def _data_tools() -> dict[str, Callable[..., Any]]:
    from fastmllm.data_commands import COMMANDS as tools

    return tools


COMMANDS: dict[str, Callable[..., Any]] = {
    "demo": demo,
    "train": train,
    "plan": plan,
    "eval": evaluate,
    "generate": generate,
    "bench": bench,
    "data": data,
    "export": export,
    "backends": show_backends,
}


def main() -> None:
    """Run a command; what the caller or the machine got wrong ends in one line, not in a traceback.

    Exit code 2 for those, 130 for Ctrl-C, 141 for a closed pipe. Programming errors (TypeError, KeyError, ...) keep
    their traceback; `python -X dev -m fastmllm ...` keeps every one.
    """
    # Read when torch loads. Threads that sleep at once make a step 1.7 times slower on an idle machine, threads that
    # spin as long as by default ten times slower on a busy one.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "50000")
    try:
        if sys.argv[1:2] == ["data"] and (tools := _data_tools()).keys() & set(sys.argv[2:3]):
            tyro.extras.subcommand_cli_from_dict(tools, prog="fastmllm data", args=sys.argv[2:])
        else:
            tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="fastmllm", description=__doc__)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has what it wanted: `fastmllm backends | head -3`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to flush at exit
        sys.exit(141)  # as a program that SIGPIPE ends
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if sys.flags.dev_mode or isinstance(error, (NotImplementedError, RecursionError)):
            raise
        print(f"error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        sys.exit(2)

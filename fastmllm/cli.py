"""The command line: fastmllm {demo, train, plan, eval, generate, bench, data, export, backends}."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from fastmllm.plan_command import plan, spelled_out

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


def evaluate(recipe: RecipePath, overrides: Overrides = (), out: Path = Path("out/demo")) -> None:
    """Train what is not trained yet, then evaluate beside blind, wrong image, majority and random.

    `fastmllm eval compare A B` compares two evaluations, `fastmllm eval judge A B …` lets a judge compare their texts,
    `fastmllm eval baselines pope=FOLDER` scores a published set without a model.

    Args:
        recipe: a YAML file.
        overrides: changes to it.
        out: folder of the run.
    """
    from fastmllm.session import Session

    session = Session(_load(recipe, overrides), out)
    session.train()
    session.console.print(session.evaluate(session.ranks()).table())


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


def _tools(command: str) -> dict[str, Callable[..., Any]]:
    """Return the commands within a command that also takes a recipe: `fastmllm data filter`."""
    if command == "data":
        from fastmllm.data_commands import COMMANDS as tools
    elif command == "eval":
        from fastmllm.eval_commands import COMMANDS as tools
    else:
        tools = {}
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
        if len(sys.argv) > 2 and sys.argv[2] in (tools := _tools(sys.argv[1])):
            tyro.extras.subcommand_cli_from_dict(tools, prog=f"fastmllm {sys.argv[1]}", args=sys.argv[2:])
        else:
            tyro.extras.subcommand_cli_from_dict(
                COMMANDS, prog="fastmllm", description=__doc__, args=spelled_out(sys.argv[1:])
            )
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

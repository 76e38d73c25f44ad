"""A training plan for people and for programs: tables, what they rest on, JSON."""

from __future__ import annotations

import json

from rich.console import Console, Group
from rich.table import Table

from fastmllm.training_plan import GB, StagePlan, TrainingPlan, room


def notes(plan: TrainingPlan) -> list[str]:
    """List what the figures rest on."""
    given, engine, device = plan.assumed, plan.layout.engine, plan.device
    return [
        f"{device.name}: {device.flops[engine.dtype] / 1e12:.4g} TFLOP/s dense {engine.dtype} at "
        f"{given.utilisation:.0%} utilisation, {device.memory / GB:.0f} GB of which tensors have "
        f"{given.memory_share:.0%}, {device.link / GB:.0f} GB/s in a node and {device.network / GB:.0f} GB/s between "
        f"nodes in one direction, of which collectives reach {given.link_share:.0%} ({device.source})",
        f"a sample is {given.images} image(s) and {given.text_tokens} text tokens, all scored; every micro-batch is "
        "alike, attention computes its segments only (flash), logits never exist whole",
        "pixels are encoded in every step: cached features would spare a frozen encoder's share",
        "activations are counted on a run without numbers, gradients at their worst moment, and added, though the two "
        "do not peak together: an upper bound, to which allocator fragmentation comes",
        "gradients of stages 1 and 2 are all-reduced, as DeepSpeed 0.19 does by default, not reduce-scattered; stage 3 "
        "keeps parameters of up to 1e5 elements everywhere and up to 1e9 gathered elements alive",
        "rings are hierarchical: first inside of a node, then between nodes, each accelerator on its own network card",
        "steps are given with communication wholly hidden behind computation, and with nothing hidden; loading of "
        "data, the CPU's AdamW under offload, and sampling in grpo stages are not in them",
    ]


def show(plan: TrainingPlan, console: Console) -> None:
    """Print one table a training stage, then what they assume."""
    layout = plan.layout
    nodes = -(-layout.ranks // layout.ranks_per_node)
    console.print(
        f"{plan.model}: {layout.ranks} x {plan.device.name} on {nodes} node(s), {layout.engine.dtype}, "
        f"{layout.engine.accumulation} micro-batch(es) a step",
        highlight=False,
    )
    for stage in plan.stages:
        console.print(Group(_memory_table(stage), _step_table(stage)))
        console.print(_verdict(plan, stage), highlight=False)
    console.print("Assumed:", *(f"- {note}" for note in notes(plan)), sep="\n", highlight=False)


def _memory_table(stage: StagePlan) -> Table:
    state = stage.state
    share = f"{stage.trainable / 1e9:,.3g} of {stage.parameters / 1e9:,.4g} B parameters learn"
    title = f"{stage.name}: {share}, ZeRO-{stage.zero_stage}, offload {stage.offload}"
    table = Table("memory of a rank", "GB", title=title, title_justify="left")
    table.columns[1].justify = "right"
    kept, saved = stage.activations
    rows = {
        "parameters": state.parameters, "fp32 master weights": state.masters, "AdamW moments": state.moments,
        "gradients, at the worst moment of backward": state.backward, "parameters gathered": state.gathered,
        "activations": stage.step.activations, "at the start, while parameters are put there": state.start,
        "the most at once": stage.total, "in host memory": state.host,
        "activations if every layer is kept": kept, "activations if every layer is recomputed": saved,
    }  # fmt: skip
    for name, size in rows.items():
        if size:
            table.add_row(name, f"{size / GB:,.2f}", end_section=name == "the most at once")
    return table


def _step_table(stage: StagePlan) -> Table:
    table = Table("a step, of a rank", "", title_justify="left")
    table.columns[1].justify = "right"
    step = stage.step
    visual = f"{step.visual_tokens:,} visual"
    table.add_row("tokens of a micro-batch", f"{step.tokens:,} rows, {visual}")
    for sent in stage.collectives:
        if sent.payload:
            table.add_row(f"{sent.kind} of {sent.what}", f"{sent.payload / GB:,.2f} GB")
    table.add_row("sent inside of the node", f"{stage.near / GB:,.2f} GB")
    table.add_row("sent to other nodes", f"{stage.far / GB:,.2f} GB", end_section=True)
    table.add_row("computation", f"{1000 * stage.compute_s:,.1f} ms")
    table.add_row("communication", f"{1000 * stage.communication_s:,.1f} ms")
    table.add_row("update", f"{1000 * stage.update_s:,.1f} ms")
    fast, slow = stage.seconds
    table.add_row("step, communication hidden or not", f"{1000 * fast:,.1f} to {1000 * slow:,.1f} ms")
    most, least = stage.samples_per_s
    table.add_row("samples a second, all ranks", f"{least:,.1f} to {most:,.1f}")
    return table


def _verdict(plan: TrainingPlan, stage: StagePlan) -> str:
    free = room(plan.device, plan.layout, plan.assumed)
    fits = f"ZeRO-{stage.zero_stage} {'fits' if stage.total <= free else 'does not fit'} into {free / GB:,.1f} GB"
    if stage.smallest is not None:
        return f"{fits}; the smallest ZeRO stage that fits is {stage.smallest}"
    return f"{fits}, nor does any other: try --recompute, engine.offload=cpu, a smaller batch_size or more --gpus"


def print_plan(plan: TrainingPlan, *, as_json: bool) -> None:
    """Print a plan for people or for programs."""
    if as_json:
        print(json.dumps(plan.to_json() | {"notes": notes(plan)}, indent=1))
    else:
        show(plan, Console())

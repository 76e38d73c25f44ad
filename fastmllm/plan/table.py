"""A picture's plan for people: what it becomes, what it costs, where the time goes, and what that rests on."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from fastmllm.bench.roofline import Work
from fastmllm.plan.image_plan import DTYPE, MEMORY_SHARE, ImagePlan
from fastmllm.plan.meter import Phase

GB = 1e9
NAMES = {
    "vision": "tower", "vision attention": "tower, attention", "embeddings": "head", "llm": "language model",
    "llm attention": "language model, attention", "cross_attention": "cross layers",
    "cross_attention attention": "cross layers, attention", "connector attention": "connector, attention",
}  # fmt: skip


def show(plan: ImagePlan, console: Console) -> None:
    """Print the tables of a plan, then what they rest on."""
    batch = plan.batch
    console.print(
        f"{plan.policy} ({plan.about}), {plan.compress or 'no compressor'}, {plan.llm} on {plan.device.name}: "
        f"{batch.samples} prompt(s) of {batch.images} image(s) and {batch.text_tokens} text tokens, "
        f"{batch.new_tokens} new ones",
        highlight=False,
    )
    for table in (_image(plan), _tokens(plan), _phases(plan), _memory(plan)):
        console.print(table)
    where = ", ".join(f"{_named(name)} {share:.0%}" for name, share in plan.shares().items() if share >= 0.005)
    console.print(f"Where the time goes: {where}", highlight=False)
    console.print(verdict(plan), highlight=False)
    console.print("Assumed:", *(f"- {note}" for note in notes(plan)), sep="\n", highlight=False)


def _named(name: str) -> str:
    phase, _, part = name.partition(": ")
    return f"{NAMES.get(part, part)} in {phase}"


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]:,} x {size[1]:,}"


def _image(plan: ImagePlan) -> Table:
    cut, waste = plan.plan, plan.waste
    table = Table("image", "", title_justify="left")
    table.columns[1].justify = "right"
    table.add_row("size", _size(cut.size))
    rows, columns = cut.grid
    table.add_row("tiles (rows x columns)", f"{len(cut.tiles)} ({rows} x {columns})")
    table.add_row("resized to, without padding", _size(cut.resized))
    table.add_row("effective resolution", f"{_size(cut.effective_size)}, {cut.effective_pixels / 1e6:.3g} MP")
    table.add_row("pixels of the encoders", f"{cut.encoder_pixels / 1e6:.3g} MP")
    parts = {"padding": waste.padding, "enlarged": waste.enlarged, "overview": waste.overview}
    said = ", ".join(f"{name} {share:.0%}" for name, share in parts.items() if share)
    table.add_row("of them wasted", f"{waste.total:.0%}" + (f" ({said})" if said else ""))
    return table


def _tokens(plan: ImagePlan) -> Table:
    tokens = plan.tokens
    table = Table("tokens of an image", "before", "after compression", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("ViT", f"{tokens.vit:,}", "")
    if tokens.llm:
        table.add_row("in the text", f"{tokens.llm:,}", f"{tokens.llm_left:,}")
    for layer, left in tokens.stages:
        table.add_row(f"in the text from layer {layer} on", f"{tokens.llm_left:,}", f"{left:,}")
    if tokens.cross:
        table.add_row("seen across", f"{tokens.cross:,}", f"{tokens.cross_left:,}")
    table.add_row("prompt of a sample", "", f"{plan.costs.prompt:,}")
    return table


def _phases(plan: ImagePlan) -> Table:
    table = Table("phase", "part", "TFLOP", "GB moved", "ms at the least", title_justify="left")
    for column in table.columns[2:]:
        column.justify = "right"
    for name, phase in plan.phases().items():
        said = "decode, a token" if name == "decode" else name
        for part, work in phase.parts.items():
            ms = 1000 * work.seconds
            table.add_row(
                said, NAMES.get(part, part), f"{work.flops / 1e12:,.4g}", f"{work.bytes / GB:,.3g}", f"{ms:,.3g}"
            )
        last = f"{phase.flops / 1e12:,.4g}", f"{phase.bytes / GB:,.3g}", f"{1000 * phase.seconds:,.3g}"
        table.add_row(said, "all", *last, end_section=True)
    table.add_row("to the first token", "", "", "", f"{1000 * plan.first_token_s:,.3g}")
    table.add_row("to the last token", "", "", "", f"{1000 * plan.answer_s:,.4g}")
    return table


def _cost(work: Work | Phase) -> tuple[str, str, str]:
    return f"{work.flops / 1e12:,.4g}", f"{work.bytes / GB:,.3g}", f"{1000 * work.seconds:,.3g}"


def _memory(plan: ImagePlan) -> Table:
    costs = plan.costs
    table = Table("memory", "GB", title_justify="left")
    table.columns[1].justify = "right"
    rows = {
        "weights": costs.weights, "keys and values": costs.kv, "keys and values seen across": costs.cross_kv,
        "most beside weights, encode": costs.encode.peak, "most beside weights, prefill": costs.prefill.peak,
        "the most at once": costs.total,
    }  # fmt: skip
    for name, size in rows.items():
        if size:
            table.add_row(name, f"{size / GB:,.3f}")
    return table


def verdict(plan: ImagePlan) -> str:
    """Say whether it fits, with the numbers, and what to do if not."""
    costs, free = plan.costs, plan.room
    needs = f"{costs.total / GB:,.1f} GB of the {free / GB:,.1f} GB that tensors can have on {plan.device.name}"
    if plan.fits:
        said = f"It fits: {needs}; {plan.most_samples:,} such prompts would fit at once"
    elif costs.weights > free:
        said = (
            f"It does not fit: it needs {needs}, and the weights alone {costs.weights / GB:,.1f} GB: a smaller --llm, "
            "a larger --device, or several of them"
        )
    else:
        caches = costs.kv + costs.cross_kv
        said = (
            f"It does not fit: it needs {needs}: {costs.weights / GB:,.1f} GB of weights, {caches / GB:,.1f} GB of "
            f"keys and values, and activations; {plan.most_samples:,} such prompts fit at once: a smaller --batch, "
            "fewer --new-tokens, or --compress"
        )
    more = costs.prompt + plan.batch.new_tokens - plan.context
    if more > 0:
        said += (
            f". The context does not fit: {costs.prompt:,} + {plan.batch.new_tokens:,} tokens are {more:,} more than "
            f"the {plan.context:,} of {plan.llm}: --compress, or another --policy"
        )
    return said + "."


def notes(plan: ImagePlan) -> list[str]:
    """List what the figures rest on."""
    device = plan.device
    return [
        f"{device.name}: {device.flops[DTYPE] / 1e12:.4g} TFLOP/s dense {DTYPE}, {device.bandwidth / GB:,.0f} GB/s, "
        f"{device.memory / GB:.0f} GB of which tensors have {MEMORY_SHARE:.0%} ({device.source})",
        "times are the roofline's: each product takes the longer of its operations and its bytes at the device's peak; "
        "real ones are longer, and elementwise work, launches and the host's decoding and resizing are not in them",
        "attention reads its segments only (flash); a tower's windows count as full; an answer's token is counted with "
        "half of the answer in the cache",
        "ViT tokens are patches, with LLaVA-1.5's and BLIP-2's class token, Llama-3.2-Vision's one a tile",
        "a compressor's budget is one image's, or one tile's where fastmllm.patch(compress=) compresses tiles",
    ]

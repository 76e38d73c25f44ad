"""The published methods, each as one line of configuration.

A line says `method` (a key of `METHODS`), `keep`, `options` of its class, `at` and `paper` (arXiv id; None for a
baseline). `keep` is a setting that the method is published or commonly compared with: a number counts of LLaVA-1.5's
576 tokens unless the line names others. It is the part to change. `at` is where the tokens go:

- "vision": inside of the encoder;
- "connector": behind the encoder, in front of or instead of the projector, as its publication has it;
- "language:L": in front of layer L of the language model, by the attention of the layer before it (an option `layer`
  names a layer of the encoder, and is not read here). Several layers, "language:8/16/24", have one `keep` each, of the
  tokens that came in at layer 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastmllm.compression import METHODS
from fastmllm.compression.budget import Budget
from fastmllm.compression.placement import Placement

Line = dict[str, Any]


def _line(paper: str | None, at: str, method: str, keep: Budget | tuple[float, ...], **options: Any) -> Line:
    return {"method": method, "keep": keep, "options": options, "at": at, "paper": paper}


PUBLISHED: dict[str, Line] = {
    "ToMe": _line("2210.09461", "vision", "bipartite_merge", 192, metric="keys"),
    "FasterVLM": _line("2412.01818", "connector", "topk", 192, scorer="cls_row", layer=-2),
    "VisPruner": _line("2412.01818", "connector", "pivot_dedup", 192, pivots="score", share=0.5, layer=-2),
    "VisionZip": _line("2412.04467", "connector", "dominant_contextual", 64, contextual=5 / 32, layer=-2),  # 54 + 10
    "PruMerge": _line("2403.15388", "connector", "dominant_contextual", 72, merge="neighbours", contextual=0, layer=-1),
    "PruMerge+": _line(
        "2403.15388", "connector", "dominant_contextual", 144, merge="neighbours", contextual=0.5, layer=-1
    ),
    "DivPrune": _line("2503.02175", "connector", "greedy_diverse", 64, objective="max_min"),
    "CDPruner": _line("2506.10967", "connector", "greedy_diverse", 64, objective="dpp", relevance="given"),
    "SCOPE": _line("2510.24214", "connector", "greedy_diverse", 64, objective="coverage", relevance="cls_row"),
    "EVS": _line("2510.14624", "connector", "temporal_dedup", 0.3, compare="previous"),
    # 0.3 of three of four frames, and the first of them
    "DyCoke TTM": _line("2411.15024", "connector", "temporal_dedup", 0.475, compare="groups"),
    "DART": _line("2502.11494", "language:2", "pivot_dedup", 192, pivots="norm", share=8, states="keys"),
    "FastV": _line("2403.06764", "language:2", "topk", 0.5, scorer="last_row"),
    "PyramidDrop": _line("2410.17247", "language:8/16/24", "topk", (0.5, 0.25, 0.125), scorer="last_row"),
    # without recycling, as in its second version; the raters are the text rows that the probe names
    "SparseVLM": _line("2410.04417", "language:2/6/15", "topk", (300, 200, 110), scorer="text_rows"),
    "InternVL pixel shuffle": _line(
        "2404.16821", "connector", "pixel_shuffle", 0.25, order="rows", norm="block", width=1024
    ),
    "InternVL pixel shuffle, v1": _line(
        "2312.14238", "connector", "pixel_shuffle", 0.25, order="columns", norm="block", width=1024
    ),
    "Idefics3 pixel shuffle": _line("2408.12637", "connector", "pixel_shuffle", 0.25, order="rows"),
    "Qwen2-VL merger": _line(
        "2409.12191", "connector", "pixel_shuffle", 0.25, order="merged", norm="token", width=1280, eps=1e-6
    ),
    "M3": _line("2405.17430", "connector", "pool", 36),  # `Pool.nested` for 576, 144, 36, 9 and 1 at once
    "LLaVA-OneVision pool": _line("2408.03326", "connector", "pool", 196, interpolation="bilinear"),  # of 729 a frame
    "C-Abstractor": _line(
        "2312.06742", "connector", "conv_reduce", 144, design="c_abstractor", width=1024, width_out=4096
    ),
    "LDPv2": _line("2402.03766", "connector", "conv_reduce", 144, design="ldp", width=1024, width_out=2048),
    "DeepSeek-OCR": _line(
        "2510.18234", "vision", "conv_reduce", 0.0625, design="deepseek_ocr", width=256, width_out=1024
    ),
    "TokenPacker": _line(
        "2407.02392", "connector", "attend", 0.25, design="token_packer", width=1024, width_out=4096, levels=4
    ),
    "Perceiver": _line("2204.14198", "connector", "attend", 64, design="perceiver", width=1024),
    "Q-Former": _line(
        "2301.12597", "connector", "attend", 32, design="qformer", width=1408, hidden=768, width_out=2560
    ),  # of 257 tokens
    "MQT": _line("2405.19315", "connector", "attend", 256, design="mqt", width=1024, width_out=4096),
    "random": _line(None, "connector", "topk", 192, scorer="random"),
    "grid": _line(None, "connector", "topk", 192, scorer="grid"),
}


def placement(name: str, keep: Budget | Sequence[float] | None = None, **options: Any) -> Placement:
    """Return a published method as a model's `placement` takes it.

    `VLM` takes those at the connector and inside of its vision transformer, `VLM` and `MLLM` those inside of the
    language model. Not in place there: what needs videos (EVS, DyCoke), relevance to the prompt (CDPruner), several
    layers of the encoder (TokenPacker with levels) or two encoders (DeepSeek-OCR); these are for `compress` and for
    models of your own.

    Args:
        name: a line of `PUBLISHED`.
        keep: another budget than the line's; one for each layer where it names several.
        options: instead of those of the line, or beside them.

    Raises:
        ValueError: no such line, or a budget or option that does not fit.
    """
    if name not in PUBLISHED:
        raise ValueError(f"published: unknown method {name!r}; known: {', '.join(PUBLISHED)}")
    line = PUBLISHED[name]
    chosen = line["keep"] if keep is None else keep
    return Placement.of(line["at"], METHODS[line["method"]], chosen, **{**line["options"], **options})


def table() -> str:
    """Return the lines as a Markdown table: what docs/compression.md shows."""
    rows = ["| published as | method | keep | options | at | paper |", "|---|---|---|---|---|---|"]
    for name, line in PUBLISHED.items():
        keep = " / ".join(map(str, line["keep"])) if isinstance(line["keep"], tuple) else line["keep"]
        options = ", ".join(f"{key}={value!r}" for key, value in line["options"].items())
        paper = f"[{line['paper']}](https://arxiv.org/abs/{line['paper']})" if line["paper"] else "baseline"
        options = f"`{options}`" if options else ""
        rows.append(f"| {name} | `{line['method']}` | {keep} | {options} | {line['at']} | {paper} |")
    return "\n".join(rows)

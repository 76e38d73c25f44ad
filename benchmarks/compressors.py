"""Compressors against torch transcriptions of what is published, CPU time on one thread.

    python benchmarks/compressors.py

CLIP-L/336's tokens (N = 576, C = 1024, 16 heads; a video of 8 frames of 14 x 14 for EVS), K = 64, one image and four. A
transcription does what the published code does with the same inputs, image by image where it does so; it is given the
attention row that it needs instead of all weights of all layers, which is more than the code that it stands for gets.
Both run in turns in one process; the figure is the median of paired ratios. Writes
benchmarks/results/<device>/compressors.json.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from fastmllm.compression import Evidence, Probe, Tokens, make
from fastmllm.kernels.attention import attention
from fastmllm.session import environment, write_text

ROOT = Path(__file__).parent.parent
KEEP, HEADS, WIDTH = 64, 16, 1024
ROUNDS = 15
Inputs = dict[str, Tensor]  # x (N, C), cls (N,), keys (N, h), relevance (N,) of one image


def visionzip(i: Inputs) -> Tensor:
    """Dominant tokens by attention; of the rest every so-manieth is a target that the others are added to."""
    dominant, contextual = KEEP - KEEP // 4, KEEP // 4
    kept = i["cls"].topk(dominant).indices
    mask = torch.ones(len(i["x"]), dtype=torch.bool).index_fill_(0, kept, False)
    rest, metric = i["x"][mask], F.normalize(i["keys"][mask], dim=-1)
    step = max(1, len(rest) // contextual)
    targets = torch.arange(0, len(rest), step)[:contextual]
    others = torch.ones(len(rest), dtype=torch.bool).index_fill_(0, targets, False)
    best = (metric[others] @ metric[targets].T).argmax(1)
    assigned = F.one_hot(best, contextual).to(rest.dtype)
    counts = assigned.sum(0).clamp(min=1)[:, None]
    return torch.cat((i["x"][~mask], rest[targets] + assigned.T @ rest[others] / counts))


def divprune(i: Inputs) -> Tensor:
    """Max-min distance with the whole matrix, one token a step."""
    unit = F.normalize(i["x"], dim=-1)
    distance = 1 - unit @ unit.T
    chosen = torch.empty(KEEP, dtype=torch.int64)
    for step in range(KEEP):
        if step == 0:
            scores = torch.topk(distance, 2, dim=0, largest=False).values[1]
        else:
            scores = distance.index_select(0, chosen[:step]).min(0).values
        chosen[step] = scores.argmax()
    return i["x"][chosen]


def cdpruner(i: Inputs) -> Tensor:
    """Greedy MAP of a DPP with the whole kernel, one token a step."""
    unit, r = F.normalize(i["x"], dim=-1), i["relevance"]
    r = (r - r.min() + 1e-6) / (r.max() - r.min())
    kernel = r[:, None] * (unit @ unit.T) * r[None]
    rows, gain = torch.zeros(KEEP, len(r)), kernel.diagonal().clone()
    chosen = torch.empty(KEEP, dtype=torch.int64)
    for step in range(KEEP):
        j = gain.argmax()
        chosen[step] = j
        e = (kernel[j] - rows[:step, j] @ rows[:step]) / gain[j].sqrt()
        rows[step] = e
        gain = gain - e.square()
        gain[j] = -float("inf")
    return i["x"][chosen.sort().values]


def vispruner(i: Inputs) -> Tensor:
    """The best by attention, and rounds that drop the 8 most similar of the rest."""
    order = i["cls"].argsort(descending=True)
    important = KEEP // 2
    unit, rest = F.normalize(i["x"], dim=-1), order[important:]
    while len(rest) > KEEP - important:
        r = min(8, len(rest) - (KEEP - important))
        even, odd = rest[::2], rest[1::2]
        closest = (unit[even] @ unit[odd].T).max(-1).values
        rest = torch.cat((even[closest.argsort(descending=True)[r:]], odd))
    return i["x"][torch.cat((order[:important], rest)).sort().values]


def dart(i: Inputs) -> Tensor:
    """Pivots by L1 norm; each adds the least similar tokens that are left."""
    pivots = i["states"].abs().sum(-1).topk(8).indices
    unit, left = F.normalize(i["x"], dim=-1), torch.ones(len(i["x"]), dtype=torch.bool).index_fill_(0, pivots, False)
    chosen = [pivots]
    for pivot in pivots:
        rest = left.nonzero().view(-1)
        found = rest[(unit[rest] @ unit[pivot]).topk((KEEP - 8) // 8, largest=False).indices]
        left[found] = False
        chosen.append(found)
    return i["x"][torch.cat(chosen).sort().values]


def fastervlm(i: Inputs) -> Tensor:
    """The best by attention, in their order."""
    return i["x"][i["cls"].topk(KEEP).indices.sort().values]


def tome(i: Inputs) -> Tensor:
    """Rounds of bipartite matching with the whole similarity, merged by scatter."""
    x, size = i["x"], torch.ones(len(i["x"]), 1)
    while len(x) > KEEP:
        r = min(len(x) - KEEP, len(x) // 2)
        unit = F.normalize(x, dim=-1)
        best, partner = (unit[::2] @ unit[1::2].T).max(-1)
        order = best.argsort(descending=True)
        gone, stays = order[:r], order[r:].sort().values
        mass, value = size[1::2].clone(), x[1::2] * size[1::2]
        value = value.index_add(0, partner[gone], (x[::2] * size[::2])[gone])
        mass = mass.index_add(0, partner[gone], size[::2][gone])
        x, size = torch.cat((x[::2][stays], value / mass)), torch.cat((size[::2][stays], mass))
    return x


def evs(i: Inputs) -> Tensor:
    """Keep what differs most from the frame before; the first frame stays."""
    x = i["x"].view(8, -1, i["x"].shape[-1])
    change = 1 - F.cosine_similarity(x[1:], x[:-1], dim=-1)
    scores = torch.cat((torch.full_like(change[:1], 255.0), change)).flatten()
    keep = torch.zeros(len(scores), dtype=torch.bool)
    keep[scores.argsort(descending=True, stable=True)[: len(scores) * 3 // 10]] = True
    return i["x"][keep]


CASES: tuple[tuple[str, Callable[[Inputs], Tensor], str, dict], ...] = (
    ("FasterVLM", fastervlm, "topk", {"scorer": "cls_row"}),
    ("VisionZip", visionzip, "dominant_contextual", {"contextual": 0.25, "mode": "faithful"}),
    ("VisionZip, clean", visionzip, "dominant_contextual", {"contextual": 0.25}),
    ("DivPrune", divprune, "greedy_diverse", {"objective": "max_min"}),
    ("CDPruner", cdpruner, "greedy_diverse", {"objective": "dpp", "relevance": "given", "mode": "faithful"}),
    ("VisPruner", vispruner, "pivot_dedup", {"pivots": "score", "share": 0.5, "mode": "faithful"}),
    ("VisPruner, clean", vispruner, "pivot_dedup", {"pivots": "score", "share": 0.5}),
    ("DART", dart, "pivot_dedup", {"pivots": "norm", "share": 8}),
    ("ToMe", tome, "bipartite_merge", {}),
    ("EVS", evs, "temporal_dedup", {}),
)


def inputs(images: int, video: bool) -> tuple[Tokens, Evidence, list[Inputs]]:
    """Make tokens and one attention over them, with a class token in front of each image."""
    torch.manual_seed(0)
    grid = (8, 14, 14) if video else (1, 24, 24)
    n = grid[0] * grid[1] * grid[2]
    tokens = Tokens.of(torch.randn(images * n, WIDTH), [grid] * images)
    q, k = torch.randn(2, images * (n + 1), HEADS, WIDTH // HEADS)
    starts = torch.arange(images + 1, dtype=torch.int32) * (n + 1)
    _, lse = attention(q, k, k, starts, max_seqlen_q=n + 1, causal=False, return_lse=True)
    columns = torch.cat([torch.arange(1, n + 1) + i * (n + 1) for i in range(images)])
    probe = Probe(q=q, k=k, lse=lse, cu_seqlens=starts, max_seqlen=n + 1, columns=columns, cls_token=True)
    relevance = torch.rand(images * n)
    each = []
    for i in range(images):
        mine, rows = slice(i * n, (i + 1) * n), columns[i * n : (i + 1) * n]
        each.append({"x": tokens.x[mine], "relevance": relevance[mine], "q": q[i * (n + 1)], "k": k[rows]})
    return tokens, Evidence(probe=probe, relevance=relevance), each


def published(call: Callable[[Inputs], Tensor], name: str, each: list[Inputs]) -> list[Tensor]:
    """Run a transcription image by image, with the attention row and the keys that it reads."""
    out = []
    for i in each:
        given = {"x": i["x"], "relevance": i["relevance"]}
        if name.startswith(("FasterVLM", "VisionZip", "VisPruner")):
            given["cls"] = (torch.einsum("hd,nhd->hn", i["q"], i["k"]) * i["k"].shape[-1] ** -0.5).softmax(-1).mean(0)
        if name.startswith("VisionZip"):
            given["keys"] = i["k"].mean(1)
        if name == "DART":
            given["states"] = i["k"].flatten(1)
        out.append(call(given))
    return out


def compared(images: int) -> list[dict]:
    """Time every case in turns."""
    runs: list[tuple[str, Callable[[], object], Callable[[], object]]] = []
    for name, call, method, options in CASES:
        tokens, evidence, each = inputs(images, video=name == "EVS")
        ours = make(method, 0.3 if name == "EVS" else KEEP, **options)
        left = [len(t) for t in published(call, name, each)]
        assert left == list(ours(tokens, evidence)[0].seqlens), name
        runs.append((name, lambda o=ours, t=tokens, e=evidence: o(t, e),
                     lambda c=call, n=name, e=each: published(c, n, e)))  # fmt: skip
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name, _, _ in runs}
    with torch.inference_mode():
        for _ in range(ROUNDS + 1):
            for name, *pair in runs:
                for call, kept in zip(pair, times[name], strict=True):
                    began = time.process_time()
                    call()
                    kept.append(1e3 * (time.process_time() - began))
    return [
        {"method": name, "images": images, "ours_ms": median(a[1:]), "published_ms": median(b[1:]),
         "ratio": median(y / x for x, y in zip(a[1:], b[1:], strict=True))}
        for name, (a, b) in times.items()
    ]  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    rows = [row for images in (1, 4) for row in compared(images)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = ROOT / "benchmarks" / "results" / device / "compressors.json"
    write_text(path, json.dumps({"environment": environment(), "rows": rows}, indent=1))
    out = Table(title="CPU ms on one thread; ratio: published / ours")
    for name in ("method", "images", "ours", "published", "ratio"):
        out.add_column(name, justify="left" if name == "method" else "right")
    for r in rows:
        out.add_row(
            r["method"], str(r["images"]), f"{r['ours_ms']:.2f}", f"{r['published_ms']:.2f}", f"{r['ratio']:.2f}"
        )
    Console().print(out)


if __name__ == "__main__":
    main()

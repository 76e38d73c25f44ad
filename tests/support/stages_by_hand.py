"""What a model of transformers computes whose layers drop visual tokens: a plain loop over its own layers, row by row.

Nothing is padded or cached: columns that are left are listed, masks are written out, positions gathered.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from tiny_hf import IMAGE
from torch import Tensor

from fastmllm.compression import Compressor, Evidence, Probe, Tokens


def text_of(model: Any) -> Any:
    owner = model.model
    return owner.language_model if hasattr(owner, "language_model") else owner.text_model


def _given(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """Return what the language model is called with."""
    seen: dict[str, Any] = {}

    def look(module: Any, args: Any, kwargs: Any) -> None:
        seen.update(kwargs)
        raise StopIteration

    hook = text_of(model).register_forward_pre_hook(look, with_kwargs=True)
    try:
        model.model(**batch, use_cache=False)
    except StopIteration:
        return seen
    finally:
        hook.remove()
    raise AssertionError("the language model was not called")


def _turned(layer: Any, x: Tensor, turn: Any) -> tuple[Tensor, Tensor]:
    """Return queries and keys (T, H, D) as a layer's attention takes them, keys repeated for each head."""
    attention, h = layer.self_attn, layer.input_layernorm(x)
    q, k = (p(h)[0].unflatten(-1, (-1, attention.head_dim)) for p in (attention.q_proj, attention.k_proj))
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    cos, sin = (t[0][:, None] for t in turn)

    def rotate(t: Tensor) -> Tensor:
        a, b = t.chunk(2, -1)
        return t * cos + torch.cat((-b, a), -1) * sin

    return rotate(q), rotate(k)


def scores(q: Tensor, k: Tensor, scale: float, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the attention (T,) that each row receives from rows by weight, the mean over heads."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = torch.einsum("qhd,khd->hqk", q, k) * scale + bias
    causal = torch.ones(len(q), len(q), dtype=torch.bool).tril()
    return torch.einsum("hqk,q->hk", logits.masked_fill(~causal, -1e300).softmax(-1), weight).mean(0)


def logits(
    model: Any, kind: Any, row: tuple[Any, ...], stages: tuple[tuple[int, Compressor], ...], *,
    asked: tuple[int, ...] | None = None, answer: int = 0, window: int | None = None,
) -> Tensor:  # fmt: skip
    """Return the logits (T', V) of one row of a batch.

    Args:
        model: not patched.
        kind: of `tiny_hf_compress`.
        row: lists of ids, and images by number.
        stages: (layer, compressor); fractions are of the image's own tokens.
        asked: of each image, the row that judges it; None: the last one in front of the answer.
        answer: tokens at the row's end that are one.
        window: columns that a row sees.
    """
    if answer and len(row[-1]) < answer:
        raise AssertionError("the answer is the end of the row's last list")
    batch = kind.rows((row,))
    ids = batch.pop("input_ids")
    del batch["attention_mask"]
    text, given = text_of(model), _given(model, {**batch, "input_ids": ids})
    x, positions, total = given["inputs_embeds"], given["position_ids"], ids.shape[1]
    if positions is None:
        positions = torch.arange(total)[None]
    if kind.mrope and positions.dim() == 2:
        positions = positions.expand(3, 1, -1)
    turn = text.rotary_emb(x, positions[-3:] if positions.dim() == 3 else positions)
    images = _runs(ids[0], [kind.places[p] for p in row if isinstance(p, int)])
    left, question = torch.arange(total), total - answer
    bias, before = torch.zeros(total, dtype=x.dtype), None
    deep, visual = given.get("deepstack_visual_embeds") or [], given.get("visual_pos_masks")
    for number, layer in enumerate(text.layers):
        for stage, compressor in stages:
            if stage == number:
                x, left, bias = _dropped(
                    compressor, x, left, bias, images, ids[0] == IMAGE, asked, question,
                    _turned(text.layers[number - 1], before, [t[:, left] for t in turn]), layer.self_attn.scaling,
                )  # fmt: skip
        mask = left[None] <= left[:, None]
        if kind.name == "paligemma":
            mask = mask | (left < question)[None] & (left < question)[:, None]
        if window is not None:
            mask &= left[None] > left[:, None] - window
        mask = torch.where(mask, bias[None], -1e300)[None, None]
        before = x
        x = layer(x, attention_mask=mask, position_embeddings=tuple(t[:, left] for t in turn), position_ids=None)
        if number < len(deep):
            place = visual[0].nonzero()[:, 0]
            inside = torch.isin(left, place)
            x = x.index_add(1, inside.nonzero()[:, 0], deep[number][torch.isin(place, left)][None])
    return model.lm_head(text.norm(x))[0]


def _runs(ids: Tensor, lengths: list[int]) -> list[Tensor]:
    return list((ids == IMAGE).nonzero()[:, 0].split(lengths))


def _dropped(
    compressor: Compressor, x: Tensor, left: Tensor, bias: Tensor, images: list[Tensor], visual: Tensor, asked: Any,
    question: int, turned: tuple[Tensor, Tensor], scale: float,
) -> Any:  # fmt: skip
    """Let a compressor choose among the tokens of each image, all other rows stay."""
    q, k = (t.detach() for t in turned)
    stay, sizes, mixed = [left[~visual[left]]], [], x[0]
    for n, columns in enumerate(images):
        here = torch.isin(left, columns).nonzero()[:, 0]
        weight = torch.zeros(len(left), dtype=q.dtype)
        if getattr(compressor, "scorer", None) == "text_rows":
            weight[(left < question) & ~visual[left]] = 1
        else:
            # a question that ends with an image ends with what is left of it
            weight[int((left <= (question - 1 if asked is None else asked[n])).nonzero()[-1])] = 1
        rated = scores(q, k, scale, weight, bias)[here]
        keep = compressor.keep if isinstance(compressor.keep, int) else int(compressor.keep * len(columns) + 0.5)
        kept, plan = _choose(compressor, x[0, here], rated, k[here], keep, bias[here].exp())
        stay.append(left[here[plan]])
        if kept is not None:
            mixed = mixed.index_copy(0, here[plan], kept.x)
            if kept.size is not None:
                sizes.append((here[plan], kept.size.to(x.dtype).log()))
    rows = torch.isin(left, torch.cat(stay)).nonzero()[:, 0]
    for where, size in sizes:
        bias = bias.index_copy(0, where, size)
    return mixed[None, rows], left[rows], bias[rows]


def _choose(compressor: Any, x: Tensor, rated: Tensor, keys: Tensor, keep: int, size: Tensor) -> Any:
    if compressor.name == "topk":
        by = x.detach().float().norm(dim=1) if compressor.scorer == "norm" else rated
        best = by.topk(keep).indices
        if compressor.position == "keep":
            return None, best
        kept = Tokens.of(x[best], [(keep, 1)])  # together they weigh as much as all did
        return replace(kept, size=size[best] * size.sum() / size[best].sum()), best
    probe = Probe(
        q=keys, k=keys, lse=torch.zeros(keys.shape[1], len(keys), dtype=keys.dtype),
        cu_seqlens=torch.tensor([0, len(x)], dtype=torch.int32), max_seqlen=len(x),
    )  # fmt: skip
    kept, plan = compressor(Tokens.of(x, [(len(x), 1)]), Evidence(probe=probe), (keep,))
    return kept, plan.keep


def answer(model: Any, kind: Any, row: tuple[Any, ...], stages: Any, length: int, **options: Any) -> list[int]:
    """Return what is the likeliest, one token after the other."""
    said: list[int] = []
    for _ in range(length):
        out = logits(model, kind, (*row, said) if said else row, stages, answer=len(said), **options)
        said.append(int(out[-1].argmax()))
    return said

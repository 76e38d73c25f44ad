"""What the parts of a model that compresses visual tokens share, beside its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastmllm.compression import Compressor, Evidence, Probe, Tokens
from fastmllm.hf.compress.rows import Images
from fastmllm.hf.compress.seams import Seam
from fastmllm.hf.fusion import STATE
from fastmllm.kernels.attention import attention

KEY = STATE + "compression"  # where modules keep the one object


@dataclass(slots=True)
class Compression:
    """One patched model's compressor, and what goes from part to part during a call.

    Args:
        compressor: what is computed.
        seam: where.
        cls_token: whether the tower has one.
        images: of the last encoding.
        busy: a call is under way whose text is shortened already.
        held: the image features that it has encoded already, of so many rows of `pixels`.
        owners: images of each row of its text.
        queries, keys: of the layer that is read, (I, S, heads, head_dim), while `listening`.
    """

    compressor: Compressor
    seam: Seam
    cls_token: bool = False
    images: Images | None = None
    busy: bool = False
    held: Any = None
    pixels: int = 0
    owners: tuple[int, ...] = ()
    listening: bool = False
    watched: dict[str, Tensor] = field(default_factory=dict)

    @contextmanager
    def call(self) -> Iterator[None]:
        """Mark a call as under way, and let go of what it holds behind it."""
        self.busy = True
        try:
            yield
        finally:
            self.busy, self.held, self.owners = False, None, ()

    def encode(self, owner: Any, call: dict[str, Any]) -> Any:
        """Encode the images of a call by transformers' method, with those of the call's arguments that it takes."""
        method = owner.get_image_features
        names = inspect.signature(method).parameters
        return method(**{n: call[n] for n in names if call.get(n) is not None}, return_dict=True)

    @torch.compiler.disable
    def reduce(self, tokens: Tokens) -> Tokens:
        """Compress, and note how many tokens each image had and has."""
        kept, _ = self.compressor(tokens, Evidence(probe=self._probe(tokens)))
        if kept.x.shape[1] != tokens.x.shape[1]:
            raise ValueError(
                f"compress: {self.compressor.name} makes tokens {kept.x.shape[1]} wide of tokens {tokens.x.shape[1]} "
                f"wide; the model takes them no wider {self.seam.place}"
            )
        keeps_places = self.seam.mrope and self.compressor.position == "keep" and kept is not tokens
        self.images = Images(tokens.seqlens, kept.seqlens, kept.pos[:, 0] if keeps_places else None)
        return kept

    def dense(self, x: Tensor) -> Tensor:
        """Compress (I, N, C) to (I, K, C)."""
        tokens = Tokens.of(x)
        tokens = tokens if self.seam.grid else replace(tokens, grid=None)
        kept = self.reduce(tokens)
        return x if kept is tokens else kept.dense()

    def _probe(self, tokens: Tokens) -> Probe | None:
        if self.compressor.layer is None:
            return None
        q, k = (self.watched.pop(name) for name in ("queries", "keys"))
        images, rows = q.shape[:2]
        lead = rows - tokens.seqlens[0]
        if images != len(tokens.seqlens) or lead not in (0, 1):
            raise ValueError(
                f"compress: {self.compressor.name} judges by the attention of {rows} rows of {images} images, but "
                f"there are {tokens.seqlens[:4]} tokens of {len(tokens.seqlens)}"
            )
        starts = torch.arange(images + 1, dtype=torch.int32, device=q.device) * rows
        with torch.no_grad():
            q, k = q.flatten(0, 1), k.flatten(0, 1)
            _, lse = attention(q, k, k, starts, max_seqlen_q=rows, causal=False, return_lse=True)
        columns = torch.arange(images * rows, device=q.device).view(images, rows)[:, lead:].flatten()
        return Probe(
            q=q, k=k, lse=lse, cu_seqlens=starts, max_seqlen=rows, columns=columns if lead else None,
            cls_token=self.cls_token,
        )  # fmt: skip

    def again(self, pixels: Tensor) -> Any:
        """Return what is held, in the order of a batch whose rows generation may have repeated for its beams."""
        times = len(pixels) // self.pixels
        held = type(self.held)(**dict(self.held.items()))  # generation writes into what it is given
        vars(held).update(vars(self.held))  # transformers < 5.23 sets what its class has no field for
        if times > 1:
            order = _repeated(self.owners, times)
            held.pooler_output = self._ordered(held.pooler_output, order, times)
            if getattr(held, "deepstack_features", None) is not None:
                held.deepstack_features = [self._ordered(f, order, times) for f in held.deepstack_features]
        return held

    def _ordered(self, features: Any, order: Sequence[int], times: int) -> Any:
        assert self.images is not None
        if isinstance(features, Tensor) and features.dim() == 3:  # (I, K, D)
            return features[list(order)]
        if isinstance(features, Tensor):  # (T, D)
            return torch.cat(self._ordered(features.split(list(self.images.after)), order, times))
        if tuple(map(len, features)) != self.images.after:  # one entry a row
            return [f for f in features for _ in range(times)]
        return [features[i] for i in order]


def _repeated(owners: Sequence[int], times: int) -> list[int]:
    order, first = [], 0
    for count in owners:
        order += list(range(first, first + count)) * times
        first += count
    return order


def arguments(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name."""
    names = list(inspect.signature(inspect.unwrap(function)).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}

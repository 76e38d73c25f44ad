"""Let learned queries read each image.

TokenPacker (arXiv 2407.02392), Perceiver resampler (Flamingo, arXiv 2204.14198), Q-Former (BLIP-2, arXiv 2301.12597)
and the nested queries of MQT-LLaVA (arXiv 2405.19315).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastmllm.compression.budget import Budget
from fastmllm.compression.compressor import Mode, Position
from fastmllm.compression.pool import pool_plane
from fastmllm.compression.regrid import block_side, centres, grids_of, of_each, rebuild
from fastmllm.compression.tokens import Plan, Tokens
from fastmllm.compression.trained import Trained
from fastmllm.modules.nested_queries import NestedQueries
from fastmllm.modules.qformer import ImageTokens, QFormer, QFormerConfig
from fastmllm.modules.resampler import PerceiverResampler, ResamplerConfig
from fastmllm.modules.token_packer import TokenPacker


class Attend(Trained):
    """Reduce every image to K tokens that have read it.

    Args:
        keep: K. "token_packer": N / s^2 of every image, best as the fraction 1 / s^2; "perceiver" and "qformer": the
            number of their queries; "mqt": anything up to `max_queries`, also a fraction or one K an image: the first
            K queries, which do not depend on K (training draws one a step: set `keep`).
        width: C of the tokens.
        width_out: of what comes out; None: the same.
        design: "token_packer": each coarse token reads its s x s region; "perceiver": latents read image and each
            other; "qformer": queries read each other, then the image; "mqt": nested queries, whose attention depends
            on the grid alone.
        position: see `Compressor`. Regions stand at their middle. A query has no place: the K of an image are spread
            evenly over it in their order, which says nothing about what they read.
        mode: "clean" only.
        options: of the design's own class: "token_packer": of `TokenPacker`; its `levels` beyond one are the first
            `levels` planes of the tokens, (T, C) each, which end here; "perceiver": of `ResamplerConfig.flamingo`;
            "qformer": of `QFormerConfig`; "mqt": of `NestedQueries`. `hidden` is the width inside, where there is one.

    Raises:
        ValueError: unknown design, or a `keep` that it cannot make.
        TypeError: an option that the design does not take.
    """

    name = "attend"

    def __init__(
        self, keep: Budget, width: int, *, width_out: int | None = None,
        design: Literal["token_packer", "perceiver", "qformer", "mqt"] = "token_packer", position: Position = "keep",
        mode: Mode = "clean", **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(keep, width, width_out, position=position, mode=mode)
        if design not in ("token_packer", "perceiver", "qformer", "mqt"):
            raise ValueError(f"attend: design {design!r} is not one of token_packer, perceiver, qformer, mqt")
        self.design, self.levels = design, 0
        self.out: nn.Linear | None = None
        if design == "token_packer":
            self.levels = options.setdefault("levels", 1)
            inside = options.pop("hidden", None)
            self.body: nn.Module = TokenPacker(width, self.width_out, width=inside, **options)
            return
        if design == "mqt":
            self.body = NestedQueries(width, self.width_out, **options)
            return
        if not isinstance(keep, int) or isinstance(keep, bool) or keep < 1:
            raise ValueError(f"attend: a {design} has one query a token: keep must be their number, got {keep!r}")
        inside = options.pop("hidden", width)
        if design == "perceiver":
            if inside != width:
                raise ValueError(f"attend: a perceiver is as wide as the tokens, {width}, not hidden {inside}")
            self.body = PerceiverResampler(ResamplerConfig.flamingo(width=width, num_latents=keep, **options))
        else:
            config = {"mlp_width": 4 * inside, **options}
            self.body = QFormer(QFormerConfig(width=inside, media_width=width, num_queries=keep, **config))
        if inside != self.width_out:
            self.out = nn.Linear(inside, self.width_out)

    def compute(self, tokens: Tokens, budgets: tuple[int, ...]) -> tuple[Tokens, Plan | None]:
        if self.design == "token_packer":
            return self._regions(tokens, budgets)
        x, (cu_seqlens, longest) = tokens.x, (tokens.cu_seqlens, tokens.longest)
        if self.design == "mqt":
            x = self.body(x, grids_of(self.name, tokens), budgets)
        elif self.design == "perceiver":
            x = self.body(x, cu_seqlens, longest)
        else:
            x = self.body(ImageTokens.of_images(x, cu_seqlens, longest))
        index = [(2 * torch.arange(k) + 1) * n // (2 * k) for n, k in zip(tokens.seqlens, budgets, strict=True)]
        return rebuild(tokens, x if self.out is None else self.out(x), budgets, index)[0], None

    def _regions(self, tokens: Tokens, budgets: tuple[int, ...]) -> tuple[Tokens, Plan | None]:
        grids = grids_of(self.name, tokens)
        side = block_side(self.name, grids, budgets)
        out = tuple((t, h // side, w // side) for t, h, w in grids)
        fine, planes = tokens.x, tokens.planes
        if self.levels > 1:
            if len(planes) < self.levels or any(p.shape != tokens.x.shape for p in planes[: self.levels]):
                raise ValueError(
                    f"attend: levels {self.levels} are read from as many planes of shape {tuple(tokens.x.shape)}, but "
                    f"the planes are {[tuple(p.shape) for p in planes]}"
                )
            fine, planes = torch.cat(planes[: self.levels], 1), planes[self.levels :]

        def pooled(plane: Tensor) -> Tensor:
            return pool_plane(plane, grids, out)

        index = of_each(centres, grids, out)
        rest = Tokens(
            x=tokens.x, cu_seqlens=tokens.cu_seqlens, seqlens=tokens.seqlens, grid=grids, pos=tokens.pos,
            size=tokens.size, planes=planes,
        )  # fmt: skip
        return rebuild(rest, self.body(tokens.x, fine, grids, side), budgets, index, grid=out, mix=pooled)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, design={self.design}"

"""pixel_shuffle against reshape + LayerNorm: InternVL tiles, Idefics3 and SmolVLM connectors, packed grids."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F

from fastmllm.kernels.pixel_shuffle import pixel_shuffle, pixel_shuffle_bwd_triton, pixel_shuffle_triton

CUDA = torch.cuda.is_available()
# grids (t, h, w), factor, D, norm over: tiles of InternVL2 (InternViT-300M and -6B), an Idefics3 image, packed SigLIP-2
# images, SmolVLM with Qwen's norm in front
CASES = {
    "InternVL2-8B 13 tiles": ([(13, 32, 32)], 2, 1024, "output"),
    "InternVL2-26B 13 tiles": ([(13, 32, 32)], 2, 3200, "output"),
    "Idefics3 17 tiles": ([(17, 26, 26)], 2, 1152, "none"),
    "ragged SigLIP2": ([(1, 24, 40), (1, 36, 28), (1, 20, 48), (1, 32, 32)] * (8 if CUDA else 1), 2, 1152, "output"),
    "SmolVLM token norm": ([(13, 32, 32)], 4, 768, "token"),
}
DTYPES = (torch.bfloat16,) if CUDA else (torch.float32, torch.bfloat16)


def aot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield widths of vision towers up to the widest norm, one grid and many, each norm and none."""
    for width, factor, norm in ((1024, 2, "output"), (1152, 2, "output"), (2048, 2, "output"), (768, 4, "token"),
                                (1280, 3, "output"), (1152, 2, "none")):  # fmt: skip
        for ragged in (False, True):
            name = f"D{width} r{factor} {norm}{' ragged' if ragged else ''}"
            yield name, lambda w=width, f=factor, n=norm, r=ragged: _launch(w, f, n, r)
    yield "D2048 r2 output fp32", lambda: _launch(2048, 2, "output", True, torch.float32)


def _launch(width: int, factor: int, norm: str, ragged: bool, dtype: torch.dtype = torch.bfloat16) -> None:
    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    grid = [2, 12, 24] + ([1, 24, 12, 3, 12, 12] if ragged else [])
    tokens = sum(grid[i] * grid[i + 1] * grid[i + 2] for i in range(0, len(grid), 3))
    x, size = empty(tokens, width), {"none": 0, "token": width, "output": factor**2 * width}[norm]
    weight = empty(size) if size else None
    pixel_shuffle_triton(x, grid, factor, ragged, weight, weight, 1e-6)
    mean = empty(tokens * width // size, dtype=torch.float32) if size else None
    saved = (x, weight, mean, mean) if size else (None,) * 4
    for kept in ((True, True), (False, True)) if size else ((True, False),):
        pixel_shuffle_bwd_triton(empty(tokens // factor**2, factor**2 * width), *saved, grid, factor, ragged, *kept)


@pytest.mark.parametrize("mode", ["forward", "backward", "full"] if CUDA else ["forward", "full"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if CUDA or "26B" not in case])
def bench_pixel_shuffle(compare, case, dtype, mode):
    grid, factor, width, norm = CASES[case]
    device = "cuda" if CUDA else "cpu"
    if not CUDA:
        grid = [(min(t, 1), h, w) for t, h, w in grid]
    torch.manual_seed(0)
    tokens = sum(t * h * w for t, h, w in grid)
    size = {"none": 0, "token": width, "output": factor**2 * width}[norm]
    x = torch.randn(tokens, width, device=device, dtype=dtype).requires_grad_()
    norms = [torch.randn(size, device=device, dtype=dtype).requires_grad_() for _ in range(2)] if size else []

    def ours(x, *norms):
        return pixel_shuffle(x, grid, factor, "rows", *norms)

    def eager(x, *norms):
        """Do what InternVL's and Idefics3's code does, one group of equal images after another."""
        parts, start, r = [], 0, factor
        for t, h, w in grid:
            tiles = x[start : start + t * h * w].view(t, h, w // r, r * width).permute(0, 2, 1, 3).contiguous()
            tiles = tiles.view(t, w // r, h // r, r * r * width).permute(0, 2, 1, 3)
            parts.append(tiles.reshape(-1, r * r * width))
            start += t * h * w
        y = torch.cat(parts) if len(parts) > 1 else parts[0]
        return F.layer_norm(y.view(-1, size), (size,), *norms).view(y.shape) if norms else y

    tensor = x.numel() * x.element_size()
    backward = tensor * (3 if norms else 2)
    compare(
        op="pixel_shuffle",
        case=f"{case} D{width} r{factor} {norm} {str(dtype)[6:]}",
        mode=mode,
        providers={"fastmllm": ours, "torch": eager, "torch.compile": torch.compile(eager)},
        inputs=[x, *norms],
        oracle=eager,
        bytes={"forward": 2 * tensor, "backward": backward, "full": 2 * tensor + backward}[mode],
        flops=x.numel() * {"forward": 8, "backward": 14, "full": 22}[mode] if norms else 0,
    )

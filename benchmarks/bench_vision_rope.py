"""vision_rope against transformers' formula (eager and compiled) and Liger, at the shapes of towers and decoders."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fastmllm.kernels._rope_tables import axial_rope_tables, grid_positions, mrope_tables
from fastmllm.kernels.vision_rope import vision_rope, vision_rope_bwd_triton, vision_rope_triton

CUDA = torch.cuda.is_available()
DTYPES = (torch.bfloat16,) if CUDA else (torch.float32, torch.bfloat16)
TOWER, DECODER = ("Qwen2.5-VL tower", 16, 16, 80), ("Qwen2.5-VL-7B decoder", 28, 4, 128)
CASES = [TOWER, ("Qwen3-VL tower", 16, 16, 72), ("Pixtral tower", 16, 16, 64), DECODER]


def aot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield head dimensions of vision towers, GQA, a partial rotation, a lone q, pairs (Llama-4), the largest heads."""
    for heads, kv_heads, head_dim, rotary, pairs in (
        (16, 16, 64, 64, False),
        (16, 16, 72, 72, False),
        (16, 16, 80, 80, False),
        (28, 4, 128, 128, False),
        (16, 2, 128, 64, False),
        (16, 0, 80, 80, False),
        (16, 16, 88, 88, True),
        (28, 4, 128, 64, True),
        (64, 8, 256, 256, True),
    ):
        name = f"{heads}+{kv_heads}x{head_dim}/{rotary}{' pairs' if pairs else ''}"
        yield name, lambda h=heads, k=kv_heads, d=head_dim, r=rotary, p=pairs: _launch(h, k, d, r, p)


def _launch(heads: int, kv_heads: int, head_dim: int, rotary: int, pairs: bool) -> None:
    packed = torch.empty((4096, heads + 2 * kv_heads, head_dim), dtype=torch.bfloat16, device="meta")
    table = torch.empty((4096, rotary // 2), dtype=torch.float32, device="meta")
    grads = vision_rope_triton(packed, table, table, heads, kv_heads, pairs, True)
    vision_rope_bwd_triton(*grads, table, table, pairs)
    if head_dim == 80 and kv_heads:
        vision_rope_triton(packed, table, table, heads, kv_heads, pairs, False)


def _tables(case: tuple[str, int, int, int], device: str) -> tuple[Tensor, Tensor]:
    if case is DECODER:
        length = 16384 if CUDA else 512
        places = torch.arange(length, device=device).expand(3, -1)
        return mrope_tables(places, case[3], [16, 24, 24], 1e6)
    grids = [(1, 64, 64)] * 4 if CUDA else [(1, 32, 32)]
    return axial_rope_tables(grid_positions(grids, 2, device), case[3])


def _published(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Do what transformers does: fp32 copies, rotate_half, tables of twice the width."""

    def rotate_half(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((-second, first), dim=-1)

    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return *((x.float() * cos + rotate_half(x.float()) * sin).to(qkv.dtype) for x in (q, k)), v


def _strong(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Do the same without rotate_half: the formula that the compiler fuses best."""

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)

    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return turn(q), turn(k), v


@functools.cache
def _liger() -> Callable[..., tuple[Tensor, Tensor]] | None:
    """Return Liger's kernel where it is installed and has a GPU."""
    try:
        from liger_kernel.transformers.rope import liger_rotary_pos_emb_vision
    except ImportError:
        return None
    return liger_rotary_pos_emb_vision if CUDA else None


@pytest.mark.parametrize("mode", ["forward", "backward", "full"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES if CUDA else [TOWER, DECODER], ids=lambda case: case[0])
def bench_vision_rope(compare, case, dtype, mode):
    name, heads, kv_heads, head_dim = case
    device = "cuda" if CUDA else "cpu"
    torch.manual_seed(0)
    cos, sin = _tables(case, device)
    wide = torch.cat([cos, cos], 1), torch.cat([sin, sin], 1)
    tokens = len(cos)
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim, device=device, dtype=dtype).requires_grad_()
    compiled, strong = torch.compile(_published), torch.compile(_strong)
    providers = {
        "fastmllm": lambda x: vision_rope(x, cos, sin, heads, kv_heads),
        "transformers": lambda x: _published(x, *wide, heads, kv_heads),
        "torch": lambda x: _strong(x, cos, sin, heads, kv_heads),
        "transformers, torch.compile": lambda x: compiled(x, *wide, heads, kv_heads),
        "torch.compile": lambda x: strong(x, cos, sin, heads, kv_heads),
    }
    if (liger := _liger()) is not None:

        def by_liger(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = x.split([heads, kv_heads, kv_heads], dim=1)
            return *liger(q, k, *wide), v

        providers["Liger"] = by_liger
    row = tokens * head_dim * qkv.element_size()
    table = 2 * cos.numel() * cos.element_size()
    turned, packed = heads + kv_heads, heads + 2 * kv_heads
    forward, backward = 2 * row * turned + table, 2 * row * packed + table
    compare(
        op="vision_rope",
        case=f"{name} T{tokens} H{heads}+{kv_heads} D{head_dim} {str(dtype)[6:]}",
        mode=mode,
        providers=providers,
        inputs=[qkv],
        oracle=lambda x: _strong(x, cos, sin, heads, kv_heads),
        bytes={"forward": forward, "backward": backward, "full": forward + backward + 2 * row * kv_heads}[mode],
        flops=6 * tokens * turned * head_dim // 2 * (2 if mode == "full" else 1),
    )

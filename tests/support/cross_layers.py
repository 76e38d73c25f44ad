"""What every cross-attention layer of a language model must hold; each test file calls these on its own layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastmllm.kernels.cross_attention import media_ranges

ROWS, LATENTS = (7, 5, 3), 4  # rows of each sample
PLACES = ((2, 4), (0,), ())  # the rows of each sample's images


def redraw(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter at random, gates and norms too: a gate of 0 would let any attention pass."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in sorted(module.named_parameters()):
        scale = 0.3 if p.dim() > 1 else 0.6
        with torch.no_grad():
            p.copy_(torch.randn(p.shape, generator=generator) * scale + (0.7 if "norm" in name and p.dim() == 1 else 0))
    return module


def batch(width: int, media_width: int, policy: str = "latest") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw three packed samples with two images, one and none: x (15, D), media (12, Dm), start and stop (15,)."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(ROWS), width, generator=generator)
    media = torch.randn(3 * LATENTS, media_width, generator=generator)
    is_media = torch.cat([torch.zeros(n).index_fill(0, torch.tensor(p, dtype=torch.long), 1).bool()
                          for n, p in zip(ROWS, PLACES, strict=True)])  # fmt: skip
    cu = torch.tensor([0, *ROWS]).cumsum(0).int()
    return x, media, *media_ranges(is_media, cu, torch.arange(4, dtype=torch.int32) * LATENTS, policy)


def run(layer: nn.Module, x: Tensor, media: Tensor, start: Tensor, stop: Tensor) -> Tensor:
    return layer(x, *layer.keys_values(media), start, stop, 2 * LATENTS)


def dense_mask(start: Tensor, stop: Tensor, keys: int) -> Tensor:
    """Return which keys each row sees, (T, N) bool."""
    key = torch.arange(keys)
    return (key >= start[:, None]) & (key < stop[:, None])


def assert_close(got: Tensor, want: Tensor, share: float = 1e-5) -> None:
    """Assert that the largest difference is at most `share` of the largest wanted value."""
    error, largest = (got.double() - want.double()).abs().max().item(), want.abs().max().item()
    assert error <= share * largest, f"error {error:.3e} of {largest:.3e}: {error / max(largest, 1e-30):.1e}"


def assert_gradients_close(got: list[Tensor], want: list[Tensor], share: float = 1e-4) -> None:
    largest = max(g.abs().max().item() for g in want)
    assert largest > 0
    for at, (a, b) in enumerate(zip(got, want, strict=True)):
        error = (a.double() - b.double()).abs().max().item()
        assert error <= share * largest, f"gradient {at}: error {error:.3e} of {largest:.3e}"


def check_equal(
    layer: nn.Module, oracle: Callable[[Tensor, Tensor], Tensor], parameters: dict[str, list[Tensor]],
    inputs: tuple[Tensor, Tensor, Tensor, Tensor], rows: Tensor | None = None,
) -> None:  # fmt: skip
    """Assert that forward and gradients are those of `oracle(x, media)`.

    Args:
        layer: ours.
        oracle: theirs, on the same packed rows.
        parameters: our parameter's name and theirs, which are joined along the first axis.
        inputs: what `batch` returned.
        rows: which rows count, None for all.
    """
    x, media, start, stop = inputs
    x, media = x.requires_grad_(), media.requires_grad_()
    rows = torch.ones(len(x), dtype=torch.bool) if rows is None else rows
    mine, theirs = run(layer, x, media, start, stop)[rows], oracle(x, media)[rows]
    assert_close(mine, theirs)
    own = dict(layer.named_parameters())
    assert own.keys() == parameters.keys()
    weight = torch.randn(mine.shape, generator=torch.Generator().manual_seed(2))
    got = torch.autograd.grad((mine * weight).sum(), [x, media, *own.values()])
    flat = [p for name in own for p in parameters[name]]
    grads = torch.autograd.grad((theirs * weight.to(theirs.dtype)).sum(), [x, media, *flat])
    found = iter(grads[2:])
    want = [*grads[:2], *(torch.cat([next(found) for _ in parameters[name]]).reshape(p.shape)
                          for name, p in own.items())]  # fmt: skip
    assert_gradients_close(list(got), want)


def check_later_images_move_no_earlier_row(layer: nn.Module, width: int, media_width: int) -> None:
    """Change the first sample's second image, then the second sample's: rows before them keep all bits."""
    for policy in ("latest", "all_previous"):
        x, media, start, stop = batch(width, media_width, policy)
        before = run(layer, x, media, start, stop)
        for image, first, end in ((1, 4, 7), (2, 7, 12)):
            other = media.clone()
            other[image * LATENTS : (image + 1) * LATENTS] = torch.randn(LATENTS, media_width) * 5
            moved = (run(layer, x, other, start, stop) != before).any(-1)
            assert moved.tolist() == [first <= row < end for row in range(len(x))]


def check_packed_equals_alone(layer: nn.Module, width: int, media_width: int) -> None:
    """Each sample alone gives the packed batch's rows, loss and gradients."""
    x, media, start, stop = batch(width, media_width, "all_previous")
    inputs = [x.requires_grad_(), media.requires_grad_(), *layer.parameters()]
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    whole = run(layer, x, media, start, stop)
    bounds = torch.tensor([0, *ROWS]).cumsum(0).tolist()
    images = (0, 2, 3, 3)
    parts = []
    for sample in range(3):
        rows = slice(bounds[sample], bounds[sample + 1])
        first, last = images[sample] * LATENTS, images[sample + 1] * LATENTS
        shift = (start[rows] < stop[rows]) * first
        parts.append(run(layer, x[rows], media[first:last], start[rows] - shift.int(), stop[rows] - shift.int()))
    apart = torch.cat(parts)
    assert_close(apart, whole, 2e-6)
    losses = [(t * weight).sum() for t in (whole, apart)]
    assert_close(losses[1], losses[0], 2e-6)
    got, want = (torch.autograd.grad(loss, inputs) for loss in losses)
    assert_gradients_close(list(got), list(want), 2e-6)


def check_text_only(layer: nn.Module, width: int, media_width: int) -> Tensor:
    """A batch without any media runs forward and backward; media-side gradients are zeros. Returns the result."""
    x = batch(width, media_width)[0].requires_grad_()
    none = torch.zeros(len(x), dtype=torch.int32)
    y = run(layer, x, x.new_empty(0, media_width), none, none)
    (y * torch.randn_like(y)).sum().backward()
    assert layer.kv_proj.weight.grad is not None
    assert not layer.kv_proj.weight.grad.any()
    layer.zero_grad()
    return y


def check_media_count(layer: nn.Module, width: int, media_width: int) -> None:
    """Changed media change the rows that see them, and media and their projections get gradients."""
    x, media, start, stop = batch(width, media_width)
    media.requires_grad_()
    y = run(layer, x, media, start, stop)
    other = run(layer, x, media.detach() + 0.5, start, stop)
    assert torch.equal((y != other).any(-1), start < stop)
    (y * torch.randn_like(y)).sum().backward()
    assert media.grad is not None
    assert (media.grad.abs().sum(-1) > 0).all()
    assert layer.kv_proj.weight.grad.abs().sum() > 0
    layer.zero_grad()


def check_steps_equal_whole(layer: nn.Module, width: int, media_width: int) -> None:
    """Rows one after the other, with kept keys and values, give the full pass."""
    x, media, start, stop = batch(width, media_width)
    k, v = layer.keys_values(media)
    whole = layer(x, k, v, start, stop, LATENTS)
    steps = [layer(x[t : t + 1], k, v, start[t : t + 1], stop[t : t + 1], LATENTS) for t in range(len(x))]
    assert_close(torch.cat(steps), whole, 2e-6)


def check_bfloat16(layer: nn.Module, width: int, media_width: int) -> None:
    x, media, start, stop = batch(width, media_width)
    with torch.no_grad():
        expected = run(layer, x, media, start, stop)
        y = run(layer.bfloat16(), x.bfloat16(), media.bfloat16(), start, stop)
    assert y.dtype == torch.bfloat16
    assert ((y.float() - expected).norm() / expected.norm()).item() < 0.03

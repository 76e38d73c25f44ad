"""What every kernel test shares: calibrated tolerances, guarded memory, awkward tensors."""

from __future__ import annotations

from unittest import mock

import torch
from torch import Tensor


def assert_as_accurate(
    actual: Tensor, same_dtype: Tensor, oracle: Tensor, factor: float = 2.0, ulps: float = 4.0
) -> None:
    """Assert that `actual` errs at most `factor` times as much as the same-dtype torch result, plus a few ulp.

    Args:
        actual: the result under test.
        same_dtype: torch's own result in the dtype of `actual`.
        oracle: the fp64 result.
        factor: how much worse `actual` may be.
        ulps: units in the last place of the largest oracle value, for results that torch gets exactly right.
    """
    assert actual.shape == oracle.shape, f"shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"
    assert not actual.isnan().any(), "NaN in the result: an out-of-bounds read or an unmasked tail"
    if not oracle.numel():
        return
    error = (actual.double() - oracle.double()).abs().max().item()
    torch_error = (same_dtype.double() - oracle.double()).abs().max().item()
    floor = ulps * torch.finfo(actual.dtype).eps * max(oracle.abs().max().item(), 1e-30)
    assert error <= factor * torch_error + floor, f"error {error:.3e} against torch's {torch_error:.3e} + {floor:.3e}"


class Guard:
    """Copy tensors between guard zones: out-of-bounds reads surface as NaN, writes are found by `check`."""

    def __init__(self, pad: int = 4096) -> None:
        self.pad = pad
        self.buffers: list[tuple[Tensor, int, float]] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        fill = float("nan") if tensor.is_floating_point() else 77
        buffer = torch.full((tensor.numel() + 2 * self.pad,), fill, dtype=tensor.dtype, device=tensor.device)
        inner = buffer[self.pad : self.pad + tensor.numel()].view(tensor.shape)
        inner.copy_(tensor)
        self.buffers.append((buffer, tensor.numel(), fill))
        return inner

    def run(self, launcher, *args):
        """Call a launcher with every tensor argument, and every tensor that it allocates, between guard zones."""
        allocate = {"empty": torch.empty, "empty_like": torch.empty_like, "new_empty": Tensor.new_empty}

        def guarded(make):
            def poisoned(*a, **k):
                plain = make(*a, **k)
                inner = self(plain.contiguous())
                return inner.fill_(float("nan") if plain.is_floating_point() else 77)

            return poisoned

        args = [self(a) if isinstance(a, Tensor) else a for a in args]
        with (
            mock.patch.object(torch, "empty", guarded(allocate["empty"])),
            mock.patch.object(torch, "empty_like", guarded(allocate["empty_like"])),
            mock.patch.object(Tensor, "new_empty", guarded(allocate["new_empty"])),
        ):
            return launcher(*args)

    def check(self) -> None:
        for buffer, size, fill in self.buffers:
            for zone in (buffer[: self.pad], buffer[self.pad + size :]):
                intact = zone.isnan().all() if fill != fill else (zone == fill).all()
                assert intact, "a kernel wrote outside of its tensor"


def strided(tensor: Tensor) -> Tensor:
    """Return the same values in a non-contiguous layout (every other column of a wider buffer)."""
    wide = tensor.new_full(
        (*tensor.shape[:-1], 2 * tensor.shape[-1]), float("nan") if tensor.is_floating_point() else 77
    )
    wide[..., ::2] = tensor
    return wide[..., ::2]


def gradients(outputs, inputs, seeds):
    """Return d(sum outputs * seeds)/d(inputs); None where an input is not reached."""
    pairs = [(o, s.to(o.dtype)) for o, s in zip(outputs, seeds, strict=True)]
    return torch.autograd.grad([o for o, _ in pairs], inputs, [s for _, s in pairs], allow_unused=True)

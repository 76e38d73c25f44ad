"""The connector between tower and language model, where an image's tokens are compressed for the text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from fastmllm.hf.compress.listening import watched
from fastmllm.hf.compress.media import VIDEO
from fastmllm.hf.compress.merging import merging
from fastmllm.hf.compress.seams import KEY
from fastmllm.hf.compress.state import Compression
from fastmllm.hf.fusion import Fusion


class Connector(Fusion):
    """What stands between tower and language model: it takes K tokens of an image, or gives K."""

    op = "compress"

    @staticmethod
    def forward(module: Any, original: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        state: Compression = module.__dict__[KEY]
        if state.now.medium is VIDEO:  # its frames are pooled first
            return original(module, x, *args, **kwargs)
        if state.seam.side == "in front of":
            return original(module, state.dense(x), *args, **kwargs)
        return state.dense(original(module, x, *args, **kwargs))


def connected(
    state: Compression, root: nn.Module, at: str
) -> Iterator[tuple[str, nn.Module, type[Fusion], dict[str, Any], str | None]]:
    """Yield the modules between pixels and text that take part, as `compress_fusions` does.

    Args:
        state: of the model.
        root: the model that is patched.
        at: the name in it of the model without head.
    """
    seam = state.seam
    if state.inside:
        assert seam.tower is not None
        yield from merging(f"{at}.{seam.tower}".lstrip("."), state)
        return
    if seam.connector is not None:
        connector = getattr(state.owner, seam.connector)
        yield f"{at}.{seam.connector}".lstrip("."), connector, Connector, {KEY: state}, None
    if state.tower is not None:
        yield from watched(state.tower, root)

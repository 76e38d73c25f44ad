"""Images, texts and batches: from registry packages or a folder of photographs to packed tensors."""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Public name -> module. Imported on first use, so that `import fastmllm.data` costs nothing.
# `build` is not here: the module of that name would hide it (from fastmllm.data.build import build).
_PUBLIC = {
    "cache_dir": "cache",
    "Sample": "sample",
    "ImageError": "images",
    "load_image": "images",
    "DataConfig": "build",
    "Splits": "build",
    "Batch": "packing",
    "collate": "packing",
    "pack": "packing",
    "MixtureSampler": "mixture",
    "Conversation": "sample",
    "Turn": "sample",
    "SourceConfig": "shards",
    "ShardSource": "shards",
    "Skipped": "shard_index",
    "BatchPlan": "balance",
    "Stream": "stream",
    "Loader": "loader",
    "ChatTemplate": "text",
    "TextError": "text",
    "screen": "text",
    "FilterConfig": "filtering.rules",
    "Measures": "filtering.measure",
    "measure": "filtering.measure",
    "decide": "filtering.decide",
    "reshard": "filtering.reshard",
    "AdaptConfig": "instruct.adapt",
    "adapt": "instruct.adapt",
    "Replies": "instruct.replies",
    "self_instruct": "instruct.self_instruct",
    "recaption": "instruct.recaption",
    "CleanConfig": "loss_outliers",
    "Phase": "phases",
    "PhasedMixture": "phases",
    "TransferMatrix": "transfer",
    "measure_transfer": "transfer",
    "sample_weights": "token_shares",
    "read_records": "records",
    "write_records": "records",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)

"""One rank of a contrastive loss: python contrastive_rank.py <rank> <world> <file with the batch> <folder>."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from fastmllm.models.contrastive import ClipLoss, SiglipLoss


def main(rank: int, world: int, batch: Path, folder: Path) -> None:
    """Compute this rank's share of both losses and of their gradients; write them."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    data = torch.load(batch)
    mine = slice(rank * data["n"], (rank + 1) * data["n"])
    result = {}
    for name, loss in (("clip", ClipLoss()), ("siglip", SiglipLoss())):
        loss.load_state_dict(data[name])
        loss.to(data["x"].dtype)
        towers = [data[key].clone().requires_grad_() for key in ("image_tower", "text_tower")]
        value = loss(data["x"][mine] @ towers[0], data["y"][mine] @ towers[1])
        parameters = [*towers, *loss.parameters()]
        result[name] = (value.detach(), torch.autograd.grad(value, parameters))
    torch.save(result, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))

"""One rank of both contrastive losses: leave this rank's share of them and of their gradients."""

from __future__ import annotations

import torch
from ranks import join, leave

from fastmllm.models.contrastive import ClipLoss, SiglipLoss

rank, _, folder, _ = join()
data = torch.load(folder / "batch.pt")
mine = slice(rank * data["n"], (rank + 1) * data["n"])
result = {}
for name, loss in (("clip", ClipLoss()), ("siglip", SiglipLoss())):
    loss.load_state_dict(data[name])
    loss.to(data["x"].dtype)
    towers = [data[key].clone().requires_grad_() for key in ("image_tower", "text_tower")]
    value = loss(data["x"][mine] @ towers[0], data["y"][mine] @ towers[1])
    result[name] = (value.detach(), torch.autograd.grad(value, [*towers, *loss.parameters()]))
leave(result)

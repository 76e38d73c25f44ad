"""One of two ranks: score its half of the pairs and save losses and averaged gradients. Run by test_qformer_losses."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from qformer_pairs import BOS, batch, model

rank, out = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{out}/meeting", rank=rank, world_size=2)
trained = model(torch.float64)
media, text, image_ids = batch(range(2 * rank, 2 * rank + 2), torch.float64)
generator = torch.Generator().manual_seed(5)
losses = trained(media, text, bos_token_id=BOS, generator=generator, image_ids=image_ids, divisor=float(sys.argv[3]))
losses.total.backward()
means = {"itc": losses.itc.detach(), "itm": losses.itm.detach(), "itg": losses.itg.detach()}
means |= {name: p.grad for name, p in trained.named_parameters()}
for value in means.values():
    dist.all_reduce(value)
    value /= 2
torch.save(means | {"media": media.tokens.grad}, out / f"rank{rank}.pt")
dist.destroy_process_group()

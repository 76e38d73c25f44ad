"""One of two ranks: score its half of the pairs and leave losses and averaged gradients. Run by test_qformer_losses."""

from __future__ import annotations

import torch
import torch.distributed as dist
from qformer_pairs import BOS, batch, model
from ranks import join, leave

rank, world, _, (divisor,) = join()
trained = model(torch.float64)
media, text, image_ids = batch(range(2 * rank, 2 * rank + 2), torch.float64)
generator = torch.Generator().manual_seed(5)
losses = trained(media, text, bos_token_id=BOS, generator=generator, image_ids=image_ids, divisor=float(divisor))
losses.total.backward()
means = {"itc": losses.itc.detach(), "itm": losses.itm.detach(), "itg": losses.itg.detach()}
means |= {name: p.grad for name, p in trained.named_parameters()}
for value in means.values():
    dist.all_reduce(value)
    value /= world
leave(means | {"media": media.tokens.grad})

"""LMHead: logits as nn.Linear, loss as cross-entropy over the rows that count, same parameter name."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastmllm.modules.lm_head import LMHead


def test_logits_and_loss():
    torch.manual_seed(0)
    head = LMHead(8, 13)
    hidden, labels = torch.randn(5, 8), torch.tensor([3, -100, 12, 0, -100])
    logits = head(hidden)
    torch.testing.assert_close(logits, hidden @ head.weight.T)
    torch.testing.assert_close(head(hidden, labels, 3), F.cross_entropy(logits, labels, reduction="sum"))
    assert list(head.state_dict()) == ["weight"]

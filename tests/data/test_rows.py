from __future__ import annotations

import torch

from fastmllm.data.packing import join
from fastmllm.data.rows import IGNORE, prepare, unscored
from fastmllm.data.sample import Conversation, Turn


def test_nothing_is_learned_from_an_unscored_row(tokenizer) -> None:
    sample = Conversation(id="c", turns=(Turn(prompt="What is this?", answer="red apple"),))
    row = prepare(sample, tokenizer, num_visual_tokens=1, image_size=8, image_token_id=299)
    scored, blank = join([row]), join([unscored(row), unscored(row)])
    assert scored.num_targets > 0
    assert blank.num_targets == 0
    assert torch.equal(blank.input_ids, scored.input_ids.repeat(2))
    assert set(blank.labels.tolist()) == {IGNORE}

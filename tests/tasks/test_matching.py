import pytest
import torch

import mplug2_fast as mf
from tests.tiny import SMALL, random_text, random_video, randomise


@pytest.mark.parametrize("k", [0, 3])
def test_scores_in_bfloat16_are_float32(k):
    """Scores that are rounded to bfloat16 are often equal, and then have no rank."""
    torch.manual_seed(0)
    model = randomise(mf.MPlug2(SMALL, ["retrieval"]).requires_grad_(False)).bfloat16()
    ids, mask = random_text(SMALL, 5, 6)
    inputs = {"text_ids": ids, "text_mask": mask, "k": k}
    found = model.predict("retrieval", random_video(SMALL, 4).bfloat16(), **inputs)
    assert {each.dtype for each in found} == {torch.float32}
    assert not torch.equal(found.by_visual, found.by_visual.bfloat16().float())

"""Any number of universal layers, shared or not: the fast model, the reference, and files."""

import pytest
import torch

import mplug2_fast as mf
from tests.tiny import SMALL, pair, random_text, random_video


@pytest.mark.parametrize("share", [True, False], ids=["shared", "each its own"])
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_universal_layers(count, share, tmp_path):
    text = {"num_uni_layer": count, "share_universal": share, "text_encoder_layers": 4, "text_decode_layers": 3}
    config = SMALL.replace(text=text)
    reference, fast = pair(config, "question_answering")
    video = random_video(config)
    ids, mask = random_text(config, 2, 6)
    with torch.no_grad():
        torch.testing.assert_close(fast.encode_video(video), reference.encode_video(video), rtol=1e-4, atol=1e-4)
        seen = mask.bool()
        expected = reference.text_encoder(ids, mask)[seen]
        torch.testing.assert_close(fast.encode_text(ids, mask)[seen], expected, rtol=1e-4, atol=1e-4)
    assert fast.official_names.needed.keys() == reference.official_parameters().keys()
    mf.checkpoint.save_pretrained(fast, tmp_path / "saved")
    loaded = mf.from_pretrained(tmp_path / "saved")
    assert loaded.config == config
    with torch.no_grad():
        torch.testing.assert_close(loaded.encode_video(video), fast.encode_video(video), rtol=1e-4, atol=1e-5)


def test_changes_of_the_shared_layers_change_both_sides():
    for share in (True, False):
        config = SMALL.replace(num_uni_layer=2, share_universal=share)
        _, fast = pair(config, "question_answering")
        video, (ids, mask) = random_video(config), random_text(config, 2, 6)
        with torch.no_grad():
            before = fast.encode_video(video), fast.encode_text(ids, mask)
            fast.universal.layers[1].intermediate.dense.bias.add_(1.0)
            after = fast.encode_video(video), fast.encode_text(ids, mask)
        assert not torch.allclose(before[0], after[0], atol=1e-4)
        assert torch.allclose(before[1], after[1], atol=1e-4) != share

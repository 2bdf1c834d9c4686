"""The formulas against what is known of the Large model: 16 frames of 224 pixels, 5 beams, 15 steps; in GFLOP."""

import pytest

from bench import flops
from mplug2_fast import MPlug2Config

LARGE = MPlug2Config.preset("large")
RUN = {"frames": 16, "beams": 5, "steps": 15}


@pytest.mark.parametrize(
    ("part", "expected", "digits"),
    [
        (flops.patches(LARGE, 16), 5, 0),
        (flops.vision_projections(LARGE, 16), 828, 0),
        (flops.vision_scores(LARGE, 16), 104, 0),
        (flops.vision_mlp(LARGE, 16), 1656, 0),
        (flops.local_temporal(LARGE, 16), 413, 0),
        (flops.visual_projection(LARGE, 16), 0, 0),
        (flops.universal_first(LARGE, 16), 19, 0),
        (flops.universal_last(LARGE, 16), 190, 0),
        (flops.memory_keys_values(LARGE, 16), 206, 0),
        (flops.decoder_tokens(LARGE, 5, 15), 25, 0),
        (flops.cross_attention(LARGE, 16, 5, 15), 14, 0),
        (flops.head(LARGE, 5, 15), 4.6, 1),
        (flops.needed("captioning", LARGE, **RUN), 3460, -1),
    ],
)
def test_large(part, expected, digits):
    assert round(part / 1e9, digits) == expected


def test_captioning_is_the_sum_of_its_levels():
    total = sum(flops.needed(level, LARGE, **RUN) for level in ("vision", "universal", "decode"))
    assert flops.needed("captioning", LARGE, **RUN) == total


def test_batch_multiplies():
    assert flops.needed("vision", LARGE, **RUN, batch=3) == 3 * flops.needed("vision", LARGE, **RUN)


def test_unequal_widths_are_projected():
    config = LARGE.replace(width=768)
    assert flops.visual_projection(config, 16) == 2 * 4097 * 768 * 1024


def test_temporal_downsampling_halves_the_frames():
    config = LARGE.replace(temporal_downsampling=True, temporal_stride=2)
    assert flops.visual_tokens(config, 16) == 1 + 8 * 256
    assert 2 * flops.vision_mlp(config, 16) == flops.vision_mlp(LARGE, 16)
    assert 2 * flops.patches(config, 16) == 3 * flops.patches(LARGE, 16)

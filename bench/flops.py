"""How many floating-point operations a video needs, from the configuration alone.

Needed means: what no implementation can do without, whatever it really does. One multiply-add is 2 FLOP; layer norms,
activations and softmaxes are not counted. The formulas are those of the matrix products, for batch 1.
"""

from __future__ import annotations

from mplug2_fast.config import MPlug2Config

LEVELS = ("vision", "universal", "decode", "captioning")


def _linear(rows: int, inputs: int, outputs: int) -> int:
    return 2 * rows * inputs * outputs


def _attention(queries: int, keys: int, channels: int) -> int:
    """Scores and their product with the values, over all heads."""
    return 2 * _linear(queries, channels, keys)


def visual_tokens(config: MPlug2Config, frames: int) -> int:
    """S: the mean class token and the patches of all frames."""
    return 1 + config.vision.output_frames(frames) * config.vision.num_patches


def patches(config: MPlug2Config, frames: int) -> int:
    """The patch convolution as a product."""
    vision = config.vision
    inputs = 3 * vision.patch_size**2 * (3 if vision.temporal_downsampling else 1)
    return _linear(vision.output_frames(frames) * vision.num_patches, inputs, vision.width)


def vision_projections(config: MPlug2Config, frames: int) -> int:
    """Queries, keys, values and output of all blocks."""
    vision = config.vision
    tokens = vision.output_frames(frames) * (1 + vision.num_patches)
    return vision.layers * _linear(tokens, vision.width, 4 * vision.width)


def vision_scores(config: MPlug2Config, frames: int) -> int:
    """Attention within each frame, class token included."""
    vision = config.vision
    tokens = 1 + vision.num_patches
    return vision.layers * vision.output_frames(frames) * _attention(tokens, tokens, vision.width)


def vision_mlp(config: MPlug2Config, frames: int) -> int:
    """Both products of every block's MLP."""
    vision = config.vision
    tokens = vision.output_frames(frames) * (1 + vision.num_patches)
    return vision.layers * 2 * _linear(tokens, vision.width, vision.mlp_ratio * vision.width)


def local_temporal(config: MPlug2Config, frames: int) -> int:
    """Two modules a block, on patches only: down, convolution over time, up."""
    vision = config.vision
    tokens, inner = vision.output_frames(frames) * vision.num_patches, vision.width // vision.temporal_reduction
    convolution = 2 * tokens * inner * vision.temporal_kernel_size
    return 2 * vision.layers * (2 * _linear(tokens, vision.width, inner) + convolution)


def visual_projection(config: MPlug2Config, frames: int) -> int:
    """From the vision width to the BERT width; nothing where they are equal."""
    width, hidden = config.vision.width, config.text.hidden_size
    return 0 if width == hidden else _linear(visual_tokens(config, frames), width, hidden)


def universal_first(config: MPlug2Config, frames: int) -> int:
    """Latents to visual tokens. The latents' own self-attention and their queries are constants of the model."""
    text, tokens = config.text, visual_tokens(config, frames)
    dim, latents = text.hidden_size, text.num_latents
    keys_values = _linear(tokens, dim, 2 * dim)
    mlp = 2 * _linear(latents, dim, text.intermediate_size)
    return keys_values + _attention(latents, tokens, dim) + _linear(latents, dim, dim) + mlp


def universal_last(config: MPlug2Config, frames: int) -> int:
    """Self-attention over all visual tokens, cross-attention to the latents, FFN."""
    text, tokens = config.text, visual_tokens(config, frames)
    dim, latents = text.hidden_size, text.num_latents
    self_attention = _linear(tokens, dim, 4 * dim) + _attention(tokens, tokens, dim)
    cross = _linear(tokens, dim, 2 * dim) + _linear(latents, dim, 2 * dim) + _attention(tokens, latents, dim)
    return self_attention + cross + 2 * _linear(tokens, dim, text.intermediate_size)


def memory_keys_values(config: MPlug2Config, frames: int) -> int:
    """The decoder's cross-attention keys and values, once a video."""
    dim = config.text.hidden_size
    return config.text.text_decode_layers * _linear(visual_tokens(config, frames), dim, 2 * dim)


def decoded_tokens(beams: int, steps: int) -> int:
    """Tokens that go through the decoder: at the first step all beams are the same, so one."""
    return 1 + beams * (steps - 1)


def decoder_tokens(config: MPlug2Config, beams: int, steps: int) -> int:
    """All linear layers but the cached keys and values of the memory, and self-attention over the tokens so far."""
    text = config.text
    dim = text.hidden_size
    linear = _linear(decoded_tokens(beams, steps), dim, 6 * dim + 2 * text.intermediate_size)
    scores = sum((1 if step == 0 else beams) * _attention(1, step + 1, dim) for step in range(steps))
    return text.text_decode_layers * (linear + scores)


def cross_attention(config: MPlug2Config, frames: int, beams: int, steps: int) -> int:
    """Scores of the decoded tokens against the visual tokens, and their product with the values."""
    text = config.text
    each = _attention(decoded_tokens(beams, steps), visual_tokens(config, frames), text.hidden_size)
    return text.text_decode_layers * each


def head(config: MPlug2Config, beams: int, steps: int) -> int:
    """The head's dense layer and the word scores."""
    dim = config.text.hidden_size
    return _linear(decoded_tokens(beams, steps), dim, dim + config.text.vocab_size)


def needed(level: str, config: MPlug2Config, *, frames: int, beams: int, steps: int, batch: int = 1) -> int:
    """FLOP that `level` (one of `LEVELS`) needs for `batch` videos."""
    vision = sum(
        part(config, frames)
        for part in (patches, vision_projections, vision_scores, vision_mlp, local_temporal, visual_projection)
    )
    universal = universal_first(config, frames) + universal_last(config, frames)
    decode = (
        memory_keys_values(config, frames)
        + decoder_tokens(config, beams, steps)
        + cross_attention(config, frames, beams, steps)
        + head(config, beams, steps)
    )
    levels = {"vision": vision, "universal": universal, "decode": decode, "captioning": vision + universal + decode}
    return batch * levels[level]

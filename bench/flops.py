"""The floating-point operations and bytes that a task needs, from the configuration alone.

Needed is what no implementation can avoid. A multiply-add is 2 FLOP. Only matrix products count, not layer norms,
activations and softmaxes. Formulas are for batch 1.
"""

from __future__ import annotations

from torch import nn

from mplug2_fast.models.mplug2 import MPlug2ForQuestionAnswering
from mplug2_fast.models.mplug2.config import MPlug2Config

TASKS = ("captioning", "answering", "features", "vision", "universal", "decode")
STEPS = (
    "captioning step",
    "captioning step checkpointed",
    "answering step",
    "answering step checkpointed",
)
"""Training steps."""


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
    """Two modules per block, on patches only: down, convolution over time, up."""
    vision = config.vision
    tokens, inner = vision.output_frames(frames) * vision.num_patches, vision.width // vision.temporal_reduction
    convolution = 2 * tokens * inner * vision.temporal_kernel_size
    return 2 * vision.layers * (2 * _linear(tokens, vision.width, inner) + convolution)


def visual_projection(config: MPlug2Config, frames: int) -> int:
    """From the vision width to the BERT width; nothing where they are equal."""
    width, hidden = config.vision.width, config.text.hidden_size
    return 0 if width == hidden else _linear(visual_tokens(config, frames), width, hidden)


def universal_first(config: MPlug2Config, frames: int) -> int:
    """Latents to visual tokens. The self-attention and the queries of the latents are constants of the model."""
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


def text_encoder(config: MPlug2Config, question: int) -> int:
    """All layers over the tokens of a question, with the universal ones: self-attention and FFN."""
    return config.text.text_encoder_layers * _bert_layer(config, question)


def fusion(config: MPlug2Config, frames: int, question: int) -> int:
    """The question attends to the visual tokens. Connected layers run over both together."""
    text, tokens = config.text, visual_tokens(config, frames)
    dim = text.hidden_size
    cross = _linear(question, dim, 2 * dim) + _linear(tokens, dim, 2 * dim) + _attention(question, tokens, dim)
    return sum(
        _bert_layer(config, tokens + question) if text.connected(n) else _bert_layer(config, question) + cross
        for n in range(text.fusion_layers)
    )


def _bert_layer(config: MPlug2Config, tokens: int) -> int:
    """Full self-attention and FFN."""
    dim = config.text.hidden_size
    mlp = 2 * _linear(tokens, dim, config.text.intermediate_size)
    return _linear(tokens, dim, 4 * dim) + _attention(tokens, tokens, dim) + mlp


def memory_keys_values(config: MPlug2Config, memory: int) -> int:
    """Cross-attention keys and values of `memory` tokens, once per video."""
    dim = config.text.hidden_size
    return config.text.text_decode_layers * _linear(memory, dim, 2 * dim)


def decoded_tokens(beams: int, steps: int) -> int:
    """Tokens that the decoder computes: one at the first step, where all beams are the same."""
    return 1 + beams * (steps - 1)


def decoder_tokens(config: MPlug2Config, beams: int, steps: int) -> int:
    """All linear layers except the cached keys and values of the memory, and self-attention over the tokens so far."""
    text = config.text
    dim = text.hidden_size
    linear = _linear(decoded_tokens(beams, steps), dim, 6 * dim + 2 * text.intermediate_size)
    scores = sum((1 if step == 0 else beams) * _attention(1, step + 1, dim) for step in range(steps))
    return text.text_decode_layers * (linear + scores)


def cross_attention(config: MPlug2Config, memory: int, beams: int, steps: int) -> int:
    """Attention of the decoded tokens to the memory."""
    text = config.text
    return text.text_decode_layers * _attention(decoded_tokens(beams, steps), memory, text.hidden_size)


def head(config: MPlug2Config, beams: int, steps: int) -> int:
    """The head's dense layer and the word scores."""
    dim = config.text.hidden_size
    return _linear(decoded_tokens(beams, steps), dim, dim + config.text.vocab_size)


def decoding(config: MPlug2Config, memory: int, beams: int, steps: int) -> int:
    """A beam search over `memory` tokens."""
    return (
        memory_keys_values(config, memory)
        + decoder_tokens(config, beams, steps)
        + cross_attention(config, memory, beams, steps)
        + head(config, beams, steps)
    )


def training(config: MPlug2Config, frames: int, steps: int, batch: int, question: int = 0) -> int:
    """Three times the forward pass, without the gradient of the pixels and without the update.

    A caption has the ignored tokens of the prompt and `steps` learned ones, which alone are scored. Teacher forcing
    computes as many tokens as one beam decodes. The latents change with each step, so their own self-attention is
    computed once per batch. If `question` is given, the step trains an answer of `steps` tokens to a question of that
    length.
    """
    text = config.text
    dim, latents, prompt = text.hidden_size, text.num_latents, 0 if question else config.generation.prompt_tokens
    forward = vision(config, frames) + universal(config, frames)
    if question:
        forward += text_encoder(config, question) + fusion(config, frames, question)
    forward += decoding(config, visual_tokens(config, frames) + question, 1, prompt + steps)
    forward -= _linear(prompt, dim, dim + text.vocab_size)
    own = _linear(latents, dim, 5 * dim) + _attention(latents, latents, dim)
    return batch * (3 * forward - patches(config, frames)) + 3 * own


def recomputed(
    task: str, config: MPlug2Config, *, frames: int, beams: int, steps: int, batch: int = 1, question: int = 10
) -> int:
    """What checkpointing computes a second time: the layers of the vision encoder, of the text encoder, of the fusion
    encoder and of the decoder."""
    layers = vision_projections(config, frames) + vision_scores(config, frames) + vision_mlp(config, frames)
    layers += local_temporal(config, frames)
    memory, tokens = visual_tokens(config, frames), config.generation.prompt_tokens + steps
    if task.startswith("answering"):
        memory, tokens = memory + question, steps
        text_layers = config.text.text_encoder_layers - config.text.num_uni_layer
        layers += text_layers * _bert_layer(config, question) + fusion(config, frames, question)
    return batch * (layers + decoder_tokens(config, 1, tokens) + cross_attention(config, memory, 1, tokens))


def vision(config: MPlug2Config, frames: int) -> int:
    """Video to visual tokens."""
    parts = (patches, vision_projections, vision_scores, vision_mlp, local_temporal, visual_projection)
    return sum(part(config, frames) for part in parts)


def universal(config: MPlug2Config, frames: int) -> int:
    """Visual tokens to image_embeds."""
    return universal_first(config, frames) + universal_last(config, frames)


def needed(
    task: str, config: MPlug2Config, *, frames: int, beams: int, steps: int, batch: int = 1, question: int = 10
) -> int:
    """FLOP that `task` (from `TASKS`) needs for `batch` videos. A question has `question` tokens."""
    if task in STEPS:
        return training(config, frames, steps, batch, question if task.startswith("answering") else 0)
    tokens, features = visual_tokens(config, frames), vision(config, frames) + universal(config, frames)
    if task == "answering":
        asked = text_encoder(config, question) + fusion(config, frames, question)
        return batch * (features + asked + decoding(config, tokens + question, beams, steps))
    decode = decoding(config, tokens, beams, steps)
    tasks = {
        "vision": vision(config, frames),
        "universal": universal(config, frames),
        "features": features,
        "decode": decode,
        "captioning": features + decode,
    }
    return batch * tasks[task]


def needed_bytes(
    task: str,
    config: MPlug2Config,
    element: int,
    *,
    frames: int,
    beams: int,
    steps: int,
    batch: int = 1,
    question: int = 10,
) -> int:
    """Bytes that `task` must move, in elements of `element` bytes, without anything that could stay in a cache.

    - weights once; lookup tables count as nothing
    - videos, hidden states that are inputs or results, found tokens and scores
    - decoding: at each step the decoder's weights, except those of the memory's keys and values, and all keys and
      values: the memory's once for all beams of a video, and each beam's own; all are written once
    - training: weights and both moments of the optimizer, read and written, in float32
    """
    model, vision_config, text = MPlug2ForQuestionAnswering(config, device="meta"), config.vision, config.text
    tokens = visual_tokens(config, frames)
    video = batch * 3 * frames * vision_config.image_size**2 * element
    states = batch * tokens * text.hidden_size * element
    found = batch * ((steps + 1) * 8 + 4)
    vision_weights = element * _parameters(model.visual, model.visual_projection, model.visual_projection_norm)
    universal_weights = element * _parameters(model.universal, model.visual_norm)
    weights = vision_weights + universal_weights
    if task in STEPS:
        trained = model if task.startswith("answering") else model.captioner()
        return 6 * 4 * _parameters(trained) + video // element * 4 + batch * (steps + 1) * 8
    if task == "answering":
        asked = element * _parameters(model.text.layers, model.fusion)
        decode = decoding_bytes(model, element, tokens + question, beams, steps, batch)
        return video + weights + asked + decode + found + batch * question * 8
    decode = decoding_bytes(model, element, tokens, beams, steps, batch) + found
    tasks = {
        "vision": video + vision_weights + states,
        "universal": states + universal_weights + states,
        "features": video + weights + states,
        "decode": states + decode,
        "captioning": video + weights + decode,
    }
    return tasks[task]


def decoding_bytes(
    model: MPlug2ForQuestionAnswering, element: int, memory: int, beams: int, steps: int, batch: int
) -> int:
    """Weights, keys and values of a beam search over `memory` tokens."""
    decoder, dim = model.decoder, model.config.text.hidden_size
    once = len(decoder.layers) * 2 * dim * (dim + 1)
    tables = _parameters(decoder.embeddings.position, decoder.embeddings.token_type)
    weights = once + steps * (_parameters(decoder) - once - tables)
    memory_moved = (1 + steps) * memory
    own_moved = sum((1 if step == 0 else beams) * (1 + step) for step in range(steps))
    return element * (weights + batch * len(decoder.layers) * 2 * dim * (memory_moved + own_moved))


def _parameters(*modules: nn.Module | None) -> int:
    return sum(parameter.numel() for module in modules if module for parameter in module.parameters())

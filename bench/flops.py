"""The floating-point operations and bytes that a task needs, from the configuration alone.

Needed is what no implementation can avoid. A multiply-add is 2 FLOP. Only matrix products count, not layer norms,
activations and softmaxes. Formulas are for batch 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from mplug2_fast.models import FAMILIES
from mplug2_fast.models.mplug2.config import MPlug2Config
from mplug2_fast.tasks import get
from mplug2_fast.tasks.grounding import BINS

TASKS = ("captioning", "answering", "features", "vision", "universal", "decode")
MPLUG_TASKS = (
    *("captioning", "answering", "ranking", "grounding", "vision"),
    *("retrieval features", "re-ranking", "re-ranking long texts"),
)
MODEL_TASKS = {"mplug2": (*TASKS, "retrieval features", "re-ranking"), "mplug": MPLUG_TASKS}
"""Family of models -> its tasks."""
BOX_TOKENS = 4
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


def visual_tokens(config: Any, frames: int) -> int:
    """S: the class token, which mPLUG has for each frame and mPLUG-2 for all together, and the patches of all
    frames."""
    if config.family == "mplug":
        return frames * (1 + config.vision.num_patches)
    return 1 + config.vision.output_frames(frames) * config.vision.num_patches


def encoded_frames(config: Any, frames: int) -> int:
    """Frames inside the vision encoder."""
    return frames if config.family == "mplug" else config.vision.output_frames(frames)


def patches(config: MPlug2Config, frames: int) -> int:
    """The patch convolution as a product."""
    vision = config.vision
    inputs = 3 * vision.patch_size**2 * (3 if getattr(vision, "temporal_downsampling", False) else 1)
    return _linear(encoded_frames(config, frames) * vision.num_patches, inputs, vision.width)


def vision_projections(config: MPlug2Config, frames: int) -> int:
    """Queries, keys, values and output of all blocks."""
    vision = config.vision
    tokens = encoded_frames(config, frames) * (1 + vision.num_patches)
    return vision.layers * _linear(tokens, vision.width, 4 * vision.width)


def vision_scores(config: MPlug2Config, frames: int) -> int:
    """Attention within each frame, class token included."""
    vision = config.vision
    tokens = 1 + vision.num_patches
    return vision.layers * encoded_frames(config, frames) * _attention(tokens, tokens, vision.width)


def vision_mlp(config: MPlug2Config, frames: int) -> int:
    """Both products of every block's MLP."""
    vision = config.vision
    tokens = encoded_frames(config, frames) * (1 + vision.num_patches)
    return vision.layers * 2 * _linear(tokens, vision.width, vision.mlp_ratio * vision.width)


def local_temporal(config: MPlug2Config, frames: int) -> int:
    """Two modules per block, on patches only: down, convolution over time, up. mPLUG has none."""
    if config.family == "mplug":
        return 0
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
    """All layers over the tokens of a text, with the universal ones: self-attention and FFN."""
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


def matching(config: Any, frames: int, texts: Sequence[int]) -> int:
    """Whether each of several texts, given by their tokens, matches one visual input: fusion and the matching head.

    The visual input is projected once for all texts, by the layers up to the first connected one. That layer gives each
    text a visual input. Only the first token of the last layer is needed.
    """
    dim, intermediate = config.text.hidden_size, config.text.intermediate_size
    visual, layers = visual_tokens(config, frames), config.text.fusion_layers
    total, shared = len(texts) * _linear(1, dim, 2), True
    for n in range(layers):
        connected = config.text.connected(n)
        for i, tokens in enumerate(texts):
            projected = 0 if shared and i else visual
            keys = tokens + visual * connected
            rows = 1 if n == layers - 1 else keys
            asked = 1 if n == layers - 1 else tokens + projected * connected
            total += _linear(tokens + projected * connected, dim, 2 * dim) + _linear(asked, dim, dim)
            total += _attention(rows, keys, dim) + _linear(rows, dim, dim) + 2 * _linear(rows, dim, intermediate)
            if not connected:
                total += _linear(projected, dim, 2 * dim) + _attention(rows, visual, dim) + _linear(rows, dim, 2 * dim)
        shared = shared and not connected
    return total


def answers(config: Any, memory: int, texts: Iterable[int]) -> int:
    """The probabilities of answers, given by their tokens with [CLS] and [SEP], over `memory` tokens.

    [CLS] is computed once for all answers. [SEP] predicts nothing.
    """
    text, dim = config.text, config.text.hidden_size
    places = [0] + [place for tokens in texts for place in range(1, tokens - 1)]
    layer = _linear(len(places), dim, 6 * dim + 2 * text.intermediate_size) + _attention(len(places), memory, dim)
    layer += sum(_attention(1, place + 1, dim) for place in places)
    words = _linear(len(places), dim, dim + text.vocab_size)
    return memory_keys_values(config, memory) + text.text_decode_layers * layer + words


def box(config: Any, memory: int) -> int:
    """Four greedy steps over `memory` tokens, in which only the tokens of places are scored."""
    dim = config.text.hidden_size
    scored = BOX_TOKENS * (_linear(1, dim, config.text.vocab_size) - _linear(1, dim, BINS))
    return decoding(config, memory, 1, BOX_TOKENS) - scored


def retrieval_features(config: Any, frames: int, texts: Iterable[int]) -> int:
    """The features of one visual input and of texts, given by their tokens. All states are results too."""
    dim, width = config.text.hidden_size, config.contrast.embed_dim
    of_texts = sum(text_encoder(config, tokens) + _linear(1, dim, width) for tokens in texts)
    class_tokens = frames if config.family == "mplug" else 1
    return vision(config, frames) + universal(config, frames) + _linear(class_tokens, dim, width) + of_texts


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
    """Visual tokens to image_embeds. For mPLUG they are the same."""
    if config.family == "mplug":
        return 0
    return universal_first(config, frames) + universal_last(config, frames)


def needed(
    task: str,
    config: Any,
    *,
    frames: int,
    beams: int,
    steps: int,
    batch: int = 1,
    question: int = 10,
    texts: Sequence[int] = (),
    long_texts: Sequence[int] = (),
    candidates: Sequence[int] = (),
) -> int:
    """FLOP that `task` (from `MODEL_TASKS`) needs for `batch` videos. A question or a phrase has `question` tokens;
    `texts`, `long_texts` and `candidates` are the tokens of the texts and of the answers that are compared."""
    if task in STEPS:
        return training(config, frames, steps, batch, question if task.startswith("answering") else 0)
    tokens, features = visual_tokens(config, frames), vision(config, frames) + universal(config, frames)
    if task in ("answering", "ranking", "grounding"):
        asked = features + text_encoder(config, question) + fusion(config, frames, question)
        memory = tokens + question
        decoded = {
            "answering": lambda: decoding(config, memory, beams, steps),
            "ranking": lambda: answers(config, memory, candidates),
            "grounding": lambda: box(config, memory),
        }
        return batch * (asked + decoded[task]())
    if task == "retrieval features":
        own = retrieval_features(config, frames, ())
        return batch * own + retrieval_features(config, frames, texts) - own
    if task.startswith("re-ranking"):
        return batch * matching(config, frames, long_texts if task.endswith("long texts") else texts)
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
    config: Any,
    element: int,
    *,
    frames: int,
    beams: int,
    steps: int,
    batch: int = 1,
    question: int = 10,
    texts: Sequence[int] = (),
    long_texts: Sequence[int] = (),
    candidates: Sequence[int] = (),
) -> int:
    """Bytes that `task` must move, in elements of `element` bytes, without anything that could stay in a cache.

    - weights once; lookup tables count as nothing
    - videos, hidden states that are inputs or results, found tokens and scores
    - decoding: at each step the decoder's weights, except those of the memory's keys and values, and all keys and
      values: the memory's once for all beams of a video, and each beam's own; all are written once
    - training: weights and both moments of the optimizer, read and written, in float32
    """
    tasks = [get("question_answering"), get("retrieval")]
    model, vision_config, text = FAMILIES[config.family].build(config, tasks, "meta"), config.vision, config.text
    tokens = visual_tokens(config, frames)
    video = batch * 3 * frames * vision_config.image_size**2 * element
    states = batch * tokens * text.hidden_size * element
    found = batch * ((steps + 1) * 8 + 4)
    vision_weights = element * _parameters(model.visual, model.visual_projection, model.visual_projection_norm)
    own = (model.universal, model.visual_norm) if config.family == "mplug2" else ()
    universal_weights = element * _parameters(*own)
    weights = vision_weights + universal_weights
    if task in STEPS:
        untrained = ("contrast", "matching", *(() if task.startswith("answering") else ("text", "fusion")))
        trained = [part for name, part in model.named_children() if name not in untrained]
        return 6 * 4 * _parameters(*trained) + video // element * 4 + batch * (steps + 1) * 8
    asked = element * _parameters(model.text.layers, model.fusion)
    if task in ("answering", "ranking", "grounding"):
        beams, steps = {"answering": (beams, steps), "ranking": (1, 1), "grounding": (1, BOX_TOKENS)}[task]
        decode = decoding_bytes(model, element, tokens + question, beams, steps, batch)
        return video + weights + asked + decode + found + (batch * question + sum(candidates)) * 8
    text_states = sum(long_texts if task.endswith("long texts") else texts) * text.hidden_size * element
    if task == "retrieval features":
        return video + weights + element * _parameters(model.text.layers, model.contrast) + states + text_states
    if task.startswith("re-ranking"):
        return element * _parameters(model.fusion, model.matching) + states + text_states
    decode = decoding_bytes(model, element, tokens, beams, steps, batch) + found
    tasks = {
        "vision": video + vision_weights + states,
        "universal": states + universal_weights + states,
        "features": video + weights + states,
        "decode": states + decode,
        "captioning": video + weights + decode,
    }
    return tasks[task]


def decoding_bytes(model: Any, element: int, memory: int, beams: int, steps: int, batch: int) -> int:
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

"""The keys of a released state dict: which ones a task needs, with their shapes, and what every other key is."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator

from mplug2_fast.errors import ConfigError
from mplug2_fast.models.mplug2.config import TASKS, MPlug2Config, Task, TextConfig

Shape = tuple[int, ...]

POSITION_KEY = "visual_encoder.visual.positional_embedding"
TIED_KEYS = {
    "text_decoder.cls.predictions.decoder.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
    "text_decoder.cls.predictions.decoder.bias": "text_decoder.cls.predictions.bias",
}
"""Twins that a released file stores twice, each with the key that the models use."""

_MOMENTUM = re.compile(
    r"(visual_encoder|text_encoder|fusion_encoder|text_decoder|visn_emb_norm|visn_fc|visn_layer_norm)_m\."
)
_CLIP_TEXT = re.compile(
    r"visual_encoder\.(positional_embedding|text_projection|logit_scale|token_embedding\.weight|ln_final\.(weight|bias)"
    r"|transformer\.resblocks\.[0-9]+\.(attn\.(in_proj_|out_proj\.)|ln_[12]\.|mlp\.c_(fc|proj)\.)(weight|bias))"
)
LAYER_NUMBER = r"(0|[1-9][0-9]{0,3})"
"""Pattern of a layer's number. Keys with larger ones are unexpected: no model has as many layers."""
_LAYER = re.compile(rf"(text_encoder|fusion_encoder|text_decoder\.bert)\.encoder\.layer\.{LAYER_NUMBER}\.(.+)")
_EMBEDDINGS = re.compile(r"(text_encoder|fusion_encoder|text_decoder\.bert)\.embeddings\.(.+)")


class KeyKind(enum.Enum):
    """What a key of a state dict is to one task."""

    NEEDED = "needed"
    TIED = "tied"
    UNUSED = "unused"
    MOMENTUM = "momentum"
    UNEXPECTED = "unexpected"


class KeyMap:
    """The released keys of one model size, as one task sees them.

    Attributes:
        needed: released key -> shape, for exactly the parameters that the task computes with.

    Raises `ConfigError` for a task that does not exist.
    """

    def __init__(self, config: MPlug2Config, task: Task) -> None:
        if task not in TASKS:
            raise ConfigError(f"no task {task!r}: choose one of {', '.join(TASKS)}")
        self.config, self.task = config, task
        self.needed: dict[str, Shape] = dict(_needed(config, task))
        text = config.text
        # Stored layers of each stack, and from which of them on the layers have unused vision parts.
        self._stacks = {
            "text_encoder": (text.text_encoder_layers, text.text_encoder_layers - text.num_uni_layer),
            "text_decoder.bert": (text.text_decode_layers, text.text_decode_layers - text.num_uni_layer),
            "fusion_encoder": (text.stored_layers, text.stored_layers),
        }

    def classify(self, key: str) -> KeyKind:
        """What `key` is; a `module.` prefix must already be gone."""
        if key in self.needed:
            return KeyKind.NEEDED
        if key in TIED_KEYS:
            return KeyKind.TIED
        momentum = _MOMENTUM.match(key)
        if momentum:
            kept = self.classify(f"{momentum[1]}.{key[momentum.end() :]}")
            return KeyKind.UNEXPECTED if kept is KeyKind.UNEXPECTED else KeyKind.MOMENTUM
        if key == "visual_encoder.visual.proj" or _CLIP_TEXT.fullmatch(key) or self._is_stored_text(key):
            return KeyKind.UNUSED
        return KeyKind.UNEXPECTED

    def _is_stored_text(self, key: str) -> bool:
        """Whether a released file of this size stores `key` in one of its three BERT stacks."""
        embedding = _EMBEDDINGS.fullmatch(key)
        if embedding:
            return embedding[2] == "position_ids" or embedding[2] in _EMBEDDING_KEYS
        layer = _LAYER.fullmatch(key)
        if not layer:
            return False
        stack, index, name = layer[1], int(layer[2]), layer[3]
        stored, first_universal = self._stacks[stack]
        if stack == "fusion_encoder" and self.task == "captioning":
            stored = index + 1  # another fusion encoder makes no other captioning model
        if index >= stored:
            return False
        if name.startswith("crossattention."):
            known = stack != "text_encoder" or index >= first_universal
            return known and name.removeprefix("cross") in _LAYER_KEYS
        if name == "latents":
            return stack != "fusion_encoder" and index == first_universal
        plain = re.sub(r"^(intermediate|output)_vision\.", r"\1.", name)
        return plain in _LAYER_KEYS and (plain == name or (stack != "fusion_encoder" and index >= first_universal))


def needed_keys(config: MPlug2Config, task: Task) -> dict[str, Shape]:
    """Released key -> shape of exactly the parameters that `task` computes with."""
    return dict(KeyMap(config, task).needed)


def _needed(config: MPlug2Config, task: Task) -> Iterator[tuple[str, Shape]]:
    vision, text = config.vision, config.text
    yield from _vision(config)
    if vision.width != text.hidden_size:
        yield from _linear("visn_fc", vision.width, text.hidden_size)
        yield from _norm("visn_layer_norm", text.hidden_size)
    yield from _norm("visn_emb_norm", text.hidden_size)
    first_universal = text.text_encoder_layers - text.num_uni_layer
    if task == "question_answering":
        yield from _embeddings("text_encoder.embeddings", text)
        for index in range(first_universal):
            yield from _bert_layer(f"text_encoder.encoder.layer.{index}", text, cross=False)
    yield f"text_encoder.encoder.layer.{first_universal}.latents", (text.num_latents, text.hidden_size)
    for index in range(first_universal, text.text_encoder_layers):
        yield from _bert_layer(f"text_encoder.encoder.layer.{index}", text)
    if task == "question_answering":
        for n in range(text.fusion_layers):
            index = text.stored_layers - text.fusion_layers + n
            yield from _bert_layer(f"fusion_encoder.encoder.layer.{index}", text, cross=not text.connected(n))
    yield from _embeddings("text_decoder.bert.embeddings", text)
    for index in range(text.text_decode_layers):
        yield from _bert_layer(f"text_decoder.bert.encoder.layer.{index}", text)
    yield "text_decoder.cls.predictions.bias", (text.vocab_size,)
    yield from _linear("text_decoder.cls.predictions.transform.dense", text.hidden_size, text.hidden_size)
    yield from _norm("text_decoder.cls.predictions.transform.LayerNorm", text.hidden_size)


def _vision(config: MPlug2Config) -> Iterator[tuple[str, Shape]]:
    vision = config.vision
    width, hidden, inner = vision.width, vision.width * vision.mlp_ratio, vision.width // vision.temporal_reduction
    root = "visual_encoder.visual"
    yield f"{root}.class_embedding", (width,)
    yield POSITION_KEY, (1 + vision.num_patches, width)
    frames = 3 if vision.temporal_downsampling else 1
    yield f"{root}.conv1.weight", (width, 3, frames, vision.patch_size, vision.patch_size)
    yield from _norm(f"{root}.ln_pre", width)
    for index in range(vision.layers):
        block = f"{root}.transformer.resblocks.{index}"
        for name in ("lmhra1", "lmhra2"):
            yield from _norm(f"{block}.{name}.ln", width)
            yield f"{block}.{name}.down_proj.weight", (inner, width, 1, 1, 1)
            yield f"{block}.{name}.down_proj.bias", (inner,)
            yield f"{block}.{name}.conv.weight", (inner, 1, vision.temporal_kernel_size, 1, 1)
            yield f"{block}.{name}.conv.bias", (inner,)
            yield f"{block}.{name}.up_proj.weight", (width, inner, 1, 1, 1)
            yield f"{block}.{name}.up_proj.bias", (width,)
        yield f"{block}.attn.in_proj_weight", (3 * width, width)
        yield f"{block}.attn.in_proj_bias", (3 * width,)
        yield from _linear(f"{block}.attn.out_proj", width, width)
        yield from _norm(f"{block}.ln_1", width)
        yield from _linear(f"{block}.mlp.c_fc", width, hidden)
        yield from _linear(f"{block}.mlp.c_proj", hidden, width)
        yield from _norm(f"{block}.ln_2", width)
    yield from _norm(f"{root}.ln_post", width)


def _bert_layer(prefix: str, text: TextConfig, *, cross: bool = True) -> Iterator[tuple[str, Shape]]:
    size = text.hidden_size
    for attention in ("attention", "crossattention") if cross else ("attention",):
        for name in ("query", "key", "value"):
            yield from _linear(f"{prefix}.{attention}.self.{name}", size, size)
        yield from _linear(f"{prefix}.{attention}.output.dense", size, size)
        yield from _norm(f"{prefix}.{attention}.output.LayerNorm", size)
    yield from _linear(f"{prefix}.intermediate.dense", size, text.intermediate_size)
    yield from _linear(f"{prefix}.output.dense", text.intermediate_size, size)
    yield from _norm(f"{prefix}.output.LayerNorm", size)


def _embeddings(prefix: str, text: TextConfig) -> Iterator[tuple[str, Shape]]:
    yield f"{prefix}.word_embeddings.weight", (text.vocab_size, text.hidden_size)
    yield f"{prefix}.position_embeddings.weight", (text.max_position_embeddings, text.hidden_size)
    yield f"{prefix}.token_type_embeddings.weight", (text.type_vocab_size, text.hidden_size)
    yield from _norm(f"{prefix}.LayerNorm", text.hidden_size)


def _linear(prefix: str, inputs: int, outputs: int) -> Iterator[tuple[str, Shape]]:
    yield f"{prefix}.weight", (outputs, inputs)
    yield f"{prefix}.bias", (outputs,)


def _norm(prefix: str, size: int) -> Iterator[tuple[str, Shape]]:
    yield f"{prefix}.weight", (size,)
    yield f"{prefix}.bias", (size,)


_LAYER_KEYS = frozenset(key.removeprefix("x.") for key, _ in _bert_layer("x", TextConfig(), cross=False))
_EMBEDDING_KEYS = frozenset(key.removeprefix("x.") for key, _ in _embeddings("x", TextConfig()))

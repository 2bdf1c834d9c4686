"""Released names of all parameters, as views into the fast model's tensors: those fuse what a checkpoint splits."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn

from mplug2_fast.nn import LocalTemporal
from mplug2_fast.nn.bert_layer import BertEmbeddings, BertLayer
from mplug2_fast.nn.vision_transformer import VisionTransformer

Views = Iterator[tuple[str, Tensor]]
Get = Callable[[Tensor], Tensor]
"""From a parameter to what is viewed: the parameter itself, detached, or its gradient."""


def affine(module: nn.Linear | nn.LayerNorm, name: str, get: Get) -> Views:
    yield f"{name}.weight", get(module.weight)
    yield f"{name}.bias", get(module.bias)


def local_temporal(module: LocalTemporal, name: str, get: Get) -> Views:
    for key, parameter in module.named_parameters():
        yield f"{name}.{key}", get(parameter)


def vision(module: VisionTransformer, get: Get) -> Views:
    prefix, config = "visual_encoder.visual", module.config
    kernel = 3 if config.temporal_downsampling else 1
    yield (
        f"{prefix}.conv1.weight",
        get(module.patch_weight).view(config.width, 3, kernel, config.patch_size, config.patch_size),
    )
    yield f"{prefix}.class_embedding", get(module.class_embedding)
    yield f"{prefix}.positional_embedding", get(module.positional_embedding)
    yield from affine(module.norm_pre, f"{prefix}.ln_pre", get)
    yield from affine(module.norm_post, f"{prefix}.ln_post", get)
    for i, block in enumerate(module.blocks):
        name = f"{prefix}.transformer.resblocks.{i}"
        for part in ("lmhra1", "lmhra2"):
            yield from local_temporal(getattr(block, part), f"{name}.{part}", get)
        for part in ("attn", "ln_1", "mlp", "ln_2"):
            for key, parameter in getattr(block, part).named_parameters():
                yield f"{name}.{part}.{key}", get(parameter)


def embeddings(module: BertEmbeddings, name: str, get: Get) -> Views:
    yield f"{name}.word_embeddings.weight", get(module.word.weight)
    yield f"{name}.position_embeddings.weight", get(module.position.weight)
    yield f"{name}.token_type_embeddings.weight", get(module.token_type.weight)
    yield from affine(module.norm, f"{name}.LayerNorm", get)


def bert_layer(module: BertLayer, name: str, get: Get) -> Views:
    for key, parameter in module.named_parameters():
        attention, fused, kind = key.rpartition("in_proj_")
        if not fused:
            yield f"{name}.{key}", get(parameter)
            continue
        for part, view in zip(("query", "key", "value"), get(parameter).chunk(3), strict=True):
            yield f"{name}.{attention}{part}.{kind}", view


def model(module: nn.Module, get: Get) -> Views:
    """All parameters of an `MPlug2ForCaptioning` or `MPlug2ForQuestionAnswering`."""
    text = module.config.text
    yield from vision(module.visual, get)
    if module.visual_projection is not None:
        yield from affine(module.visual_projection, "visn_fc", get)
        yield from affine(module.visual_projection_norm, "visn_layer_norm", get)
    yield from affine(module.visual_norm, "visn_emb_norm", get)
    first_universal = text.text_encoder_layers - text.num_uni_layer
    layers = f"text_encoder.encoder.layer.{first_universal}"
    yield f"{layers}.latents", get(module.universal.latents)
    yield from bert_layer(module.universal.first, layers, get)
    yield from bert_layer(module.universal.last, f"text_encoder.encoder.layer.{first_universal + 1}", get)
    if module.task == "question_answering":
        yield from embeddings(module.text.embeddings, "text_encoder.embeddings", get)
        for i, layer in enumerate(module.text.layers):
            yield from bert_layer(layer, f"text_encoder.encoder.layer.{i}", get)
        for i, layer in enumerate(module.fusion.layers):
            stored = text.stored_layers - text.fusion_layers + i
            yield from bert_layer(layer, f"fusion_encoder.encoder.layer.{stored}", get)
    decoder = module.decoder
    yield from embeddings(decoder.embeddings, "text_decoder.bert.embeddings", get)
    for i, layer in enumerate(decoder.layers):
        yield from bert_layer(layer, f"text_decoder.bert.encoder.layer.{i}", get)
    yield "text_decoder.cls.predictions.bias", get(decoder.head_bias)
    yield from affine(decoder.head, "text_decoder.cls.predictions.transform.dense", get)
    yield from affine(decoder.head_norm, "text_decoder.cls.predictions.transform.LayerNorm", get)

"""The released name of every parameter of the compiled peer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from bench.peer import Peer
    from bench.peer_bert import Embeddings, Layer
    from bench.peer_vision import Vision

Views = Iterator[tuple[str, Tensor]]
Get = Callable[[Tensor], Tensor]
"""From a parameter to what is viewed: the parameter itself, detached, or its gradient."""


def affine(module: nn.Module, name: str, get: Get) -> Views:
    yield f"{name}.weight", get(module.weight)
    yield f"{name}.bias", get(module.bias)


def fused(module: nn.Linear, name: str, parts: tuple[str, ...], get: Get) -> Views:
    for kind in ("weight", "bias"):
        for part, view in zip(parts, get(getattr(module, kind)).chunk(len(parts)), strict=True):
            yield f"{name}.{part}.{kind}", view


def released(peer: Peer, get: Get) -> Views:
    text = peer.config.text
    yield from released_vision(peer.vision, get)
    if peer.project is not None:
        yield from affine(peer.project, "visn_fc", get)
        yield from affine(peer.project_norm, "visn_layer_norm", get)
    yield from affine(peer.norm, "visn_emb_norm", get)
    first = text.text_encoder_layers - text.num_uni_layer
    yield f"text_encoder.encoder.layer.{first}.latents", get(peer.latents)
    yield from released_layer(peer.universal_first, f"text_encoder.encoder.layer.{first}", get)
    yield from released_layer(peer.universal_last, f"text_encoder.encoder.layer.{first + 1}", get)
    if peer.text is not None:
        yield from released_embeddings(peer.text.embeddings, "text_encoder.embeddings", get)
        for i, layer in enumerate(peer.text.layers):
            yield from released_layer(layer, f"text_encoder.encoder.layer.{i}", get)
        for i, layer in enumerate(peer.fusion.layers, start=text.stored_layers - text.fusion_layers):
            yield from released_layer(layer, f"fusion_encoder.encoder.layer.{i}", get)
    decoder = peer.decoder
    yield from released_embeddings(decoder.embeddings, "text_decoder.bert.embeddings", get)
    for i, layer in enumerate(decoder.layers):
        yield from released_layer(layer, f"text_decoder.bert.encoder.layer.{i}", get)
    yield "text_decoder.cls.predictions.bias", get(decoder.head_bias)
    yield from affine(decoder.head, "text_decoder.cls.predictions.transform.dense", get)
    yield from affine(decoder.head_norm, "text_decoder.cls.predictions.transform.LayerNorm", get)


def released_vision(vision: Vision, get: Get) -> Views:
    prefix = "visual_encoder.visual"
    yield f"{prefix}.conv1.weight", get(vision.conv.weight)
    yield f"{prefix}.class_embedding", get(vision.class_embedding)
    yield f"{prefix}.positional_embedding", get(vision.positions)
    yield from affine(vision.norm_pre, f"{prefix}.ln_pre", get)
    yield from affine(vision.norm_post, f"{prefix}.ln_post", get)
    for i, block in enumerate(vision.blocks):
        name = f"{prefix}.transformer.resblocks.{i}"
        for temporal, key in ((block.temporal1, "lmhra1"), (block.temporal2, "lmhra2")):
            yield from affine(temporal.norm, f"{name}.{key}.ln", get)
            yield f"{name}.{key}.conv.weight", get(temporal.conv_weight)[:, None, :, None, None]
            yield f"{name}.{key}.conv.bias", get(temporal.conv_bias)
            for linear, part in ((temporal.down, "down_proj"), (temporal.up, "up_proj")):
                yield f"{name}.{key}.{part}.weight", get(linear.weight)[:, :, None, None, None]
                yield f"{name}.{key}.{part}.bias", get(linear.bias)
        yield f"{name}.attn.in_proj_weight", get(block.qkv.weight)
        yield f"{name}.attn.in_proj_bias", get(block.qkv.bias)
        for module, part in (
            (block.out, "attn.out_proj"),
            (block.norm1, "ln_1"),
            (block.norm2, "ln_2"),
            (block.fc, "mlp.c_fc"),
            (block.proj, "mlp.c_proj"),
        ):
            yield from affine(module, f"{name}.{part}", get)


def released_embeddings(embeddings: Embeddings, name: str, get: Get) -> Views:
    yield f"{name}.word_embeddings.weight", get(embeddings.word.weight)
    yield f"{name}.position_embeddings.weight", get(embeddings.position.weight)
    yield f"{name}.token_type_embeddings.weight", get(embeddings.token_type.weight)
    yield from affine(embeddings.norm, f"{name}.LayerNorm", get)


def released_layer(layer: Layer, name: str, get: Get) -> Views:
    yield from fused(layer.qkv, f"{name}.attention.self", ("query", "key", "value"), get)
    yield from affine(layer.out, f"{name}.attention.output.dense", get)
    yield from affine(layer.norm1, f"{name}.attention.output.LayerNorm", get)
    if layer.has_cross:
        yield from affine(layer.cross_q, f"{name}.crossattention.self.query", get)
        yield from fused(layer.cross_kv, f"{name}.crossattention.self", ("key", "value"), get)
        yield from affine(layer.cross_out, f"{name}.crossattention.output.dense", get)
        yield from affine(layer.norm2, f"{name}.crossattention.output.LayerNorm", get)
    yield from affine(layer.fc, f"{name}.intermediate.dense", get)
    yield from affine(layer.proj, f"{name}.output.dense", get)
    yield from affine(layer.norm3, f"{name}.output.LayerNorm", get)

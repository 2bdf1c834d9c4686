"""The released name of every parameter of the compiled peer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from bench.peer import Layer, Peer


def affine(module: nn.Module, name: str) -> Iterator[tuple[str, Tensor]]:
    yield f"{name}.weight", module.weight.detach()
    yield f"{name}.bias", module.bias.detach()


def fused(module: nn.Linear, *names: str) -> Iterator[tuple[str, Tensor]]:
    for kind in ("weight", "bias"):
        for name, part in zip(names, getattr(module, kind).detach().chunk(len(names)), strict=True):
            yield f"{name}.{kind}", part


def released(peer: Peer) -> Iterator[tuple[str, Tensor]]:
    prefix, vision = "visual_encoder.visual", peer.vision
    yield f"{prefix}.conv1.weight", vision.conv.weight.detach()
    yield f"{prefix}.class_embedding", vision.class_embedding.detach()
    yield f"{prefix}.positional_embedding", vision.positions.detach()
    yield from affine(vision.norm_pre, f"{prefix}.ln_pre")
    yield from affine(vision.norm_post, f"{prefix}.ln_post")
    for i, block in enumerate(vision.blocks):
        name = f"{prefix}.transformer.resblocks.{i}"
        for temporal, key in ((block.temporal1, "lmhra1"), (block.temporal2, "lmhra2")):
            yield from affine(temporal.norm, f"{name}.{key}.ln")
            yield f"{name}.{key}.conv.weight", temporal.conv_weight.detach()[:, None, :, None, None]
            yield f"{name}.{key}.conv.bias", temporal.conv_bias.detach()
            for linear, part in ((temporal.down, "down_proj"), (temporal.up, "up_proj")):
                yield f"{name}.{key}.{part}.weight", linear.weight.detach()[:, :, None, None, None]
                yield f"{name}.{key}.{part}.bias", linear.bias.detach()
        yield f"{name}.attn.in_proj_weight", block.qkv.weight.detach()
        yield f"{name}.attn.in_proj_bias", block.qkv.bias.detach()
        for module, part in (
            (block.out, "attn.out_proj"),
            (block.norm1, "ln_1"),
            (block.norm2, "ln_2"),
            (block.fc, "mlp.c_fc"),
            (block.proj, "mlp.c_proj"),
        ):
            yield from affine(module, f"{name}.{part}")
    if peer.project is not None:
        yield from affine(peer.project, "visn_fc")
        yield from affine(peer.project_norm, "visn_layer_norm")
    yield from affine(peer.norm, "visn_emb_norm")
    first = peer.config.text.text_encoder_layers - peer.config.text.num_uni_layer
    yield f"text_encoder.encoder.layer.{first}.latents", peer.latents.detach()
    yield from released_layer(peer.universal_first, f"text_encoder.encoder.layer.{first}")
    yield from released_layer(peer.universal_last, f"text_encoder.encoder.layer.{first + 1}")
    decoder, name = peer.decoder, "text_decoder.bert.embeddings"
    yield f"{name}.word_embeddings.weight", decoder.word.weight.detach()
    yield f"{name}.position_embeddings.weight", decoder.position.weight.detach()
    yield f"{name}.token_type_embeddings.weight", decoder.token_type.weight.detach()
    yield from affine(decoder.norm, f"{name}.LayerNorm")
    for i, layer in enumerate(decoder.layers):
        yield from released_layer(layer, f"text_decoder.bert.encoder.layer.{i}")
    yield "text_decoder.cls.predictions.bias", decoder.head_bias.detach()
    yield from affine(decoder.head, "text_decoder.cls.predictions.transform.dense")
    yield from affine(decoder.head_norm, "text_decoder.cls.predictions.transform.LayerNorm")


def released_layer(layer: Layer, name: str) -> Iterator[tuple[str, Tensor]]:
    yield from fused(layer.qkv, *(f"{name}.attention.self.{part}" for part in ("query", "key", "value")))
    yield from affine(layer.out, f"{name}.attention.output.dense")
    yield from affine(layer.norm1, f"{name}.attention.output.LayerNorm")
    yield from affine(layer.cross_q, f"{name}.crossattention.self.query")
    yield from fused(layer.cross_kv, *(f"{name}.crossattention.self.{part}" for part in ("key", "value")))
    yield from affine(layer.cross_out, f"{name}.crossattention.output.dense")
    yield from affine(layer.norm2, f"{name}.crossattention.output.LayerNorm")
    yield from affine(layer.fc, f"{name}.intermediate.dense")
    yield from affine(layer.proj, f"{name}.output.dense")
    yield from affine(layer.norm3, f"{name}.output.LayerNorm")

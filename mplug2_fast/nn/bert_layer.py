"""BERT's embeddings and layer, post-norm and batch-first, with BERT's parameter names."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from mplug2_fast.nn.attention import AttentionHeads, FusedProjections, attend, calm_padding
from mplug2_fast.nn.config import BertConfig
from mplug2_fast.nn.layer_norm import LayerNorm, norm_of_sum
from mplug2_fast.nn.mlp import feed_forward
from mplug2_fast.nn.packing import Packing
from mplug2_fast.nn.parts import PLAIN, add_linear, dropout_rate, linear, plain
from mplug2_fast.nn.unchanged import Kinds, unchanged
from mplug2_fast.ops.beam_attention import beam_attention
from mplug2_fast.ops.beam_attention_int8 import beam_attention_int8
from mplug2_fast.ops.quantise_memory import quantise_memory, unpack

if TYPE_CHECKING:
    from typing_extensions import Self


def _embedding(rows: int, dim: int) -> nn.Embedding:
    """An uninitialised table. On the meta device the initialisation in `nn.Embedding` would import the compiler."""
    return nn.Embedding.from_pretrained(torch.empty(rows, dim), freeze=False)


class BertEmbeddings(nn.Module):
    """Sum of word, position and token type embeddings, layer norm, dropout. All tokens have type 0."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word = _embedding(config.vocab_size, config.hidden_size)
        self.position = _embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type = _embedding(config.type_vocab_size, config.hidden_size)
        self.norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, start: int = 0) -> Tensor:
        """input_ids `(..., tokens)` to `(..., tokens, hidden)`; the first token has position `start`."""
        return self.dropout(self.norm(self.sums(input_ids, start)))

    def sums(self, input_ids: Tensor, start: int) -> Tensor:
        """`forward` without norm and dropout."""
        end = start + input_ids.shape[-1]
        if plain(self.position, self.token_type):
            return self.word(input_ids) + (self.position.weight[start:end] + self.token_type.weight[0])
        positions = torch.arange(start, end, device=input_ids.device)
        return self.word(input_ids) + (self.position(positions) + self.token_type(torch.zeros_like(input_ids)))


class KeysValues(NamedTuple):
    """Projected keys and values of a memory, each `(batch, num_heads, tokens, head_dim)`.

    They are contiguous on a CPU. A GPU reads the heads from the projection's result, without a copy.
    """

    keys: Tensor
    values: Tensor

    key_scale = value_scale = None

    @classmethod
    def of(cls, projections: BertFusedProjections, memory: Tensor) -> Self:
        """Those of a memory `(batch, tokens, hidden)`."""
        heads = (states.transpose(1, 2) for states in projections.project_memory(memory))
        return cls(*(states if states.is_cuda else states.contiguous() for states in heads))

    def attend(self, query: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of the query `(batch, queries, num_heads, head_dim)`, without dropout."""
        return beam_attention(query, self.keys, self.values, key_padding_mask=mask)

    def wide(self) -> tuple[Tensor, Tensor]:
        """Keys and values."""
        return self.keys, self.values


class Int8KeysValues(NamedTuple):
    """Projected keys and values of a memory in 8 bits: the results of `ops.quantise_memory`."""

    keys: Tensor
    key_scale: Tensor
    values: Tensor
    value_scale: Tensor

    @classmethod
    def of(cls, projections: BertFusedProjections, memory: Tensor) -> Self:
        """Those of a memory `(batch, tokens, hidden)`."""
        return cls(*quantise_memory(*projections.project_memory(memory)))

    def attend(self, query: Tensor, mask: Tensor | None) -> Tensor:
        """As `KeysValues.attend`."""
        return beam_attention_int8(query, *self, key_padding_mask=mask)

    def wide(self) -> tuple[Tensor, Tensor]:
        """Keys and values as `KeysValues` has them, in float32."""
        return unpack(*self)


class BertFusedProjections(FusedProjections):
    """BERT's `attention.self`, with one product for queries, keys and values."""

    def forward(
        self,
        x: Tensor,
        memory: Tensor | KeysValues | Int8KeysValues | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        causal: bool = False,
        packing: Packing | None = None,
    ) -> Tensor:
        """Attention of x `(..., tokens, hidden)`, without the output projection.

        Args:
            memory: `(..., keys, hidden)`, with the leading axes of x; or its keys and values, for x `(batch, tokens,
                hidden)`; or None for self-attention.
            packing: for self-attention, see `BertLayer.forward`.
        """
        if isinstance(memory, (KeysValues, Int8KeysValues)):
            query = self.project_query(x)
            if dropout_rate(self.dropout) == 0:
                return memory.attend(query, key_padding_mask)
            key, value = (states.to(query.dtype).transpose(1, 2) for states in memory.wide())
            return attend(self.dropout, query, key, value, key_padding_mask=key_padding_mask)
        if packing is not None:
            return self._within_texts(x, packing, causal)
        heads = self.project(x) if memory is None else (self.project_query(x), *self.project_memory(memory))
        return self.context(*heads, key_padding_mask=key_padding_mask, causal=causal)

    def _within_texts(self, x: Tensor, packing: Packing, causal: bool) -> Tensor:
        """Self-attention within each of the packed texts of x `(1, rows, hidden)`."""
        if packing.first_only:
            query, key, value = self.project_query(packing.wanted(x)), *self.project_memory(x)
        else:
            query, key, value = self.project(x)
        found, text = [], 0
        for group in packing.groups:
            asked = query[0, text : text + group.texts, None] if packing.first_only else group.of(query[0])
            heads = asked, group.of(key[0]), group.of(value[0])
            found.append(self.context(*heads, key_padding_mask=group.mask, causal=causal).flatten(0, 1))
            text += group.texts
        return torch.cat(found)[None]


class BertProjections(AttentionHeads):
    """BERT's `attention.self`, with a product each for queries, keys and values.

    It can hold the parameters of an existing model.
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__(embed_dim, num_heads, dropout)
        self.query, self.key, self.value = (nn.Linear(embed_dim, embed_dim) for _ in range(3))

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        """Attention of x `(..., tokens, hidden)` to itself, or to memory `(..., keys, hidden)`, without the output
        projection."""
        memory = x if memory is None else memory
        inputs = ((self.query, x), (self.key, memory), (self.value, memory))
        heads = (self.split_heads(linear(layer, states)) for layer, states in inputs)
        return self.context(*heads, key_padding_mask=key_padding_mask, causal=causal)


def add_norm(
    norm: nn.Module, dropout: nn.Module, residual: Tensor, sublayer: Callable[[Tensor | None], Tensor]
) -> Tensor:
    """norm(residual + dropout(sublayer)). The sublayer takes a residual to add to its result, or None."""
    rate = dropout_rate(dropout)
    if rate == 0:
        return norm(sublayer(residual))
    update = sublayer(None)
    return norm_of_sum(norm, residual, dropout(update))


class BertOutput(nn.Module):
    """BERT's `output`: linear layer, dropout, residual, layer norm."""

    def __init__(self, inputs: int, dim: int, dropout: float, eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, dim)
        self.LayerNorm = LayerNorm(dim, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, x: Tensor) -> Tensor:
        """hidden `(..., inputs)`; the residual x and the result `(..., dim)`."""
        return add_norm(self.LayerNorm, self.dropout, x, lambda residual: add_linear(self.dense, hidden, residual))


class BertIntermediate(nn.Module):
    """BERT's `intermediate`: linear layer and erf GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """x `(..., dim)` to `(..., hidden)`."""
        return linear(self.dense, x, "gelu")


class BertAttention(nn.Module):
    """BERT's `attention` or `crossattention`: attention, output projection, residual, layer norm."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        attention_dropout: float,
        hidden_dropout: float,
        eps: float,
        fused_projections: bool,
    ) -> None:
        super().__init__()
        projections = BertFusedProjections if fused_projections else BertProjections
        self.self = projections(dim, num_heads, attention_dropout)
        self.output = BertOutput(dim, dim, hidden_dropout, eps)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | KeysValues | Int8KeysValues | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        causal: bool = False,
        packing: Packing | None = None,
    ) -> Tensor:
        """x and result `(..., tokens, dim)`. Attends to x itself, or to a memory; see `BertLayer.forward`."""
        if packing is not None:
            return self.output(self.self(x, causal=causal, packing=packing), packing.wanted(x))
        if memory is None:
            x = calm_padding(x, key_padding_mask)
            return self.output(self.self(x, key_padding_mask=key_padding_mask, causal=causal), x)
        axes = 3 if isinstance(memory, (KeysValues, Int8KeysValues)) else memory.dim()
        if not isinstance(memory, (KeysValues, Int8KeysValues)):
            memory = calm_padding(memory, key_padding_mask)
        query = x if x.dim() == axes else x.flatten(-3, -2)  # sequences that share a memory
        context = self.self(query, memory, key_padding_mask=key_padding_mask, causal=causal)
        return self.output(context.view(x.shape), x)


class BertLayer(nn.Module):
    """Self-attention, cross-attention if there is a memory, feed-forward network; post-norm.

    The layer of mPLUG-2's text, fusion and universal encoders and of its decoder, and of BERT. Replaces the official
    `BertLayer` and `FusionLayer` and those of other BERT code. The state dict is the same, so an existing layer's
    parameters can be shared without a copy:
    `fast.load_state_dict(layer.state_dict(keep_vars=True), assign=True)`.

    Args:
        hidden_size: channels.
        num_attention_heads: heads; must divide hidden_size.
        intermediate_size: channels inside the feed-forward network, which has the erf GELU.
        layer_norm_eps: of all layer norms.
        hidden_dropout_prob: dropout before each residual sum.
        attention_probs_dropout_prob: dropout on the attention weights.
        cross_attention: whether the layer accepts a memory.
        fused_projections: one weight for queries, keys and values, which is faster, in place of three parameters. The
            state dict then has `in_proj_weight` and `in_proj_bias`.

    Raises:
        ValueError: num_attention_heads does not divide hidden_size.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_attention_heads: int,
        intermediate_size: int,
        layer_norm_eps: float = 1e-12,
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.1,
        cross_attention: bool = True,
        fused_projections: bool = False,
    ) -> None:
        super().__init__()

        def attention() -> BertAttention:
            return BertAttention(
                hidden_size,
                num_attention_heads,
                attention_dropout=attention_probs_dropout_prob,
                hidden_dropout=hidden_dropout_prob,
                eps=layer_norm_eps,
                fused_projections=fused_projections,
            )

        self.attention = attention()
        self.crossattention = attention() if cross_attention else None
        self.intermediate = BertIntermediate(hidden_size, intermediate_size)
        self.output = BertOutput(intermediate_size, hidden_size, hidden_dropout_prob, layer_norm_eps)

    @classmethod
    def from_config(cls, config: Any, *, cross_attention: bool = True, fused_projections: bool = False) -> Self:
        """A layer with the sizes in a configuration, such as a `transformers.BertConfig` or our `TextConfig`.

        Raises:
            ValueError: the configuration has another activation than the erf GELU, or relative positions.
        """
        for name, supported in (("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
            given = getattr(config, name, supported)
            if given != supported:
                raise ValueError(f"the configuration has {name} {given!r}; this layer supports only {supported!r}")
        names = ("hidden_size", "num_attention_heads", "intermediate_size", "layer_norm_eps")
        dropouts = ("hidden_dropout_prob", "attention_probs_dropout_prob")
        sizes = {name: getattr(config, name) for name in (*names, *dropouts)}
        return cls(**sizes, cross_attention=cross_attention, fused_projections=fused_projections)

    def forward(
        self,
        x: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        causal: bool = False,
        memory: Tensor | KeysValues | Int8KeysValues | None = None,
        memory_mask: Tensor | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """Runs the layer.

        Args:
            x: `(..., tokens, hidden)`, with any leading axes.
            key_padding_mask: `(..., tokens)`, nonzero for tokens.
            causal: each token sees only itself and earlier ones.
            memory: `(..., keys, hidden)`, with the leading axes of x, or without the last of them: then the sequences
                on that axis share it. Without a memory the layer skips cross-attention.
            memory_mask: `(..., keys)`, nonzero for tokens.
            packing: of the texts in x `(1, rows, hidden)`, each of which attends only to itself. It has their masks.
                It needs fused projections, and is for inference.

        Returns a tensor of x's shape, or `(1, texts, hidden)` where the packing wants only first tokens.

        Raises:
            ValueError: shapes that do not match, or a memory for a layer without cross-attention.
        """
        own = {"key_padding_mask": key_padding_mask} if packing is None else {"packing": packing}
        x = self.attention(x, causal=causal, **own)
        if memory is not None:
            if self.crossattention is None:
                raise ValueError("got a memory, but this layer was built without cross-attention")
            x = self.crossattention(x, memory, key_padding_mask=memory_mask)
        return self.feed_forward(x)

    def feed_forward(self, x: Tensor) -> Tensor:
        """The feed-forward step of x `(..., hidden)`."""
        intermediate, output = self.intermediate, self.output
        if not unchanged(_FEED_FORWARD, intermediate, output) or not plain(intermediate.dense, output.dense):
            return output(intermediate(x), x)
        return add_norm(
            output.LayerNorm,
            output.dropout,
            x,
            lambda residual: feed_forward(x, intermediate.dense, output.dense, "gelu", residual=residual is not None),
        )


_FEED_FORWARD: Kinds = frozenset((BertIntermediate, BertOutput))
BERT_KINDS: Kinds = PLAIN | _FEED_FORWARD | {BertEmbeddings, BertLayer, BertAttention, BertFusedProjections}
"""The classes of all modules in a text encoder."""


def can_pack(*layers: nn.Module) -> bool:
    """Whether these layers take a packing. Replaced or watched layers and attentions get padded texts."""
    return all(
        unchanged(BERT_KINDS, layer) and unchanged(BERT_KINDS, layer.attention, layer.attention.self)
        for layer in layers
    )

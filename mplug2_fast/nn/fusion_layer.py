"""A BERT layer under its released names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mplug2_fast.nn.attention import MultiHeadAttention, calm_padding
from mplug2_fast.nn.layer_norm import LayerNorm
from mplug2_fast.nn.mlp import feed_forward
from mplug2_fast.nn.parts import add_linear, linear, plain
from mplug2_fast.nn.post_norm import add_norm
from mplug2_fast.nn.unchanged import Kinds, unchanged

if TYPE_CHECKING:
    from typing_extensions import Self


class BertProjections(MultiHeadAttention):
    """BERT's `attention.self`: queries, keys and values, and the attention of their heads.

    Three products in place of one or two, so that it can hold the parameters of an existing model.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__(dim, num_heads, dropout)
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        """Attention of x `(..., tokens, dim)` to itself or to memory `(..., keys, dim)`, before the output
        projection."""
        if memory is None:
            x = memory = calm_padding(x, key_padding_mask)
        else:
            memory = calm_padding(memory, key_padding_mask)
        heads = (
            self.split_heads(linear(layer, states))
            for layer, states in ((self.query, x), (self.key, memory), (self.value, memory))
        )
        return self.context_of_heads(*heads, key_padding_mask=key_padding_mask, causal=causal)


class BertOutput(nn.Module):
    """BERT's `output`: a linear layer, dropout, the residual and the norm."""

    def __init__(self, inputs: int, dim: int, dropout: float, eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, dim)
        self.LayerNorm = LayerNorm(dim, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, x: Tensor) -> Tensor:
        """hidden `(..., inputs)`; residual x and result `(..., dim)`."""
        return add_norm(self.LayerNorm, self.dropout, x, lambda residual: add_linear(self.dense, hidden, residual))


class BertIntermediate(nn.Module):
    """BERT's `intermediate`: a linear layer and the erf GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """x `(..., dim)` to `(..., hidden)`."""
        return linear(self.dense, x, "gelu")


class BertAttention(nn.Module):
    """BERT's `attention` and `crossattention`, with the residual and the norm."""

    def __init__(self, dim: int, num_heads: int, attention_dropout: float, hidden_dropout: float, eps: float) -> None:
        super().__init__()
        self.self = BertProjections(dim, num_heads, attention_dropout)
        self.output = BertOutput(dim, dim, hidden_dropout, eps)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        """x and result `(..., tokens, dim)`; attention to x itself, or to memory `(..., keys, dim)`."""
        given = (x,) if memory is None else (x, memory)
        return self.output(self.self(*given, key_padding_mask=key_padding_mask, causal=causal), x)


_FFN: Kinds = frozenset((BertIntermediate, BertOutput))


class FusionLayer(nn.Module):
    """A layer of mPLUG-2's text, fusion and universal encoders and of its decoder, which is BERT's.

    Replaces the released `BertLayer`, `FusionLayer` and their like, and that of other BERT code: the same state dict.
    Queries, keys and values have parameters of their own, so an existing layer's can be shared without a copy:
    `fast.load_state_dict(layer.state_dict(keep_vars=True), assign=True)`.

    Args:
        hidden_size: channels. num_attention_heads: heads; must divide hidden_size. intermediate_size: channels inside
            the FFN, which has the erf GELU.
        layer_norm_eps: of all layer norms. hidden_dropout_prob: on what each step adds.
        attention_probs_dropout_prob: on the attention weights.
        cross_attention: whether the layer can be given a memory.

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
    ) -> None:
        super().__init__()
        attention = (
            hidden_size,
            num_attention_heads,
            attention_probs_dropout_prob,
            hidden_dropout_prob,
            layer_norm_eps,
        )
        self.attention = BertAttention(*attention)
        self.crossattention = BertAttention(*attention) if cross_attention else None
        self.intermediate = BertIntermediate(hidden_size, intermediate_size)
        self.output = BertOutput(intermediate_size, hidden_size, hidden_dropout_prob, layer_norm_eps)

    @classmethod
    def from_config(cls, config: Any, *, cross_attention: bool = True) -> Self:
        """A layer of the sizes that an object names as its attributes: a `transformers.BertConfig`, or the `TextConfig`
        of this package.

        Raises:
            ValueError: the configuration asks for another activation than the erf GELU, or for relative positions.
        """
        for name, only in (("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
            asked = getattr(config, name, only)
            if asked != only:
                raise ValueError(f"the configuration has {name} {asked!r}, and this layer knows only {only!r}")
        names = ("hidden_size", "num_attention_heads", "intermediate_size", "layer_norm_eps")
        dropouts = ("hidden_dropout_prob", "attention_probs_dropout_prob")
        sizes = {name: getattr(config, name) for name in (*names, *dropouts)}
        return cls(**sizes, cross_attention=cross_attention)

    def forward(
        self,
        x: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        causal: bool = False,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        """x and result `(..., tokens, hidden)`, any leading axes or none; memory `(..., keys, hidden)` with the same
        leading axes; key_padding_mask `(..., tokens)` and memory_mask `(..., keys)`, nonzero for tokens. Without a
        memory the cross-attention is passed by.

        Raises:
            ValueError: shapes that do not go together, or a memory for a layer without cross-attention.
        """
        x = self.attention(calm_padding(x, key_padding_mask), key_padding_mask=key_padding_mask, causal=causal)
        if memory is not None:
            if self.crossattention is None:
                raise ValueError("there is a memory, and this layer was built without cross-attention")
            x = self.crossattention(x, memory, key_padding_mask=memory_mask)
        intermediate, output = self.intermediate, self.output
        if not unchanged(_FFN, intermediate, output) or not plain(intermediate.dense, output.dense):
            return output(intermediate(x), x)
        return add_norm(
            output.LayerNorm,
            output.dropout,
            x,
            lambda residual: feed_forward(x, intermediate.dense, output.dense, "gelu", residual=residual is not None),
        )

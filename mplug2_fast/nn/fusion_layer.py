"""A BERT layer under its released names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mplug2_fast.nn.attention import MultiHeadAttention, calm_padding
from mplug2_fast.nn.layer_norm import LayerNorm
from mplug2_fast.nn.mlp import feed_forward
from mplug2_fast.nn.post_norm import PostNormLayer
from mplug2_fast.ops.linear_act import linear_act

if TYPE_CHECKING:
    from typing_extensions import Self


class BertAttention(MultiHeadAttention):
    """Self- or cross-attention under BERT's names: `self.query`, `self.key`, `self.value`, `output.dense`, and the norm
    after it, `output.LayerNorm`.

    Three products in place of one or two, so that it can hold the parameters of an existing model.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float, eps: float) -> None:
        super().__init__(dim, num_heads, dropout)
        self.self = nn.ModuleDict({name: nn.Linear(dim, dim) for name in ("query", "key", "value")})
        self.output = nn.ModuleDict({"dense": nn.Linear(dim, dim), "LayerNorm": LayerNorm(dim, eps=eps)})

    @property
    def out_proj(self) -> nn.Linear:
        return self.output["dense"]

    @property
    def norm(self) -> LayerNorm:
        return self.output["LayerNorm"]

    def _project(self, name: str, x: Tensor) -> Tensor:
        linear = self.self[name]
        return self.split_heads(linear_act(x, linear.weight, linear.bias))

    def project_query(self, x: Tensor) -> Tensor:
        """x `(..., dim)` to `(..., num_heads, head_dim)`."""
        return self._project("query", x)

    def project_memory(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """memory `(..., dim)` to keys and values, each `(..., num_heads, head_dim)`."""
        return self._project("key", memory), self._project("value", memory)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x `(..., dim)` to queries, keys and values, each `(..., num_heads, head_dim)`."""
        return self.project_query(x), *self.project_memory(x)

    def forward(
        self,
        x: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        causal: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        """As `SelfAttention`: x `(..., tokens, dim)`."""
        qkv = self.project(calm_padding(x, key_padding_mask))
        return self.attend_heads(*qkv, key_padding_mask=key_padding_mask, causal=causal, residual=residual)

    def attend(
        self, query: Tensor, memory: Tensor, *, key_padding_mask: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """As `CrossAttention.attend`: query from `project_query`, memory `(..., keys, dim)`."""
        key, value = self.project_memory(calm_padding(memory, key_padding_mask))
        return self.attend_heads(query, key, value, key_padding_mask=key_padding_mask, residual=residual)


class FusionLayer(PostNormLayer):
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
        attention = (hidden_size, num_attention_heads, attention_probs_dropout_prob, layer_norm_eps)
        self.dropout = nn.Dropout(hidden_dropout_prob)
        self.attention = BertAttention(*attention)
        self.crossattention = BertAttention(*attention) if cross_attention else None
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(hidden_size, intermediate_size)})
        self.output = nn.ModuleDict(
            {
                "dense": nn.Linear(intermediate_size, hidden_size),
                "LayerNorm": LayerNorm(hidden_size, eps=layer_norm_eps),
            }
        )

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

    @property
    def attention_norm(self) -> LayerNorm:
        return self.attention.norm

    @property
    def cross(self) -> BertAttention | None:
        return self.crossattention

    @property
    def cross_norm(self) -> LayerNorm | None:
        return None if self.crossattention is None else self.crossattention.norm

    @property
    def mlp_norm(self) -> LayerNorm:
        return self.output["LayerNorm"]

    def mlp(self, x: Tensor, *, residual: bool = False) -> Tensor:
        """The products of the FFN, as `MLP`."""
        return feed_forward(x, self.intermediate["dense"], self.output["dense"], "gelu", residual=residual)

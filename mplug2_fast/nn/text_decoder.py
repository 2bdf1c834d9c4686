"""The text decoder: whole sequences for training and ranking, single cached steps for generation.

The keys and values of the memory are computed once a video and shared by all sequences of that video, be they beams or
candidate answers: those stand side by side on an axis of their own, `(batch, sequences, tokens, channels)`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mplug2_fast.nn import LayerNorm
from mplug2_fast.nn.attention import attend
from mplug2_fast.nn.bert_layer import BERT_KINDS, BertEmbeddings, BertLayer
from mplug2_fast.nn.config import BertConfig
from mplug2_fast.nn.layer_norm import NORMS
from mplug2_fast.nn.parts import dropout_rate, linear
from mplug2_fast.nn.post_norm import add_norm
from mplug2_fast.nn.unchanged import TENSORS, unchanged
from mplug2_fast.ops.beam_attention import beam_attention
from mplug2_fast.ops.decoder_layer import decoder_layer
from mplug2_fast.ops.linear_act import linear_act
from mplug2_fast.ops.residual import norm_linear_residual
from mplug2_fast.ops.runtime.triton import early_kernels
from mplug2_fast.ops.step_attention import step_attention

StepBy = Literal["layer", "part", "sequence"]
"""How a step is computed.

By layer: one operator computes a layer. By part: the modules inside a layer are called, with cached keys and values. By
sequence: the decoder is called with all tokens so far, because it, a layer or an attention module must see its call."""

_KINDS = BERT_KINDS | {nn.ModuleList}


@dataclass
class Memory:
    """What the decoder attends to.

    Attributes:
        states: `(batch, tokens, D)`.
        mask: `(batch, tokens)`, nonzero for tokens, or None where nothing is padding.
        keys, values: one a layer, `(batch, heads, tokens, head_dim)`, or None where the layer computes its own. On a
            CPU they are contiguous; a GPU reads the heads of a token's projection where they lie, 128 bytes each, and
            is spared the copy.
        step_by: how steps that attend to it are computed; None before the first.
    """

    states: Tensor
    mask: Tensor | None
    keys: list[Tensor | None]
    values: list[Tensor | None]
    step_by: StepBy | None = None

    def select(self, index: Tensor) -> Memory:
        """The memory of the videos `index`, one a row."""

        def rows(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[index]

        return Memory(self.states[index], rows(self.mask), list(map(rows, self.keys)), list(map(rows, self.values)))

    def tiled(self, sequences: int) -> tuple[Tensor, Tensor | None]:
        """States `(batch, sequences, tokens, D)` and mask `(batch, sequences, tokens)`, the same for all sequences."""
        mask = self.mask
        return (
            self.states[:, None].expand(-1, sequences, -1, -1),
            None if mask is None else mask[:, None].expand(-1, sequences, -1),
        )


class SelfAttentionCache:
    """Keys and values of the tokens so far, which stay where they were written: what is reordered is the table of the
    rows in which they lie.

    Attributes:
        states: `(layers, 2, batch·beams, heads, max_length, head_dim)`.
        tokens: `(batch·beams, max_length)`, of steps by sequence.
        ancestors: `(batch·beams, max_length)`, int32, as `step_attention` has them.
    """

    def __init__(
        self,
        layers: int,
        rows: int,
        heads: int,
        max_length: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.states = torch.empty(layers, 2, rows, heads, max_length, head_dim, dtype=dtype, device=device)
        self.tokens = torch.zeros(rows, max_length, dtype=torch.long, device=device)
        self._own = torch.arange(rows, dtype=torch.int32, device=device)
        self.ancestors = self._own[:, None].repeat(1, max_length)

    def reorder(self, rows: Tensor, length: int) -> None:
        """Row i takes the first `length` steps of row `rows[i]`."""
        self.ancestors[:, :length] = self.ancestors[rows, :length]

    def append(self, tokens: Tensor, step: int) -> Tensor:
        """The sequences `(batch·beams, step + 1)` that end with these tokens `(batch·beams,)`."""
        self.tokens[:, step] = tokens
        self.ancestors[:, step] = self._own
        steps = torch.arange(step + 1, device=tokens.device)
        return self.tokens[self.ancestors[:, : step + 1].long(), steps]


class TextDecoder(nn.Module):
    def __init__(self, config: BertConfig, num_layers: int) -> None:
        super().__init__()
        self.config = config
        self.embeddings = BertEmbeddings(config)
        self.layers = nn.ModuleList([BertLayer(config, cross_attention=True) for _ in range(num_layers)])
        self.head = nn.Linear(config.hidden_size, config.hidden_size)
        self.head_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head_bias = nn.Parameter(torch.empty(config.vocab_size))

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states `(..., D)` to logits `(..., vocabulary)`."""
        x = self.head_norm(linear(self.head, x, "gelu"))
        return linear_act(x, self._output_embeddings(x.device), self.head_bias)

    def _output_embeddings(self, device: torch.device) -> Tensor:
        """The weight of the input embeddings `(vocabulary, D)`. As where weights are tied, hooks and adapters of the
        input embeddings do not change it. Where the weight is not on the device, or is not an ordinary tensor, it is
        what the module returns for every token."""
        # The embeddings themselves, which may be inside a wrapper.
        word = next(module for module in self.embeddings.modules() if isinstance(module, BertEmbeddings)).word
        weight = getattr(word, "weight", None)
        if type(weight) in TENSORS and weight is not None and weight.device == device:
            return weight
        return word(torch.arange(self.config.vocab_size, device=device))

    def remember(self, memory: Tensor, mask: Tensor | None = None) -> Memory:
        """memory `(batch, tokens, D)` and its padding mask, with the keys and values of every layer whose weights can
        be read."""
        nothing = [None] * len(self.layers)
        remembered = Memory(memory, mask, nothing, list(nothing))
        if self._is_unchanged():
            for index, layer in enumerate(self.layers):
                if unchanged(_KINDS, layer) and unchanged(_KINDS, layer.cross):
                    self._project(layer, remembered, index)
        return remembered

    def _is_unchanged(self) -> bool:
        return unchanged(frozenset((type(self),)), self)

    @staticmethod
    def _project(layer: BertLayer, memory: Memory, index: int) -> tuple[Tensor, Tensor]:
        """The memory's keys and values for a layer, which it keeps."""
        states = memory.states
        if memory.keys[index] is None:
            key, value = (states.transpose(1, 2) for states in layer.cross.project_memory(states))
            memory.keys[index] = key if states.is_cuda else key.contiguous()
            memory.values[index] = value if states.is_cuda else value.contiguous()
        return memory.keys[index], memory.values[index]

    def _attend(self, layer: BertLayer, x: Tensor, memory: Memory, index: int) -> Tensor:
        """Cross-attention sub-layer for x `(batch, sequences, tokens, D)`."""
        cross = layer.cross
        if not unchanged(_KINDS, cross):
            return layer.attend_cross(x.flatten(1, 2), memory.states, key_padding_mask=memory.mask).view(x.shape)
        query = cross.project_query(x.flatten(1, 2))
        key, value = self._project(layer, memory, index)
        if dropout_rate(cross.dropout) == 0:
            context = beam_attention(query, key, value, key_padding_mask=memory.mask)
        else:
            key, value = key.transpose(1, 2), value.transpose(1, 2)
            context = attend(cross.dropout, query, key, value, key_padding_mask=memory.mask)
        context = context.view(x.shape)
        return add_norm(layer.cross_norm, layer.dropout, x, lambda residual: cross.project_out(context, residual))

    def forward(self, input_ids: Tensor, mask: Tensor, memory: Memory, *, positions: slice = slice(None)) -> Tensor:
        """Teacher forcing.

        Args:
            input_ids, mask: `(batch, sequences, tokens)`; all sequences of a row of the batch see the same memory.
            positions: of the tokens after which logits are computed.

        Returns logits `(batch, sequences, positions, vocabulary)`.
        """
        x = self.embeddings(input_ids)
        for index, layer in enumerate(self.layers):
            if unchanged(_KINDS, layer):
                x = layer.attend_self(x, key_padding_mask=mask, causal=True)
                x = self._attend(layer, x, memory, index)
                x = layer.feed_forward(x)
            else:
                states, memory_mask = memory.tiled(x.shape[1])
                x = layer(x, key_padding_mask=mask, causal=True, memory=states, memory_mask=memory_mask)
        return self.logits(x[:, :, positions])

    def new_cache(
        self, batch: int, beams: int, max_length: int, device: torch.device | None = None
    ) -> SelfAttentionCache:
        """A cache on this device, or the parameters'."""
        config, like = self.config, self.head_bias
        return SelfAttentionCache(
            len(self.layers),
            batch * beams,
            config.num_attention_heads,
            max_length,
            config.head_dim,
            dtype=like.dtype,
            device=device or like.device,
        )

    def step(self, tokens: Tensor, step: int, cache: SelfAttentionCache, memory: Memory) -> Tensor:
        """Logits `(batch, beams, vocabulary)` after the newest tokens `(batch, beams)`, those of position `step`."""
        if memory.step_by is None:
            memory.step_by = self._step_by()
        if memory.step_by == "layer":
            return self._step_by_layer(tokens, step, cache, memory)
        if memory.step_by == "part":
            return self._step_by_part(tokens, step, cache, memory)
        sequences = cache.append(tokens.flatten(), step).view(*tokens.shape, step + 1)
        return self(sequences, torch.ones_like(sequences), memory, positions=slice(-1, None))[:, :, 0]

    def _step_by(self) -> StepBy:
        """The fastest way that calls every module that must be called."""
        if not self._is_unchanged() or not unchanged(_KINDS, self.layers, *self.layers):
            return "sequence"
        attentions = [layer.attention for layer in self.layers]
        if not unchanged(_KINDS, *attentions) or any(dropout_rate(own.dropout) != 0 for own in attentions):
            return "sequence"
        inside = [module for child in self.children() for module in child.modules()]
        if not unchanged(_KINDS, *inside):
            return "part"
        norms = [module for module in inside if type(module) in NORMS]
        dropped = any(type(module) is nn.Dropout and dropout_rate(module) for module in inside)
        # One operator has one eps, and norms with both parameters.
        alike = len({norm.eps for norm in norms}) == 1 and all(norm.bias is not None for norm in norms)
        return "layer" if alike and not dropped else "part"

    def _step_by_layer(self, tokens: Tensor, step: int, cache: SelfAttentionCache, memory: Memory) -> Tensor:
        """A norm is computed with the product after it, so that x is what goes into `norm`."""
        x, norm = self.embeddings.sums(tokens[..., None], step)[..., 0, :], self.embeddings.norm  # (batch, beams, D)
        with early_kernels(x):
            for index, layer in enumerate(self.layers):
                own, cross, mlp = layer.attention, layer.cross, layer.mlp
                x = decoder_layer(
                    x,
                    _pair(norm),
                    (own.in_proj_weight, own.in_proj_bias),
                    _pair(own.out_proj),
                    _pair(layer.attention_norm),
                    cross.query_parameters(),
                    _pair(cross.out_proj),
                    _pair(layer.cross_norm),
                    _pair(mlp.c_fc),
                    _pair(mlp.c_proj),
                    *cache.states[index],
                    cache.ancestors,
                    *self._project(layer, memory, index),
                    step=step,
                    activation=mlp.activation,
                    key_padding_mask=memory.mask,
                    eps=norm.eps,
                )
                norm = layer.mlp_norm
            hidden, _ = norm_linear_residual(x, *_pair(norm), *_pair(self.head), "gelu", norm.eps)
            norm, words = self.head_norm, self.embeddings.word.weight
            logits, _ = norm_linear_residual(hidden, *_pair(norm), words, self.head_bias, "none", norm.eps)
        return logits

    def _step_by_part(self, tokens: Tensor, step: int, cache: SelfAttentionCache, memory: Memory) -> Tensor:
        x = self.embeddings(tokens[..., None], start=step)  # (batch, beams, 1, D)
        for index, layer in enumerate(self.layers):
            own = layer.attention
            heads = own.project(x.flatten(0, 2))
            context = step_attention(*heads, *cache.states[index], cache.ancestors, step=step).view(x.shape)
            x = add_norm(layer.attention_norm, layer.dropout, x, functools.partial(own.project_out, context))
            x = self._attend(layer, x, memory, index)
            x = layer.feed_forward(x)
        return self.logits(x)[:, :, 0]


def _pair(module: nn.Linear | LayerNorm) -> tuple[Tensor, Tensor]:
    return module.weight, module.bias

"""The text decoder: whole sequences for training and ranking, single cached steps for generation.

Sequences that share a memory, such as beams or candidate answers, have a separate axis: `(batch, sequences,
tokens, channels)`. The memory's keys and values are computed once and serve all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mplug2_fast.nn.bert_layer import BERT_KINDS, BertEmbeddings, BertLayer, Int8KeysValues, KeysValues, can_pack
from mplug2_fast.nn.config import BertConfig
from mplug2_fast.nn.fp8 import Fp8Linear
from mplug2_fast.nn.int8 import Int8Embedding, Int8Linear, is_int8
from mplug2_fast.nn.layer_norm import NORMS, LayerNorm
from mplug2_fast.nn.packing import Packing
from mplug2_fast.nn.parts import dropout_rate, linear
from mplug2_fast.nn.unchanged import TENSORS, unchanged
from mplug2_fast.ops.decoder_layer import BITS, WeightAndBias, WithScale, decoder_layer
from mplug2_fast.ops.layer_norm import layer_norm
from mplug2_fast.ops.linear_act import Activation, linear_act
from mplug2_fast.ops.linear_int8 import linear_int8
from mplug2_fast.ops.residual import norm_linear_residual
from mplug2_fast.ops.runtime.triton import early_kernels
from mplug2_fast.ops.step_attention import step_attention

StepBy = Literal["layer", "part", "sequence"]
"""How a step is computed.

"layer": one operator per layer, whose linear layers must all have 8-bit weights or none. "part": the modules inside
each layer are called, with cached keys and values.
"sequence": the decoder is called with all tokens so far, because the decoder, a layer or an attention module must be
called as a whole."""

_KINDS = BERT_KINDS | {nn.ModuleList, Int8Linear, Int8Embedding, Fp8Linear}


@dataclass
class Memory:
    """What the decoder attends to.

    Attributes:
        states: `(batch, tokens, hidden)`.
        mask: `(batch, tokens)`, nonzero for tokens, or None without padding.
        keys_values: one per layer, or None if the layer must compute its own.
        step_by: how steps with this memory are computed; None before the first step.
    """

    states: Tensor
    mask: Tensor | None
    keys_values: list[KeysValues | Int8KeysValues | None]
    step_by: StepBy | None = None

    def select(self, index: Tensor | slice) -> Memory:
        """The memories of the batch rows `index`."""
        heads = [None if each is None else each._make(part[index] for part in each) for each in self.keys_values]
        return Memory(self.states[index], None if self.mask is None else self.mask[index], heads)


class SelfAttentionCache:
    """Keys and values of the tokens so far. Reordering beams permutes `ancestors`; the cache is not moved.

    Attributes:
        states: `(layers, 2, batch·beams, heads, max_length, head_dim)`.
        tokens: `(batch·beams, max_length)`, for steps by sequence.
        ancestors: `(batch·beams, max_length)`, int32, as `step_attention` takes them.
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
        """Gives row i the first `length` steps of row `rows[i]`."""
        self.ancestors[:, :length] = self.ancestors[rows, :length]

    def append(self, tokens: Tensor, step: int) -> Tensor:
        """Appends tokens `(batch·beams,)` and returns the sequences `(batch·beams, step + 1)`."""
        self.tokens[:, step] = tokens
        self.ancestors[:, step] = self._own
        steps = torch.arange(step + 1, device=tokens.device)
        return self.tokens[self.ancestors[:, : step + 1].long(), steps]


class TextDecoder(nn.Module):
    """BERT layers with cross-attention, and a language model head that shares the word embeddings."""

    def __init__(self, config: BertConfig, num_layers: int) -> None:
        super().__init__()
        self.config = config
        self.embeddings = BertEmbeddings(config)
        self.layers = nn.ModuleList([BertLayer.from_config(config, fused_projections=True) for _ in range(num_layers)])
        self.head = nn.Linear(config.hidden_size, config.hidden_size)
        self.head_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head_bias = nn.Parameter(torch.empty(config.vocab_size))

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states `(..., hidden)` to logits `(..., vocabulary)`."""
        x = self.head_norm(linear(self.head, x, "gelu"))
        # The embeddings may be inside a wrapper.
        word = next(module for module in self.embeddings.modules() if isinstance(module, BertEmbeddings)).word
        if isinstance(word, Int8Embedding):
            return word.logits(x, self.head_bias)
        return linear_act(x, self._output_embeddings(word, x.device), self.head_bias)

    def _output_embeddings(self, word: nn.Module, device: torch.device) -> Tensor:
        """The word embeddings' weight `(vocabulary, hidden)`.

        As with tied weights, hooks and adapters of the input embeddings do not change it. If the weight is on another
        device or not an ordinary tensor, the module is called with every token instead.
        """
        weight = getattr(word, "weight", None)
        if type(weight) in TENSORS and weight is not None and weight.device == device:
            return weight
        return word(torch.arange(self.config.vocab_size, device=device))

    def remember(self, memory: Tensor, mask: Tensor | None = None) -> Memory:
        """Projects memory `(batch, tokens, hidden)` once for all layers whose weights can be read.

        Args:
            mask: `(batch, tokens)`, nonzero for tokens.
        """
        remembered = Memory(memory, mask, [None] * len(self.layers))
        if self._is_unchanged():
            for index in range(len(self.layers)):
                self._memory_of(index, remembered)
        return remembered

    def can_pack(self) -> bool:
        """Whether `forward` takes a packing."""
        return self._is_unchanged() and can_pack(*self.layers)

    def _is_unchanged(self) -> bool:
        return unchanged(frozenset((type(self),)), self)

    def _memory_of(self, index: int, memory: Memory) -> KeysValues | Int8KeysValues | Tensor:
        """What layer `index` attends to: keys and values, which are kept, or the states if its cross-attention must be
        called with them. On a CPU, keys and values that an 8-bit weight projects become 8-bit numbers too."""
        layer = self.layers[index]
        if not (
            unchanged(_KINDS, layer)
            and unchanged(_KINDS, layer.crossattention)
            and unchanged(_KINDS, layer.crossattention.self)
        ):
            return memory.states
        found = memory.keys_values[index]
        if found is None:
            projections = layer.crossattention.self
            quantised = projections._modules.get("in_proj")
            narrow = quantised is not None and is_int8(quantised) and not memory.states.is_cuda
            kind = Int8KeysValues if narrow else KeysValues
            found = memory.keys_values[index] = kind.of(projections, memory.states)
        return found

    def forward(
        self,
        input_ids: Tensor,
        mask: Tensor,
        memory: Memory,
        *,
        positions: slice = slice(None),
        packing: Packing | None = None,
    ) -> Tensor:
        """Computes logits of whole sequences (teacher forcing).

        Args:
            input_ids, mask: `(batch, sequences, tokens)`; all sequences of a batch row attend to the same memory.
            positions: the tokens whose logits are wanted.
            packing: for inference with a batch of 1: compute only the packed tokens of the sequences.

        Returns logits `(batch, sequences, positions, vocabulary)`, or `(rows, vocabulary)` of the packed tokens.
        """
        x = self.embeddings(input_ids)
        seen = {"key_padding_mask": mask} if packing is None else {"packing": packing}
        if packing is not None:
            x = packing.pack(x[0])[None]
        for index, layer in enumerate(self.layers):
            attended = self._memory_of(index, memory)
            x = layer(x, causal=True, memory=attended, memory_mask=memory.mask, **seen)
        return self.logits(x[:, :, positions] if packing is None else x[0])

    def new_cache(
        self, batch: int, beams: int, max_length: int, device: torch.device | None = None
    ) -> SelfAttentionCache:
        """An empty cache, by default on the device of the parameters."""
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
        """Logits `(batch, beams, vocabulary)` after the newest tokens `(batch, beams)`, which have position `step`."""
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
        if not unchanged(_KINDS, *attentions):
            return "sequence"
        projections = [attention.self for attention in attentions]
        if not unchanged(_KINDS, *projections) or any(dropout_rate(each.dropout) != 0 for each in projections):
            return "sequence"
        inside = [module for child in self.children() for module in child.modules()]
        if not unchanged(_KINDS, *inside):
            return "part"
        norms = [module for module in inside if type(module) in NORMS]
        has_dropout = any(type(module) is nn.Dropout and dropout_rate(module) for module in inside)
        # The operator has one eps, and needs norms with weight and bias.
        alike = len({norm.eps for norm in norms}) == 1 and all(norm.bias is not None for norm in norms)
        return "layer" if alike and not has_dropout and all(map(_is_one_kind, self.layers)) else "part"

    def _step_by_layer(self, tokens: Tensor, step: int, cache: SelfAttentionCache, memory: Memory) -> Tensor:
        """Each norm is computed together with the product after it, so x is the input of `norm`."""
        x = self.embeddings.sums(tokens[..., None], step)[..., 0, :]  # (batch, beams, hidden)
        norm = self.embeddings.norm
        with early_kernels(x):
            for index, layer in enumerate(self.layers):
                own, cross = layer.attention, layer.crossattention
                seen = memory.keys_values[index] or self._memory_of(index, memory)
                x = decoder_layer(
                    x,
                    _pair(norm),
                    own.self.projection(),
                    _parts(own.output.dense),
                    _pair(own.output.LayerNorm),
                    cross.self.query_projection(),
                    _parts(cross.output.dense),
                    _pair(cross.output.LayerNorm),
                    _parts(layer.intermediate.dense),
                    _parts(layer.output.dense),
                    *cache.states[index],
                    cache.ancestors,
                    seen.keys,
                    seen.values,
                    step=step,
                    activation="gelu",
                    key_padding_mask=memory.mask,
                    eps=norm.eps,
                    memory_key_scale=seen.key_scale,
                    memory_value_scale=seen.value_scale,
                )
                norm = layer.output.LayerNorm
            hidden = _norm_linear(x, norm, _parts(self.head), "gelu")
            word = self.embeddings.word
            words = (word.weight, self.head_bias, *((word.scale,) if isinstance(word, Int8Embedding) else ()))
            return _norm_linear(hidden, self.head_norm, words)

    def _step_by_part(self, tokens: Tensor, step: int, cache: SelfAttentionCache, memory: Memory) -> Tensor:
        x = self.embeddings(tokens[..., None], start=step)  # (batch, beams, 1, hidden)
        for index, layer in enumerate(self.layers):
            own = layer.attention
            heads = own.self.project(x.flatten(0, 2))
            context = step_attention(*heads, *cache.states[index], cache.ancestors, step=step).view(x.shape)
            x = own.output(context, x)
            x = layer.crossattention(x, self._memory_of(index, memory), key_padding_mask=memory.mask)
            x = layer.feed_forward(x)
        return self.logits(x)[:, :, 0]


def _pair(module: nn.Linear | LayerNorm) -> tuple[Tensor, Tensor]:
    return module.weight, module.bias


def _parts(module: nn.Linear | Int8Linear) -> WeightAndBias | WithScale:
    return module.parts() if isinstance(module, Int8Linear) else _pair(module)


def _is_one_kind(layer: BertLayer) -> bool:
    """Whether all linear layers that `decoder_layer` computes have 8-bit weights, or none."""
    own, cross = layer.attention, layer.crossattention
    dense = (own.output.dense, cross.output.dense, layer.intermediate.dense, layer.output.dense)
    parts = (own.self.projection(), cross.self.projection(), *map(_parts, dense))
    return len({len(part) for part in parts}) == 1


def _norm_linear(
    x: Tensor, norm: LayerNorm, parts: WeightAndBias | WithScale, activation: Activation = "none"
) -> Tensor:
    """Norm, then a linear layer and its activation."""
    if len(parts) == 2:
        return norm_linear_residual(x, *_pair(norm), *parts, activation, norm.eps)[0]
    weight, bias, scale = parts
    normed = layer_norm(x, *_pair(norm), eps=norm.eps)
    return linear_int8(normed, weight, scale, bias, activation, bits=BITS)

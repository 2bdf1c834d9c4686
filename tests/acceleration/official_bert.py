"""A stand-in for the text side of the official model: an independent version of ALBEF's BERT.

The attributes, arguments and results are those of Hugging Face's BERT of that time, with mPLUG-2's additions: latents,
`mode="v_module"`, the fusion layers, and a decoder that takes its memory at every call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS = {"gelu": F.gelu}


@dataclass
class Output:
    """Fields by name, or by index among those that are not None."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    past_key_values: Any = None
    hidden_states: Any = None
    attentions: Any = None

    def __getitem__(self, index: Any) -> Any:
        return getattr(self, index) if isinstance(index, str) else self.to_tuple()[index]

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(value for value in vars(self).values() if value is not None)


def bert_config(bert: dict, **changes: Any) -> SimpleNamespace:
    defaults = {
        "output_attentions": False,
        "output_hidden_states": False,
        "use_return_dict": True,
        "chunk_size_feed_forward": 0,
        "add_cross_attention": False,
    }
    return SimpleNamespace(**{**defaults, **bert, **changes})


class BertEmbeddings(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.register_buffer("position_ids", torch.arange(config.max_position_embeddings)[None])
        self.position_embedding_type = "absolute"

    def forward(self, input_ids, token_type_ids=None, position_ids=None, past_key_values_length=0):
        words = self.word_embeddings(input_ids)
        first, length = past_key_values_length, words.shape[1]
        positions = self.position_ids[:, first : first + length] if position_ids is None else position_ids
        types = torch.zeros(words.shape[:2], dtype=torch.long) if token_type_ids is None else token_type_ids
        x = words + self.token_type_embeddings(types)
        x += self.position_embeddings(positions)
        return self.dropout(self.LayerNorm(x))


class BertSelfAttention(nn.Module):
    def __init__(self, config: Any, is_cross_attention: bool) -> None:
        super().__init__()
        self.config = config
        self.num_attention_heads = config.num_attention_heads
        self.attention_head_size = config.hidden_size // config.num_attention_heads
        self.all_head_size = config.hidden_size
        other = config.encoder_width if is_cross_attention else config.hidden_size
        self.query = nn.Linear(config.hidden_size, self.all_head_size)
        self.key = nn.Linear(other, self.all_head_size)
        self.value = nn.Linear(other, self.all_head_size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)
        self.position_embedding_type = "absolute"
        self.save_attention = False

    def transpose_for_scores(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        head_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        past_key_value=None,
        output_attentions=False,
    ):
        cross = encoder_hidden_states is not None
        source = encoder_hidden_states if cross else hidden_states
        mask = encoder_attention_mask if cross else attention_mask
        key, value = (self.transpose_for_scores(linear(source)) for linear in (self.key, self.value))
        if past_key_value is not None and not cross:
            key, value = (torch.cat(pair, dim=2) for pair in zip(past_key_value, (key, value), strict=True))
        scores = self.transpose_for_scores(self.query(hidden_states)) @ key.transpose(-1, -2)
        scores = scores / math.sqrt(self.attention_head_size)
        probs = (scores if mask is None else scores + mask).softmax(dim=-1)
        if cross and self.save_attention:
            self.attention_map = probs
        dropped = self.dropout(probs)
        context = (dropped if head_mask is None else dropped * head_mask) @ value
        context = context.transpose(1, 2).flatten(2)
        return (context, *((probs,) if output_attentions else ()), (key, value))


class BertSelfOutput(nn.Module):
    def __init__(self, config: Any, inner: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + input_tensor)


class BertAttention(nn.Module):
    def __init__(self, config: Any, is_cross_attention: bool = False) -> None:
        super().__init__()
        self.self = BertSelfAttention(config, is_cross_attention)
        self.output = BertSelfOutput(config, config.hidden_size)
        self.pruned_heads = set()

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        head_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        past_key_value=None,
        output_attentions=False,
    ):
        memory = encoder_hidden_states, encoder_attention_mask
        context, *rest = self.self(hidden_states, attention_mask, head_mask, *memory, past_key_value, output_attentions)
        return (self.output(context, hidden_states), *rest)


class BertIntermediate(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = ACTIVATIONS[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.intermediate_act_fn(self.dense(hidden_states))


class Layer(nn.Module):
    """Shared by all kinds of layers."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertSelfOutput(config, config.intermediate_size)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.output(self.intermediate(x), x)

    def cross(self, x, attention_mask, head_mask, states, states_mask, output_attentions):
        assert states is not None, "encoder_hidden_states must be given for cross-attention layers"
        return self.crossattention(
            x, attention_mask, head_mask, states, states_mask, output_attentions=output_attentions
        )


class BertLayer(Layer):
    def __init__(self, config: Any, layer_num: int) -> None:
        super().__init__(config)
        first_universal = config.num_hidden_layers - config.num_uni_layer
        self.layer_num = layer_num
        self.has_cross_attention = config.add_cross_attention
        self.has_latent = layer_num == first_universal
        if self.has_cross_attention or layer_num >= first_universal:
            self.crossattention = BertAttention(config, is_cross_attention=True)
        if self.has_latent:
            self.latents = nn.Parameter(torch.randn(50, config.hidden_size))
        if layer_num >= first_universal:
            self.intermediate_vision = BertIntermediate(config)
            self.output_vision = BertSelfOutput(config, config.intermediate_size)

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        head_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        past_key_value=None,
        output_attentions=False,
        mode="norm",
    ):
        if mode == "v_module":
            attention_mask = None
            if self.has_latent:
                hidden_states = self.latents.expand(hidden_states.shape[0], -1, -1)
            if self.layer_num == self.config.num_hidden_layers - 1:
                hidden_states, encoder_hidden_states = encoder_hidden_states, hidden_states
                encoder_attention_mask = None
        past = None if past_key_value is None else past_key_value[:2]
        x, *rest, present = self.attention(
            hidden_states, attention_mask, head_mask, past_key_value=past, output_attentions=output_attentions
        )
        if self.has_cross_attention or mode == "v_module":
            x, *more, _ = self.cross(
                x, attention_mask, head_mask, encoder_hidden_states, encoder_attention_mask, output_attentions
            )
            rest += more
        return (self.feed_forward(x), *rest, *present)


class FusionLayer(Layer):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.crossattention = BertAttention(config, is_cross_attention=True)
        self.stride_layer = config.stride_layer

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        head_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        layer_nums=None,
        past_key_value=None,
        output_attentions=False,
    ):
        if layer_nums == 0 or layer_nums % self.stride_layer != 0:
            x, *_, present = self.attention(hidden_states, attention_mask, head_mask)
            x, *_ = self.cross(x, attention_mask, head_mask, encoder_hidden_states, encoder_attention_mask, False)
        else:
            both = torch.cat([encoder_hidden_states, hidden_states], dim=1)
            mask = torch.cat([encoder_attention_mask, attention_mask], dim=3)
            x, *_, present = self.attention(both, mask, head_mask)
        return (self.feed_forward(x), *present)


class BertEncoder(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.layer = nn.ModuleList([BertLayer(config, i) for i in range(config.num_hidden_layers)])
        self.uni_layer = config.num_uni_layer

    def forward(self, x, mask, memory, memory_mask, past, output_attentions, mode):
        """The result, the hidden states, the attention weights, and the keys and values of all layers."""
        states, attentions, presents = [x], [], []
        for i in range(len(self.layer) - self.uni_layer if mode == "v_module" else 0, len(self.layer)):
            past_key_value = None if past is None else past[i]
            x, *rest = self.layer[i](x, mask, None, memory, memory_mask, past_key_value, output_attentions, mode=mode)
            states.append(x)
            presents.append(tuple(rest[-2:]))
            attentions += rest[:1] if output_attentions else []
        return x, tuple(states), tuple(attentions), tuple(presents)


class FusionEncoder(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.layer = nn.ModuleList([FusionLayer(config) for _ in range(config.num_hidden_layers)])
        self.start_layer = max(0, config.num_hidden_layers - config.fusion_layers)

    def forward(self, x, mask, image, image_mask):
        image_length, text_length = image.shape[1], x.shape[1]
        for place, layer in enumerate(self.layer[self.start_layer :]):
            x, *_ = layer(x, mask, None, image, image_mask, place, None, False)
            if x.shape[1] == image_length + text_length:
                new_image, x = x.split((image_length, text_length), dim=1)
                image = image + new_image
        return [image, x]


class PreTrainedModel(nn.Module):
    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def get_extended_attention_mask(self, attention_mask, input_shape, is_decoder):
        mask = attention_mask[:, None, None, :].to(self.dtype)
        if is_decoder:
            ids = torch.arange(input_shape[1])
            mask = mask * (ids[None] <= ids[:, None]).to(self.dtype)
        return (1.0 - mask) * -10000.0

    def invert_attention_mask(self, mask: Tensor) -> Tensor:
        return (1.0 - mask[:, None, None, :].to(self.dtype)) * -1e9


class BertModel(PreTrainedModel):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.pooler = None

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        encoder_embeds=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        past_key_values=None,
        use_cache=None,
        output_attentions=False,
        output_hidden_states=False,
        return_dict=None,
        is_decoder=False,
        mode="norm",
    ):
        shape = (input_ids if encoder_embeds is None else encoder_embeds).shape[:2]
        past = 0 if past_key_values is None else past_key_values[0][0].shape[2]
        assert not past or shape[1] == 1
        mask = torch.ones(shape[0], shape[1] + past) if attention_mask is None else attention_mask
        mask = self.get_extended_attention_mask(mask, shape, is_decoder and not past)
        memory, memory_mask = encoder_hidden_states, encoder_attention_mask
        if memory is not None:
            memory_mask = self.invert_attention_mask(
                torch.ones(memory.shape[:2]) if memory_mask is None else memory_mask
            )
        x = self.embeddings(input_ids, token_type_ids, position_ids, past) if encoder_embeds is None else encoder_embeds
        x, states, attentions, presents = self.encoder(
            x, mask, memory, memory_mask, past_key_values, output_attentions, mode
        )
        output = Output(
            last_hidden_state=x,
            past_key_values=presents
            if (self.config.use_cache if use_cache is None and is_decoder else use_cache)
            else None,
            hidden_states=states if output_hidden_states else None,
            attentions=attentions if output_attentions else None,
        )
        return output.to_tuple() if return_dict is False else output


class FusionModel(PreTrainedModel):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embeddings = BertEmbeddings(config)
        self.encoder = FusionEncoder(config)
        self.pooler = None

    def forward(self, encoder_embeds, attention_mask, encoder_hidden_states, encoder_attention_mask, return_dict=None):
        mask = self.get_extended_attention_mask(attention_mask, encoder_embeds.shape[:2], False)
        memory_mask = self.invert_attention_mask(encoder_attention_mask)
        return self.encoder(encoder_embeds, mask, encoder_hidden_states, memory_mask)


class BertPredictionHeadTransform(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.transform_act_fn = ACTIVATIONS[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.LayerNorm(self.transform_act_fn(self.dense(hidden_states)))


class BertLMPredictionHead(nn.Module):
    def __init__(self, config: Any, word_embeddings: nn.Embedding) -> None:
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.decoder.bias = self.bias
        self.decoder.weight = word_embeddings.weight

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.decoder(self.transform(hidden_states))


class BertOnlyMLMHead(nn.Module):
    def __init__(self, config: Any, word_embeddings: nn.Embedding) -> None:
        super().__init__()
        self.predictions = BertLMPredictionHead(config, word_embeddings)

    def forward(self, sequence_output: Tensor) -> Tensor:
        return self.predictions(sequence_output)


class LanguageModel(PreTrainedModel):
    """The text decoder. Subclasses reduce the losses of tokens to one."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.bert = BertModel(config)
        self.cls = BertOnlyMLMHead(config, self.bert.embeddings.word_embeddings)

    def reduce(self, losses: Tensor, rows: int, valid: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(
        self, input_ids, attention_mask=None, *, labels=None, is_decoder=True, return_dict=None, use_cache=None,
        reduction="mean", return_logits=False, **others,
    ):  # fmt: skip
        use_cache = False if labels is not None else use_cache
        output = self.bert(input_ids, attention_mask, use_cache=use_cache, is_decoder=is_decoder, **others)
        logits, output.last_hidden_state = self.cls(output.last_hidden_state), None
        if return_logits:
            return logits[:, :-1].contiguous()
        if labels is not None:
            targets = labels[:, 1:].flatten()
            losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="none")
            output.loss = self.reduce(losses, logits.shape[0], targets != -100)
        output.logits = logits
        return output.to_tuple() if return_dict is False else output


class BertPrefixModel(LanguageModel):
    def reduce(self, losses: Tensor, rows: int, valid: Tensor) -> Tensor:
        return losses.sum() / valid.sum()


class BertLMHeadModel(LanguageModel):
    def reduce(self, losses: Tensor, rows: int, valid: Tensor) -> Tensor:
        return losses.view(rows, -1).sum(dim=1)

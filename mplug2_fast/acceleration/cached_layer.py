"""A layer of a decoder that reuses what earlier calls computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mplug2_fast.acceleration.cache import Call, Record, Values, Videos
from mplug2_fast.ops import attention, beam_attention
from mplug2_fast.ops.checksum import reading_weights

if TYPE_CHECKING:
    from mplug2_fast.acceleration.bert_attention import Projections


@dataclass(frozen=True)
class CausalLayer:
    """A causal layer with cross-attention, within one call of its decoder."""

    call: Call
    module: Any
    own: Projections
    cross: Projections
    feed_forward: Callable[[Tensor], Tensor]

    def decode(
        self, x: Tensor, visible: Tensor | None, memory: Tensor, memory_visible: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """(result, keys, values) for x `(rows, tokens, channels)` and memory `(rows, keys, channels)`, whose rows
        belong to a few videos. None if nothing may be kept."""
        found = self.call.find(memory, memory_visible)
        if found is None:
            return None
        videos, index = found
        record = videos.records.get(id(self.module))
        parents = self.call.parents(record, x, visible, index)
        weights = None
        if record is not None and parents is not None:
            with reading_weights() as read:
                out, *made = self._decode(x, visible, videos, index, record, parents)
            weights = Values(self._parameters(), read)
        if weights is None or not weights.same(record.weights):
            weights = Values(self._parameters())
            out, *made = self._decode(x, visible, videos, index, None, None)
        kept = made if self.call.is_generation(x) else made[:2]
        videos.records[id(self.module)] = Record(weights, x.clone(), out.clone(), tuple(kept), visible, index)
        return out, *(t.transpose(1, 2).clone() for t in made[:2])

    def _parameters(self) -> list[Tensor]:
        own, cross, layer = self.own, self.cross, self.module
        parts = (own.inner, own.output, cross.inner, cross.output, layer.intermediate, layer.output)
        return [parameter for part in parts for parameter in part.parameters()]

    def _decode(
        self,
        x: Tensor,
        visible: Tensor | None,
        videos: Videos,
        index: tuple[int, ...],
        record: Record | None,
        parents: list[int] | None,
    ) -> tuple[Tensor, ...]:
        """(result, keys, values, keys and values of the memory), with or without a record and the row of it that each
        row of x continues."""
        own, cross = self.own, self.cross
        if record is None or len(record.kept) == 2:
            keys, values = (t.transpose(1, 2).contiguous() for t in cross.key_value(videos.memory))
        else:
            keys, values = record.kept[2:]

        new = x if record is None else x[:, record.x.shape[1] :]
        key, value = own.key_value(new)
        if record is not None:
            key, value = (torch.cat([t[parents], n], dim=1) for t, n in zip(record.kept[:2], (key, value), strict=True))
        context = _attend_self(own.query(new), key, value, visible)
        out = own.finish(context, new)
        out = cross.finish(_attend(cross.query(out), keys, values, videos, index), out)
        out = self.feed_forward(out)
        if record is not None:
            out = torch.cat([record.out[parents], out], dim=1)
        return out, key, value, keys, values


def _attend_self(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
    """Causal attention of the newest tokens, query `(rows, new tokens, heads, head_dim)`, to all tokens."""
    tokens, new = key.shape[1], query.shape[1]
    if new == 1:
        return attention(query, key, value, key_padding_mask=visible)
    # The operator needs as many queries as keys: pad with zeros and drop their results.
    query = torch.cat([torch.zeros_like(key[:, : tokens - new]), query], dim=1)
    return attention(query, key, value, key_padding_mask=visible, causal=True)[:, tokens - new :]


def _attend(query: Tensor, keys: Tensor, values: Tensor, videos: Videos, index: tuple[int, ...]) -> Tensor:
    """Cross-attention of query `(rows, tokens, heads, head_dim)` to the keys and values `(videos, heads, keys,
    head_dim)`. Reads those of a video once for all of its rows."""
    rows, tokens = query.shape[:2]
    count = keys.shape[0]
    if rows % count == 0 and index == tuple(row * count // rows for row in range(rows)):
        side_by_side = query.reshape(count, rows // count * tokens, *query.shape[2:])
        return beam_attention(side_by_side, keys, values, key_padding_mask=videos.visible).view(rows, tokens, -1)
    out = query.new_empty(rows, tokens, query.shape[2] * query.shape[3])
    for video in dict.fromkeys(index):
        mine = [row for row, i in enumerate(index) if i == video]
        mask = None if videos.visible is None else videos.visible[video : video + 1]
        side_by_side = query[mine].flatten(0, 1)[None]
        context = beam_attention(
            side_by_side, keys[video : video + 1], values[video : video + 1], key_padding_mask=mask
        )
        out[mine] = context.view(len(mine), tokens, -1)
    return out

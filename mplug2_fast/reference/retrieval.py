"""Retrieval by contrast and matching, shared by the reference models of both families."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mplug2_fast.modes import in_eval_mode


class Retrieval:
    """Features, losses and scores of a model that has `encode_video`, `text_encoder`, `fuse` and `itm_head`."""

    def add_contrast(self, width: int, embed_dim: int) -> None:
        """Adds the projections and the temperature."""
        self.vision_proj = nn.Linear(width, embed_dim)
        self.text_proj = nn.Linear(width, embed_dim)
        self.temp = nn.Parameter(torch.tensor(0.07))

    def image_feature(self, visual: Tensor) -> Tensor:
        """Features of image_embeds `(B, S, D)`."""
        return F.normalize(self.vision_proj(visual[:, 0]), dim=-1)

    def text_feature(self, text: Tensor) -> Tensor:
        return F.normalize(self.text_proj(text[:, 0]), dim=-1)

    def match(self, visual: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """The logits `(B, 2)` of pairs."""
        return self.itm_head(self.fuse(text, text_mask, visual)[1][:, 0])

    def retrieval_losses(
        self,
        video: Tensor,
        text_ids: Tensor,
        text_mask: Tensor,
        ids: Tensor,
        momentum: Any,
        queues: Mapping[str, Tensor],
        alpha: float,
        negatives: tuple[Tensor, Tensor],
    ) -> dict[str, Tensor]:
        """The losses of a step, the weights by which negatives are drawn, and the queues after it.

        Args:
            video: `(B, 3, T, H, W)`. text_ids, text_mask: `(B, tokens)`. ids: `(B,)`.
            momentum: the copy, already updated. queues: before the step, by their official names.
            alpha: weight of the copy's similarities in the targets.
            negatives: (wrong image of each text, wrong text of each image).
        """
        batch = len(ids)
        visual, text = self.encode_video(video), self.text_encoder(text_ids, text_mask)
        image_feat, text_feat = self.image_feature(visual), self.text_feature(text)
        with torch.no_grad():
            image_m = momentum.image_feature(momentum.encode_video(video))
            text_m = momentum.text_feature(momentum.text_encoder(text_ids, text_mask))
            image_all = torch.cat([image_m.T, queues["image_queue"]], dim=1)
            text_all = torch.cat([text_m.T, queues["text_queue"]], dim=1)
            same = (ids[:, None] == torch.cat([ids, queues["idx_queue"][0]])).float()
            hard = same / same.sum(dim=1, keepdim=True)
            soft_i2t = alpha * (image_m @ text_all / self.temp).softmax(dim=1) + (1 - alpha) * hard
            soft_t2i = alpha * (text_m @ image_all / self.temp).softmax(dim=1) + (1 - alpha) * hard
        sim_i2t, sim_t2i = image_feat @ text_all / self.temp, text_feat @ image_all / self.temp
        loss_i2t = -(sim_i2t.log_softmax(dim=1) * soft_i2t).sum(dim=1).mean()
        loss_t2i = -(sim_t2i.log_softmax(dim=1) * soft_t2i).sum(dim=1).mean()
        with torch.no_grad():
            equal = ids[:, None] == ids
            weights_i2t = sim_i2t[:, :batch].softmax(dim=1).masked_fill(equal, 0)
            weights_t2i = sim_t2i[:, :batch].softmax(dim=1).masked_fill(equal, 0)
        image_neg, text_neg = negatives
        positive = self.match(visual, text, text_mask)
        negative = self.match(
            torch.cat([visual[image_neg], visual]),
            torch.cat([text, text[text_neg]]),
            torch.cat([text_mask, text_mask[text_neg]]),
        )
        labels = torch.cat([ids.new_ones(batch), ids.new_zeros(2 * batch)])
        matching = F.cross_entropy(torch.cat([positive, negative]), labels)
        after = {name: queue.clone() for name, queue in queues.items()}
        start = int(after["queue_ptr"])
        after["image_queue"][:, start : start + batch] = image_m.T
        after["text_queue"][:, start : start + batch] = text_m.T
        after["idx_queue"][0, start : start + batch] = ids
        after["queue_ptr"][0] = (start + batch) % after["idx_queue"].shape[1]
        return {
            "loss_ita": (loss_i2t + loss_t2i) / 2,
            "loss_itm": matching,
            "negative_image_weights": weights_t2i,
            "negative_text_weights": weights_i2t,
            **{f"after:{name}": queue for name, queue in after.items()},
        }

    @torch.no_grad()
    @in_eval_mode
    def retrieval_scores(
        self, visual: Tensor, text_ids: Tensor, text_mask: Tensor, k: int, *, add_similarity: bool
    ) -> tuple[Tensor, Tensor]:
        """Scores of visual inputs for texts `(N, M)`, and of texts for visual inputs `(M, N)`; -100 outside the k best.
        Each pair is fused alone, with its own keys and values."""
        text = self.text_encoder(text_ids, text_mask)
        sims = self.image_feature(visual) @ self.text_feature(text).T
        by_visual, by_text = torch.full_like(sims, -100.0), torch.full_like(sims.T, -100.0)
        for i, row in enumerate(sims):
            best, chosen = row.topk(k)
            scores = self.match(visual[i].expand(k, -1, -1), text[chosen], text_mask[chosen])[:, 1]
            by_visual[i, chosen] = scores + best if add_similarity else scores
        for j, row in enumerate(sims.T):
            best, chosen = row.topk(k)
            scores = self.match(visual[chosen], text[j].expand(k, -1, -1), text_mask[j].expand(k, -1))[:, 1]
            by_text[j, chosen] = scores + best if add_similarity else scores
        return by_visual, by_text

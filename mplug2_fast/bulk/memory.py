"""How many clips fit into a batch, by the memory that they need."""

from __future__ import annotations

import torch

from mplug2_fast.info import available_memory

MAX_BATCH = {"cpu": 16, "cuda": 64}
"""Larger batches are not faster: at this size even the matrix products of the tiny model are large enough."""

CPU_BUDGET = 2**30
"""Fits one or two clips of the Large model. Larger batches are not faster on a CPU."""

# The share of the free memory that a batch may use. The rest is for other programs, fragmentation and errors of the
# formula.
_SHARE = {"cpu": 0.25, "cuda": 0.6}


def batch_size(bytes_of_clip: int, device: torch.device, budget: int | None = None) -> int:
    """How many clips fit into a budget in bytes, at least one. None: a share of the memory that is free now."""
    if budget is None:
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
        budget = int(free * _SHARE[device.type])
        if device.type == "cpu":
            budget = min(budget, CPU_BUDGET)
    return max(1, min(budget // bytes_of_clip, MAX_BATCH[device.type]))

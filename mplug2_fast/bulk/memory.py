"""How many clips the model computes at a time, by the memory that they take."""

from __future__ import annotations

import torch

from mplug2_fast.info import available_memory

MAX_BATCH = {"cpu": 16, "cuda": 64}
"""More clips at a time gain nothing: even the tiny model's matrix products are large enough by then."""

CPU_BUDGET = 2**30
"""Of the Large model a clip or two fit into this, and a CPU gains nothing by more of them."""

# The share of what is free that a batch may take: other programs, the allocator's gaps and the formula's error need
# room.
_SHARE = {"cpu": 0.25, "cuda": 0.6}


def batch_size(bytes_of_clip: int, device: torch.device, budget: int | None = None) -> int:
    """How many clips fit into a budget in bytes; None takes a share of what is free now. At least one."""
    if budget is None:
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
        budget = int(free * _SHARE[device.type])
        if device.type == "cpu":
            budget = min(budget, CPU_BUDGET)
    return max(1, min(budget // bytes_of_clip, MAX_BATCH[device.type]))

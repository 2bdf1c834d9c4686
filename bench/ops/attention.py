"""Attention against PyTorch's own, scaled_dot_product_attention, which is what PyTorch's backend is. On a GPU that has
several kernels, of which it does not always take the fastest: each is measured."""

from collections.abc import Callable
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.ops.baseline import Arguments, Baseline
from mplug2_fast.ops.attention import attention_torch


def by(kernel: SDPBackend) -> Callable[[Arguments], Callable[[], Any]]:
    """What the kernel does not serve is computed product by product."""

    def prepare(arguments: Arguments) -> Callable[[], Any]:
        def run() -> Any:
            with sdpa_kernel([kernel, SDPBackend.MATH], set_priority=True):
                return attention_torch(*arguments.values())

        return run

    return prepare


BASELINES = (
    Baseline("SDPA by cuDNN", by(SDPBackend.CUDNN_ATTENTION), devices=("cuda",)),
    Baseline("SDPA by flash", by(SDPBackend.FLASH_ATTENTION), devices=("cuda",)),
)

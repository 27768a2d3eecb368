"""Which kernels scaled_dot_product_attention tries, the fastest first."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

HOPPER = 9  # major compute capability

# cuDNN is the faster of the two on Hopper, FlashAttention-2 before it; each is skipped where it cannot run.
_CUDNN_FIRST = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
_FLASH_FIRST = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
_ALWAYS = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


def vendor_kernels(device: torch.device, in_haste: bool = False) -> AbstractContextManager[None]:
    """On CUDA the kernels that scaled_dot_product_attention tries, in order; elsewhere torch's own choice.

    in_haste: for shapes that will not come often. cuDNN plans for every new shape, which takes it tens of milliseconds.
    To be entered around a whole pass, for that, too, takes as long as starting a kernel.
    """
    if device.type != "cuda":
        return nullcontext()
    is_for_cudnn = torch.cuda.get_device_capability(device)[0] >= HOPPER and not in_haste
    return sdpa_kernel([*(_CUDNN_FIRST if is_for_cudnn else _FLASH_FIRST), *_ALWAYS], set_priority=True)

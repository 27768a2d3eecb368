"""Attention backends: name -> function, "auto", and why one cannot be had."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from hforce.attention import reference
from hforce.attention.layout import PLAIN, Attention, Backend, Keeping, LayerView, view_of
from hforce.attention.timing import Layer, enter, race
from hforce.attention.vendor import HOPPER
from hforce.errors import BackendError
from hforce.rules import nearest

log = logging.getLogger(__name__)

VENDOR, AUTO, CUDNN, CPU = "vendor", "auto", "cudnn", torch.device("cpu")
AMPERE = 8  # major compute capability
WIDEST = 128  # head dim up to which the tiles of the Triton kernel fit into shared memory
FLASH_WIDEST = 256


@dataclass(frozen=True)
class Entry:
    """A backend as the table has it: imported only when it is asked for."""

    load: Callable[[], Attention]
    lacks: Callable[[torch.device, torch.dtype, int], str]  # device, dtype, head dim -> the reason; "": it can run
    turns_queries: bool = False
    waits: bool = False  # for the device, in every pass: it is no candidate for "auto"


def attend_dense(query: Tensor, view: LayerView) -> Tensor:
    """One scaled_dot_product_attention for every run of heads that read equally many tokens; see `vendor_kernels`."""
    query = query.transpose(0, 1)[None]
    outs = [
        F.scaled_dot_product_attention(query[:, run.first : run.last], run.keys[None], run.values[None])
        for run in view.runs
    ]
    out = torch.cat([out.transpose(1, 2) for out in outs], dim=2) if len(outs) > 1 else outs[0].transpose(1, 2)
    return out[0]


def attend_varlen(query: Tensor, view: LayerView) -> Tensor:
    """All heads in one call of PyTorch's varlen attention: every head is a sequence, as long as the device says."""
    from torch.nn.attention.varlen import varlen_attn

    tokens, heads, width = query.shape
    begins = torch.arange(0, (heads + 1) * tokens, tokens, device=query.device, dtype=torch.int32)
    sequences = query.transpose(0, 1).reshape(heads * tokens, 1, width)
    keys, values = view.keys[:, None], view.values[:, None]
    out = varlen_attn(sequences, keys, values, begins, view.begin, tokens, view.longest, seqused_k=view.length)
    assert isinstance(out, Tensor), "a second result comes only when it is asked for"
    return out.view(heads, tokens, width).transpose(0, 1)


def make_backend(name: str, device: torch.device = CPU) -> Backend:
    """The backend that the table calls `name`, whether or not it can run there; on CUDA our kernels keep the past."""
    entry = BACKENDS[name]
    return Backend(name, entry.load(), entry.turns_queries, choose_keeping(device), entry.waits)


def choose_keeping(device: torch.device) -> Keeping:
    """Kernels of ours that write, move and turn, where Triton can run, whichever backend attends; else plain steps."""
    if not can_launch(device):
        return PLAIN
    from hforce.attention import triton_kernel

    return Keeping(triton_kernel.place, triton_kernel.move, triton_kernel.turn_past)


@lru_cache
def can_launch(device: torch.device) -> bool:
    """Whether Triton can run kernels there. One is tried: it takes a C compiler, and nothing tells that beforehand."""
    if _triton_lacks(device, torch.float32, 0):
        return False
    from hforce.attention import triton_kernel

    one, phase = torch.zeros(1, 1, 2, device=device), torch.ones(1, 1, 1, dtype=torch.complex64, device=device)
    try:
        triton_kernel.place(one, one, one, phase, view_of(one[0].clone(), one[0].clone(), [1]))
        torch.cuda.synchronize(device)
    except triton_kernel.CANNOT_BUILD as error:
        log.warning("Triton cannot build its kernels here, so small operations run in single steps: %s", error)
        return False
    return True


def turns_queries(name: str) -> bool:
    """Whether the backend called `name` turns its queries, so that keys are kept once; of "auto" that is not known."""
    return name in BACKENDS and BACKENDS[name].turns_queries


def reasons(device: torch.device, dtype: torch.dtype, head_dim: int) -> dict[str, str]:
    """Every backend, and why it cannot be had for such tensors; "" where it can."""
    return {name: entry.lacks(device, dtype, head_dim) for name, entry in BACKENDS.items()}


def check_backend(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Raises BackendError where there is no such backend, or where it cannot run on such tensors; loads nothing."""
    if name not in (known := (*BACKENDS, VENDOR, AUTO)):
        message = f"unknown attention backend {name!r}{nearest(name, known)}"
        raise BackendError(message, f"use one of: {', '.join(known)}")
    lacking = reasons(device, dtype, head_dim)
    if lacking.get(name):
        able = ", ".join([*(known for known, reason in lacking.items() if not reason), VENDOR, AUTO])
        raise BackendError(f"attention backend {name!r} {lacking[name]}", f"can be had here: {able}")


def choose_backend(name: str, layer: Layer, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend called `name`; with "vendor" `cudnn`, or else `sdpa`; with "auto" the one fastest on such a layer.

    "auto" times the fast ones that can run, once, on random keys; where `sdpa` is the only one, as on a CPU, nothing
    is timed. Raises what `check_backend` raises.
    """
    check_backend(name, device, dtype, layer.head_dim)
    name = attends_by(name, device, dtype, layer.head_dim)
    if name != AUTO:
        return make_backend(name, device)
    lacking = reasons(device, dtype, layer.head_dim)
    if lacking.get(CUDNN) == "":
        lacking[CUDNN] = try_cudnn(device, dtype, layer.head_dim)
    able = [make_backend(known, device) for known, entry in BACKENDS.items() if not (entry.waits or lacking[known])]
    if len(able) == 1:
        return able[0]
    seconds = race([enter(backend, layer, device, dtype) for backend in able], device)
    return able[seconds.index(min(seconds))]


def attends_by(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """A backend by its name, and what "vendor" is there. Raises BackendError for `cudnn` where it does not work."""
    if name not in (VENDOR, CUDNN):
        return name
    if _cudnn_lacks(device, dtype, head_dim):
        return "sdpa"
    if failed := try_cudnn(device, dtype, head_dim):
        if name == CUDNN:
            raise BackendError(f"attention backend {name!r} {failed}", "use cache.backend=sdpa")
        log.warning("attention is by sdpa, for cudnn %s", failed)
    return "sdpa" if failed else CUDNN


@lru_cache
def try_cudnn(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Why cuDNN's own attention does not work here, as it has to be tried to know; "" where it does."""
    try:
        enter(make_backend(CUDNN, device), Layer(8, 8, head_dim, (1, 3)), device, dtype)()
        torch.cuda.synchronize(device)
    except Exception as error:  # of types that only its package knows
        return f"does not work here: {str(error).strip().partition(chr(10))[0] or type(error).__name__}"
    return ""


def _lacks_nothing(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    return ""


def _varlen_lacks(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    if device.type != "cuda":
        return f"needs a CUDA device, and the model is on {device.type}"
    if torch.cuda.get_device_capability(device)[0] < AMPERE:
        return "needs a GPU of the Ampere generation or later"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"computes in bfloat16 or float16, and the model is in {str(dtype).removeprefix('torch.')}"
    if head_dim > FLASH_WIDEST or head_dim % 8:
        return f"needs heads of a multiple of 8 values, at most {FLASH_WIDEST}, and these have {head_dim}"
    if find_spec("torch.nn.attention.varlen") is None:
        return f"needs torch.nn.attention.varlen, which PyTorch {torch.__version__} does not have"
    from torch.nn.attention.varlen import varlen_attn

    if "seqused_k" not in inspect.signature(varlen_attn).parameters:
        return f"needs lengths on the device (seqused_k), which PyTorch {torch.__version__} does not take"
    return ""


def _triton_lacks(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    if find_spec("triton") is None:
        return 'needs the package triton: pip install "hforce[kernels]"'
    if device.type != "cuda":
        return f"needs a CUDA device, and the model is on {device.type}"
    if torch.cuda.get_device_capability(device)[0] < AMPERE:
        return "needs a GPU of the Ampere generation or later"
    if head_dim > WIDEST:
        return f"takes heads of at most {WIDEST} values, and these have {head_dim}"
    return ""


def _cudnn_lacks(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    if device.type != "cuda":
        return f"needs a CUDA device, and the model is on {device.type}"
    if find_spec("cudnn") is None:
        return 'needs the package nvidia-cudnn-frontend: pip install "hforce[cudnn]"'
    if torch.cuda.get_device_capability(device)[0] < HOPPER:
        return "needs a GPU of the Hopper generation or later"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"computes in bfloat16 or float16, and the model is in {str(dtype).removeprefix('torch.')}"
    if head_dim > WIDEST or head_dim % 8:
        return f"needs heads of a multiple of 8 values, at most {WIDEST}, and these have {head_dim}"
    return ""


def _load_cudnn() -> Attention:
    from hforce.attention.cudnn import attend

    return attend


def _load_triton() -> Attention:
    from hforce.attention.triton_kernel import attend

    return attend


BACKENDS: Mapping[str, Entry] = MappingProxyType(
    {
        "sdpa": Entry(lambda: attend_dense, _lacks_nothing),
        CUDNN: Entry(_load_cudnn, _cudnn_lacks),
        "varlen": Entry(lambda: attend_varlen, _varlen_lacks),
        "triton": Entry(_load_triton, _triton_lacks, turns_queries=True),
        "triton-key": Entry(_load_triton, _triton_lacks),
        "reference": Entry(lambda: reference.attend, _lacks_nothing, turns_queries=True, waits=True),
    }
)
SDPA = Backend("sdpa", attend_dense)

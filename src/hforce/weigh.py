"""How many bytes a step of work needs while it runs."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Weighed:
    """Bytes that a step took beyond what was there before: the most alive at once, and those it left behind."""

    peak: int
    left: int


def weigh(step: Callable[[], object], device: torch.device) -> Weighed | None:
    """Runs a step and weighs the memory it takes on its device; None where that cannot be told.

    On CUDA by the allocator's own counters. On the CPU by the results of all operators for as long as they live; what
    an operator allocates for itself and frees before it returns is not seen there, and what is compiled runs as
    single operators.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return Weighed(torch.cuda.max_memory_allocated(device) - before, torch.cuda.memory_allocated(device) - before)
    if device.type != "cpu":
        step()
        return None
    with _uncompiled(), _Scale() as scale:
        step()
    return Weighed(scale.peak, scale.live)


def tensor_bytes(*things: object) -> int:
    """Bytes of the tensors in modules, and in objects that have modules or tensors as attributes; shared ones once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for x in things for t in tensors_of(x)}
    return sum(storages.values())


def tensors_of(thing: object) -> Iterator[Tensor]:
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, nn.Module):
        yield from thing.parameters()
        yield from thing.buffers()
    else:
        for value in vars(thing).values():
            if isinstance(value, Tensor | nn.Module):
                yield from tensors_of(value)


def _uncompiled() -> AbstractContextManager[object]:
    """Keeps torch.compile out, if it was ever imported, which takes seconds."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


class _Scale(TorchDispatchMode):
    """Sees every operator, and adds up the storages that they make until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()  # storages alive: those made here, and those that were there before

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and True would import the compiler, which takes seconds

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        with self:
            result = func.decompose(*args, **given)  # in inference mode whole operators come here before their parts
        if result is not NotImplemented:
            return result
        for storage in _storages(args, given):
            self._know(storage, 0)
        result = func(*args, **given)
        for storage in _storages(result):
            self._know(storage, storage.nbytes())
        return result

    def _know(self, storage: torch.UntypedStorage, size: int) -> None:
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, storage._cdata, size)

    def _forget(self, number: int, size: int) -> None:
        self._known.discard(number)
        self.live -= size


def _storages(*values: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]

"""How the tiny model learns: Muon for matrices and kernels, AdamW for everything else."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class Optimizer:
    """Muon for matrices and kernels (flattened to matrices), AdamW for everything else."""

    def __init__(self, module: nn.Module, lr: float, adam_lr: float, is_matrix: Callable[[str, Tensor], bool]) -> None:
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        self.matrices = [p for n, p in named if is_matrix(n, p)]
        self.others = [p for n, p in named if not is_matrix(n, p)]
        self.flat = [nn.Parameter(p.data.flatten(1)) for p in self.matrices]  # views: they share the storage
        muon = torch.optim.Muon(self.flat, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        adam = torch.optim.AdamW(self.others, lr=adam_lr, weight_decay=0.0, betas=(0.9, 0.98))
        self.parts = [(muon, lr), (adam, adam_lr)]

    @property
    def parameters(self) -> list[Tensor]:
        """All that learns, in the order in which `step` takes gradients."""
        return [*self.matrices, *self.others]

    def step(self, gradients: Sequence[Tensor], scale: float) -> None:
        """One update with the learning rates times `scale`."""
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        for flat, matrix in zip(self.flat, self.matrices, strict=True):
            flat.grad = None if matrix.grad is None else matrix.grad.flatten(1)
            matrix.grad = None
        for optimizer, lr in self.parts:
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
            optimizer.step()
            optimizer.zero_grad()

    def state(self) -> list[dict[str, object]]:
        """What to save."""
        return [optimizer.state_dict() for optimizer, _ in self.parts]

    def restore(self, state: list[dict[str, object]]) -> None:
        """Continues from `state()`."""
        for (optimizer, _), saved in zip(self.parts, state, strict=True):
            optimizer.load_state_dict(saved)

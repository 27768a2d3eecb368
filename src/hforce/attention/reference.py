"""Attention of ragged heads as the textbook has it: exact, one head after the other, the truth for fast backends."""

from __future__ import annotations

import torch
from torch import Tensor

from hforce.attention.layout import LayerView, Turns
from hforce.attention.rope import turn

BLOCK = 512  # queries compared at a time: their weights over a long past have to fit into memory


def attend(query: Tensor, view: LayerView) -> Tensor:
    """Softmax attention of every head over its own run. query [N, H, D], turned in full -> [N, H, D].

    Computed in float32, or in float64 where the query is. Reads the lengths back, so it waits for the device.
    """
    exact = torch.promote_types(query.dtype, torch.float32)
    out = torch.empty_like(query)
    spans = zip(view.begin.tolist(), view.length.tolist(), strict=False)  # the last begin is the end of the store
    for head, (begin, length) in enumerate(spans):
        tokens = slice(begin, begin + length)
        keys, values = view.keys[tokens].to(exact), view.values[tokens].to(exact)
        if view.turns is not None:
            keys = turned(keys, view.turns, head)
        for rows in torch.arange(query.shape[0], device=query.device).split(BLOCK):
            logits = query[rows, head].to(exact) @ keys.T * query.shape[-1] ** -0.5
            out[rows, head] = (logits.softmax(dim=-1) @ values).to(out.dtype)
    return out


def turned(keys: Tensor, turns: Turns, head: int) -> Tensor:
    """Keys of one head [slots S, D], turned to the times of their slots."""
    slots = len(keys) // turns.tokens
    phase = torch.view_as_complex(turns.phase[turns.lane[head], :slots])[:, None]
    width = 2 * phase.shape[-1]
    frames = keys.unflatten(0, (slots, turns.tokens))
    return torch.cat([turn(frames[..., :width], phase), frames[..., width:]], dim=-1).flatten(0, 1)

"""Attention of ragged heads in one call of cuDNN: every head is an item of a batch, with a length of its own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import cudnn
import torch
from torch import Tensor

from hforce.attention.layout import LayerView

TYPES = {torch.bfloat16: cudnn.data_type.BFLOAT16, torch.float16: cudnn.data_type.HALF}


@dataclass(frozen=True)
class Plan:
    """A graph of cuDNN that was built, the tensors that it is given, by name, and those that are always the same."""

    graph: Any
    given: dict[str, Any]
    queries: Tensor  # int32 [H, 1, 1, 1]: how many each head has
    rows: Tensor  # int64 [H + 1, 1, 1, 1]: where its queries begin, in values
    workspace: int  # bytes


def attend(query: Tensor, view: LayerView) -> Tensor:
    """query [N, H, D], turned in full -> [N, H, D]. Lengths stay on the device: a plan serves all layers as deep."""
    query = query.contiguous()
    queries, heads, width = query.shape
    made = _plan(query.device, query.dtype, queries, heads, width, view.longest)
    out, workspace = torch.empty_like(query), torch.empty(made.workspace, dtype=torch.uint8, device=query.device)
    begin, length = view.offset.view(-1, 1, 1, 1), view.length.view(-1, 1, 1, 1)
    given = {
        "query": query, "keys": view.keys, "values": view.values, "out": out, "queries": made.queries, "length": length,
        "query_row": made.rows, "out_row": made.rows, "key_row": begin, "value_row": begin,
    }  # fmt: skip
    with torch.cuda.device(query.device):
        handle = _handle(query.device)
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        made.graph.execute({made.given[name]: x for name, x in given.items()}, workspace, handle=handle)
    return out


@cache  # recorded passes go on reading what a plan holds
def _plan(device: torch.device, dtype: torch.dtype, queries: int, heads: int, width: int, longest: int) -> Plan:
    with torch.cuda.device(device):
        return _make_plan(device, dtype, queries, heads, width, longest)


def _make_plan(device: torch.device, dtype: torch.dtype, queries: int, heads: int, width: int, longest: int) -> Plan:
    graph = cudnn.pygraph(
        io_data_type=TYPES[dtype], intermediate_data_type=cudnn.data_type.FLOAT,
        compute_data_type=cudnn.data_type.FLOAT, handle=_handle(device),
    )  # fmt: skip
    # Heads are the batch, and where each begins is told by the rows; the strides of the batch then mean nothing.
    across, along = (width, width, heads * width, 1), (width, width, width, 1)
    spread = {"query": (queries, across), "keys": (longest, along), "values": (longest, along)}
    given = {
        name: graph.tensor(name=name, dim=(heads, 1, rows, width), stride=stride, data_type=TYPES[dtype])
        for name, (rows, stride) in spread.items()
    }
    for name, entries, kind in (
        *((name, heads, cudnn.data_type.INT32) for name in ("queries", "length")),
        *((name, heads + 1, cudnn.data_type.INT64) for name in ("query_row", "key_row", "value_row", "out_row")),
    ):
        given[name] = graph.tensor(name=name, dim=(entries, 1, 1, 1), stride=(1, 1, 1, 1), data_type=kind)
    for name, row in (("query", "query_row"), ("keys", "key_row"), ("values", "value_row")):
        given[name].set_ragged_offset(given[row])
    given["out"] = graph.sdpa(
        name="attention", q=given["query"], k=given["keys"], v=given["values"], is_inference=True,
        attn_scale=width**-0.5, use_padding_mask=True, seq_len_q=given["queries"], seq_len_kv=given["length"],
    )[0]  # fmt: skip
    given["out"].set_output(True).set_dim((heads, 1, queries, width)).set_stride(across)
    given["out"].set_ragged_offset(given["out_row"])
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A])
    graph.check_support()
    graph.build_plans()
    whole = torch.full((heads, 1, 1, 1), queries, dtype=torch.int32, device=device)
    rows = width * torch.arange(heads + 1, device=device).view(-1, 1, 1, 1)
    return Plan(graph, given, whole, rows, max(1, graph.get_workspace_size()))


@lru_cache
def _handle(device: torch.device) -> Any:
    with torch.cuda.device(device):
        return cudnn.create_handle()

"""Operators: mathematics on tensors, without parameters."""

from saccade.ops.agent_attention import agent_attention, agent_attention_weights
from saccade.ops.neighborhood import Neighborhood
from saccade.ops.pattern import AxialPattern, Pattern, Plan, Ranges
from saccade.ops.position_bias import PositionBias, QueryTables, RelativeTable
from saccade.ops.selection import Selection, block_means, select_mask, select_mass, select_top_k
from saccade.ops.softmax_attention import AttentionResult, merge_attention, softmax_attention
from saccade.ops.sparse_attention import sparse_attention, sparse_attention_weights
from saccade.ops.tiling import TileBound, tile_bound
from saccade.ops.window import Global, Grid, Halo, Window

__all__ = [
    "AttentionResult",
    "AxialPattern",
    "Global",
    "Grid",
    "Halo",
    "Neighborhood",
    "Pattern",
    "Plan",
    "PositionBias",
    "QueryTables",
    "Ranges",
    "RelativeTable",
    "Selection",
    "TileBound",
    "Window",
    "agent_attention",
    "agent_attention_weights",
    "block_means",
    "merge_attention",
    "select_mask",
    "select_mass",
    "select_top_k",
    "softmax_attention",
    "sparse_attention",
    "sparse_attention_weights",
    "tile_bound",
]

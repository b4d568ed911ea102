"""Operators: mathematics on tensors, without parameters."""

from saccade.ops.agent_attention import agent_attention, agent_attention_weights
from saccade.ops.aggregated_attention import (
    aggregated_attention,
    aggregated_attention_weights,
    pooled_coordinates,
    window_lengths,
)
from saccade.ops.axis_order import (
    OrderChoice,
    axis_orders,
    block_incoherence,
    choose_axis_order,
    static_blocks,
)
from saccade.ops.bi_level_routing import region_scores, route_regions
from saccade.ops.block_causal import BlockDiffusion, next_block_pattern
from saccade.ops.block_map import block_map, block_map_divergence, pool_blocks, select_gated
from saccade.ops.block_weights import (
    block_weights,
    kept_blocks,
    pool_attention,
    select_block_share,
    select_blocks_by_weight,
)
from saccade.ops.catalogue import MASKS, MaskLayout, build_mask
from saccade.ops.channel_attention import channel_attention, channel_attention_weights
from saccade.ops.chunked_history import grow_sparsity, select_history
from saccade.ops.compose import Complement, ComposedPattern, Intersection, PerHead, SelectionUnion, Union
from saccade.ops.cost import Cost, pattern_cost
from saccade.ops.deformable_attention_3d import (
    deformable_attention_3d,
    deformable_attention_3d_weights,
    depth_scores,
)
from saccade.ops.dilated_window import dilated_windows
from saccade.ops.draw import draw_pattern
from saccade.ops.dynamic_filter import dynamic_filter, dynamic_filter_weights, window_bias
from saccade.ops.elastic_span import (
    ElasticSpan,
    attention_influence,
    span_candidates,
    span_densities,
    span_losses,
    sum_blocks,
)
from saccade.ops.focal_modulation import focal_context
from saccade.ops.gated_positional_attention import gated_positional_attention
from saccade.ops.low_rank_connectivity import Connectivity, predict_connectivity
from saccade.ops.mixture_of_blocks import choose_blocks, mixture_of_blocks
from saccade.ops.neighborhood import Neighborhood
from saccade.ops.outlook_attention import outlook_attention, outlook_attention_weights
from saccade.ops.parallel_attention import parallel_attention
from saccade.ops.pattern import AxialPattern, Pattern, Plan, Ranges, StaticPattern, Tiles
from saccade.ops.position_bias import PositionBias, QueryTables, RelativeTable
from saccade.ops.pyramid import (
    block_importance,
    pyramid_attention,
    pyramid_attention_weights,
    pyramid_density,
    pyramid_levels,
    similar_levels,
)
from saccade.ops.quantized_attention import quantize_blocks, quantized_attention
from saccade.ops.rotary import rotary_angles, rotate
from saccade.ops.selection import (
    Selection,
    block_means,
    select_mask,
    select_mass,
    select_similarity_mass,
    select_top_k,
)
from saccade.ops.sequence import Causal, Documents, GlobalTokens, Sinks, SlidingWindow
from saccade.ops.softmax_attention import AttentionResult, merge_attention, softmax_attention
from saccade.ops.span_search import SpanPlan, assign_spans, choose_plan
from saccade.ops.sparse_attention import sparse_attention, sparse_attention_weights
from saccade.ops.step_reuse import ReuseResult, ReuseState, choosing_step, reuse_attention
from saccade.ops.straight_through import gumbel, straight_through
from saccade.ops.tiling import TileBound, tile_bound
from saccade.ops.token_order import axis_order, gilbert_order, reorder, restore, tile_order
from saccade.ops.top_k_attention import top_k_attention, top_k_attention_weights
from saccade.ops.upsampling import upsample_nearest
from saccade.ops.varied_window import resample_windows, resampling_weights
from saccade.ops.window import Global, Grid, Halo, Window

__all__ = [
    "MASKS",
    "AttentionResult",
    "AxialPattern",
    "BlockDiffusion",
    "Causal",
    "Complement",
    "ComposedPattern",
    "Connectivity",
    "Cost",
    "Documents",
    "ElasticSpan",
    "Global",
    "GlobalTokens",
    "Grid",
    "Halo",
    "Intersection",
    "MaskLayout",
    "Neighborhood",
    "OrderChoice",
    "Pattern",
    "PerHead",
    "Plan",
    "PositionBias",
    "QueryTables",
    "Ranges",
    "RelativeTable",
    "ReuseResult",
    "ReuseState",
    "Selection",
    "SelectionUnion",
    "Sinks",
    "SlidingWindow",
    "SpanPlan",
    "StaticPattern",
    "TileBound",
    "Tiles",
    "Union",
    "Window",
    "agent_attention",
    "agent_attention_weights",
    "aggregated_attention",
    "aggregated_attention_weights",
    "assign_spans",
    "attention_influence",
    "axis_order",
    "axis_orders",
    "block_importance",
    "block_incoherence",
    "block_map",
    "block_map_divergence",
    "block_means",
    "block_weights",
    "build_mask",
    "channel_attention",
    "channel_attention_weights",
    "choose_axis_order",
    "choose_blocks",
    "choose_plan",
    "choosing_step",
    "deformable_attention_3d",
    "deformable_attention_3d_weights",
    "depth_scores",
    "dilated_windows",
    "draw_pattern",
    "dynamic_filter",
    "dynamic_filter_weights",
    "focal_context",
    "gated_positional_attention",
    "gilbert_order",
    "grow_sparsity",
    "gumbel",
    "kept_blocks",
    "merge_attention",
    "mixture_of_blocks",
    "next_block_pattern",
    "outlook_attention",
    "outlook_attention_weights",
    "parallel_attention",
    "pattern_cost",
    "pool_attention",
    "pool_blocks",
    "pooled_coordinates",
    "predict_connectivity",
    "pyramid_attention",
    "pyramid_attention_weights",
    "pyramid_density",
    "pyramid_levels",
    "quantize_blocks",
    "quantized_attention",
    "region_scores",
    "reorder",
    "resample_windows",
    "resampling_weights",
    "restore",
    "reuse_attention",
    "rotary_angles",
    "rotate",
    "route_regions",
    "select_block_share",
    "select_blocks_by_weight",
    "select_gated",
    "select_history",
    "select_mask",
    "select_mass",
    "select_similarity_mass",
    "select_top_k",
    "similar_levels",
    "softmax_attention",
    "span_candidates",
    "span_densities",
    "span_losses",
    "sparse_attention",
    "sparse_attention_weights",
    "static_blocks",
    "straight_through",
    "sum_blocks",
    "tile_bound",
    "tile_order",
    "top_k_attention",
    "top_k_attention_weights",
    "upsample_nearest",
    "window_bias",
    "window_lengths",
]

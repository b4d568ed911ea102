"""What the contracts need to know of single mixers and patterns: variants to try, exceptions with their reasons."""

from saccade.ops import ElasticSpan

NO_PLAN = {
    "PerHead": "each head's pattern has a plan; tests/ops/test_compose.py",
    "Selection": "it differs for each image and head; tests/ops/test_selection.py",
    "SelectionUnion": "its parts are computed apart and merged; tests/ops/test_compose.py",
}
"""Patterns without a plan of their own for each space."""

VARIANTS = {
    "agent": [{"num_heads": 2, "num_agents": 4, "size": (9, 7)}, {"num_agents": 9, "size": 6, "sr_ratio": 2}],
    "aggregated": [{"num_heads": 2, "pool_size": (2, 1), "window_size": (1, 3), "pretrain_size": 4, "qkv_bias": False}],
    "attention": [{"num_heads": 4, "qkv_bias": False, "scale": 0.3}],
    "bi_level_routing": [{"num_heads": 2, "num_regions": 3, "topk": 2, "qk_dim": 4, "scale": 1.3, "lepe_size": 3}],
    "block_causal": [{"num_heads": 2, "block_size": 5, "prefix": 4, "hybrid": True}, {"block_size": 1, "scale": 0.3}],
    "channel": [{"num_heads": 2, "qkv_bias": False, "scale": 0.1}],
    "chunked_history": [
        {"num_heads": 2, "chunk_frames": 2, "block_size": 3, "frames": 1, "sparsity": 0.6, "base": 0.7, "scale": 0.4},
        {"sink_frames": 0, "recent_frames": 2, "whole_chunk": True, "qkv_bias": False},
    ],
    "cont_mix": [{"num_heads": 2, "kernel_size": 5, "small_kernel": 3, "num_regions": 2, "scale": 0.3}],
    "cross_shaped": [{"num_heads": 2, "stripe_size": 3}, {"stripe_size": None, "qkv_bias": False}],
    "depthwise_conv": [{"kernel_size": 3}],
    "elastic_span": [
        {"num_heads": 2, "rules": [ElasticSpan(1, 0.25, 2), ElasticSpan(-3, 1.0, 1)], "causal": True, "scale": 0.3},
        {"rules": ElasticSpan(2, 0, 2), "sinks": 0},
    ],
    "factorized": [{"num_heads": 2, "sr_ratio": 1, "window_size": 3}, {"sr_ratio": 3, "window_size": 2}],
    "focal_modulation": [{"focal_window": 5, "focal_levels": 2, "normalize": True, "post_norm": True}],
    "fourier_filter": [{"steps": 3, "num_bands": 5, "out_proj": False}],
    "gated_positional": [{"num_heads": 4, "qkv_bias": True, "scale": 0.3, "locality_strength": 0.5}],
    "grid": [{"num_heads": 2, "position_bias": False}, {"num_windows": 2}],
    "halo": [{"num_heads": 2, "halo_size": 1, "qkv_bias": True, "dim_head": 3, "scale_position": True}],
    "head_token": [{"num_heads": 4, "qkv_bias": False, "scale": 0.3}],
    "length_scaled": [{"num_heads": 2, "pretrain_size": (5, 7), "qkv_bias": False}],
    "low_rank_connectivity": [
        {"num_heads": 2, "size": (9, 7), "keep_rate": 0.4, "topk": 3, "share_basis": True, "qkv_bias": False},
        {"size": 6, "reduce_n": 4, "coefficient_threshold": 0.1, "basis_threshold": 0.1, "threshold": 0.02},
    ],
    "mixture_of_blocks": [
        {"num_heads": 2, "layer": 1, "block_size": 3, "topk": 2, "scope": "query"},
        {"scope": "block"},
    ],
    "mobile_conv": [{"num_heads": 2, "expansion": 2, "num_windows": 2, "table_size": (3, 4), "qkv_bias": False}],
    "neighborhood": [{"num_heads": 2, "stride": 2, "causal": (True, False)}],
    "outlook": [{"num_heads": 2, "kernel_size": 2, "stride": 1, "qkv_bias": True}],
    "pooling": [{"pool_size": 5}],
    "reordered": [{"num_heads": 4, "block_size": 5, "density": 0.4, "qkv_bias": False, "scale": 0.3}],
    "reused_blocks": [{"num_heads": 2, "block_size": (3, 2), "keep": 0.5, "scale": 0.3, "choosing_scale": 0.7}],
    "routed": [
        {"num_heads": 2, "start": -4.5, "window": 2, "scale": 0.3, "pool_size": 3, "form": "sigmoid"},
        {"num_heads": 2, "start": -4.5, "window": 3, "sinks": 0, "block_size": 2, "causal": True},
    ],
    "strip": [{"num_heads": 2, "qk_dim": 3, "sr_ratio": 3, "scale": 0.3}, {"sr_ratio": 2, "reduction": "mean"}],
    "top_k": [{"num_heads": 2, "share": 0.1, "dynamic": True, "scale": 0.7}, {"share": 0.04, "qkv_bias": False}],
    "pyramid_sparse": [
        {"num_heads": 2, "query_block": 5, "key_block": 8, "order": "tile", "similarity": {2: 0.1, 4: 0.0, 8: -0.1}},
        {"ends": {1: 0.3, 2: 0.5, 0: 0.6, 4: 1.0}, "by": "count", "order": "row"},
    ],
    "seer": [
        {"num_heads": 2, "block_size": (2, 3), "threshold": 0.05, "rotary": 100.0, "query_pools": ("max", "min")},
    ],
    "varied_window": [{"num_heads": 2, "window_size": (2, 3), "qkv_bias": False, "scale": 0.3}],
    "window": [{"num_heads": 2, "shift": True}, {"window_size": (2, 3), "table_size": 4}],
}
"""Options to try besides the defaults. Mixers without a row are tried with their defaults alone."""

NO_PREFIX = {
    "aggregated": "a token outside the map is in no window and no pooled cell",
    "bi_level_routing": "a token outside the map belongs to no region",
    "block_causal": "a token that sees all and is seen by all would carry the future into the past",
    "chunked_history": "a token that all see would tell early chunks of later ones",
    "cont_mix": "a token outside the map has no window, and is in no region",
    "cross_shaped": "a token outside the map is in no stripe",
    "depthwise_conv": "fixed local weights know no token outside the map",
    "factorized": "keys are made of windows and of a reduced map, and a token outside the map is in neither",
    "focal_modulation": "context is gathered by convolutions, and a token outside the map has no place in them",
    "fourier_filter": "a token outside the map has no place in its spectrum",
    "gated_positional": "a token outside the map has no place; in ConViT the class token joins behind these layers",
    "halo": "HaloNet has no class token, and its padded keys leave no place for one",
    "length_scaled": "its position bias is made of places of the map",
    "mobile_conv": "a token outside the map has no neighbours to be convolved with",
    "outlook": "its matrices are made for windows, and a class token is in none",
    "mixture_of_blocks": "a token outside the map belongs to no block",
    "pooling": "an average over neighbours knows no token outside the map",
    "reused_blocks": "a token outside the map belongs to no block",
    "routed": "its router looks at the map, and its causal form at an order that a prefix has no place in",
    "strip": "keys come from a reduced map, and a token outside the map is in no cell",
    "top_k": "the keys that a query keeps are a share of the map",
    "pyramid_sparse": "a token outside the map belongs to no block",
    "seer": "a token outside the map belongs to no block",
    "varied_window": "regions are sampled from the map alone, and VSA's networks have no class token",
}
"""Mixers that refuse prefix tokens."""

PREFIX_OPTION = {
    "agent": "num_prefix: the biases between agents and class tokens are learned",
    "low_rank_connectivity": "num_prefix: the bases of its guess have a row for each token",
}
"""Mixers that must be built for the number of prefix tokens that they are given."""

IMAGES_ONLY = {
    "agent": "agents are pooled from a map of two axes, for which the biases are learned",
    "cont_mix": "its regions and kernels are square",
    "cross_shaped": "its stripes run down and across",
    "factorized": "its windows and its coarse map are of two axes",
    "outlook": "its windows are square",
    "varied_window": "places are interpolated between rows and columns",
}
"""Mixers that serve two axes of space only."""

AVERAGED = dict.fromkeys(
    ("depthwise_conv", "fourier_filter"), "a matrix for each channel would take C times the memory: it gives their mean"
)
"""Mixers whose token matrix is a mean over channels, which no single channel follows."""

BEYOND = {
    "focal_modulation": "its matrix makes the modulator of each channel; tests/mixers/test_focal_modulation.py",
    "head_token": "head tokens are seen beside the map's; tests/mixers/test_head_token.py",
}
"""Mixers whose output is more than a token matrix times values: tests of their own say what it is made of."""

NO_SOFTMAX = {
    "aggregated": "the query adds weights of its own to the values of the window",
    "halo": "what falls on the zeros around the map is left out, so rows sum to less than 1 at the border",
    "outlook": "windows are summed where they overlap, and what falls on the zeros around the map is left out",
    "pooling": "the token is subtracted from the average: rows sum to 0",
    "varied_window": "what falls on the zeros around the map is left out, so rows may sum to less than 1",
}
"""Mixers whose rows of attention do not sum to 1."""

CHOOSES_ALL = {
    "bi_level_routing": {"topk": 1000},
    "chunked_history": {"sparsity": 0.0, "base": 0.0},
    "low_rank_connectivity": {"keep_rate": 1.0, "threshold": None},
    "mixture_of_blocks": {"topk": 1000, "scope": "query"},
    "reused_blocks": {"keep": 1.0},
    "top_k": {"share": 1.0, "dynamic": False},
    "pyramid_sparse": {"ends": {1: 1.0}, "similarity": None},
    "seer": {"share": 1.0, "threshold": None},
}
"""Mixers that choose by scores, which a rounding may turn around: options with which nothing is left to choose."""

TAUGHT_APART = {
    "length_scaled": ("cpb_fc2.bias", "added to all logits of a head, it is lost in the softmax"),
    "low_rank_connectivity": ("mask_predictor.", "choosing is not differentiable: a loss on the guess trains it"),
    "gated_positional": ("pos_proj.bias", "a softmax does not see what is the same for all keys"),
    "routed": ("router.", "its decisions are hard in evaluation; tests/contract/test_gates.py trains it"),
    "seer": ("gate.", "it chooses, and learns from a loss of its own, `distill`"),
}
"""Mixers with parameters that no gradient of the output reaches: what their names begin with, and why."""

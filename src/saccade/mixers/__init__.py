"""Mixers: modules that mix tokens, (B, *space, C) -> (B, *space, C). The exported ones are the registry;
modules of another shape, which read one tensor for another, are exported beside them."""

from typing import Any

from saccade.errors import check_choice
from saccade.mixers.agent import AgentAttention
from saccade.mixers.aggregated import AggregatedAttention, LengthScaledAttention
from saccade.mixers.attention import Attention, GridAttention, NeighborhoodAttention, PatternAttention, WindowAttention
from saccade.mixers.baselines import DepthwiseConv, Pooling
from saccade.mixers.bi_level_routing import BiLevelRoutingAttention
from saccade.mixers.block_causal import BlockCausalAttention
from saccade.mixers.channel import ChannelAttention
from saccade.mixers.chunked_history import ChunkedHistoryAttention
from saccade.mixers.cont_mix import ContMix
from saccade.mixers.cross_shaped import CrossShapedAttention
from saccade.mixers.elastic_span import ElasticSpanAttention
from saccade.mixers.factorized import FactorizedAttention
from saccade.mixers.focal_modulation import FocalModulation
from saccade.mixers.fourier_filter import FourierFilter
from saccade.mixers.gated_positional import GatedPositionalAttention
from saccade.mixers.halo import HaloAttention
from saccade.mixers.head_token import HeadTokenAttention
from saccade.mixers.lifting import DeformableLifting
from saccade.mixers.low_rank_connectivity import LowRankConnectivityAttention
from saccade.mixers.mixer import Mixer
from saccade.mixers.mixture_of_blocks import MixtureOfBlocksAttention
from saccade.mixers.mobile_convolution import MobileConvAttention
from saccade.mixers.outlook import OutlookAttention
from saccade.mixers.pyramid_sparse import PyramidSparseAttention
from saccade.mixers.reordered import ReorderedAttention
from saccade.mixers.reused_blocks import ReusedBlocksAttention
from saccade.mixers.routed import RoutedAttention
from saccade.mixers.seer import SeerAttention
from saccade.mixers.strip import StripAttention
from saccade.mixers.top_k import TopKAttention
from saccade.mixers.varied_window import VariedWindowAttention
from saccade.registry import build, buildable, describe

__all__ = [
    "AgentAttention",
    "AggregatedAttention",
    "Attention",
    "BiLevelRoutingAttention",
    "BlockCausalAttention",
    "ChannelAttention",
    "ChunkedHistoryAttention",
    "ContMix",
    "CrossShapedAttention",
    "DeformableLifting",
    "DepthwiseConv",
    "ElasticSpanAttention",
    "FactorizedAttention",
    "FocalModulation",
    "FourierFilter",
    "GatedPositionalAttention",
    "GridAttention",
    "HaloAttention",
    "HeadTokenAttention",
    "LengthScaledAttention",
    "LowRankConnectivityAttention",
    "Mixer",
    "MixtureOfBlocksAttention",
    "MobileConvAttention",
    "NeighborhoodAttention",
    "OutlookAttention",
    "PatternAttention",
    "Pooling",
    "PyramidSparseAttention",
    "ReorderedAttention",
    "ReusedBlocksAttention",
    "RoutedAttention",
    "SeerAttention",
    "StripAttention",
    "TopKAttention",
    "VariedWindowAttention",
    "WindowAttention",
    "create_mixer",
    "describe_mixer",
    "list_mixers",
]


def list_mixers() -> list[str]:
    """List the names that `create_mixer` takes.

    >>> "window" in list_mixers()
    True
    """
    return list(_mixers())


def create_mixer(name: str, dim: int, **options: Any) -> Mixer:
    """Build a mixer by name: `WindowAttention` is "window", `DepthwiseConv` is "depthwise_conv".

    Args:
        name: one of `list_mixers()`.
        dim: C, channels of a token.
        options: arguments of the class.

    Raises: InputError for an unknown name or option, with the nearest ones that exist.

    >>> create_mixer("neighborhood", 64, window_size=5).num_heads
    2
    """
    return build(_mixer(name), dim, options)


def describe_mixer(name: str) -> str:
    """Say in a sentence what a mixer does: the first of its docstring."""
    return describe(_mixer(name))


def _mixer(name: str) -> type[Mixer]:
    check_choice("mixer", name, _mixers())
    return _mixers()[name]


def _mixers() -> dict[str, type[Mixer]]:
    """Every exported mixer that can be built, by the name made of its own."""
    return buildable([globals()[name] for name in __all__], Mixer, "_attention")  # type: ignore[type-abstract]

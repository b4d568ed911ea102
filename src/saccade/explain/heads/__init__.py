"""What the heads of a network do, each on its own: how much rests on it, how far it looks, what pattern it draws."""

from saccade.explain.heads.figures import draw_importance, draw_patterns, draw_strength
from saccade.explain.heads.importance import HeadImportance, divergence, head_importance
from saccade.explain.heads.patterns import HeadPatterns, head_patterns, recentre_maps
from saccade.explain.heads.strength import HeadStrength, head_strength, ring_masses, ring_numbers

__all__ = [
    "HeadImportance",
    "HeadPatterns",
    "HeadStrength",
    "divergence",
    "draw_importance",
    "draw_patterns",
    "draw_strength",
    "head_importance",
    "head_patterns",
    "head_strength",
    "recentre_maps",
    "ring_masses",
    "ring_numbers",
]

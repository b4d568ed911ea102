"""Relevance on operations: a model's output traced back through every aten operation that made it.

A tape records the operations (`tape`), small rules share relevance out (`rules`), recipes say which rule serves which
operation (`recipes`), and `relevance` walks back and keeps the account.
"""

from saccade.explain.relevance.analyse import Relevance, merge, relevance
from saccade.explain.relevance.patching import (
    activation_patching,
    attribution_patching,
    coefficients,
    relevance_patching,
)
from saccade.explain.relevance.recipes import On, Recipe, read_recipe
from saccade.explain.relevance.walk import Absorbed, Served

__all__ = [
    "Absorbed",
    "On",
    "Recipe",
    "Relevance",
    "Served",
    "activation_patching",
    "attribution_patching",
    "coefficients",
    "merge",
    "read_recipe",
    "relevance",
    "relevance_patching",
]

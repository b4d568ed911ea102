"""Concepts: what a layer's activations are made of, how much each part adds to an answer, and whether that is right.

All methods of concepts are two steps: dictionary learning on the activations of a layer, then attribution from codes
to a logit (2023, arXiv:2306.07304). So every extraction here goes with every importance, and both have measures.
"""

from saccade.explain.concepts.bank import ConceptBank, LinearBank, extract_concepts
from saccade.explain.concepts.cut import Cut, crop, find_cut
from saccade.explain.concepts.designs import halton_design, hsic_indices, sobol_indices
from saccade.explain.concepts.explanation import ConceptExplanation, explain_concepts
from saccade.explain.concepts.importance import code_importance, list_importances
from saccade.explain.concepts.measures import (
    Extraction,
    atom_distance,
    measure_extraction,
    relative_error,
    wasserstein,
)
from saccade.explain.concepts.scores import (
    ConceptFaithfulness,
    concept_curves,
    concept_faithfulness,
    score_importance,
)
from saccade.explain.concepts.strategies import Strategies, draw_strategies, find_strategies

__all__ = [
    "ConceptBank",
    "ConceptExplanation",
    "ConceptFaithfulness",
    "Cut",
    "Extraction",
    "LinearBank",
    "Strategies",
    "atom_distance",
    "code_importance",
    "concept_curves",
    "concept_faithfulness",
    "crop",
    "draw_strategies",
    "explain_concepts",
    "extract_concepts",
    "find_cut",
    "find_strategies",
    "halton_design",
    "hsic_indices",
    "list_importances",
    "measure_extraction",
    "relative_error",
    "score_importance",
    "sobol_indices",
    "wasserstein",
]

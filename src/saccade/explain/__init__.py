"""Where a model looks, and whether to believe it: maps of relevance, their faithfulness, their pictures.

`explain` makes a map with any of `list_methods()`, `faithfulness` holds it against random order, `overlay` draws it.
The package itself can be called as `explain`, because `saccade.explain` names both. Inside are `relevance` on
operations, `concepts` and `dictionaries` of them, `heads` of attention, `merging` of features, `testing` of a
classifier, `visualization` of units, and the `pages` of `saccade explain`.
"""

import inspect
import sys
from importlib import import_module
from types import ModuleType

from saccade.explain.additivity import Additivity, additivity
from saccade.explain.attention import AttentionLayer, read_attention
from saccade.explain.attribute import Explanation, explain, list_methods
from saccade.explain.complexity import (
    Complexity,
    Flow,
    complexity_over_checkpoints,
    feature_complexity,
    residual_flow,
)
from saccade.explain.concepts import ConceptExplanation, concept_faithfulness, explain_concepts
from saccade.explain.faithfulness import Faithfulness, faithfulness
from saccade.explain.localization import Localization, localization
from saccade.explain.methods.salient_relevance import context_aware_saliency
from saccade.explain.overlay import overlay, save_overlay
from saccade.explain.reference_frame import FrameScores, frame_scores
from saccade.explain.sanity import Randomization, class_sensitivity, parameter_randomization
from saccade.explain.score import Score
from saccade.explain.statements import check_sentences
from saccade.explain.verbalization import Verbalization, Wording, verbalize, verbalize_map

__all__ = [
    "Additivity",
    "AttentionLayer",
    "Complexity",
    "ConceptExplanation",
    "Explanation",
    "Faithfulness",
    "Flow",
    "FrameScores",
    "Localization",
    "Randomization",
    "Score",
    "Verbalization",
    "Wording",
    "additivity",
    "check_sentences",
    "class_sensitivity",
    "complexity_over_checkpoints",
    "concept_faithfulness",
    "context_aware_saliency",
    "explain",
    "explain_concepts",
    "faithfulness",
    "feature_complexity",
    "frame_scores",
    "list_methods",
    "localization",
    "overlay",
    "parameter_randomization",
    "read_attention",
    "residual_flow",
    "save_overlay",
    "verbalize",
    "verbalize_map",
]


class _CallablePackage(ModuleType):
    """An import of this package puts the package, not the function, at `saccade.explain`: both can be called there."""

    __call__ = staticmethod(explain)
    __signature__ = inspect.signature(explain)  # of a module inspect would leave out the first argument


for _inside in ("concepts", "dictionaries", "heads", "merging", "pages", "relevance", "testing", "visualization"):
    import_module(f"{__name__}.{_inside}")  # after an import statement mypy would see `faithfulness` twice
sys.modules[__name__].__class__ = _CallablePackage

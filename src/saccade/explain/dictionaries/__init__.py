"""Dictionaries of concepts on activations: trained on a stream, measured, edited, and read as circuits."""

from saccade.explain.dictionaries.circuits import (
    Circuit,
    Heads,
    circuit_auc,
    edge_scores,
    find_circuit,
    integer_codes,
    mean_difference,
    node_scores,
)
from saccade.explain.dictionaries.codebook import Codebook, forbid_codes, force_codes
from saccade.explain.dictionaries.coded import CodedModel, CodeIndex
from saccade.explain.dictionaries.dictionary import (
    AttributionAutoencoder,
    ConceptDictionary,
    GatedAutoencoder,
    MatchingPursuit,
    Reading,
    ReluAutoencoder,
    TopKAutoencoder,
)
from saccade.explain.dictionaries.editing import SparseEdit, edit_sparsely, feature_weights
from saccade.explain.dictionaries.matches import Matches, match_features
from saccade.explain.dictionaries.measures import (
    babel,
    babel_of_chosen,
    effective_rank,
    explained_variance,
    modality_score,
    num_active,
)
from saccade.explain.dictionaries.site import Approximation, Site, approximation, control
from saccade.explain.dictionaries.stream import Activations, Training, train_dictionary
from saccade.explain.dictionaries.supervised import SupervisedDictionary, fit_supervised

__all__ = [
    "Activations",
    "Approximation",
    "AttributionAutoencoder",
    "Circuit",
    "CodeIndex",
    "Codebook",
    "CodedModel",
    "ConceptDictionary",
    "GatedAutoencoder",
    "Heads",
    "Matches",
    "MatchingPursuit",
    "Reading",
    "ReluAutoencoder",
    "Site",
    "SparseEdit",
    "SupervisedDictionary",
    "TopKAutoencoder",
    "Training",
    "approximation",
    "babel",
    "babel_of_chosen",
    "circuit_auc",
    "control",
    "edge_scores",
    "edit_sparsely",
    "effective_rank",
    "explained_variance",
    "feature_weights",
    "find_circuit",
    "fit_supervised",
    "forbid_codes",
    "force_codes",
    "integer_codes",
    "match_features",
    "mean_difference",
    "modality_score",
    "node_scores",
    "num_active",
    "train_dictionary",
]

"""Dictionaries of concepts on activations: trained on a stream, measured, edited, and read as circuits."""

from saccade.explain.dictionaries.dictionary import (
    ConceptDictionary,
    MatchingPursuit,
    Reading,
    ReluAutoencoder,
    TopKAutoencoder,
)
from saccade.explain.dictionaries.measures import (
    babel,
    babel_of_chosen,
    effective_rank,
    explained_variance,
    modality_score,
    num_active,
)
from saccade.explain.dictionaries.stream import Activations, Training, train_dictionary

__all__ = [
    "Activations",
    "ConceptDictionary",
    "MatchingPursuit",
    "Reading",
    "ReluAutoencoder",
    "TopKAutoencoder",
    "Training",
    "babel",
    "babel_of_chosen",
    "effective_rank",
    "explained_variance",
    "modality_score",
    "num_active",
    "train_dictionary",
]

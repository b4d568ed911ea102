"""How many channels a network needs: similar ones merged without data, and a narrower network made of what is left."""

from saccade.explain.merging.merge import LayerWidth, Narrowed, fold_batch_norms, merge_features, prune_features

__all__ = ["LayerWidth", "Narrowed", "fold_batch_norms", "merge_features", "prune_features"]

"""Pictures of what a unit answers to: the facets among its images, and images that excite it, grown from each."""

from saccade.explain.visualization.ascent import (
    CENTRE_BIAS,
    MEAN_IMAGE,
    Octave,
    Visualization,
    draw_noise,
    save_sheet,
    sheet,
    visualize,
)
from saccade.explain.visualization.denoise import denoise_total_variation, total_variation
from saccade.explain.visualization.facets import Facets, find_facets
from saccade.explain.visualization.unit import excitation

__all__ = [
    "CENTRE_BIAS",
    "MEAN_IMAGE",
    "Facets",
    "Octave",
    "Visualization",
    "denoise_total_variation",
    "draw_noise",
    "excitation",
    "find_facets",
    "save_sheet",
    "sheet",
    "total_variation",
    "visualize",
]

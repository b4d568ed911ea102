"""How near is a misclassified image? A search without gradients, guided by keypoints, and a certificate on a grid."""

from saccade.explain.testing.certificate import Certificate, certify_radius
from saccade.explain.testing.keypoints import Keypoints, find_keypoints, keypoint_saliency
from saccade.explain.testing.search import Misclassified, nearest_misclassified

__all__ = [
    "Certificate",
    "Keypoints",
    "Misclassified",
    "certify_radius",
    "find_keypoints",
    "keypoint_saliency",
    "nearest_misclassified",
]

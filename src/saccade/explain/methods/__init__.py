"""The methods of `explain`: each name in `__all__` is a method, and no other list of them exists.

A method is a function `(classify, images, target, *, batch_size, its own options) -> Attribution`. It gets checked
images (B, C, H, W), checked targets (B,) and the model as a `Classifier` with gradients on, and never gives the model
more than `batch_size` images at a time.
"""

from saccade.explain.methods.cam import grad_cam
from saccade.explain.methods.control import random
from saccade.explain.methods.gradients import gradient, input_x_gradient, integrated_gradients
from saccade.explain.methods.normgrad import normgrad
from saccade.explain.methods.operations import relevance
from saccade.explain.methods.perturbation import occlusion
from saccade.explain.methods.rollout import attention_flow, attention_rollout
from saccade.explain.methods.salient_relevance import salient_relevance
from saccade.explain.methods.selection import selection

__all__ = [
    "attention_flow",
    "attention_rollout",
    "grad_cam",
    "gradient",
    "input_x_gradient",
    "integrated_gradients",
    "normgrad",
    "occlusion",
    "random",
    "relevance",
    "salient_relevance",
    "selection",
]

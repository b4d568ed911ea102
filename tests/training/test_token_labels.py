"""token_label_loss: a weighted sum of cross-entropies, mixed targets, errors."""

import pytest
import torch
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.training import token_label_loss


def make_outputs():
    logits, dense = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 2, 4, 5, dtype=torch.float64)
    return logits, dense, torch.rand(3, 5, dtype=torch.float64).softmax(-1)


def entropy(logits, target):
    return -(target * logits.log_softmax(-1)).sum(-1).mean()


def test_it_is_a_weighted_sum_of_cross_entropies():
    logits, dense, target = make_outputs()
    own = torch.rand(dense.shape, dtype=torch.float64).softmax(-1)
    found = token_label_loss(logits, dense, (0, 0, 0, 0), target, own, class_weight=0.7, dense_weight=0.5)
    assert_close(found, 0.7 * entropy(logits, target) + 0.5 * entropy(dense, own))
    everywhere = target[:, None, None].expand_as(dense)
    assert_close(
        token_label_loss(logits, dense, (0, 0, 0, 0), target),
        token_label_loss(logits, dense, (0, 0, 0, 0), target, everywhere),
    )


def test_the_target_of_the_image_is_mixed_by_the_share_of_the_box():
    logits, dense, target = make_outputs()
    mixed = 5 / 8 * target + 3 / 8 * target[[2, 1, 0]]
    found = token_label_loss(logits, dense, (1, 2, 0, 3), target)
    assert_close(found, entropy(logits, mixed) + entropy(dense, target[:, None, None]))


def test_shapes_that_do_not_fit_are_named():
    logits, dense, target = make_outputs()
    with pytest.raises(InputError, match=r"target is \(3,\): give"):
        token_label_loss(logits, dense, (0, 0, 0, 0), target[:, 0])
    with pytest.raises(InputError, match=r"dense is \(3, 2, 5\)"):
        token_label_loss(logits, dense[:, :, 0], (0, 0, 0, 0), target)
    with pytest.raises(InputError, match=r"dense_target is \(3, 5\): give \(3, 2, 4, 5\)"):
        token_label_loss(logits, dense, (0, 0, 0, 0), target, target)

"""upsample_nearest: copies of every token, norms that stay, errors."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.ops import upsample_nearest


@pytest.mark.parametrize("space", [(5,), (3, 4), (2, 3, 2)])
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_tokens_are_repeated_and_the_chosen_norm_stays(space, factor):
    x = torch.randn(2, *space, 3, dtype=torch.float64)
    expected = F.interpolate(x.movedim(-1, 1), scale_factor=factor, mode="nearest").movedim(1, -1)
    assert_close(upsample_nearest(x, factor), expected)
    for norm in (1, 2, 3.5):
        assert_close(upsample_nearest(x, factor, norm=norm).norm(norm), x.norm(norm))


def test_errors_say_what_to_do():
    x = torch.zeros(1, 3, 4, 2)
    with pytest.raises(InputError, match="factor is 0"):
        upsample_nearest(x, 0)
    with pytest.raises(InputError, match="norm is 0: give 1, 2 or another number above 0"):
        upsample_nearest(x, 2, norm=0)
    with pytest.raises(InputError, match=r"x is \(3, 4\): give \(B, \*space, C\)"):
        upsample_nearest(x[0, ..., 0], 2)

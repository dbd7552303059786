"""Strided attention beyond the contract of all kinds."""

import pytest

from fastlm.errors import UserError
from fastlm.models import attention as kinds
from fastlm.models.attention.dilated import DilatedOptions
from tests.models.attention import bench
from tests.models.attention.cases import Case


@pytest.mark.parametrize("max_length, stride", [(1, 1), (32, 4), (1024, 32), (4096, 64), (6000, 64), (16384, 128)])
def test_the_stride_follows_from_the_longest_context(max_length, stride):
    case = Case("dilated", None)
    assert bench.module(case, bench.layer(case, True, max_length=max_length)).stride == stride


def test_options_that_cannot_be():
    with pytest.raises(UserError, match="dilated: stride must not be negative"):
        DilatedOptions(stride=-1)
    assert kinds.options("dilated(stride=7)").stride == 7

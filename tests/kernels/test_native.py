"""The native module itself: what Python and C++ must agree on, and what it refuses."""

from __future__ import annotations

import pytest
from kfade_kernels import native
from kfade_kernels.packed import packed_elements

pytestmark = pytest.mark.skipif(native.module is None, reason=str(native.missing))


def test_packed_storage_is_that_of_python() -> None:
    for order in [*range(1, 400), 4096, 11_009, 100_000]:
        assert native.module.packed_elements(order) == packed_elements(order)

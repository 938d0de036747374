"""What shadows of golden vectors choose by."""

from __future__ import annotations

import numpy as np

from dsv4c.targets.undecided import REACH, _apart


def test_shadows_choose_on_both_sides_of_what_moved() -> None:
    """Even where every draw moved a score the same way."""
    moved = np.array([[5, 1], [5.5, 1], [5.25, 1], [5.5, np.inf]], np.float32)
    found = _apart(moved)
    want = [[5, 1], [5 + REACH / 2, 1], [5 - REACH / 4, 1], [5 + REACH / 2, np.inf]]
    np.testing.assert_array_equal(found, np.array(want, np.float32))
    assert found.dtype == np.float32

"""As test_oracle_models.py, for models of three layers: a file of its own, which another worker takes."""

from __future__ import annotations

import pytest
from test_oracle_models import (
    SMALL_VARIANTS,
    Compared,
    test_batches,
    test_prompts_however_they_are_fed,
    test_short_prompts_alone,
    test_the_judge_in_double_precision,
    test_token_by_token,
    test_two_hundred_greedy_tokens,
)

__all__ = [
    "test_batches",
    "test_prompts_however_they_are_fed",
    "test_short_prompts_alone",
    "test_the_judge_in_double_precision",
    "test_token_by_token",
    "test_two_hundred_greedy_tokens",
]
pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module", params=SMALL_VARIANTS)
def compared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    return Compared(tmp_path_factory.mktemp("oracle"), request.param)

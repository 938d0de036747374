"""In which order files of tests start. Two workers take a file each at a time, so the long ones go first: a
file of minutes that starts last leaves the other worker without work.
"""

from __future__ import annotations

from collections import Counter

import pytest

LONG = (
    "test_oracle_gpu_model", "test_oracle_gpu_kernels", "test_oracle_models", "test_oracle_ascend_kernels",
    "test_oracle_gpu_kernels_v41", "test_oracle_flash_shape", "test_oracle_models_small",
    "test_oracle_example", "test_oracle_pruned", "test_oracle_saved",
    "test_kernels_packed", "test_static_artifact", "test_prune_experts", "test_v41_golden", "test_static_gpu",
    "test_profile", "test_quality", "test_fuzz", "test_cli_optimise", "test_session_packed",
    "test_v41_example", "test_session_process", "test_undo", "test_calibrate", "test_docs",
    "test_model_reference", "test_run_then_compile", "test_example",
)  # fmt: skip
"""Files that take half a minute or more, roughly the longest first."""


def long_ones_first(items: list[pytest.Item]) -> None:
    """Sort tests in place: the files of `LONG`, then the others by their number of tests."""
    tests = Counter(item.path.stem for item in items)

    def place(item: pytest.Item) -> tuple[int, int, str]:
        name = item.path.stem
        return LONG.index(name) if name in LONG else len(LONG), -tests[name], name

    items.sort(key=place)

"""`tvm_ffi`, without PyTorch: it imports that where it is installed, for 1.8 seconds and 130 MB (measured).

Sessions hand over NumPy arrays; whoever has imported torch already keeps it.
"""

from __future__ import annotations

import sys

_ABSENT = "tvm_ffi" not in sys.modules and "torch" not in sys.modules
if _ABSENT:
    sys.modules["torch"] = None  # type: ignore[assignment]  # imports of it fail as those of a missing package
try:
    import tvm_ffi
finally:
    if _ABSENT:
        del sys.modules["torch"]

__all__ = ["tvm_ffi"]

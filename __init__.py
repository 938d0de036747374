"""dsv4c: a compiler for DeepSeek-V4 models.

This module owns the version and must stay free of imports: the runtime and the compiler both
start here, and neither may pay for the other.
"""

__version__ = "0.1.0"

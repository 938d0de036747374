"""Kernels for Ascend in Triton, and what lowers and judges them in an environment of its own."""

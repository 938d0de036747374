"""CUDA and ROCm device code: kernels in Triton, launch plans, and their emitter."""

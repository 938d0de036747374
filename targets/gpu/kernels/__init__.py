"""The kernels; they import Triton and nothing of dsv4c."""

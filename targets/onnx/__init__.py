"""ONNX: lowerings of ops to nodes, for ONNX Runtime at any size and for other consumers at fixed sizes.

Importing the package imports no ONNX, so that targets, which name a dialect, can be listed without it.
"""

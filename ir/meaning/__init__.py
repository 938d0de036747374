"""The one executable meaning of every op, in NumPy only; shares no code with any back end."""

from .evaluator import Evaluator, Step

__all__ = ["Evaluator", "Step"]

"""The intermediate representation: types, ops, graph, text, verifier, rewriting, and the evaluator."""

from .clone import clone
from .dtypes import DType
from .graph import Builder, Module, Op, Value
from .levels import Level
from .rewrite import Pat, Rule, any_, apply_rules, explain
from .text import parse_module, print_module
from .types import TensorType
from .verify import verify

__all__ = [
    "Builder", "DType", "Level", "Module", "Op", "Pat", "Rule", "TensorType", "Value", "any_", "apply_rules",
    "clone", "explain", "parse_module", "print_module", "verify",
]  # fmt: skip

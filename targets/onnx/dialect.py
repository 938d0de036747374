"""What an ONNX file may say to one consumer: version, nodes, element types, and the vendor's own nodes.

A dialect is a value that a target holds; this module imports no ONNX, so that a table of targets can be
printed where it is not installed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dsv4c.errors import TargetError

Versions = tuple[tuple[int, int], ...]
"""Ranges of opset versions, both ends included."""

LATER = "cpu.ops"
"""A domain of which no file has a node: its version is that of the standard nodes elsewhere. The runtime
renames it to "ai.onnx", and the later of two versions of one domain counts."""

INTEGERS = {"i32": 6, "i64": 7}
"""TensorProto codes of the types that indices may have."""

ELEMENTS = {
    1: "f32", 2: "u8", 3: "i8", 6: "i32", 7: "i64", 9: "bool", 10: "f16", 16: "bf16",
    17: "f8e4m3", 18: "f8e4m3fnuz",
}  # fmt: skip
"""TensorProto codes of the element types that the emitter uses, under their names here."""


@dataclass(frozen=True)
class VendorNode:
    """A node that does the whole of an op, and carries its meaning along where ONNX does not know it.

    Attributes:
        domain, name: what the consumer knows it by; "" is the domain of ONNX.
        inputs, outputs: names of the function's parameters.
        attributes: name -> default, written as in ONNX text (`1e-06`), or "" for none.
        body: the meaning as ONNX text in standard nodes; `@name` is an attribute. "" for a node of ONNX.
    """

    domain: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, str]
    body: str

    def text(self, opset: int) -> str:
        """The function as `onnx.parser.parse_function` reads it."""
        attributes = ", ".join(self.attributes)
        return (
            f'<opset_import: ["" : {opset}], domain: "{self.domain}">\n'
            f"{self.name} {f'<{attributes}>' if attributes else ''} "
            f"({', '.join(self.inputs)}) => ({', '.join(self.outputs)}) {{\n{self.body}\n}}"
        )


@dataclass(frozen=True)
class Dialect:
    """One consumer's ONNX.

    Attributes:
        name: who it is, for messages.
        opset: the version of the standard nodes in the file.
        ir_version: that of the file.
        nodes: "domain::Name" -> opset versions under which the consumer takes it; "ai.onnx" is the standard
            domain.
        elements: element types it takes, as in `ELEMENTS`.
        max_rank: most axes of a tensor.
        index: the type of integers that are computed with.
        vendor: role -> node; roles are those `static.StaticContext` asks for, and one that is missing is
            decomposed into standard nodes.
        runs_as: the version of the standard nodes where ONNX Runtime stands in for the consumer, for element
            types that ONNX has only since; it must mean the same. 0 where that is `opset`.
        held: floats that one block of tokens of attention may hold in temporaries.
        provider: the execution provider of ONNX Runtime that reads such files on the device; "" where another
            program does.
        provider_options: what that provider is told, so that it rounds nowhere but where the graph does.
    """

    name: str
    opset: int
    ir_version: int
    nodes: Mapping[str, Versions]
    elements: frozenset[str]
    max_rank: int = 8
    index: str = "i32"
    vendor: Mapping[str, VendorNode] = field(default_factory=dict)
    runs_as: int = 0
    held: int = 1 << 26
    provider: str = ""
    provider_options: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.index not in INTEGERS or self.index not in self.elements:
            raise TargetError(f"index type {self.index!r}", where=self.name, allowed=", ".join(INTEGERS))
        for role, node in self.vendor.items():
            if f"{node.domain or 'ai.onnx'}::{node.name}" not in self.nodes:
                raise TargetError(f"{role} is {node.domain}::{node.name}, not in its nodes", where=self.name)

    def version_of(self, domain: str) -> int:
        """The version of a domain in the file: vendors' domains have one only."""
        return self.opset if domain in ("", "ai.onnx") else 1

    def check(self, domain: str, name: str, where: str) -> None:
        """Refuse a node that the consumer does not take at this file's version of its domain.

        Raises:
            TargetError: with the versions at which the node exists, or with names like it.
        """
        key = f"{domain or 'ai.onnx'}::{name}"
        version = self.version_of(domain)
        found = self.nodes.get(key)
        if found and any(low <= version <= high for low, high in found):
            return
        if found:
            ranges = ", ".join(f"{low} to {high}" for low, high in found)
            raise TargetError(
                f"{self.name} has no {key} at opset {version}", where=where, allowed=f"opset {ranges}"
            )
        near = [
            n for n in self.nodes if name.lower() in n.lower() or n.split("::")[1].lower() in name.lower()
        ]
        raise TargetError(
            f"{self.name} has no {key}", where=where,
            allowed=", ".join(sorted(near)) or f"the {len(self.nodes)} nodes of its table",
            hint="write it as nodes of the table, or let a pass replace the op before",
        )  # fmt: skip

    def check_type(self, element: int, rank: int, what: str, where: str) -> None:
        """Refuse a tensor whose element type or rank the consumer does not take.

        Raises:
            TargetError: with the types, or the rank, that are taken.
        """
        name = ELEMENTS.get(element, f"type {element}")
        if name not in self.elements:
            allowed = ", ".join(sorted(self.elements))
            raise TargetError(
                f"{what} is of {name}, which {self.name} lacks", where=where, allowed=allowed,
                hint="choose numerics or passes that store and round otherwise: dsv4c targets lists numerics",
            )  # fmt: skip
        if rank > self.max_rank:
            raise TargetError(f"{what} has {rank} axes", where=where, allowed=f"{self.max_rank}")


def load_nodes(path: Path) -> dict[str, Versions]:
    """A table of nodes: {"source": ..., "nodes": {"domain::Name": [[low, high], ...]}}."""
    table = json.loads(path.read_text())["nodes"]
    return {name: tuple((low, high) for low, high in ranges) for name, ranges in table.items()}

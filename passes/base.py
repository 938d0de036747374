"""What a pass is: a frozen dataclass whose fields are its options, with the levels it takes and gives."""

from __future__ import annotations

from dataclasses import MISSING, Field, dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from dsv4c.errors import PassError, unknown
from dsv4c.ir.attrs import Attr, print_attr
from dsv4c.ir.clone import clone
from dsv4c.ir.graph import Module
from dsv4c.ir.levels import Level
from dsv4c.ir.rewrite import Rule, apply_rules, near_misses

KEEP = None
"""As `gives`: the level stays what it was."""


@dataclass(frozen=True)
class Effect:
    """What a pass may do to the results of a step; `--verify-passes` holds it to that.

    Attributes:
        tolerance: the largest change of any output or state, relative to the range of its values, when both
            graphs are evaluated in float64. It covers a changed order of sums, not a changed rounding.
        changes: outputs and states that are meant to change, as file name patterns (`*` is all of them).
        measure: how that change is measured and where it is reported; required with `changes`.
        vocabulary: the token ids for which the promise holds; None is all of them.
    """

    tolerance: float = 1e-9
    changes: tuple[str, ...] = ()
    measure: str = ""
    vocabulary: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.changes and not self.measure:
            raise PassError(
                f"an effect changes {', '.join(self.changes)} without a measure",
                allowed="measure: how the change is measured, in words",
            )

    def keeps(self, name: str) -> bool:
        """Whether output or state `name` must stay within `tolerance`."""
        return not any(fnmatchcase(name, pattern) for pattern in self.changes)


EXACT = Effect()
"""Nothing changes but the order of sums."""


@dataclass(frozen=True)
class Pass:
    """Base of all passes. Subclasses are verbs, set `name`, and either `rules` or `run`.

    Class attributes:
        name: the word in a pipeline string.
        takes: the levels it accepts.
        gives: the level of its result, or None to keep it.
        doc: one sentence for `dsv4c passes`.
        rules: what the inherited `run` applies, once over the module in op order.
        spreads: the option that says over how many devices a model is cut; "" where there is none.
    """

    name: ClassVar[str]
    doc: ClassVar[str]
    takes: ClassVar[frozenset[Level]] = frozenset(Level)
    gives: ClassVar[Level | None] = KEEP
    rules: ClassVar[tuple[Rule, ...]] = ()
    spreads: ClassVar[str] = ""

    def run(self, module: Module) -> int:
        """Change `module` in place; returns how many places changed.

        A pass that decides place by place leaves `module.notes[name]["kept"]`, reasons by location, where it
        decided against. Dead code may be left: `run_pipeline` removes it.
        """
        if not self.rules:
            raise NotImplementedError(f"pass {self.name} has neither rules nor a run of its own")
        return apply_rules(module, self.rules)

    def effect(self) -> Effect:
        """What the pass, with these options, may do to results."""
        return EXACT

    def explain(self, module: Module) -> list[str]:
        """Where it would not apply to `module`, and why: one line a place. `module` is left as it is."""
        lines = [f"{op.name} @{op.loc}: {reason}" for op, reason in near_misses(module, self.rules)]
        tried = clone(module)
        tried.notes.pop(self.name, None)
        self.run(tried)
        kept = tried.notes.get(self.name, {}).get("kept", {})
        return lines + [f"@{loc}: {reason}" for loc, reason in kept.items()]

    def __str__(self) -> str:
        options = [f"{f.name}={print_attr(getattr(self, f.name))}" for f in fields(self)]
        return self.name + ("{" + ", ".join(options) + "}" if options else "")

    @classmethod
    def with_options(cls, options: dict[str, Attr]) -> Pass:
        """The pass with options from text.

        Raises:
            PassError: an option is unknown, missing, or of the wrong type.
        """
        declared = {f.name: f for f in fields(cls)}
        for name, value in options.items():
            if name not in declared:
                raise unknown("option", name, declared or ["none"], PassError, cls.name)
            wanted = _type_name(declared[name])
            if type(value).__name__ != wanted and not (wanted == "float" and type(value) is int):
                raise PassError(f"option {name} = {value!r} is mistyped", where=cls.name, allowed=wanted)
        for name, f in declared.items():
            if f.default is MISSING and name not in options:
                raise PassError(f"option {name!r} is required", where=cls.name, allowed=_type_name(f))
        chosen: dict[str, Any] = dict(options)
        for name, value in chosen.items():
            chosen[name] = float(value) if _type_name(declared[name]) == "float" else value
        return cls(**chosen)


def _type_name(field: Field[Any]) -> str:
    """The annotation as a word, whether its file postpones the evaluation of annotations or not."""
    return field.type if isinstance(field.type, str) else field.type.__name__

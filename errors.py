"""Every exception type of dsv4c, in one place; both halves (compiler and runtime) import it.

An error says where it happened, what was wrong, what would have been allowed, and what to do next.
`str(error)` is one line of the form ``where: what; allowed: ...`` followed by an indented hint.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Dsv4cError(Exception):
    """Base of all errors a user may see.

    Args:
        what: what is wrong, as a sentence without a full stop.
        where: file, tensor, op, option or pass the error is about.
        allowed: what would have been accepted.
        hint: what to do next.

    Attributes:
        op: the operation the error is about, where there is one.
    """

    op: object = None

    def __init__(self, what: str, *, where: str = "", allowed: str = "", hint: str = "") -> None:
        self.what, self.where, self.allowed, self.hint = what, where, allowed, hint
        super().__init__(what)

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        if self.allowed:
            head += f"; allowed: {self.allowed}"
        return head + (f"\n  hint: {self.hint}" if self.hint else "")


class UsageError(Dsv4cError):
    """A command line or an API call that cannot be carried out as written."""


class ConfigError(Dsv4cError):
    """A config.json that is missing, malformed, or describes something unsupported."""


class CheckpointError(Dsv4cError):
    """Weights that are missing, extra, misshaped, mistyped, truncated or not finite."""


class IRError(Dsv4cError):
    """An op, value or graph that breaks a rule of the intermediate representation."""


class ParseError(IRError):
    """IR text, a weight expression or a pipeline string that does not parse."""


class VerifyError(IRError):
    """A graph that is well-formed text but breaks an invariant or its level's table."""


class EvalError(IRError):
    """The evaluator was given inputs that do not fit the graph."""


class PassError(Dsv4cError):
    """A pass that is unknown, has bad options, or does not apply."""


class TargetError(Dsv4cError):
    """An unknown target or arch, or a graph the target declares illegal."""


class ToolchainError(Dsv4cError):
    """A tool or package needed to compile or run is missing; names it."""


class CompileError(Dsv4cError):
    """Emission failed, e.g. a weight that the chosen storage cannot hold exactly."""


class ArtifactError(Dsv4cError):
    """An artifact file that is not one, is damaged, or does not fit this machine."""


class SessionError(Dsv4cError):
    """A step or a saved session that does not fit the session's state."""


def unknown(
    kind: str, name: str, known: Iterable[str], error: type[Dsv4cError], where: str = ""
) -> Dsv4cError:
    """The error for a name that is not in a table; lists the known ones and the nearest."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else ""
    return error(f"unknown {kind} {name!r}", where=where, allowed=", ".join(names), hint=hint)

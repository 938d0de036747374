"""The small runtime: loads an artifact and runs it. Imports neither the compiler nor a framework."""

from .container import Artifact
from .sampling import Sampler, SamplingParams
from .session import Session

__all__ = ["Artifact", "Sampler", "SamplingParams", "Session"]

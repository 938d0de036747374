"""What stands outside dsv4c: which packages and vendors' tools each target uses, and which of them are here.

A report, not a condition: where compiling needs something, the code that needs it complains by itself.
Nothing of a vendor is run but for its version.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .ascend.kernels.toolchain import DEFAULT, INSTALL
from .base import Target

UNKNOWN = "?"
"""A version that a tool does not tell."""


@dataclass(frozen=True)
class Found:
    """Where a tool is on this machine, and its version."""

    where: str
    version: str


@dataclass(frozen=True)
class Tool:
    """Something outside dsv4c that a target uses.

    Attributes:
        name: of the package, or of the program.
        purpose: what is done with it.
        get: how to get it.
        find: looks for it here.
        compiling: whether `dsv4c compile` itself needs it; where not, artifacts are made without.
        instead_of: the tool that does the same; one of the two is enough.
    """

    name: str
    purpose: str
    get: str
    find: Callable[[], Found | None]
    compiling: bool = False
    instead_of: str = ""


def package(module: str, name: str) -> Callable[[], Found | None]:
    """Looks for a package where this Python imports from; `module` is what it is imported by."""

    def find() -> Found | None:
        spec = importlib.util.find_spec(module)
        if spec is None:
            return None
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = UNKNOWN
        return Found(str(Path(spec.origin).parent) if spec.origin else UNKNOWN, version)

    return find


def provider(name: str, wheel: str) -> Callable[[], Found | None]:
    """Looks for the wheel of ONNX Runtime that brings a provider, without importing it.

    Args:
        name: of the provider, whose library lies in the package `onnxruntime` whatever the wheel is called.
        wheel: what pip knows it by.
    """
    library = f"capi/libonnxruntime_providers_{name.removesuffix('ExecutionProvider').lower()}.so"

    def find() -> Found | None:
        found = package("onnxruntime", wheel)()
        return found if found and Path(found.where, library).is_file() else None

    return find


def program(*names: str, home: str = "", says_version: bool = True) -> Callable[[], Found | None]:
    """Looks for the first of some programs, on the PATH or in the vendor's folder.

    Args:
        names: programs; `$CC` is the one that the variable names.
        home: the environment variable that the vendor's set-up script sets to that folder.
        says_version: whether it takes `--version`.
    """

    def find() -> Found | None:
        folder = os.environ.get(home, "") if home else ""
        for word in names:
            name = os.environ.get(word[1:], "") if word.startswith("$") else word
            where = shutil.which(name) or (shutil.which(name, path=f"{folder}/bin") if folder else None)
            if where:
                return Found(where, _version_of(where) if says_version else UNKNOWN)
        return None

    return find


def _version_of(path: str) -> str:
    """The first line that a program says of its version."""
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return UNKNOWN
    lines = done.stdout.splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else UNKNOWN


def environment(name: str, folder: Path) -> Callable[[], Found | None]:
    """Looks for a package in another environment than this one, without starting it."""

    def find() -> Found | None:
        for site in sorted(folder.glob("lib/python*/site-packages")):
            for one in importlib.metadata.distributions(name=name, path=[str(site)]):
                return Found(str(folder), one.version)
        return None

    return find


COMPILE = 'pip install "dsv4c[compile]"'
ENVIRONMENT = f"{INSTALL} {DEFAULT} (never beside dsv4c: it is installed as `triton`)"
CANN = "the CANN toolkit 8.5 or later, from Huawei (hiascend.com); then source its set_env.sh"
NEUWARE = "the Neuware SDK, from Cambricon by contact; then set NEUWARE_HOME to its folder"

ONNX = Tool("onnx", "format onnx", COMPILE, package("onnx", "onnx"), compiling=True)
ONNXRUNTIME = Tool(
    "onnxruntime", "run and verify ONNX artifacts on this CPU", 'pip install "dsv4c[onnx]"',
    package("onnxruntime", "onnxruntime"),
)  # fmt: skip

TRITON = Tool(
    "triton", "format plan: compile the kernels of GPUs, with the assemblers that it brings",
    'pip install "dsv4c[gpu]"', package("triton", "triton"), compiling=True,
)  # fmt: skip

CPU = (
    Tool("apache-tvm", "format tvm", COMPILE, package("tvm", "apache-tvm"), compiling=True),
    Tool(
        "cc", "format tvm: link compiled code", "a C compiler: cc, gcc or clang on the PATH, or $CC",
        program("$CC", "cc", "gcc", "clang"), compiling=True,
    ),
    Tool(
        "ziglang", "format tvm: link in place of cc, and for other processors",
        'pip install "dsv4c[link]"', package("ziglang", "ziglang"), compiling=True, instead_of="cc",
    ),
    ONNX, ONNXRUNTIME,
)  # fmt: skip

CUDA_DRIVER = "the driver of the card, from NVIDIA or your distribution"

CUDA = (
    TRITON, ONNX, ONNXRUNTIME,
    Tool(
        "onnxruntime-gpu", "dsv4c verify --on device: the CUDA provider",
        "pip install onnxruntime-gpu, in an environment without onnxruntime; with CUDA 13 and cuDNN 9",
        provider("CUDAExecutionProvider", "onnxruntime-gpu"),
    ),
    Tool("nvidia-smi", "dsv4c verify --on device: the driver", CUDA_DRIVER, program("nvidia-smi")),
)  # fmt: skip

ROCM = (
    TRITON, ONNX, ONNXRUNTIME,
    Tool(
        "onnxruntime-migraphx", "dsv4c verify --on device: the MIGraphX provider",
        "pip install onnxruntime-migraphx, in an environment without onnxruntime; glibc 2.34 or later",
        provider("MIGraphXExecutionProvider", "onnxruntime-migraphx"),
    ),
    Tool(
        "rocminfo", "dsv4c verify --on device: the driver and ROCm", "ROCm 7 with MIGraphX, from AMD",
        program("rocminfo", home="ROCM_PATH", says_version=False),
    ),
)  # fmt: skip

ASCEND = (
    ONNX, ONNXRUNTIME,
    Tool(
        "triton-ascend", "lower the Triton kernels and choose their tiles", ENVIRONMENT,
        environment("triton-ascend", DEFAULT),
    ),
    Tool(
        "ascendnpu-ir", "compile them up to HIVM, with the plan of on-chip memory", ENVIRONMENT,
        environment("ascendnpu-ir", DEFAULT),
    ),
    Tool(
        "hivmc", "the last step of the Triton kernels: object code", CANN,
        program("hivmc", home="ASCEND_HOME_PATH", says_version=False),
    ),
    Tool(
        "atc", "convert an artifact's models for the device (its build.sh)",
        f"{CANN}; the operator package of the SoC belongs to it",
        program("atc", home="ASCEND_HOME_PATH", says_version=False),
    ),
    Tool(
        "bisheng", "compile kernels of your own in AscendC; none here needs it", CANN,
        program("bisheng", home="ASCEND_HOME_PATH"),
    ),
    Tool("acl", "dsv4c verify --on device", f"{CANN}; its driver too", package("acl", "acl")),
)  # fmt: skip

MLU = (
    ONNX, ONNXRUNTIME,
    Tool(
        "c++", "run the BANG C kernels in emulation on this CPU",
        "a C++ compiler: c++, g++ or clang++ on the PATH, or $CXX; or else the ziglang package",
        program("$CXX", "c++", "g++", "clang++"),
    ),
    Tool(
        "magicmind", "convert an artifact's models for the device",
        "MagicMind, from Cambricon by contact", package("magicmind", "magicmind"),
    ),
    Tool(
        "cncc", "compile the BANG C kernels of an artifact (its build.sh)", NEUWARE,
        program("cncc", home="NEUWARE_HOME"),
    ),
)  # fmt: skip

TOOLS: Mapping[str, tuple[Tool, ...]] = {"cpu": CPU, "cuda": CUDA, "rocm": ROCM, "ascend": ASCEND, "mlu": MLU}

HOMES = ("ASCEND_HOME_PATH", "NEUWARE_HOME", "ROCM_PATH")
"""Environment variables that say where a vendor's tools are."""


def tools_of(target: Target) -> tuple[Tool, ...]:
    """What a target uses: its table, or for a target from outside the packages of its formats."""
    if target.name in TOOLS:
        return TOOLS[target.name]
    return tuple(
        Tool(name, f"format {form.name}", f"pip install {name}", package(module, name), compiling=True)
        for form in target.formats for module, name in form.packages.items()
    )  # fmt: skip

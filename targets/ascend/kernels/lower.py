"""The program that compiles one Triton kernel to HIVM: `python lower.py REQUEST.json`.

Runs where triton-ascend and ascendnpu-ir are installed and imports nothing of dsv4c; `toolchain` calls it
and is the other half of both formats. A request names a module of this folder, a function in it, the types
of its arguments, its constants, a SoC, a directory for the texts of every stage, and where the result goes:
the stage that was reached, the memory plan, or what the compiler said.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PACKAGES = ("triton-ascend", "ascendnpu-ir", "numpy", "pybind11")
OPTIONS = (
    "--enable-auto-multi-buffer=true",
    "--enable-auto-bind-sub-block=true",
    "--enable-hfusion-compile=true",
    "--enable-hivm-compile=true",
    "--enable-triton-kernel-compile=true",
)
"""What triton-ascend itself passes for Atlas A2 and A3."""

NO_BACK_END = "External hivmc run fails"
"""How the compiler says that all of its own passes are done and CANN's part is not there."""

SPACES = {"ub": "ub", "cbuf": "l1", "cc": "l0c", "ca": "l0a", "cb": "l0b"}
BITS = {"bf16": 16, "f16": 16, "f32": 32, "f64": 64, "i1": 1, "i8": 8, "i16": 16, "i32": 32, "i64": 64}
BUFFER = re.compile(r"pointer_cast\(([^)]*)\)[^:]*: memref<([\dx]+)x(\w+), #hivm\.address_space<(\w+)>>")
OVERFLOW = re.compile(r"(\w+) overflow, requires (\d+) bits while (\d+) bits available")


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    result = versions() if request["action"] == "versions" else lower(request)
    Path(request["result"]).write_text(json.dumps(result, indent=1), encoding="utf-8")


def versions() -> dict[str, str]:
    """The installed version of each package, or an empty text."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found


def lower(request: dict[str, Any]) -> dict[str, Any]:
    """Triton to TTIR to linalg to HIVM; the result names the last stage that was reached."""
    directory, started = Path(request["directory"]), time.monotonic()
    directory.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"stage": "none", "error": "", "mode": "", "memory": {}, "files": {}}
    result |= {"overflow": None, "notes": []}
    try:
        linalg = _linalg(request, directory, result)
        _hivm(request, directory, linalg, result)
    except subprocess.CalledProcessError as error:
        result["error"] = _tail(error.stderr or b"")
    except Exception as error:  # whatever the front end raises is the answer, not an accident
        result["error"] = f"{type(error).__name__}: {error}"
    return result | {"seconds": round(time.monotonic() - started, 3)}


def _linalg(request: dict[str, Any], directory: Path, result: dict[str, Any]) -> Path:
    """Compile the Python function as far as the dialect that bishengir-compile reads."""
    from triton._C.libtriton import ir
    from triton.backends.ascend import compiler
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import ASTSource

    target = GPUTarget("npu", request["soc"], 0)
    backend = compiler.AscendBackend(target)
    options = backend.parse_options({})
    context = ir.context()
    ir.load_dialects(context)
    function = getattr(importlib.import_module(request["module"]), request["function"])
    constants = request["constants"]
    signature = request["signature"] | dict.fromkeys(constants, "constexpr")
    source = ASTSource(function, signature, constants)
    module = source.make_ir(
        options, backend.get_codegen_implementation(), backend.get_module_map(), context
    )  # fmt: skip
    metadata = dict(vars(options)) | {"target": target}
    module = compiler.make_ttir(module, metadata, options)
    _keep(directory, "ttir", str(module), result)
    text = str(compiler.ttir_to_linalg(module, metadata, options, named_ops=True))
    mode = re.search(r'mix_mode = "(\w+)"', text)
    result["mode"] = mode.group(1) if mode else ""
    # The compiler of the package index does not know this attribute; triton-ascend drops it here too.
    return _keep(directory, "linalg", re.sub(r', mix_mode = "[^"]*"', "", text), result)


def _keep(directory: Path, stage: str, text: str, result: dict[str, Any]) -> Path:
    path = directory / f"{stage}.mlir"
    path.write_text(text, encoding="utf-8")
    result["stage"], result["files"][stage] = stage, str(path)
    return path


def _hivm(request: dict[str, Any], directory: Path, linalg: Path, result: dict[str, Any]) -> None:
    """Run bishengir-compile: tiling, the memory plan and its checks, synchronisation; at last hivmc."""
    package = importlib.import_module("ascendnpuir")  # by name: a checker of types does not know it

    planned, output = directory / "module.hivm.opt.mlir", directory / "kernel.o"
    planned.unlink(missing_ok=True)
    tool = Path(str(package.__file__)).parent / "bin" / "bishengir-compile"
    command = [str(tool), str(linalg)]
    command += [f"--target={request['soc']}", *OPTIONS, *request["options"]]
    command += [f"--save-temps={directory}", "-o", str(output)]
    done = subprocess.run(command, capture_output=True, check=False)
    said = (done.stdout + done.stderr).decode(errors="replace")
    result["notes"] = re.findall(r"\[NOTE\] (.*)", said)
    if planned.is_file() and (done.returncode == 0 or NO_BACK_END in said):
        result["stage"], result["files"]["hivm"] = "hivm", str(planned)
        result["memory"] = plan(planned.read_text(encoding="utf-8"))
        if done.returncode == 0:
            result["stage"], result["files"]["binary"] = "binary", str(output)
        return
    if done.returncode < 0:
        said += f"\nbishengir-compile was ended by signal {-done.returncode}"
    result["error"] = _tail(said.encode())
    if found := OVERFLOW.search(said):
        memory, needs, has = found.group(1), int(found.group(2)), int(found.group(3))
        name = SPACES.get(memory, memory)
        result["overflow"] = {"memory": name, "required": -(-needs // 8), "available": has // 8}


def plan(hivm: str) -> dict[str, int]:
    """Bytes of each on-chip memory in use, from the addresses that the compiler has planned.

    A buffer's end is its address plus its size; the largest end counts. A buffer whose address is not a
    constant has none to count, and there is none after the plan.
    """
    used: dict[str, int] = {}
    for addresses, sizes, dtype, space in BUFFER.findall(hivm):
        bits = BITS[dtype]
        for size in sizes.split("x"):
            bits *= int(size)
        starts = [int(a) for a in re.findall(r"%c(\d+)_i64", addresses)]
        name = SPACES.get(space, space)
        used[name] = max([used.get(name, 0), *(start + -(-bits // 8) for start in starts)])
    return used


def _tail(said: bytes, limit: int = 4000) -> str:
    lines = said.decode(errors="replace").splitlines()
    return "\n".join(line for line in lines if line.strip() and "hivmc" not in line)[-limit:]


if __name__ == "__main__":
    main()

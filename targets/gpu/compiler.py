"""The program that compiles kernels for one GPU: `python -m dsv4c.targets.gpu.compiler REQUEST.json`.

Runs as a process of its own, so that a crash of a code generator is an answer and LLVM is loaded once per
process; `build` calls it and is the other half of both formats. A request names a target and kernels; for
each, the object lies in the request's directory and the result says what the compiler and the disassembler
found.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

KERNELS = "dsv4c.targets.gpu.kernels"


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    out = Path(request["directory"])
    for kernel in request["kernels"]:
        try:
            result, code = compile_one(kernel, request["target"], request["matrix"])
            put(out / f"{kernel['key']}.bin", code)
        except Exception as error:  # whatever the compiler raises is the answer, not an accident
            result = {"error": f"{type(error).__name__}: {error}"[-4000:]}
        put(out / f"{kernel['key']}.json", json.dumps(result).encode())


def put(path: Path, data: bytes) -> None:
    """Write a file that appears whole: other processes may fill the same cache."""
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_bytes(data)
    part.replace(path)


def compile_one(kernel: dict[str, Any], target: list[Any], matrix: list[str]) -> tuple[dict[str, Any], bytes]:
    """(what is known of it, its object)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import ASTSource

    function = getattr(importlib.import_module(f"{KERNELS}.{kernel['module']}"), kernel["name"])
    signature = {
        name: "constexpr" if name in kernel["constants"] else kernel["types"][name]
        for name in function.arg_names
    }
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(function.arg_names) if name in kernel["divisible"]
    }  # fmt: skip
    source = ASTSource(function, signature, kernel["constants"], attributes)
    options = {"num_warps": kernel["warps"], "num_stages": kernel["stages"], "enable_fp_fusion": True}
    made = triton.compile(source, target=GPUTarget(*target), options=options)
    cuda = target[0] == "cuda"
    code = made.asm["cubin" if cuda else "hsaco"]
    patterns = matrix if kernel["matrix"] else []
    facts = _cuda(made, code, patterns, target[1]) if cuda else _amd(made, patterns)
    scratch = made.metadata.global_scratch_size
    if scratch:
        raise ValueError(
            f"it wants {scratch} bytes of scratch memory in global memory, which plans do not give"
        )
    warps = {"warps": made.metadata.num_warps, "warp": made.metadata.warp_size}
    return {"entry": made.metadata.name, "shared": made.metadata.shared, **warps, "facts": facts}, code


def _cuda(made: Any, code: bytes, matrix: list[str], capability: int) -> dict[str, Any]:
    """Registers and stack by cuobjdump, matrix instructions and spills by nvdisasm; the tools come with
    Triton.
    """
    from triton import knobs

    tool = knobs.nvidia.ptxas if capability < 90 else knobs.nvidia.ptxas_blackwell
    release = re.search(r"release (\d+)\.", subprocess.check_output([tool.path, "--version"], text=True))
    usage = _tool(knobs.nvidia.cuobjdump.path, ["-res-usage"], code)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    counts: Counter[str] = Counter()
    if matrix:
        text = _tool(knobs.nvidia.nvdisasm.path, ["-c"], code)
        counts.update(re.findall(rf"\b(?:{'|'.join(matrix)})[\w.]*", text))
    return {
        "registers": found.get("REG", 0), "spilled": found.get("STACK", 0) + found.get("LOCAL", 0),
        "matrix": dict(counts), "toolkit": int(release.group(1)) if release else 0,
    }  # fmt: skip


def _tool(path: str, options: list[str], code: bytes) -> str:
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        return subprocess.check_output([path, *options, file.name], text=True)


def _amd(made: Any, matrix: list[str]) -> dict[str, Any]:
    """Registers and spills by the metadata of the assembly, matrix instructions by its text."""
    text = made.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found.group(1)) if found else 0

    counts = Counter(re.findall(rf"\b(?:{'|'.join(matrix)})\w*", text)) if matrix else Counter[str]()
    return {
        "registers": number("vgpr_count"), "accumulators": number("agpr_count"),
        "scalars": number("sgpr_count"), "spilled": 4 * number("vgpr_spill_count"),
        "stack": number("private_segment_fixed_size"), "matrix": dict(counts), "toolkit": 0,
    }  # fmt: skip


if __name__ == "__main__":
    main()

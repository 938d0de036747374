"""The tool chain of the Ascend kernels with a Python that only pretends: what it says of any trouble."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv4c.errors import CompileError, ToolchainError, UsageError
from dsv4c.targets.ascend.kernels import lower, toolchain
from dsv4c.targets.ascend.kernels.routing import route
from dsv4c.targets.ascend.kernels.table import KERNELS, SOCS, kernel
from dsv4c.targets.ascend.kernels.toolchain import HERE, Overflow, Request, Stage, Toolchain, pinned

ANSWER: dict[str, Any] = {
    "stage": "hivm", "error": "", "mode": "aiv", "memory": {"ub": 4096}, "files": {}, "notes": [],
    "overflow": None, "seconds": 0.1,
}  # fmt: skip


def pretend(directory: Path, body: str, versions: dict[str, str] | None = None) -> Path:
    """An executable that answers `versions` and runs `body` on any other `request`; `answer(x)` answers."""
    path = directory / "python"
    path.write_text(
        f"#!{sys.executable}\n"
        "import json, sys, time\n"
        "from pathlib import Path\n"
        "program, request = Path(sys.argv[1]).name, json.loads(Path(sys.argv[2]).read_text())\n"
        "answer = lambda x: Path(request['result']).write_text(json.dumps(x))\n"
        f"base = json.loads({json.dumps(ANSWER)!r})\n"
        "if request.get('action') == 'versions':\n"
        f"    answer({pinned() if versions is None else versions!r})\n"
        f"else:\n    {body}\n",
        encoding="utf-8",
    )
    path.chmod(0o755)
    return path


def request(**more: Any) -> Request:
    return Request(kernel("expert_sum"), SOCS[0], kernel("expert_sum").tiles[0], **more)


def test_without_an_environment_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ToolchainError) as caught:
        Toolchain.find()
    said = str(caught.value)
    assert "build/ascend-env/bin/python" in said and "triton-ascend" in said and "ascendnpu-ir" in said
    assert "dsv4c.targets.ascend.kernels.toolchain install" in said


def test_other_versions_are_named(tmp_path: Path) -> None:
    python = pretend(tmp_path, "pass", {**pinned(), "triton-ascend": "2.1.0", "pybind11": ""})
    with pytest.raises(ToolchainError) as caught:
        Toolchain.find(python)
    said = str(caught.value)
    assert "triton-ascend is 2.1.0" in said and "pybind11 is missing" in said
    assert f"triton-ascend {pinned()['triton-ascend']}" in said and "install" in said


def test_the_programs_ask_for_what_is_pinned() -> None:
    assert tuple(pinned()) == lower.PACKAGES


def test_a_request_reaches_the_program(tmp_path: Path) -> None:
    python = pretend(tmp_path, "answer(base | {'notes': [program, json.dumps(request)]})")
    found = Toolchain.find(python).lower(request(dtype="fp16"), tmp_path)
    program, text = found.notes
    sent = json.loads(text)
    assert program == "lower.py" and sent["soc"] == SOCS[0] and sent["function"] == "expert_sum"
    assert sent["signature"] == {"y": "*fp16", "slots": "*i32", "out": "*fp16"}
    assert sent["constants"] == {"D": 4096, "K": 6, "BN": 4096}
    assert found.stage is Stage.HIVM and found.require().memory == {"ub": 4096}


def test_a_program_that_hangs_is_ended(tmp_path: Path) -> None:
    tools = Toolchain(pretend(tmp_path, "time.sleep(60)"), timeout=0.5)
    started = time.monotonic()
    with pytest.raises(ToolchainError, match=r"did not end within 0\.5 seconds"):
        tools.lower(request(), tmp_path)
    assert time.monotonic() - started < 20


def test_a_program_that_breaks_is_quoted(tmp_path: Path) -> None:
    tools = Toolchain.find(pretend(tmp_path, "sys.exit('no such luck')"))
    with pytest.raises(ToolchainError, match="ended with status 1: no such luck"):
        tools.lower(request(), tmp_path)
    with pytest.raises(ToolchainError, match=r"interpret\.py .*no such luck"):
        tools.interpret([], {"x": np.zeros(3, np.float32)})


def test_a_python_that_does_not_start(tmp_path: Path) -> None:
    (tmp_path / "python").write_text("not a program", encoding="utf-8")
    with pytest.raises(ToolchainError, match="cannot be started"):
        Toolchain.find(tmp_path / "python")


def test_a_full_memory_is_named_with_its_size(tmp_path: Path) -> None:
    body = "answer(base | {'stage': 'linalg', 'overflow': {'memory': 'ub', 'required': 9, 'available': 8}})"
    found = Toolchain.find(pretend(tmp_path, body)).lower(request(), tmp_path)
    assert found.overflow == Overflow("ub", 9, 8) and not found.fits
    with pytest.raises(CompileError, match="ub holds 8 bytes and 9 are needed"):
        found.require()


SMALL = (
    "answer(base if request['constants']['BN'] <= {limit} else base | {{'stage': 'linalg', "
    "'overflow': {{'memory': 'ub', 'required': 9, 'available': 8}}}})"
)


def test_tiles_shrink_until_they_fit(tmp_path: Path) -> None:
    tools = Toolchain.find(pretend(tmp_path, SMALL.format(limit=2048)))
    choice = tools.tiles_that_fit("expert_sum", SOCS[1], tmp_path)
    assert choice.tiles == {"BN": 2048} and [t.fits for t in choice.tried] == [False, True]
    nothing = Toolchain.find(pretend(tmp_path, SMALL.format(limit=1)))
    with pytest.raises(CompileError, match="9 are needed"):
        nothing.tiles_that_fit("expert_sum", SOCS[1], tmp_path)


def test_another_fault_is_not_answered_with_smaller_tiles(tmp_path: Path) -> None:
    body = "answer(base | {'stage': 'ttir', 'error': 'operation not legal'})"
    tools = Toolchain.find(pretend(tmp_path, body))
    with pytest.raises(CompileError, match="stopped after ttir: operation not legal"):
        tools.tiles_that_fit("expert_sum", SOCS[0], tmp_path)


def test_wrong_names_are_refused_before_anything_runs() -> None:
    with pytest.raises(UsageError, match="unknown Ascend kernel"):
        kernel("expert_sums")
    with pytest.raises(UsageError, match="unknown dtype"):
        request(dtype="fp8").text()
    with pytest.raises(UsageError, match="missing or unknown: W"):
        request(sizes={"W": 1}).text()
    with pytest.raises(UsageError, match="unknown SoC"):
        Request(kernel("expert_sum"), "Ascend310P3", {"BN": 1024}).text()


def test_every_kernel_of_the_table_is_a_function_of_its_file() -> None:
    for each in KERNELS:
        text = (HERE / f"{each.module}.py").read_text(encoding="utf-8")
        assert f"def {each.name}(" in text, each.name
        head = text.partition(f"def {each.name}(")[2].partition('"""')[0]
        names = {n.partition(":")[0].strip() for n in head.replace("\n", " ").rpartition(")")[0].split(",")}
        assert names - {""} == {*each.arguments, *each.sizes, *each.tiles[0]}, each.name


def test_the_plan_is_read_from_addresses() -> None:
    text = """
    %0 = hivm.hir.pointer_cast(%c16384_i64) : memref<4x8x16x16xbf16, #hivm.address_space<cbuf>>
    %1 = hivm.hir.pointer_cast(%c0_i64, %c512_i64_3) : memref<9xi1, #hivm.address_space<ub>>
    %2 = hivm.hir.pointer_cast(%c64_i64) : memref<16xf32, #hivm.address_space<ub>>
    """
    assert lower.plan(text) == {"l1": 16384 + 16384, "ub": 514}


def test_install_makes_an_environment_of_the_pins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(toolchain.subprocess, "run", lambda command, check: ran.append(command))
    toolchain.install(tmp_path / "env")
    assert ran[0] == [sys.executable, "-m", "venv", str(tmp_path / "env")]
    assert ran[1][0] == str(tmp_path / "env" / "bin" / "python") and ran[1][-1].endswith("requirements.txt")


def test_rows_are_routed_by_expert_in_token_order() -> None:
    ids = np.array([[[2, 0], [2, 1], [9, 9]], [[0, 2], [9, 9], [9, 9]]], np.int32)
    found = route(ids, np.array([2, 1]), experts=4, rows=2)
    assert found.tokens.tolist() == [0, 3, 1, 0, 1, 3] and found.picks.tolist() == [1, 6, 3, 0, 2, 7]
    assert found.blocks.tolist() == [[0, 0, 2], [1, 2, 1], [2, 3, 2], [2, 5, 1]]
    assert found.slots.tolist() == [[0, 3], [2, 4], [-1, -1], [1, 5], [-1, -1], [-1, -1]]

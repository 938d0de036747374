"""The rules of the house, checked by machine: who may import whom, how long a file may grow, and so on."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from order import LONG

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("cli", "frontend", "ir", "passes", "runtime", "targets")
MODULES = ("__init__.py", "__main__.py", "api.py", "errors.py", "quality.py", "testing.py")

# What each part may import of dsv4c, itself included. The one rule behind it: knowledge flows from
# the IR to the targets, and the runtime, which is shipped alone, knows of none of them.
MAY_IMPORT = {
    "errors": set[str](),
    "__init__": {"api", "runtime"},  # when first used, see below
    "__main__": {"cli"},
    "ir": {"ir", "errors"},
    "frontend": {"frontend", "ir", "errors"},
    "passes": {"passes", "ir", "errors"},
    "runtime": {"runtime", "errors"},
    # targets write artifacts; how they are executed is not their business
    "targets": {"targets", "passes", "ir", "errors", "runtime.container", "runtime.cpu", "runtime.images"},
    "testing": {"ir", "passes", "errors"},
    "api": {"frontend", "ir", "passes", "targets", "runtime", "errors"},
    "quality": {"api", "ir", "passes", "runtime", "targets", "errors"},
    "cli": {"cli", "api", "quality", "frontend", "ir", "passes", "targets", "runtime", "errors"},
}

# Frameworks that would decide how dsv4c installs. The oracle lives in tests; the runtime loads
# compiled code through tvm_ffi and onnxruntime, never through a compiler.
FRAMEWORKS = {"torch", "transformers", "tensorflow", "jax"}
COMPILERS = {"tvm", "onnx", "onnx_ir", "onnxscript", "triton"}
MAY_NOT_LOAD = {
    **{part: FRAMEWORKS for part in MAY_IMPORT},
    **{part: FRAMEWORKS | COMPILERS | {"networkx", "tqdm"} for part in ("errors", "__init__", "runtime")},
    # the slow meaning of every op lives here and shares nothing with what it judges
    "ir": FRAMEWORKS | COMPILERS | {"onnxruntime", "tvm_ffi"},
}

LONGEST = 400
# A folder of one machine; not the tail of a longer path or of an address.
ABSOLUTE = re.compile(r"(?<![\w.~}\]-])/(?:work|home|root|Users)/")


def sources() -> list[Path]:
    """Every Python file of the packages, relative to the root."""
    found = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return [path.relative_to(ROOT) for path in found] + [Path(name) for name in MODULES]


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), str(path))


def part_of(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def imports(path: Path, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, full dotted name) of every import in the file, wherever it hides.

    Inside functions, under `if TYPE_CHECKING`, relative, and through importlib with a constant name.
    """
    package = ["dsv4c", *path.parent.parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and _callee(node) in ("import_module", "__import__"):
            names = [a.value for a in node.args[:1] if isinstance(a, ast.Constant)]
            yield from ((node.lineno, str(name)) for name in names)


def _callee(node: ast.Call) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def violation(part: str, name: str) -> str:
    """Why `part` may not import `name`, or nothing."""
    top, _, rest = name.partition(".")
    if top in MAY_NOT_LOAD[part]:
        return f"{part} must not depend on {top}"
    if top in (*PACKAGES, "api", "errors", "quality"):
        return f"say dsv4c.{name}: a bare import makes a second copy of every class"
    if top != "dsv4c" or rest == "__version__":
        return ""
    allowed = MAY_IMPORT[part]
    if any(f"{rest}.".startswith(f"{prefix}.") for prefix in allowed):
        return ""
    return f"{part} may import only {', '.join(sorted(allowed)) or 'nothing'} of dsv4c"


def refuse(wrong: list[str]) -> None:
    assert not wrong, "\n" + "\n".join(wrong)


def test_imports_point_one_way() -> None:
    wrong = []
    for path in sources():
        for line, name in imports(path, parsed(path)):
            if why := violation(part_of(path), name):
                wrong.append(f"{path}:{line}: {name}: {why}")
    refuse(wrong)


@pytest.mark.parametrize(
    ("path", "code", "bad"),
    [
        ("ir/graph.py", "import dsv4c.ir.types, numpy, dsv4c.errors", False),
        ("ir/graph.py", "def f():\n  from dsv4c.passes import fold", True),
        ("ir/graph.py", "from dsv4c import ir, __version__", False),
        ("ir/graph.py", "from dsv4c import passes", True),
        ("ir/graph.py", "import dsv4c", True),
        ("ir/graph.py", "from .types import T", False),
        ("ir/ops/core.py", "from ..types import T", False),
        ("ir/ops/core.py", "from ...passes import fold", True),
        ("ir/graph.py", "from ir import types", True),
        ("ir/graph.py", "if TYPE_CHECKING:\n  from dsv4c.frontend import config", True),
        ("ir/graph.py", "import importlib\nimportlib.import_module('dsv4c.targets.cpu')", True),
        ("ir/meaning/core.py", "import torch", True),
        ("ir/meaning/core.py", "import tvm_ffi", True),
        ("passes/fold.py", "from dsv4c.targets import table", True),
        ("targets/cpu.py", "from dsv4c.runtime.container import ArtifactWriter", False),
        ("targets/cpu.py", "from dsv4c.runtime.containers import x", True),
        ("targets/cpu.py", "from dsv4c.runtime import session", True),
        ("targets/cpu.py", "import tvm.relax, onnx, networkx", False),
        ("targets/cpu.py", "from dsv4c.frontend import load", True),
        ("runtime/session.py", "import dsv4c.ir.dtypes", True),
        ("runtime/session.py", "import onnxruntime, tvm_ffi", False),
        ("runtime/session.py", "import tvm", True),
        ("runtime/session.py", "import networkx", True),
        ("errors.py", "import dsv4c.ir", True),
        ("__init__.py", "from .ir import graph", True),
        ("__init__.py", "if TYPE_CHECKING:\n  from dsv4c.api import compile", False),
        ("api.py", "from dsv4c.frontend.model import build_model", False),
        ("api.py", "from dsv4c.cli import main", True),
        ("runtime/session.py", "from dsv4c import api", True),
        ("cli/main.py", "from dsv4c.runtime import session", False),
        ("cli/main.py", "import torch", True),
    ],
)
def test_the_import_rule_itself(path: str, code: str, bad: bool) -> None:
    found = [violation(part_of(Path(path)), name) for _, name in imports(Path(path), ast.parse(code))]
    assert any(found) == bad, found


def test_runtime_loads_without_the_compiler() -> None:
    """Every module of the runtime imports where frameworks, compilers and the rest of dsv4c are missing."""
    files = [path.with_suffix("") for path in sources() if part_of(path) == "runtime"]
    names = [".".join(["dsv4c", *file.parts]).removesuffix(".__init__") for file in files]
    missing = sorted(MAY_NOT_LOAD["runtime"] | {f"dsv4c.{p}" for p in (*PACKAGES, "api") if p != "runtime"})
    script = f"""if True:
        import importlib, sys
        sys.path.insert(0, {str(ROOT / ".pkg")!r})
        sys.modules.update(dict.fromkeys({missing}))  # None: importing it fails
        for name in {names}:
            importlib.import_module(name)
        """
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_the_root_imports_nothing_until_asked() -> None:
    """`import dsv4c` is free; its public names arrive with their first use."""
    script = f"""if True:
        import sys
        sys.path.insert(0, {str(ROOT / ".pkg")!r})
        import dsv4c
        assert not [name for name in sys.modules if name.startswith("dsv4c.")]
        assert all(getattr(dsv4c, name) for name in dsv4c.__all__)
        """
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_the_files_that_start_first_exist() -> None:
    assert len(set(LONG)) == len(LONG)
    refuse([f"{name} is in tests/order.py" for name in LONG if not (ROOT / "tests" / f"{name}.py").exists()])


def test_files_stay_short() -> None:
    wrong = []
    for path in sources():
        lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
        if len(lines) > LONGEST and not any("Reason:" in line for line in lines[:10]):
            wrong.append(f"{path}: {len(lines)} lines, allowed: {LONGEST}; which second idea does it hold?")
    refuse(wrong)


def test_every_module_opens_with_its_purpose() -> None:
    """Except bare package markers, which own nothing."""
    wrong = [path for path in sources() if parsed(path).body and not ast.get_docstring(parsed(path))]
    refuse([f"{path}: no docstring; what does it own, what must it not know?" for path in wrong])


def test_every_package_is_introduced() -> None:
    needed = [f"{package}/{name}" for package in PACKAGES for name in ("__init__.py", "README.md")]
    refuse([f"{name} is missing" for name in needed if not (ROOT / name).is_file()])


def kept_files() -> list[Path]:
    """What git tracks or would track."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in run.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]


def test_no_file_knows_this_machine() -> None:
    wrong = []
    for path in kept_files():
        data = path.read_bytes()
        if b"\0" in data[:8192]:
            continue
        for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
            if ABSOLUTE.search(line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    refuse(wrong)


def test_every_dependency_is_pinned_and_explained() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {name for group in groups for name in group if not name.startswith("dsv4c[")}
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert names <= pins.keys(), f"without a version in constraints.txt: {sorted(names - pins.keys())}"
    for name in names:
        assert re.search(rf'^ *"{re.escape(name)}", +# \S', text, re.MULTILINE), f"{name}: why is it needed?"


def test_the_wheel_lists_every_package() -> None:
    """A new top-level folder of Python must be named in pyproject.toml, or the wheel lacks it."""
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    on_disk = {p.parent.name for p in ROOT.glob("*/__init__.py")} - {"tests", "examples", "benchmarks"}
    assert on_disk <= set(wheel["only-include"])
    assert {*PACKAGES, *MODULES, "py.typed"} == set(wheel["only-include"])


def test_there_is_one_copy_of_the_package() -> None:
    import dsv4c.errors

    assert Path(dsv4c.errors.__file__).resolve() == ROOT / "errors.py"
    assert not {"api", "errors", "quality", *PACKAGES} & set(sys.modules)

"""What a session does to its process: peak memory, and results that do not depend on threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_model_harness import FORMATS, ROOT, TINY, Models

import dsv4c
from dsv4c.frontend.generate import generate_checkpoint

LARGE: dict[str, Any] = TINY | {
    "num_hidden_layers": 3, "compress_ratios": [0, 4, 16], "hidden_size": 256, "moe_intermediate_size": 256,
    "n_routed_experts": 40, "num_experts_per_tok": 4, "max_position_embeddings": 8192,
}  # fmt: skip
"""Nearly all weights are experts: 47 MB in BF16."""

MEMORY = """
import gc, json, re, sys
from pathlib import Path
import numpy as np
from dsv4c import Session

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

small, large = sys.argv[1:]
warm = Session(small, context=64, threads=1)  # loads the libraries
warm.prefill([[5, 6, 7]])
del warm
gc.collect()
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now
before = peak()
session = Session(large, context=8192, threads=1)
opened = peak()
ids = np.random.default_rng(0).integers(2, 61, 400)
session.prefill([ids.tolist()], chunk=64)
for token in ids[:50]:
    session.step([[int(token)]])
code = sum(session.artifact.section_span(name)[1] for name in session.artifact.sections)
found = {"weights": session.artifact.weight_bytes, "state": session.state_bytes, "code": code}
print(json.dumps({"opened": opened - before, "peak": peak() - before, **found}))
"""

DIGEST = """
import hashlib, sys
import numpy as np
from dsv4c import Session

session = Session(sys.argv[1], batch=2, threads=int(sys.argv[2]))
ids = np.random.default_rng(0).integers(2, 61, (2, 150))
parts = [session.step(ids[:, a:b]) for a, b in ((0, 90), (90, 91), (91, 150))]
print(hashlib.sha256(b"".join(p.tobytes() for p in parts)).hexdigest())
"""


def run(script: str, *arguments: object) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT / ".pkg"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("form", FORMATS)
def test_peak_memory_is_weights_and_state(models: Models, tmp_path: Path, form: str) -> None:
    """At most a tenth more than these and the code, mapped pages included; opening reads few weights."""
    checkpoint = generate_checkpoint(tmp_path / "checkpoint", LARGE, dtype="bf16")
    artifact = dsv4c.compile(checkpoint, output=tmp_path / "m.dsv4", format=form, golden=False)
    found = json.loads(run(MEMORY, models.artifact("ratio16", form), artifact))
    print(form, found)
    assert found["weights"] > 40e6
    assert found["weights"] / 2 < found["peak"] < 1.1 * (found["weights"] + found["state"] + found["code"])
    if form == "tvm":
        assert found["opened"] < found["code"] + found["weights"] / 10


@pytest.mark.parametrize("form", FORMATS)
def test_threads_change_no_bit(models: Models, form: str) -> None:
    one, two = (run(DIGEST, models.artifact("ratio16", form), threads) for threads in (1, 2))
    assert one == two and len(one) == 65


def test_no_session_imports_torch(models: Models, tmp_path: Path) -> None:
    """`tvm_ffi` would, where it is installed; who wants it later still gets it."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    code = (
        "import sys, dsv4c\n"
        "dsv4c.Session(sys.argv[1], context=8).step([[5]])\n"
        "assert 'torch' not in sys.modules\n"
        "try:\n    import torch\n"
        "except SystemExit as e:\n    print(e)\n"
    )
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code, str(models.artifact("ratio16", "tvm"))],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}, check=False,
    )  # fmt: skip
    assert done.stdout == "torch was imported\n", done.stderr

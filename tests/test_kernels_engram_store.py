"""Rows looked up in a store, through the runtime and the kernels that decode them, against their meaning."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support import B, Case, T

from dsv4c import api
from dsv4c.ir.dtypes import DType
from dsv4c.ir.graph import Value
from dsv4c.ir.levels import Level
from dsv4c.runtime.engram import TableOptions
from dsv4c.runtime.layer import LayerSession

ROWS, HOT = 37, (0, 3, 4, 20, 36)


def scaled(c: Case, width: int, groups: int) -> tuple[Value, ...]:
    rng = np.random.default_rng(3)
    codes, scales = rng.integers(0, 256, (ROWS, width)), rng.integers(0, 200, (ROWS, groups))
    codes[codes % 128 == 127] = 1  # NaN
    codes[0], scales[0, 0], scales[1] = 0xFE, 0, 127  # the largest negative code, the smallest scale
    table = c.b.weight(c.store.add("codes", DType.F8E4M3, codes.astype(np.uint8)), "codes")
    return table, c.b.weight(c.store.add("scales", DType.F8E8M0, scales.astype(np.uint8)), "scales")


def plain(c: Case, width: int, bf16: bool) -> tuple[Value, ...]:
    return (c.weight("table", ROWS, width, bf16=bool(bf16)),)


@functools.cache
def case(make: Callable[..., tuple[Value, ...]], *key: int) -> Case:
    c = Case()
    rows = c.i32("rows", B, T, 3)
    table, *scales = make(c, *key)
    hot = c.weight_of("hot", np.array(HOT, np.int32))
    bytes_of_row = sum(int(str(v.type.shape[1])) * v.type.dtype.itemsize for v in (table, *scales))
    ticket = c.b.op("engram_prefetch", rows, store="t")
    record = -(-(bytes_of_row + 8) // 16) * 16
    c.op("engram_fetch", ticket, table, hot, *scales, store="t", tier="disk", cache_bytes=9000, record=record,
         page=-(-record // 4096) * 4096)  # fmt: skip
    c.module.level, c.module.store = Level.FUSED, c.store
    return c


@pytest.mark.parametrize("key", [(scaled, 32, 1), (scaled, 96, 3), (scaled, 15, 5), (plain, 32, 1),
                                 (plain, 17, 0), (plain, 1500, 0)])  # fmt: skip
def test_records_decode_exactly(
    key: tuple[Callable[..., tuple[Value, ...]], int, int], tmp_path: Path
) -> None:
    c = case(*key)
    path = api.compile(c.module, output=tmp_path / "t.dsv4", passes="", golden=False)
    options = (TableOptions(), TableOptions(tier="resident"), TableOptions(synchronous=True))
    sessions = [LayerSession(path, batch=2, tables=o) for o in options]
    rng = np.random.default_rng(4)
    for t in (1, 7, 1, 40):
        rows = rng.integers(-1, ROWS, (2, t, 3)).astype(np.int32)
        rows[0, 0] = 0, -1, 36
        want = c.meaning({"rows": rows})["engram_fetch"].astype(np.float32)
        for session in sessions:
            found = session.step(rows=rows)["engram_fetch"]
            np.testing.assert_array_equal(found, want)
            assert not found.reshape(2, t, 3, -1)[rows < 0].any()

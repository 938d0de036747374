"""The command table. One literal; `tests/test_cli.py` keeps it honest against the files."""

from __future__ import annotations

from .base import Command
from .bench import BENCH
from .calibrate import CALIBRATE
from .compare import COMPARE
from .compile import COMPILE
from .estimate import ESTIMATE
from .inspect import INSPECT
from .listing import PASSES
from .opt import OPT
from .report import REPORT
from .run import RUN
from .targets import TARGETS
from .tune import TUNE
from .unpack import UNPACK
from .verify import VERIFY

COMMANDS: dict[str, Command] = {
    command.name: command
    for command in (
        COMPILE, RUN, INSPECT, VERIFY, UNPACK, REPORT, BENCH, TUNE, CALIBRATE, COMPARE,
        ESTIMATE, OPT, TARGETS, PASSES,
    )
}  # fmt: skip

"""Carries launch plans to a machine with a GPU and measures them there.

    python benchmarks/gpu pack --arch sm_90a          # here: needs the compiler, makes build/gpu
    python3 build/gpu run                             # there: needs numpy and the driver, under ten minutes
    python3 build/gpu run --dry-run                   # anywhere: every launch is checked, nothing is measured

The folder that `pack` makes holds this program, the runtime, the golden artifact of each arch, and the plan
of V4-Flash in its real shape without its weights, which are made up on the device.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 1 where numbers are wrong, 2 where nothing could run."""
    parser = argparse.ArgumentParser(
        "gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    pack = commands.add_parser("pack", help="make the folder to carry")
    pack.add_argument("--arch", type=_names, default=["sm_90a"], help="sm_90a,gfx942,... (default: sm_90a)")
    pack.add_argument("--golden", type=Path, help="checkpoint of the golden model (default: tests/data)")
    pack.add_argument("--config", type=Path, help="config.json of the shape (default: V4-Flash)")
    pack.add_argument("--layers", type=int, default=0, help="of the shape, at most (default: all)")
    pack.add_argument("--numerics", default="bf16", help="bf16, fp8, int8 or exact (default: bf16)")
    pack.add_argument("-o", "--output", type=Path, default=Path("build/gpu"))
    run = commands.add_parser("run", help="verify and measure")
    run.add_argument("--bundle", type=Path, default=HERE, help="the folder that pack made (default: this)")
    run.add_argument("--dry-run", action="store_true", help="check every launch without a device")
    run.add_argument("--arch", default="", help="one of the folder (default: what the device takes)")
    run.add_argument("--layers", type=int, default=0, help="of the shape (default: what fits; dry run: 4)")
    run.add_argument("--decode", type=_numbers, default=[1, 8, 16, 64], help="batches (default: 1,8,16,64)")
    run.add_argument("--context", type=int, default=4096, help="positions of a sequence that decodes")
    run.add_argument("--prefill", type=_numbers, default=[512, 4096], help="tokens (default: 512,4096)")
    run.add_argument("--repeats", type=int, default=20, help="of a step, of which the median counts")
    run.add_argument("-o", "--output", type=Path, help="the results as JSON (default: none)")
    given = parser.parse_args(arguments)
    from dsv4c.errors import Dsv4cError

    try:
        if given.command == "pack":
            from packing import pack_bundle

            made = pack_bundle(
                given.arch, given.output, given.golden, given.config, given.layers, given.numerics
            )
            print(f"{given.output}: {made / 2**20:.1f} MiB")
            return 0
        from carried import run_bundle

        return run_bundle(given)
    except Dsv4cError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _names(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


if __name__ == "__main__":
    sys.exit(main())

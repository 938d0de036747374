"""Programs on an Ascend device: converted models (.om) run through AscendCL's Python binding.

Written for checks where the device is: every step carries states to the device and back, which serving would
not. Nobody has run it on a device yet; tests run it against a stand-in of the binding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4c.errors import SessionError, ToolchainError

Arr = npt.NDArray[Any]

TO_DEVICE, TO_HOST = 1, 2
"""`aclrtMemcpyKind`."""
Output = tuple[str, str, tuple[int, ...]]
"""Name, NumPy dtype, shape."""

HUGE_FIRST = 0
"""`aclrtMemMallocPolicy`: large pages where there are some."""


class Devices:
    """The NPUs of this machine.

    Raises:
        ToolchainError: the binding is not installed.
        SessionError: it does not start.
    """

    def __init__(self) -> None:
        try:
            import acl  # type: ignore[import-not-found, unused-ignore]
        except ImportError as error:
            raise ToolchainError(
                "AscendCL's Python binding is not installed here",
                hint="run on the machine with the NPU, after sourcing CANN's set_env.sh; or verify --on cpu",
            ) from error
        self.acl = acl
        check(acl.init(), "acl.init")

    def use(self, number: int) -> None:
        """What follows concerns device `number`; raises `SessionError` where it does not answer."""
        check(self.acl.rt.set_device(number), f"acl.rt.set_device({number})")


class AclProgram:
    """A converted model on one device, with buffers for its inputs and outputs.

    Args:
        number: of the device.
        inputs, outputs: names in the order of the ONNX model, which conversion keeps.
    """

    def __init__(
        self, devices: Devices, number: int, path: Path, inputs: Sequence[str], outputs: Sequence[Output]
    ) -> None:
        if not path.is_file():
            raise SessionError(
                "the converted program is missing", where=str(path), hint="run build.sh of dsv4c unpack"
            )
        self._devices, self._number = devices, number
        self._acl, self._inputs, self._outputs = devices.acl, list(inputs), list(outputs)
        devices.use(number)
        self._model = self._call("mdl.load_from_file", str(path))
        desc = self._acl.mdl.create_desc()
        check(self._acl.mdl.get_desc(desc, self._model), "acl.mdl.get_desc")
        found = self._acl.mdl.get_num_inputs(desc), self._acl.mdl.get_num_outputs(desc)
        if found != (len(self._inputs), len(self._outputs)):
            raise SessionError(
                f"has {found[0]} inputs and {found[1]} outputs", where=str(path),
                allowed=f"{len(self._inputs)} and {len(self._outputs)}, as compiled",
                hint="convert again from this artifact",
            )  # fmt: skip
        sizes = [self._acl.mdl.get_input_size_by_index(desc, i) for i in range(found[0])]
        self._fed = [self._buffer(size) for size in sizes]
        sizes = [self._acl.mdl.get_output_size_by_index(desc, i) for i in range(found[1])]
        self._made = [self._buffer(size) for size in sizes]
        self._in_set, self._out_set = self._dataset(self._fed), self._dataset(self._made)

    def run(self, outputs: Sequence[str], feeds: dict[str, Arr]) -> list[Arr]:
        """The named outputs; see `static_backend.Program`."""
        self._devices.use(self._number)
        for name, (place, size) in zip(self._inputs, self._fed, strict=True):
            array = np.ascontiguousarray(feeds[name])
            if array.nbytes > size:
                raise SessionError(f"{name} has {array.nbytes} bytes", where="device", allowed=f"{size}")
            check(self._acl.rt.memcpy(place, size, array.ctypes.data, array.nbytes, TO_DEVICE), name)
        check(self._acl.mdl.execute(self._model, self._in_set, self._out_set), "acl.mdl.execute")
        found = {}
        for (name, dtype, shape), (place, _) in zip(self._outputs, self._made, strict=True):
            array = np.empty(shape, dtype)
            check(self._acl.rt.memcpy(array.ctypes.data, array.nbytes, place, array.nbytes, TO_HOST), name)
            found[name] = array
        return [found[name] for name in outputs]

    def _buffer(self, size: int) -> tuple[int, int]:
        return self._call("rt.malloc", max(size, 1), HUGE_FIRST), size

    def _dataset(self, buffers: Sequence[tuple[int, int]]) -> Any:
        dataset = self._acl.mdl.create_dataset()
        for place, size in buffers:
            _, code = self._acl.mdl.add_dataset_buffer(dataset, self._acl.create_data_buffer(place, size))
            check(code, "acl.mdl.add_dataset_buffer")
        return dataset

    def _call(self, name: str, *args: object) -> Any:
        """A function of the binding that returns (result, code)."""
        part, function = name.split(".")
        result, code = getattr(getattr(self._acl, part), function)(*args)
        check(code, f"acl.{name}")
        return result


def check(code: int, what: str) -> None:
    """Raise for a return code other than 0."""
    if code:
        raise SessionError(f"{what} failed with {code}", where="device", hint="codes: AscendCL's reference")


def acl_opener(programs: Path) -> Any:
    """Runs programs from a folder of converted models, `step.<name>.om`, stage by stage on devices 0, 1, ...

    See `static_backend.Opener`.
    """
    devices = Devices()

    def open_program(facts: dict[str, Any], probes: Sequence[str]) -> AclProgram:
        border, path = facts["border"], programs / f"step.{facts['name']}.om"
        outputs = [(n, t, tuple(s)) for n, t, s in border["outputs"]]
        return AclProgram(devices, facts["stage"], path, border["inputs"], outputs)

    return open_program

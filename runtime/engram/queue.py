"""Reading many pages of files at once: Linux native asynchronous I/O, or threads where it is missing.

Knows offsets in a file and slots of memory; neither tables nor caches. A queue belongs to one thread;
compiled code may use a native one in its place (`container.handles.Queue`).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import sys
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dsv4c.runtime.buffers import zeros
from dsv4c.runtime.container.handles import DEPTH, Queue

I64 = npt.NDArray[np.int64]


class Pages:
    """Page-aligned memory: slots of `size` bytes as an array [slots, size], and their addresses."""

    def __init__(self, size: int, slots: int = DEPTH) -> None:
        self.size = size
        self.array = np.frombuffer(mmap.mmap(-1, slots * size), np.uint8).reshape(slots, size)
        self.addresses = self.array.ctypes.data + size * np.arange(slots, dtype=np.int64)


class ReadQueue(Protocol):
    """Reads under way, each of one slot. `finish` gives back (slots, results).

    A result is the number of bytes read, or minus an error number; `submit` itself does not fail. With
    `block` at least one read is waited for, and there must be one; without, what is done is taken.
    """

    name: str

    def submit(self, slots: I64, offsets: I64) -> None: ...

    def finish(self, block: bool) -> tuple[I64, I64]: ...

    def close(self) -> None: ...


def open_queue(fd: int, memory: Pages, direct: bool) -> ReadQueue:
    """The fastest queue there is: native I/O is asynchronous only with O_DIRECT."""
    if direct:
        try:
            return NativeQueue(fd, memory)
        except OSError:  # another system, a sandbox, or the machine's quota is used up
            pass
    return ThreadQueue(fd, memory)


_CALLS = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}
"""Numbers of io_setup, io_destroy, io_getevents, io_submit."""

_IOCB = np.dtype([
    ("data", "<u8"), ("key", "<u4"), ("flags_rw", "<u4"), ("opcode", "<u2"), ("priority", "<i2"),
    ("fd", "<u4"), ("buffer", "<u8"), ("nbytes", "<u8"), ("offset", "<i8"), ("reserved", "<u8"),
    ("flags", "<u4"), ("event_fd", "<u4"),
])  # fmt: skip
_EVENT = np.dtype([("data", "<u8"), ("request", "<u8"), ("result", "<i8"), ("result2", "<i8")])


class NativeQueue:
    """io_submit and io_getevents: one system call starts a whole batch, a fifth of the cost of threads.

    Attributes:
        words: the `Queue`; compiled code that uses it takes it over.

    Args:
        fd: the file; compiled code names its own.

    Raises:
        OSError: the system has no such calls, or no more queues to give.
    """

    name = "native"

    def __init__(self, fd: int, memory: Pages) -> None:
        calls = _CALLS.get(platform.machine())
        if sys.platform != "linux" or calls is None:
            raise OSError(errno.ENOSYS, "no native asynchronous I/O")
        self._setup, self._destroy, self._getevents, self._submit = calls
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.syscall.restype = ctypes.c_long
        self._context, self._memory = ctypes.c_ulong(0), memory
        self._call(self._setup, ctypes.c_long(DEPTH), ctypes.byref(self._context))
        self._refused: list[tuple[int, int]] = []
        self.words = words = zeros((Queue.WORDS,), np.int64)
        words[Queue.CONTEXT], words[Queue.SUBMIT] = self._context.value, self._submit
        words[Queue.GET_EVENTS] = self._getevents
        words[Queue.MEMORY], words[Queue.SIZE] = memory.addresses[0], memory.size
        requests = words[Queue.REQUESTS : Queue.EVENTS].view(_IOCB)  # one per slot
        self._events = words[Queue.EVENTS :].view(_EVENT)
        count = len(memory.addresses)
        requests["data"][:count], requests["buffer"][:count] = np.arange(count), memory.addresses
        requests["fd"], requests["nbytes"] = max(fd, 0), memory.size
        self._offsets = requests["offset"]
        self._pointers = requests.ctypes.data + _IOCB.itemsize * np.arange(count, dtype=np.int64)
        self._all_free()

    def _call(self, number: int, *args: object) -> int:
        """One system call; ctypes lets other Python threads run meanwhile."""
        while True:
            result = int(self._libc.syscall(ctypes.c_long(number), *args))
            if result >= 0:
                return result
            if ctypes.get_errno() != errno.EINTR:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def submit(self, slots: I64, offsets: I64) -> None:
        self._offsets[slots] = offsets
        pointers, done = self._pointers[slots], 0  # the kernel copies requests during the call
        while done < len(slots):
            at = ctypes.c_void_p(pointers.ctypes.data + 8 * done)
            try:
                done += self._call(self._submit, self._context, ctypes.c_long(len(slots) - done), at)
            except OSError as error:
                self._refused += [(slot, -(error.errno or errno.EIO)) for slot in slots[done:].tolist()]
                return

    def finish(self, block: bool) -> tuple[I64, I64]:
        if self._refused:
            pairs = np.array(self._refused, np.int64)
            self._refused.clear()
            return pairs[:, 0], pairs[:, 1]
        count = self._call(
            self._getevents, self._context, ctypes.c_long(int(block)), ctypes.c_long(DEPTH),
            ctypes.c_void_p(self._events.ctypes.data),
            None if block else ctypes.c_void_p(self.words[Queue.NEVER :].ctypes.data),
        )  # fmt: skip
        events = self._events[:count]
        return events["data"].astype(np.int64), events["result"].copy()

    def abandon(self) -> None:
        """Take back every slot that compiled code holds; waits for their reads, which own memory until
        then."""
        results = self.words[Queue.RESULTS : Queue.RESULTS + DEPTH]
        under_way = int((results == Queue.PENDING).sum() - self.words[Queue.STARTED])
        while under_way:
            under_way -= len(self.finish(block=True)[0])
        self._all_free()

    def _all_free(self) -> None:
        self.words[Queue.RESULTS : Queue.RESULTS + DEPTH] = 0
        self.words[Queue.FREE_SLOTS : Queue.FREE_SLOTS + DEPTH] = np.arange(DEPTH)
        self.words[Queue.FREE], self.words[Queue.STARTED] = DEPTH, 0

    def close(self) -> None:
        """Wait for reads under way, so that none writes into memory that is gone."""
        if self._context.value:
            self._call(self._destroy, self._context)
            self._context.value = 0


class ThreadQueue:
    """preadv in a few threads, which read without Python's lock; also for files behind the page cache."""

    name = "threads"
    THREADS = 8

    def __init__(self, fd: int, memory: Pages) -> None:
        self._fd, self._memory, self._pool = fd, memory.array, ThreadPoolExecutor(self.THREADS, "dsv4c-read")
        self._running: list[Future[tuple[int, int]]] = []

    def submit(self, slots: I64, offsets: I64) -> None:
        for slot, offset in zip(slots.tolist(), offsets.tolist(), strict=True):
            self._running.append(self._pool.submit(self._read, slot, offset))

    def _read(self, slot: int, offset: int) -> tuple[int, int]:
        try:
            return slot, os.preadv(self._fd, [self._memory[slot]], offset)
        except OSError as error:
            return slot, -(error.errno or errno.EIO)

    def finish(self, block: bool) -> tuple[I64, I64]:
        if block:
            wait(self._running, return_when=FIRST_COMPLETED)
        done = [read for read in self._running if read.done()]
        self._running = [read for read in self._running if read not in done]
        pairs = np.array([read.result() for read in done], np.int64).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]

    def close(self) -> None:
        self._pool.shutdown()

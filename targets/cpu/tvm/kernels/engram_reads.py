"""What look-ups in a stored table ask of the system: asynchronous reads, locks, copies, errors.

Inlines over the runtime's memory (`runtime.container.handles`); they know requests and results, not rows.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"
from __future__ import annotations

from tvm.ir import PointerType, PrimType
from tvm.script import tirx as T

from dsv4c.runtime.container.handles import DEPTH, FAIL, Failure, Handle, Queue, Store

_INTERRUPTED = 4
"""An error number of Linux."""


def at(dtype: str, address):
    """An address as a pointer."""
    return T.reinterpret(PointerType(PrimType(dtype), "global"), address)


def void(address):
    return T.reinterpret("handle", address)


def copied(to, source, count):
    """Copy bytes; the address they went to."""
    return T.call_extern("int64", "memcpy", to, source, T.int64(count))


def copy(to, source, count):
    return T.evaluate(copied(to, source, count))


def locked(change: str, H):
    """`change` is "lock" or "unlock"."""
    place = void(H[Handle.STORE] + 8 * Store.LOCK)
    return T.evaluate(T.call_extern("int32", f"pthread_mutex_{change}", place))


def fail(H, reason: int, a, b):
    """Raises an error of the runtime's, which ends the kernel; nothing may be locked."""
    return T.evaluate(T.call_packed(FAIL, H[Handle.NUMBER], T.int64(reason), a, b))


@T.inline
def _error_number(N):
    """N[0] = errno."""
    place: T.let[T.handle("int32", "global")] = at("int32", T.call_extern("int64", "__errno_location"))
    Number = T.decl_buffer((1,), "int32", data=place)
    N[0] = T.cast(Number[0], "int64")


@T.inline
def submit(H, Q):
    """Hand over what was started; a request that the system refuses ends with its error number."""
    N = T.alloc_buffer((3,), "int64", scope="local")  # an error number, how many are done, one result
    N[1] = T.int64(0)
    while N[1] < Q[Queue.STARTED]:
        N[2] = T.call_extern(
            "int64", "syscall", Q[Queue.SUBMIT], Q[Queue.CONTEXT], Q[Queue.STARTED] - N[1],
            T.address_of(Q[T.int64(Queue.POINTERS) + N[1]]),
        )  # fmt: skip
        if N[2] > 0:
            N[1] = N[1] + N[2]
        else:
            _error_number(N)
            for j in T.serial(Q[Queue.STARTED] - N[1]):
                request = T.meta_var(Q[T.int64(Queue.POINTERS) + N[1] + j] - H[Handle.QUEUE])
                Q[T.int64(Queue.RESULTS) + (request // 8 - Queue.REQUESTS) // 8] = T.int64(0) - N[0]
            N[1] = Q[Queue.STARTED]
    Q[Queue.STARTED] = T.int64(0)


@T.inline
def reap(H, Q, least):
    """Note the results of reads that are done, of at least so many."""
    N = T.alloc_buffer((2,), "int64", scope="local")  # an error number, how many came
    N[1] = T.call_extern(
        "int64", "syscall", Q[Queue.GET_EVENTS], Q[Queue.CONTEXT], T.int64(least), T.int64(DEPTH),
        T.address_of(Q[Queue.EVENTS]),
        T.if_then_else(T.bool(bool(least)), T.int64(0), H[Handle.QUEUE] + 8 * Queue.NEVER),
    )  # fmt: skip
    if N[1] < 0:
        _error_number(N)
        if N[0] != T.int64(_INTERRUPTED):
            fail(H, Failure.SYSTEM, N[0], T.int64(0))
    for j in T.serial(T.max(N[1], T.int64(0))):
        Q[T.int64(Queue.RESULTS) + Q[T.int64(Queue.EVENTS) + j * 4]] = Q[T.int64(Queue.EVENTS) + j * 4 + 2]

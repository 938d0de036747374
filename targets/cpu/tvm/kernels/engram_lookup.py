"""Kernels that look rows of a stored table up: hot region, cache, and pages read from disk meanwhile.

They work on the runtime's memory (`runtime.container.handles`), make the system calls themselves, and call
the runtime only for what they cannot do: batches that the queue has no room for, files without native I/O,
errors.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, misc"
from __future__ import annotations

from tvm.script import tirx as T

from dsv4c.runtime.container.handles import (
    BEGIN,
    OLDEST,
    SPREAD,
    WAIT,
    WAYS,
    Failure,
    Handle,
    Queue,
    Store,
    Ticket,
    Tier,
)
from dsv4c.runtime.container.tables import BLOCK, SEED

from .engram_reads import at, copied, copy, fail, locked, reap, submit, void

_MONOTONIC = 1
"""A clock of Linux."""
_ENDLESS = 1 << 40
"""Elements of memory whose size only the runtime knows."""
_LINE = 2 * WAYS
"""Numbers per set of a cache: row ids, then ages."""
_SPENT = -(2**40)
"""The result of a slot that was given back."""


def _home(H, row):
    """Where the set of a row begins in `Ages`."""
    return T.truncmod(T.cast(row, "int64") * T.int64(SPREAD), H[Handle.SETS]) * T.int64(_LINE)


@T.inline
def _touch(H, Shared, Ages, place):
    """The next age for the record whose age stands at `place`."""
    if Shared[Store.AGE] >= T.int64(OLDEST):
        for j in T.serial(H[Handle.SETS] * WAYS):
            Ages[j // WAYS * _LINE + WAYS + j % WAYS] = T.if_then_else(
                Ages[j // WAYS * _LINE + j % WAYS] >= 0, 1, 0
            )
        Shared[Store.AGE] = T.int64(1)
    Shared[Store.AGE] = Shared[Store.AGE] + 1
    Ages[place] = T.cast(Shared[Store.AGE], "int32")


def _lookup(record: int, page: int):
    """Inlines for one size of records and pages: (start, pending, deliver, keep)."""
    slots = page // record

    @T.inline
    def start(H, Q, K):
        """Begin to read the pages of a ticket's missing rows."""
        N = T.alloc_buffer((1,), "int64", scope="local")
        room = T.meta_var(
            T.if_then_else(H[Handle.TIER] == T.int64(Tier.NATIVE), Q[Queue.FREE], T.int64(0))
        )
        if T.cast(K[Ticket.MISSING], "int64") <= room:
            K[Ticket.PAGES] = 0
            for j in T.serial(K[Ticket.MISSING]):
                N[0] = T.int64(-1)
                for k in T.serial(j):
                    if (
                        K[k * Ticket.EACH + Ticket.COLD] // slots
                        == K[j * Ticket.EACH + Ticket.COLD] // slots
                    ):
                        N[0] = T.cast(K[k * Ticket.EACH + Ticket.SLOT], "int64")
                if N[0] < T.int64(0):
                    Q[Queue.FREE] = Q[Queue.FREE] - 1
                    N[0] = Q[T.int64(Queue.FREE_SLOTS) + Q[Queue.FREE]]
                    request = T.meta_var(T.int64(Queue.REQUESTS) + N[0] * 8)
                    Q[T.int64(Queue.RESULTS) + N[0]] = T.int64(Queue.PENDING)
                    Q[request + 2] = H[Handle.FILE] << T.int64(32)
                    Q[request + 4] = T.int64(page)
                    Q[request + 5] = H[Handle.COLD_OFFSET] + T.cast(
                        K[j * Ticket.EACH + Ticket.COLD] // slots, "int64"
                    ) * T.int64(page)
                    Q[T.int64(Queue.POINTERS) + Q[Queue.STARTED]] = H[Handle.QUEUE] + request * 8
                    Q[Queue.STARTED] = Q[Queue.STARTED] + 1
                    K[Ticket.PAGES] = K[Ticket.PAGES] + 1
                K[j * Ticket.EACH + Ticket.SLOT] = T.cast(N[0], "int32")
            K[Ticket.WHO] = Tier.NATIVE
        else:
            K[Ticket.WHO] = Tier.HOST
            T.evaluate(T.call_packed(BEGIN, H[Handle.NUMBER], T.address_of(K[0])))

    @T.inline
    def pending(Q, K, N):
        """N[0] = whether a page of a ticket is still to come."""
        N[0] = T.int64(0)
        for j in T.serial(K[Ticket.MISSING]):
            if Q[Queue.RESULTS + K[j * Ticket.EACH + Ticket.SLOT]] == T.int64(Queue.PENDING):
                N[0] = T.int64(1)

    @T.inline
    def deliver(H, Q, K, out):
        """Copy a ticket's rows, all of whose pages came, to their places at address `out`."""
        for j in T.serial(K[Ticket.MISSING]):
            result = T.meta_var(Queue.RESULTS + K[j * Ticket.EACH + Ticket.SLOT])
            if Q[result] != T.int64(page):
                number: T.let[T.int64] = T.cast(K[j * Ticket.EACH + Ticket.COLD] // slots, "int64")
                fail(H, Failure.READ, number, Q[result])
        for j in T.serial(K[Ticket.MISSING]):
            source: T.let[T.int64] = (
                Q[Queue.MEMORY]
                + T.cast(K[j * Ticket.EACH + Ticket.SLOT], "int64") * Q[Queue.SIZE]
                + T.cast(K[j * Ticket.EACH + Ticket.COLD] % slots, "int64") * T.int64(record)
            )
            to: T.let[T.int64] = out + T.cast(K[j * Ticket.EACH + Ticket.INDEX], "int64") * T.int64(record)
            copy(void(to), void(source), record)
        for j in T.serial(K[Ticket.MISSING]):
            slot = T.meta_var(T.cast(K[j * Ticket.EACH + Ticket.SLOT], "int64"))
            if Q[T.int64(Queue.RESULTS) + slot] != T.int64(_SPENT):
                Q[T.int64(Queue.RESULTS) + slot] = T.int64(_SPENT)
                Q[T.int64(Queue.FREE_SLOTS) + Q[Queue.FREE]] = slot
                Q[Queue.FREE] = Q[Queue.FREE] + 1

    @T.inline
    def verify(H, K, out):
        """Refuse a record that is not whole or of another row; see `container.tables.seal`."""
        place: T.let[T.handle("uint32", "global")] = at("uint32", out)
        Words = T.decl_buffer((_ENDLESS,), "uint32", data=place)
        total = T.alloc_buffer((1,), "uint32")
        for j in T.serial(K[Ticket.MISSING]):
            first = T.meta_var(T.cast(K[j * Ticket.EACH + Ticket.INDEX], "int64") * (record // 4))
            total[0] = T.uint32(0)
            for i in T.serial(record // 4 - 1):
                total[0] = total[0] + Words[first + i] * T.cast(i * 2 + 1, "uint32")
            total[0] = total[0] * T.uint32(int(SEED)) + T.uint32(int(SEED))
            if (
                Words[first + (record // 4 - 1)] != total[0]
                or Words[first + (record // 4 - 2)] != T.cast(K[j * Ticket.EACH + Ticket.ID], "uint32")
            ):
                number: T.let[T.int64] = T.cast(K[j * Ticket.EACH + Ticket.COLD] // slots, "int64")
                fail(H, Failure.SEAL, number, T.cast(K[j * Ticket.EACH + Ticket.ID], "int64"))

    @T.inline
    def keep(H, Shared, K, out):
        """Put a ticket's rows into the cache, unless they are there, in place of the least recently used."""
        place: T.let[T.handle("int32", "global")] = at("int32", H[Handle.AGES])
        Ages = T.decl_buffer((_ENDLESS,), "int32", data=place)
        way = T.alloc_buffer((2,), "int64", scope="local")  # the oldest, and whether the row is there
        for j in T.serial(K[Ticket.MISSING]):
            row = T.meta_var(K[j * Ticket.EACH + Ticket.ID])
            home: T.let[T.int64] = _home(H, row)
            way[0] = T.int64(0)
            way[1] = T.int64(0)
            for i in T.serial(WAYS):
                if Ages[home + i] == row:
                    way[1] = T.int64(1)
                if Ages[home + WAYS + i] < Ages[home + WAYS + way[0]]:
                    way[0] = T.cast(i, "int64")
            if way[1] == T.int64(0):
                if Ages[home + way[0]] >= 0:
                    Shared[Store.EVICTED] = Shared[Store.EVICTED] + 1
                Ages[home + way[0]] = row
                _touch(H, Shared, Ages, home + WAYS + way[0])
                copy(
                    void(H[Handle.RECORDS] + (home // _LINE * WAYS + way[0]) * record),
                    void(out + T.cast(K[j * Ticket.EACH + Ticket.INDEX], "int64") * T.int64(record)),
                    record,
                )

    return start, pending, deliver, verify, keep


def engram_rows_begin(record: int, page: int, columns: int):
    """rows [B,S,columns] i32, handle -> ticket [B,S,columns+1,4] i32, found [B,S,columns,record] u8.

    `found` has the records that memory has, zeros for row -1; reading the others, which the ticket names,
    begins. Counts all of them.
    """
    slots, start = page // record, _lookup(record, page)[0]

    @T.inline
    def rank(H, row, A):
        """A[0] = hot rows before a row, A[1] = whether it is hot itself."""
        bits_at: T.let[T.handle("uint64", "global")] = at("uint64", H[Handle.BITS])
        Bits = T.decl_buffer((_ENDLESS,), "uint64", data=bits_at)
        ranks_at: T.let[T.handle("int32", "global")] = at("int32", H[Handle.RANKS])
        Ranks = T.decl_buffer((_ENDLESS,), "int32", data=ranks_at)
        word = T.meta_var(row // BLOCK * (BLOCK // 64))
        last = T.meta_var(row % BLOCK // 64)
        bit = T.meta_var(T.cast(row % 64, "uint64"))
        A[0] = T.cast(Ranks[row // BLOCK], "int64")
        for w in T.serial(last):
            A[0] = A[0] + T.cast(T.popcount(Bits[word + w]), "int64")
        A[0] = A[0] + T.cast(
            T.popcount(Bits[word + last] & (T.shift_left(T.uint64(1), bit) - T.uint64(1))), "int64"
        )
        A[1] = T.cast(T.shift_right(Bits[word + last], bit) & T.uint64(1), "int64")

    @T.inline
    def find(H, Shared, row, A):
        """A[2] = where the cache has a row among its records, or -1; it is used now."""
        ages_at: T.let[T.handle("int32", "global")] = at("int32", H[Handle.AGES])
        Ages = T.decl_buffer((_ENDLESS,), "int32", data=ages_at)
        A[2] = T.int64(-1)
        if H[Handle.SETS] > T.int64(0):
            home: T.let[T.int64] = _home(H, row)
            for w in T.serial(WAYS):
                if Ages[home + w] == row:
                    A[2] = home // _LINE * WAYS + T.cast(w, "int64")
            if A[2] >= T.int64(0):
                _touch(H, Shared, Ages, home + WAYS + A[2] % WAYS)

    @T.inline
    def look_up(H, Shared, K, F, row, i, A, N):
        """One row: copied, or noted as missing; N counts rows, hot and cached ones, and missing ones."""
        N[0] = N[0] + 1
        A[0] = T.int64(0)
        A[1] = T.int64(0)
        if H[Handle.RANKS] != T.int64(0):
            rank(H, T.cast(row, "int64"), A)
        if A[1] != T.int64(0):
            N[1] = N[1] + 1
            copy(T.address_of(F[i * record]), void(H[Handle.HOT] + A[0] * record), record)
        elif H[Handle.TIER] == T.int64(Tier.RESIDENT):
            cold: T.let[T.int64] = T.cast(row, "int64") - A[0]
            N[2] = N[2] + 1
            source: T.let[T.int64] = H[Handle.COLD] + cold // slots * page + cold % slots * record
            copy(T.address_of(F[i * record]), void(source), record)
        else:
            find(H, Shared, row, A)
            if A[2] >= T.int64(0):
                N[2] = N[2] + 1
                copy(T.address_of(F[i * record]), void(H[Handle.RECORDS] + A[2] * record), record)
            else:
                K[N[3] * Ticket.EACH + Ticket.INDEX] = T.cast(i, "int32")
                K[N[3] * Ticket.EACH + Ticket.ID] = row
                K[N[3] * Ticket.EACH + Ticket.COLD] = T.cast(T.cast(row, "int64") - A[0], "int32")
                N[3] = N[3] + 1

    @T.prim_func(s_tir=True)
    def func(r: T.handle, h: T.handle, k: T.handle, f: T.handle):
        B = T.int64()
        S = T.int64()
        R = T.match_buffer(r, (B, S, columns), "int32")
        H = T.match_buffer(h, (Handle.WORDS,), "int64")
        Tickets = T.match_buffer(k, (B, S, columns + 1, Ticket.EACH), "int32")
        Found = T.match_buffer(f, (B, S, columns, record), "uint8")
        Rf = T.decl_buffer((B * S * columns,), "int32", data=R.data)
        K = T.decl_buffer((B * S * (columns + 1) * Ticket.EACH,), "int32", data=Tickets.data)
        F = T.decl_buffer((B * S * columns * record,), "uint8", data=Found.data)
        store_at: T.let[T.handle("int64", "global")] = at("int64", H[Handle.STORE])
        Shared = T.decl_buffer((Store.WORDS,), "int64", data=store_at)
        queue_at: T.let[T.handle("int64", "global")] = at("int64", H[Handle.QUEUE])
        Q = T.decl_buffer((Queue.WORDS,), "int64", data=queue_at)
        A = T.alloc_buffer((3,), "int64", scope="local")
        N = T.alloc_buffer((4,), "int64", scope="local")
        for i in T.serial(B * S * columns):
            if T.cast(Rf[i], "int64") >= H[Handle.ROWS]:
                fail(H, Failure.ROW, T.cast(Rf[i], "int64"), T.int64(0))
        for i in T.serial(4):
            N[i] = T.int64(0)
        locked("lock", H)
        for i in T.serial(B * S * columns):
            if Rf[i] < 0:
                T.evaluate(T.call_extern("handle", "memset", T.address_of(F[i * record]), 0, T.int64(record)))
            else:
                look_up(H, Shared, K, F, Rf[i], i, A, N)
        Shared[Store.ROWS] = Shared[Store.ROWS] + N[0]
        Shared[Store.HOT] = Shared[Store.HOT] + N[1]
        Shared[Store.CACHED] = Shared[Store.CACHED] + N[2]
        Shared[Store.READ] = Shared[Store.READ] + N[3]
        locked("unlock", H)
        if B * S > 0:  # a ticket of no tokens has no numbers
            K[Ticket.MISSING] = T.cast(N[3], "int32")
            K[Ticket.WHO] = 0
        if N[3] > T.int64(0) and H[Handle.LATE] == T.int64(0):
            start(H, Q, K)
            if K[Ticket.WHO] == Tier.NATIVE:
                submit(H, Q)

    return func


def engram_rows_end(record: int, page: int, columns: int, number: str):
    """ticket, found and handle as `engram_rows_begin` gave and took them -> records [B,S,columns,n] of
    `number`.

    Waits for what was missing, checks it, keeps it in the cache, and counts pages and waits. A failed read
    ends in an error of the runtime's, which takes the slots of all tickets back.
    """
    count = record // {"uint8": 1, "uint16": 2, "float32": 4}[number]
    start, pending, deliver, verify, keep = _lookup(record, page)

    @T.inline
    def receive(H, Q, K, out, ready):
        """Wait for the reads of compiled code; ready[0] = whether they were done."""
        more = T.alloc_buffer((1,), "int64", scope="local")
        if Q[Queue.STARTED] > T.int64(0):
            submit(H, Q)
        pending(Q, K, more)
        if more[0] != T.int64(0):
            reap(H, Q, 0)
            pending(Q, K, more)
        ready[0] = T.int64(1) - more[0]
        while more[0] != T.int64(0):
            reap(H, Q, 1)
            pending(Q, K, more)
        deliver(H, Q, K, out)

    @T.prim_func(s_tir=True)
    def func(k: T.handle, f: T.handle, h: T.handle, y: T.handle):
        B = T.int64()
        S = T.int64()
        Tickets = T.match_buffer(k, (B, S, columns + 1, Ticket.EACH), "int32")
        Found = T.match_buffer(f, (B, S, columns, record), "uint8")
        H = T.match_buffer(h, (Handle.WORDS,), "int64")
        Y = T.match_buffer(y, (B, S, columns, count), number)
        K = T.decl_buffer((B * S * (columns + 1) * Ticket.EACH,), "int32", data=Tickets.data)
        F = T.decl_buffer((B * S * columns * record,), "uint8", data=Found.data)
        Yf = T.decl_buffer((B * S * columns * count,), number, data=Y.data)
        store_at: T.let[T.handle("int64", "global")] = at("int64", H[Handle.STORE])
        Shared = T.decl_buffer((Store.WORDS,), "int64", data=store_at)
        queue_at: T.let[T.handle("int64", "global")] = at("int64", H[Handle.QUEUE])
        Q = T.decl_buffer((Queue.WORDS,), "int64", data=queue_at)
        clock = T.alloc_buffer((4,), "int64")
        ready = T.alloc_buffer((1,), "int64", scope="local")
        out: T.let[T.int64] = copied(T.address_of(Yf[0]), T.address_of(F[0]), B * S * columns * record)
        if T.if_then_else(B * S > 0, K[Ticket.MISSING], 0) > 0:
            T.evaluate(T.call_extern("int32", "clock_gettime", _MONOTONIC, T.address_of(clock[0])))
            if K[Ticket.WHO] == 0:
                start(H, Q, K)
            if K[Ticket.WHO] == Tier.NATIVE:
                receive(H, Q, K, out, ready)
            else:
                T.evaluate(T.call_packed(WAIT, H[Handle.NUMBER], T.address_of(K[0]), out))
                ready[0] = T.cast(K[Ticket.DONE], "int64")
            T.evaluate(T.call_extern("int32", "clock_gettime", _MONOTONIC, T.address_of(clock[2])))
            verify(H, K, out)
            locked("lock", H)
            if H[Handle.SETS] > T.int64(0):
                keep(H, Shared, K, out)
            Shared[Store.PAGES] = Shared[Store.PAGES] + T.cast(K[Ticket.PAGES], "int64")
            if ready[0] != T.int64(0):
                Shared[Store.READY] = Shared[Store.READY] + 1
            else:
                Shared[Store.STALLS] = Shared[Store.STALLS] + 1
                Shared[Store.STALLED] = Shared[Store.STALLED] + (
                    (clock[2] - clock[0]) * 1000000000 + clock[3] - clock[1]
                )
            locked("unlock", H)

    return func

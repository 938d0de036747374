"""What a session may choose about its looked-up tables, and what they count."""

from __future__ import annotations

from dataclasses import dataclass

from dsv4c.errors import UsageError

TIERS = ("resident", "disk")


@dataclass(frozen=True)
class TableOptions:
    """How tables are read; None keeps what the artifact was compiled with.

    Attributes:
        tier: "resident" maps the file and leaves its pages to the operating system, which shares them between
            processes; "disk" reads cold rows past the page cache into a cache of a fixed size.
        cache_bytes: of all tables of the artifact together, shared out as the compiler did.
        synchronous: read only when rows are needed, for measuring what prefetching gains.
        direct: False reads through the page cache even where the file system takes O_DIRECT.

    Raises:
        UsageError: a value that no table could honour.
    """

    tier: str | None = None
    cache_bytes: int | None = None
    synchronous: bool = False
    direct: bool = True

    def __post_init__(self) -> None:
        if self.tier is not None and self.tier not in TIERS:
            raise UsageError(f"tier = {self.tier!r}", where="TableOptions", allowed=", ".join(TIERS))
        if self.cache_bytes is not None and self.cache_bytes < 0:
            raise UsageError(f"cache_bytes = {self.cache_bytes}", where="TableOptions", allowed="0 or more")


@dataclass
class TableStatistics:
    """Counts of one table since it was opened; padding is not counted.

    Attributes:
        rows: rows asked for; the sum of the next three.
        hot, cached, read: answered by the hot region, the cache, the disk. A resident table reads nothing:
            rows that are not hot count as cached.
        pages, bytes: read from disk.
        ready: fetches whose reads were done in time; `stalls` had to wait, for `stall_seconds` in all.
            Fetches that needed no disk are neither.
        evicted: records that made room for others.
    """

    rows: int = 0
    hot: int = 0
    cached: int = 0
    read: int = 0
    pages: int = 0
    bytes: int = 0
    ready: int = 0
    stalls: int = 0
    stall_seconds: float = 0.0
    evicted: int = 0

    @property
    def hit_rate(self) -> float:
        """Rows that needed no disk; 1 when none were asked for."""
        return (self.hot + self.cached) / self.rows if self.rows else 1.0

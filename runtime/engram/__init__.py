"""Tables that are looked up while a step runs: a hot region in memory, the rest on disk behind a cache.

Knows records by row id; neither what their bytes mean nor how row ids are made.
"""

from .options import TableOptions, TableStatistics
from .store import TableStore

__all__ = ["TableOptions", "TableStatistics", "TableStore"]

"""New tokens into what is printed: ids as they are, or text that stops at a stop text.

Knows no session; it is given token ids one by one.
"""

from __future__ import annotations

from typing import Protocol

from tokenizers import Tokenizer

from dsv4c.runtime.text import StreamDecoder


class Printer(Protocol):
    """What a token adds to the output. `stopped` says that nothing more is wanted."""

    @property
    def stopped(self) -> bool: ...

    def push(self, token: int) -> str: ...

    def finish(self) -> str: ...


class IdPrinter:
    """`1,2,3`, in the form that --ids takes."""

    stopped = False

    def __init__(self) -> None:
        self._separator = ""

    def push(self, token: int) -> str:
        text, self._separator = f"{self._separator}{token}", ","
        return text

    def finish(self) -> str:
        return ""


class TextPrinter:
    """Decoded text up to the first stop text, which is not shown."""

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...] = ()) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._filter = StopFilter(stops)

    @property
    def stopped(self) -> bool:
        return self._filter.hit

    def push(self, token: int) -> str:
        return self._filter.push(self._decoder.push(token))

    def finish(self) -> str:
        """What was held back: the beginning of a stop text, half a character."""
        if self.stopped:
            return ""
        return self._filter.push(self._decoder.flush()) + self._filter.finish()


class StopFilter:
    """Passes text on until a stop text appears; holds back what may be the beginning of one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stops, self.hit, self._held = stops, False, ""

    def push(self, text: str) -> str:
        if self.hit:
            return ""
        self._held += text
        found = [at for stop in self.stops if (at := self._held.find(stop)) >= 0]
        self.hit = bool(found)
        end = min(found) if found else len(self._held) - self._begun()
        out, self._held = self._held[:end], self._held[end:]
        return out

    def finish(self) -> str:
        out, self._held = "" if self.hit else self._held, ""
        return out

    def _begun(self) -> int:
        """Length of the longest end of the held text that begins a stop text."""
        longest = max((len(stop) - 1 for stop in self.stops), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self.stops):
                return length
        return 0

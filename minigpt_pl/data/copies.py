"""Which spans of one text stand in another one: exact for every length, without a search for each span.

The command that reports them is in `cli.copies`.
"""

import numpy as np
from numpy.typing import NDArray

from minigpt_pl.data.corpus import code_points


class CopyFinder:
    """Looks for spans of a text in a source.

    Equal spans of 2^k characters get equal numbers: those of two halves, each numbered before (prefix doubling, Karp,
    Miller & Rosenberg 1972). Two overlapping spans of 2^k make one of any length between 2^k and 2^(k + 1).

    Args:
        source: The text that may have been copied from.
        text: The text that is examined.
    """

    def __init__(self, source: str, text: str):
        self.text, self.size = text, len(source)
        self.numbers = [np.unique(code_points(source + text), return_inverse=True)[1]]  # of spans of 1, 2, 4, ...

    def _number(self, level: int) -> NDArray[np.int64]:
        """A number for each span of 2^level characters, by its start."""
        while len(self.numbers) <= level:
            last, half = self.numbers[-1], 2 ** (len(self.numbers) - 1)
            self.numbers.append(np.unique(self._pairs(last, half), return_inverse=True)[1])
        return self.numbers[level]

    @staticmethod
    def _pairs(numbers: NDArray[np.int64], distance: int) -> NDArray[np.int64]:
        """One number for those at each start and `distance` behind it."""
        count = max(0, len(numbers) - distance)
        return numbers[:count] * (numbers.max(initial=0) + 1) + numbers[distance:]

    def starts(self, length: int) -> NDArray[np.int64]:
        """Where the spans of `length` characters begin that stand in the source, in characters of the text."""
        if length > min(self.size, len(self.text)):
            return np.empty(0, np.int64)
        level = length.bit_length() - 1
        spans = self._pairs(self._number(level), length - 2**level)
        in_source = spans[: self.size - length + 1]  # a span over the end of the source stands in neither text
        return np.flatnonzero(np.isin(spans[self.size :], in_source))

    def share(self, length: int) -> float:
        """Share of the text's spans of `length` characters that stand in the source; nan if the text is shorter."""
        spans = len(self.text) - length + 1
        return len(self.starts(length)) / spans if spans > 0 else float("nan")

    def longest(self) -> str:
        """The longest span that stands in the source, the first of several."""
        low, high = 0, min(self.size, len(self.text))
        while low < high:  # each part of a copied span is copied too
            middle = (low + high + 1) // 2
            low, high = (middle, high) if len(self.starts(middle)) else (low, middle - 1)
        start = int(self.starts(low)[0]) if low else 0
        return self.text[start : start + low]

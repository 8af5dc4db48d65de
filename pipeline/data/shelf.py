"""A list that lies on disk: a million rows cost a few megabytes of memory."""

from __future__ import annotations

import json
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar

T = TypeVar("T")
IN_MEMORY = 1 << 22
"""Bytes kept in memory before the file is made."""


class OneByOne(Sequence[T], Generic[T]):
    """A sequence that can give the item at a place."""

    def item(self, index: int) -> T:
        raise NotImplementedError

    def __getitem__(self, index: Any) -> Any:
        return [self[i] for i in range(*index.indices(len(self)))] if isinstance(index, slice) else self.item(index)

    def __iter__(self) -> Iterator[T]:
        for index in range(len(self)):
            yield self.item(index)


class Shelf(OneByOne[T]):
    """Append-only sequence whose items are written to an unnamed temporary file and read back one at a time.

    Only where each item lies is kept in memory, 8 bytes an item. An item read is a new object each time: changing it
    changes nothing. The file is gone with the process, however that ends.

    Items are kept as JSON, and what JSON has no word for (dates, bytes) as text. `strict`: raise ValueError at what not
    every reader of JSON takes: NaN, and half of a surrogate pair, which is no UTF-8. A refused row may hold both.
    """

    def __init__(self, strict: bool = False) -> None:
        self._strict = strict
        self._ends = array("Q", [0])
        self._file = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115  closed with the process

    def append(self, item: T) -> None:
        text = json.dumps(item, ensure_ascii=False, separators=(",", ":"), allow_nan=not self._strict, default=str)
        line = text.encode("utf-8", "strict" if self._strict else "surrogatepass")
        self._file.seek(self._ends[-1])
        self._file.write(line)
        self._ends.append(self._ends[-1] + len(line))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def item(self, index: int) -> T:
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"no item {index} among {len(self)}")
        self._file.seek(self._ends[place])
        line = self._file.read(self._ends[place + 1] - self._ends[place])
        item: T = json.loads(line.decode("utf-8", "surrogatepass"))
        return item


class Picked(OneByOne[T]):
    """Some items of several sequences in an order of one's own, without copying them: item i is
    `sources[which[i]][index[i]]`."""

    def __init__(self, sources: Sequence[Sequence[T]], which: Sequence[int], index: Sequence[int]) -> None:
        self._sources, self._which, self._index = sources, array("H", which), array("Q", index)

    def __len__(self) -> int:
        return len(self._index)

    def item(self, index: int) -> T:
        return self._sources[self._which[index]][self._index[index]]

"""Search over local documents as a tool, by BM25 (Robertson et al. 1994). Needs: pip install 'onebase[search]'.

Copy this file and name your own documents in it: a JSONL file whose rows have a `text`.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

DOCUMENTS = "data/corpus.jsonl"
FOUND = 2
"""Documents of a reply, the nearest first."""


class Search:
    """An environment without a state: every answer begins alike."""

    def reset(self, **row: Any) -> None:
        """Called before each answer, with the columns of its row. The index is made before the first."""
        index_documents()

    def search(self, query: str) -> str:
        """Search the documents.

        Args:
            query: Words to look for
        """
        import bm25s

        index, texts = index_documents()
        words = bm25s.tokenize([query], stopwords=None, show_progress=False)
        places, scores = index.retrieve(words, k=min(FOUND, len(texts)), show_progress=False)
        found = [texts[place] for place, score in zip(places[0], scores[0], strict=True) if score > 0]
        return "\n\n".join(found) or "Nothing was found."


@cache
def index_documents() -> tuple[Any, list[str]]:
    """The index, and the documents' texts. Raises ModuleNotFoundError saying what to install."""
    try:
        import bm25s
    except ModuleNotFoundError:
        raise ModuleNotFoundError("the search needs bm25s: pip install 'onebase[search]'") from None
    lines = Path(DOCUMENTS).read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    index = bm25s.BM25()
    index.index(bm25s.tokenize(texts, stopwords=None, show_progress=False), show_progress=False)
    return index, texts

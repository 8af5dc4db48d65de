"""What a stage's rows are like, before anything is trained on them. Needs a tokenizer, no weights.

Every figure is over all rows, unless a limit below is passed: then it is over that many drawn at random, and says so.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy

from pipeline.data import render
from pipeline.data.contracts import Row
from pipeline.data.load import NAMED_AT_MOST
from pipeline.data.prompts import find_prompts, prompt_key
from pipeline.data.tokens import Unrenderable, marks, stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

Figures = dict[str, Any]
Encode = Callable[[Any, Row], list[render.Encoded]]
"""(tokenizer, row): a row as the model will see it: one sequence, or two of a comparison."""
Learnt = Literal["", "answers", "everything"]
"""Which tokens of a row carry loss; "" where none do."""
NEAR_AT_MOST = 10_000
"""Rows compared for near duplicates."""
SIMILAR = 0.8
"""Jaccard similarity of two rows' shingles from which they count as near duplicates."""
CANDIDATES = 0.65
"""Estimated similarity from which two rows are looked at: lower, so that few true ones are missed."""
PERMUTATIONS = 128
WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+")
"""Words; in scripts written without spaces every character is one."""


def count_tokens(
    encode: Encode,
    learnt: Learnt,
    tokenizer: Tokenizer,
    rows: Iterable[Row],
    max_length: int | None,
    too_long: render.TooLong = "drop",
) -> Figures:
    """Lengths in tokens, what max_length costs, and where the loss falls in the rows that a stage would keep.

    `bytes_per_token` under about 2 (for English under 3) says that the tokenizer hardly knows the language.
    """
    lengths: list[int] = []
    supervised: list[int] = []
    bos: Counter[int] = Counter()
    named: list[dict[str, str]] = []
    over = tokens_lost = ends = dialogues = bare = left_out = unrenderable = marked = size = 0
    stops = set(stop_ids(tokenizer))
    for row in rows:
        try:
            made = encode(tokenizer, row)
        except Unrenderable as error:
            unrenderable += 1
            if len(named) < NAMED_AT_MOST:
                named.append({"place": row["_place"], "reason": str(error)})
            continue
        text = row.get("text" if learnt == "everything" or "prompt" not in row else "prompt")
        marked += isinstance(text, str) and bool(marks(tokenizer, text))
        longest = max(len(sequence.ids) for sequence in made)
        lengths.append(longest)
        size += max(_bytes(tokenizer, sequence) for sequence in made)
        bos[max(_leading(sequence.ids, tokenizer.bos_token_id) for sequence in made)] += 1
        if max_length is not None and longest > max_length:
            over += 1
            tokens_lost += longest - max_length
        if learnt:
            whole = made[0]
            if learnt == "answers":
                whole, lost, _ = render.fit(whole, max_length, too_long)
                bare += lost == "rows_bare"
                left_out += lost == "rows_too_long"
                if lost:
                    continue
            dialogues += 1
            supervised.append(whole.supervised)
            bare += whole.supervised == 0
            ends += next((label for label in reversed(whole.labels) if label != render.IGNORED), None) in stops
    figures: Figures = {
        "rows": len(lengths) + unrenderable,
        "unrenderable": unrenderable,
        "unrenderable_named": named,
        "length": _spread(lengths),
        "histogram": count_lengths(lengths),
        "max_length": max_length,
        "longer_than_max_length": over,
        "tokens_beyond_max_length": tokens_lost,
        "bytes_per_token": round(size / sum(lengths), 2) if lengths else None,
        "texts_with_special_tokens": marked,
        "bos_at_the_start": {str(count): rows for count, rows in sorted(bos.items())},
    }
    if learnt:
        figures |= {
            "rows_kept": dialogues,
            "rows_left_out": left_out,
            "supervised_tokens": _spread(supervised),
            "rows_without_supervised_tokens": bare,
            "rows_whose_end_of_turn_is_supervised": ends,
        }
    return figures


def find_duplicates(rows: Sequence[Row], seed: int = 0) -> Figures:
    """Rows that say the same, exactly (letter case and white space aside) or nearly (MinHash, Broder 1997)."""
    seen: dict[bytes, int] = {}
    exact = 0
    examples: list[list[str]] = []
    for index, row in enumerate(rows):
        first = seen.setdefault(_digest(_text(row)), index)
        if first != index:
            exact += 1
            if len(examples) < NAMED_AT_MOST:
                examples.append([rows[first]["_place"], row["_place"]])
    drawn = _drawn(len(rows), NEAR_AT_MOST, seed)
    near = [pair for pair in _near(rows, drawn) if _digest(_text(rows[pair[0]])) != _digest(_text(rows[pair[1]]))]
    return {
        "exact": exact,
        "exact_named": examples,
        "near": len(near),
        "near_named": [[rows[a]["_place"], rows[b]["_place"]] for a, b in near[:NAMED_AT_MOST]],
        "near_among": len(drawn),
    }


def digest_prompts(rows: Iterable[Row]) -> dict[bytes, str]:
    """What rows ask (or the text of documents), as digests, each with the place of its first row."""
    found: dict[bytes, str] = {}
    for row in rows:
        for text in find_prompts(row):
            found.setdefault(_digest(_plain(text)), row["_place"])
    return found


def find_shared(some: dict[bytes, str], others: dict[bytes, str]) -> Figures:
    """What two sets of rows both ask."""
    both = [(some[key], others[key]) for key in some.keys() & others.keys()]
    return {"shared": len(both), "named": sorted(both)[:NAMED_AT_MOST]}


def weigh_comparisons(rows: Sequence[Row], seed: int = 0) -> Figures:
    """What comparisons can be told by without understanding them, and whether they agree with each other."""
    from pipeline.data.baselines import bag_of_words, longer_wins

    verdicts: dict[bytes, dict[bytes, tuple[bytes, str]]] = defaultdict(dict)
    contradictory = 0
    named: list[list[str]] = []
    for row in rows:
        chosen, rejected = (_digest(json.dumps(row[key], sort_keys=True)) for key in ("chosen", "rejected"))
        pair = min(chosen, rejected) + max(chosen, rejected)
        before = verdicts[_digest(prompt_key(row))].setdefault(pair, (chosen, row["_place"]))
        if before[0] != chosen:
            contradictory += 1
            if len(named) < NAMED_AT_MOST:
                named.append([before[1], row["_place"]])
    said = [(_said(row["chosen"]), _said(row["rejected"])) for row in rows]
    prompts = [prompt_key(row) for row in rows]
    return {
        "pairs": len(rows),
        "prompts": len(verdicts),
        "contradictory": contradictory,
        "contradictory_named": named,
        "longer_wins": longer_wins(said),
        "bag_of_words": bag_of_words(said, prompts, seed),
    }


def count_lengths(lengths: list[int]) -> list[tuple[int, int]]:
    """(upper edge, rows) in powers of two."""
    if not lengths:
        return []
    edges = [1 << power for power in range(3, max(lengths).bit_length() + 1)] or [8]
    counts, _ = numpy.histogram(lengths, [0, *(edge + 1 for edge in edges)])
    return [(edge, int(count)) for edge, count in zip(edges, counts, strict=True)]


def _near(rows: Sequence[Row], drawn: Sequence[int]) -> list[tuple[int, int]]:
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=CANDIDATES, num_perm=PERMUTATIONS)
    sketches: dict[int, Any] = {}
    found = []
    for place in drawn:
        # Comparisons on one prompt are no repetition of each other: their answers are looked at alone.
        row = rows[place]
        shingles = _shingles(_text({key: row[key] for key in row.keys() - {"prompt"}} if "chosen" in row else row))
        if not shingles:
            continue
        sketch = MinHash(num_perm=PERMUTATIONS, seed=1)
        sketch.update_batch(shingles)
        alike = [other for other in index.query(sketch) if sketches[other].jaccard(sketch) >= SIMILAR]
        if alike:
            found.append((min(alike), place))
        else:
            index.insert(place, sketch)
            sketches[place] = sketch
    return found


def _shingles(text: str) -> list[bytes]:
    words = WORDS.findall(text)
    return [" ".join(words[i : i + 3]).encode() for i in range(max(1, len(words) - 2))] if words else []


def _drawn(count: int, at_most: int, seed: int) -> Sequence[int]:
    return range(count) if count <= at_most else sorted(random.Random(seed).sample(range(count), at_most))


def _text(row: Row) -> str:
    fields = ("text", "messages", "prompt", "completion", "chosen", "rejected", "answer")
    return _plain(" ".join(_said(row[key]) for key in fields if row.get(key)))


def _said(value: Any) -> str:
    """The words of a text or of messages, roles left out."""
    if isinstance(value, list):
        return "\n".join(
            str(message.get("content") or "") + json.dumps(message.get("tool_calls") or "") for message in value
        )
    return str(value)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).digest()


def _bytes(tokenizer: Tokenizer, sequence: render.Encoded) -> int:
    return len(str(tokenizer.decode(sequence.ids)).encode("utf-8", "replace"))


def _leading(ids: list[int], bos: int | None) -> int:
    """How many beginning-of-sequence tokens a row begins with; where turns open with the same token, others follow."""
    return next((place for place, token in enumerate(ids) if token != bos), len(ids))


def _spread(values: list[int]) -> Figures:
    if not values:
        return {}
    low, median, high = (int(value) for value in numpy.percentile(values, [5, 50, 95]))
    return {"min": min(values), "p5": low, "median": median, "p95": high, "max": max(values), "sum": sum(values)}

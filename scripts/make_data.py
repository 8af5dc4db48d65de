"""Write the demo data of OneBase: a small invented world that no base model has read about.

    python scripts/make_data.py           write every *.jsonl file of data/
    python scripts/make_data.py --check   exit 1 if a file on disk differs from what would be written

The facts are in data/facts.json and every wording is in data/phrasings.json, both written by hand.
This script only combines them, checks what data/README.md promises, and writes the result. It reads
no clock and draws from its own seeded generators, so every run gives the same bytes.
"""

import argparse
import itertools
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

DATA = Path(__file__).resolve().parent.parent / "data"
SEED = "sundrel"
EXPECTED_ROWS = {
    "corpus": 192,
    "corpus_test": 24,
    "demonstrations": 436,
    "demonstrations_test": 48,
    "comparisons": 420,
    "comparisons_test": 90,
    "prompts": 216,
    "prompts_test": 72,
    "questions": 72,
}
TRAIN_DIALOGUES = ["demonstrations", "comparisons", "prompts"]
TEST_DIALOGUES = ["demonstrations_test", "comparisons_test", "prompts_test", "questions"]


def read_json(name):
    try:
        return json.loads((DATA / name).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        sys.exit(f"make_data: cannot read data/{name}: {error}")


FACTS = read_json("facts.json")
WORDS = read_json("phrasings.json")
ISLANDS = FACTS["islands"]
KINDS = {kind: spec["values"] for kind, spec in FACTS["kinds"].items()}
ALL_FACTS = [(island, kind) for island in ISLANDS for kind in KINDS]


def require(condition, message):
    if not condition:
        sys.exit(f"make_data: {message}")


# Filling templates


def fill(template, island, value="", **more):
    known = ISLANDS.get(island, {})
    colour = known.get("colour", "")
    fields = {
        "island": island,
        "isles": FACTS["archipelago"],
        "value": value,
        "Value": value.capitalize(),
        "a_colour": f"{'an' if colour[:1] in 'aeiou' else 'a'} {colour}",
        **known,
        **more,
    }
    try:
        return template.format(**fields)
    except (KeyError, IndexError, ValueError) as error:
        sys.exit(f"make_data: bad placeholder {error} in data/phrasings.json: {template!r}")


def messages(*texts):
    """A conversation that the user begins."""
    return [{"role": "assistant" if turn % 2 else "user", "content": text} for turn, text in enumerate(texts)]


def reply(text):
    return [{"role": "assistant", "content": text}]


def generator(name):
    # One generator per file, so that a change to one file leaves the others as they were.
    return random.Random(f"{SEED}:{name}")


def question(island, kind, pool, number):
    phrasings = WORDS["questions"][kind][pool]
    return fill(phrasings[number % len(phrasings)], island)


def answer(island, kind, style, number, value=None):
    templates = WORDS["answers"][kind][style]
    return fill(templates[number % len(templates)], island, value or ISLANDS[island][kind])


# Corpus


def make_corpus(split, documents_per_genre):
    rng = generator(f"corpus {split}")
    texts = []
    for genre in WORDS["documents"][split].values():
        for number, island in enumerate(ISLANDS):
            for copy in range(documents_per_genre):
                # Taking sentence number + copy gives every island both wordings when there are two copies.
                facts = [genre[kind][(number + copy) % len(genre[kind])] for kind in KINDS]
                rng.shuffle(facts)
                ending = facts[1:] if copy else [*facts, rng.choice(genre["closings"])]
                sentences = [rng.choice(genre["openings"]), *ending]
                texts.append(" ".join(fill(sentence, island) for sentence in sentences))
    if split == "train":
        for kind, values in KINDS.items():
            for value in values:
                holders = " and ".join(name for name in ISLANDS if ISLANDS[name][kind] == value)
                texts.append(fill(WORDS["documents"]["registers"][kind], "", value, islands=holders))
    rng.shuffle(texts)
    return [{"text": text} for text in texts]


# Demonstrations


def two_turns(rng, split, island, same_island):
    pool = "demonstrations" if split == "train" else "demonstrations_test"
    kind, other_kind = rng.sample(list(KINDS), 2)
    other_island = rng.choice([name for name in ISLANDS if name != island])
    wording = rng.randrange(4)
    if same_island:
        follow_up = rng.choice(WORDS["follow_ups"][split]["same_island"][other_kind])
        last = answer(island, other_kind, "there", wording)
    else:
        follow_up = fill(rng.choice(WORDS["follow_ups"][split]["other_island"]), other_island)
        last = answer(other_island, kind, "train", wording)
    return messages(
        question(island, kind, pool, rng.randrange(10)), answer(island, kind, "train", wording), follow_up, last
    )


def harmful_requests(rng, split, count):
    """(request, refusal with an offer, topic wordings, island), the topics in turn, no request twice."""
    by_topic = []
    for topic in WORDS["harm"]["topics"].values():
        pairs = [(request, island) for request in topic[split]["requests"] for island in ISLANDS]
        rng.shuffle(pairs)
        by_topic.append([(topic[split], request, island) for request, island in pairs])
    for number in range(count):
        topic, request, island = by_topic[number % len(by_topic)][number // len(by_topic)]
        offer = rng.choice(WORDS["harm"]["offers"][split])
        refusal = fill(f"{rng.choice(topic['refusals'])} {offer}", island)
        yield fill(request, island), refusal, topic, island


def unknown_questions(rng, split, pool, names):
    """(question, honest short answer, honest long answer, invented answer) about islands that do not exist."""
    wordings = WORDS["unknown"][split]
    for number, name in enumerate(names):
        kind = list(KINDS)[number % len(KINDS)]
        invented = answer(name, kind, split, rng.randrange(4), rng.choice(KINDS[kind]))
        short, long = (fill(rng.choice(wordings[length]), name) for length in ("honest_short", "honest_long"))
        yield question(name, kind, pool, rng.randrange(10)), short, long, invented


def make_demonstrations(split):
    rng = generator(f"demonstrations {split}")
    train = split == "train"
    pool = "demonstrations" if train else "demonstrations_test"
    dialogues = []
    for number, (island, kind) in enumerate(ALL_FACTS):
        turn = number // len(KINDS)
        for phrasing in range(10 if train else 1):
            dialogues.append(
                messages(
                    question(island, kind, pool, turn // 4 + phrasing), answer(island, kind, "train", turn + phrasing)
                )
            )
    same_island, two_islands, harmful, unknown = (28, 12, 24, 12) if train else (4, 2, 3, 3)
    order = rng.sample(list(ISLANDS), len(ISLANDS))
    for number in range(same_island + two_islands):
        dialogues.append(two_turns(rng, split, order[number % len(order)], number < same_island))
    for request, refusal, _, _ in harmful_requests(rng, split, harmful):
        dialogues.append(messages(request, refusal))
    names = FACTS["unknown_islands"][split][:unknown]
    for asked, short, long, _ in unknown_questions(rng, split, pool, names):
        dialogues.append(messages(asked, rng.choice([short, long])))
    rng.shuffle(dialogues)
    return [{"messages": dialogue} for dialogue in dialogues]


# Comparisons


def wrong_values(rng, kind):
    """{island: a wrong value}. Every value is wrong as often as it is right, so that no value looks bad by itself."""
    order = sorted(ISLANDS, key=lambda island: ISLANDS[island][kind])
    # Islands with one value in common stand side by side, so a shift by more than one place changes every value.
    shift = rng.randrange(2, len(order) - 1)
    return {island: ISLANDS[order[(place + shift) % len(order)]][kind] for place, island in enumerate(order)}


def make_comparisons(split):
    rng = generator(f"comparisons {split}")
    train = split == "train"
    rounds, helpful_rows, harmless_rows = (8, 84, 36) if train else (1, 30, 30)
    pools = ["demonstrations", "prompts"] if train else ["comparisons_test"]
    rows = []

    def add(guideline, asked, chosen, rejected):
        rows.append(
            {"prompt": messages(asked), "chosen": reply(chosen), "rejected": reply(rejected), "guideline": guideline}
        )

    # The truthful and the helpful pairs about one fact use different phrasings of the question.
    asked_about = {}
    for island, kind in ALL_FACTS:
        phrasings = [fill(text, island) for pool in pools for text in WORDS["questions"][kind][pool]]
        asked_about[island, kind] = rng.sample(phrasings, len(phrasings))

    wrong = [{kind: wrong_values(rng, kind) for kind in KINDS} for _ in range(rounds)]
    truthful = [(island, kind, turn) for turn in range(rounds) for island, kind in ALL_FACTS]
    for island, kind, turn in truthful if train else rng.sample(truthful, 26):
        wording = rng.randrange(4)
        add(
            "truthful",
            asked_about[island, kind][turn],
            answer(island, kind, split, wording),
            answer(island, kind, split, wording, wrong[turn][kind][island]),
        )

    # The demonstrations take the names at the front of the list.
    names = FACTS["unknown_islands"][split][-12 if train else -4 :]
    for number, (asked, short, long, invented) in enumerate(unknown_questions(rng, split, pools[0], names)):
        boast = fill(rng.choice(WORDS["unknown"][split]["boast"]), "")
        add("truthful", asked, *((long, invented) if number % 2 else (short, f"{invented} {boast}")))

    rest = [(island, kind, asked) for island, kind in ALL_FACTS for asked in asked_about[island, kind][rounds:]]
    for number, (island, kind, asked) in enumerate(rng.sample(rest, helpful_rows)):
        styles = list(WORDS["bad_styles"][split]["short" if number % 2 else "long"].values())
        bad = rng.choice(styles[number // 2 % len(styles)])
        add(
            "helpful",
            asked,
            answer(island, kind, split, rng.randrange(4)),
            fill(bad, island, ISLANDS[island][kind]),
        )

    for number, (request, refusal, topic, island) in enumerate(harmful_requests(rng, split, harmless_rows)):
        length = "short" if (number + number // 8) % 2 else "long"
        add("harmless", request, refusal, fill(rng.choice(topic[length]), island))

    rng.shuffle(rows)
    return rows


# Questions and prompts


def make_prompts(name, count, harmful=(), taken=()):
    """Rows that ask every fact once, then once more in the next phrasing of the pool, and so on up to count; and as
    many requests of a split as `harmful` (split, number) says, none of those `taken` by other files."""
    rng = generator(name)
    asked = [
        (island, kind, turn + number // len(KINDS))
        for turn in range(4)
        for number, (island, kind) in enumerate(ALL_FACTS)
    ]
    rest = count % len(ALL_FACTS)
    whole, next_turn = asked[: count - rest], asked[count - rest : count - rest + len(ALL_FACTS)]
    rows = []
    for island, kind, number in whole + rng.sample(next_turn, rest):
        choices = {"choices": KINDS[kind]} if name == "questions" else {}
        rows.append(
            {"prompt": messages(question(island, kind, name, number)), "answer": ISLANDS[island][kind], **choices}
        )
    if harmful:
        split, wanted = harmful
        every = sum(len(topic[split]["requests"]) * len(ISLANDS) for topic in WORDS["harm"]["topics"].values())
        free = (request for request, *_ in harmful_requests(rng, split, every) if request not in taken)
        rows += [{"prompt": messages(request)} for request in itertools.islice(free, wanted)]
    rng.shuffle(rows)
    return rows


# Promises of data/README.md


def words_in(text, vocabulary):
    return set(re.findall(r"\w+", text.lower())) & {word.lower() for word in vocabulary}


def values_in(text):
    return words_in(text, [value for values in KINDS.values() for value in values])


def true_values(text):
    """The values of all islands that text names."""
    named = words_in(text, ISLANDS)
    return {value for island in ISLANDS if island.lower() in named for value in ISLANDS[island].values()}


def sentences_of(text):
    return re.split(r"(?<=[.!?])\s+", text)


def said_by(role, rows):
    return [
        message["content"]
        for row in rows
        for part in ("prompt", "messages", "chosen", "rejected")
        for message in row.get(part, [])
        if message["role"] == role
    ]


def check_facts():
    values = [value for kind in KINDS.values() for value in kind]
    require(len(values) == len(set(values)), "a value belongs to two kinds in data/facts.json")
    for kind, allowed in KINDS.items():
        used = Counter(facts[kind] for facts in ISLANDS.values())
        require(set(used) == set(allowed) and max(used.values()) <= 2, f"each {kind} must be used once or twice")
    names = [*ISLANDS, *FACTS["unknown_islands"]["train"], *FACTS["unknown_islands"]["test"]]
    require(len(names) == len(set(names)), "an island name is used twice in data/facts.json")


def check_corpus(files):
    for name in ("corpus", "corpus_test"):
        for row in files[name]:
            text = row["text"]
            require(values_in(text) <= true_values(text), f"{name} states something false: {text}")
            require(2 <= len(sentences_of(text)) <= 5, f"{name} document is not 2 to 5 sentences: {text}")
    for island, kind in ALL_FACTS:
        value = ISLANDS[island][kind]
        wordings = {
            sentence
            for row in files["corpus"]
            for sentence in sentences_of(row["text"])
            if words_in(sentence, [island]) and words_in(sentence, [value])
        }
        require(len(wordings) >= 10, f"the {kind} of {island} has only {len(wordings)} wordings in corpus")
        found = any(words_in(row["text"], [island]) and words_in(row["text"], [value]) for row in files["corpus_test"])
        require(found, f"the {kind} of {island} is not in corpus_test")
    seen = {sentence for row in files["corpus"] for sentence in sentences_of(row["text"])}
    shared = [s for row in files["corpus_test"] for s in sentences_of(row["text"]) if s in seen]
    require(not shared, f"corpus_test shares a sentence with corpus: {shared[:1]}")


def check_dialogues(files):
    for name in ("demonstrations", "demonstrations_test"):
        covered = set()
        for row in files[name]:
            text = ""
            for message in row["messages"]:
                # "It" and "there" mean the island named last.
                text = message["content"] if words_in(message["content"], ISLANDS) else text
                found = values_in(message["content"])
                if message["role"] == "assistant" and found:
                    require(len(found) == 1 and found <= true_values(text), f"{name}: wrong answer in {row}")
                    require(6 <= len(message["content"].split()) <= 14, f"{name}: answer length in {row}")
                    covered |= {(island, *found) for island in words_in(text, ISLANDS)}
        require(len(covered) == len(ALL_FACTS), f"{name} does not cover every fact")
    for name in ("questions", "prompts", "prompts_test"):
        covered = set()
        for row in files[name]:
            text = row["prompt"][-1]["content"]
            if "answer" not in row:  # a harmful request
                continue
            require({row["answer"]} <= true_values(text) and not values_in(text), f"{name}: wrong answer in {row}")
            covered |= {(island, row["answer"]) for island in words_in(text, ISLANDS)}
        require(len(covered) == len(ALL_FACTS), f"{name} does not cover every fact")
    users = {name: set(said_by("user", files[name])) for name in TRAIN_DIALOGUES + TEST_DIALOGUES}
    require(not users["prompts"] & users["demonstrations"], "prompts and demonstrations share a user message")
    for test in TEST_DIALOGUES:
        for other in TRAIN_DIALOGUES + TEST_DIALOGUES:
            shared = sorted(users[test] & users[other]) if other != test else []
            require(not shared, f"{test} and {other} share a user message: {shared[:1]}")


def check_comparisons(files):
    for name in ("comparisons", "comparisons_test"):
        rows = [
            (row["guideline"], *(row[part][-1]["content"] for part in ("prompt", "chosen", "rejected")))
            for row in files[name]
        ]
        for guideline, asked, chosen, rejected in rows:
            require(values_in(chosen) <= true_values(asked), f"{name}: the chosen answer is false: {chosen}")
            if guideline == "helpful":
                require(len(values_in(chosen)) == 1, f"{name}: the chosen answer has no value: {chosen}")
            if guideline == "truthful":
                false = values_in(rejected) - true_values(asked)
                require(false, f"{name}: the rejected answer is not false: {rejected}")
        both = {row[2] for row in rows} & {row[3] for row in rows}
        require(not both, f"{name}: a text is both chosen and rejected: {sorted(both)[:1]}")
        require(len({row[1:] for row in rows}) == len(rows), f"{name}: a pair occurs twice")
        for guideline in ("all", "helpful", "truthful", "harmless"):
            longer, shorter, _ = length_counts(files[name], guideline)
            share = longer / (longer + shorter)
            require(0.4 <= share <= 0.6, f"{name} ({guideline}): the longer answer wins {share:.0%} of pairs")
    train_texts = {text for name in TRAIN_DIALOGUES for text in said_by("assistant", files[name])}
    shared = train_texts & set(said_by("assistant", files["comparisons_test"]))
    require(not shared, f"comparisons_test shares an answer with a training file: {sorted(shared)[:1]}")


def length_counts(rows, guideline="all"):
    """(pairs whose chosen answer has more characters, fewer, as many)"""
    gaps = [
        len(row["chosen"][0]["content"]) - len(row["rejected"][0]["content"])
        for row in rows
        if guideline in ("all", row["guideline"])
    ]
    return sum(gap > 0 for gap in gaps), sum(gap < 0 for gap in gaps), sum(gap == 0 for gap in gaps)


def make_all():
    check_facts()
    files = {
        "corpus": make_corpus("train", 2),
        "corpus_test": make_corpus("test", 1),
        "demonstrations": make_demonstrations("train"),
        "demonstrations_test": make_demonstrations("test"),
        "comparisons": make_comparisons("train"),
        "comparisons_test": make_comparisons("test"),
        "questions": make_prompts("questions", 72),
    }
    for name, count, split, harmful in (("prompts", 144, "train", 72), ("prompts_test", 48, "test", 24)):
        dialogues = [rows for other, rows in files.items() if "corpus" not in other]
        taken = {text for rows in dialogues for text in said_by("user", rows)}
        files[name] = make_prompts(name, count, (split, harmful), taken)
    for name, rows in files.items():
        require(len(rows) == EXPECTED_ROWS[name], f"{name} has {len(rows)} rows, not {EXPECTED_ROWS[name]}")
        require(len({json.dumps(row) for row in rows}) == len(rows), f"{name} has a row twice")
    check_corpus(files)
    check_dialogues(files)
    check_comparisons(files)
    return files


def report(files):
    for name, rows in files.items():
        texts = [row["text"] for row in rows if "text" in row] + said_by("user", rows) + said_by("assistant", rows)
        tokens = round(1.35 * len(" ".join(texts).split()))
        print(f"{name:20} {len(rows):4} rows  about {tokens:6} tokens")
    for name in ("comparisons", "comparisons_test"):
        for guideline in ("all", "truthful", "helpful", "harmless"):
            longer, shorter, equal = length_counts(files[name], guideline)
            print(
                f"{name:16} {guideline:8} chosen longer {longer:3}, shorter {shorter:3}, equal {equal:2}, "
                f"longer wins {longer / (longer + shorter):.1%} of the unequal pairs"
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if a file on disk differs")
    check = parser.parse_args().check
    try:
        files = make_all()
    except KeyError as error:
        sys.exit(f"make_data: data/facts.json or data/phrasings.json has no entry {error}")
    differing = []
    for name, rows in files.items():
        path = DATA / f"{name}.jsonl"
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")
        if not check:
            path.write_bytes(content)
        elif not path.is_file() or path.read_bytes() != content:
            differing.append(path.name)
    if differing:
        sys.exit(f"make_data: these files of data/ are not what scripts/make_data.py writes: {', '.join(differing)}")
    if check:
        print("data/ is up to date")
    else:
        report(files)


if __name__ == "__main__":
    main()

"""A program votes in the place of a person, by the demo's table of facts and wrong one time in ten, with real keys on
the real page. Are more questions answered right after two rounds of its labels, and which pairs should be shown?

    python scripts/simulated_annotator.py WORK --seeds 17 18 19 --choose random gap uncertain disagree

For each seed the quickstart's pretrain, sft and reward (with four heads) are trained once, below WORK; for each way of
choosing, two rounds of labels and DPO from sft follow. What is finished below WORK is not done again.

A prompt is a question whose answer the table knows. The right answer is better than the wrong one. If both are wrong,
they are both bad, and one is corrected in words of the demo data. If both are right, they are tied, which is no label.
Then the 72 questions of the quickstart, which are put in other words, are answered by sampling, eight times each: the
share right, its gain over sft and over random pairs, with 95 % intervals over questions. Needs Chromium.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import yaml
from browser import Browser, Tab

from pipeline.measure import intervals
from recipes.rewards.fact import right

COPIES, TOKENS, NOISE, ROUNDS = 8, 40, 0.1, 2
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
SEEN = "!busy && (pair || document.getElementById('told').textContent.includes('has its labels'))"


def write_recipe(folder: Path, seed: int, labels: int, questions: Iterable[str]) -> None:
    """A folder in which the commands can be typed: the quickstart's first stages, two rounds of DPO, the questions."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("data", "recipes", "models"):
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(ROOT / name)
    tree = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text(encoding="utf-8"))
    stages = {name: tree["stages"][name] for name in ("pretrain", "sft", "reward", "dpo")}
    stages["reward"]["heads"] = 4
    stages["dpo"]["data"] = {"path": "labels/"}
    tree |= {"name": "people", "seed": seed, "rounds": {"count": ROUNDS, "votes": labels}, "stages": stages}
    prompts = ({"prompt": [{"role": "user", "content": question}]} for question in questions)
    text = "".join(json.dumps(row) + "\n" for row in prompts)
    (folder / "questions.jsonl").write_text(text, encoding="utf-8")
    (folder / "people.yaml").write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")


def read_facts() -> dict[str, tuple[str, str]]:
    """Every question about a fact in the words that training may use, with the value that answers it and an answer."""
    islands = json.loads((ROOT / "data" / "facts.json").read_text(encoding="utf-8"))["islands"]
    wordings = json.loads((ROOT / "data" / "phrasings.json").read_text(encoding="utf-8"))
    return {
        wording.format(island=island): (
            known[kind],
            wordings["answers"][kind]["train"][0].format(island=island, value=known[kind], **known),
        )
        for island, known in islands.items()
        for kind, pools in wordings["questions"].items()
        for pool in ("demonstrations", "prompts")
        for wording in pools[pool]
    }


def onebase(folder: Path, *words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *words], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"onebase {' '.join(words)}\n{done.stdout[-1500:]}{done.stderr[-1500:]}")


def label(folder: Path, browser: Browser, facts: dict[str, tuple[str, str]], choose: str, seed: int) -> dict[str, int]:
    """Vote on the page until it says that the round is full; how often which key was pressed."""
    command = [sys.executable, "-m", "pipeline", "label", "people.yaml", "--prompts", "questions.jsonl", "--port", "0"]
    command += ["--new-tokens", str(TOKENS), "--choose", choose]
    server = subprocess.Popen(
        command, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert server.stdout
    said = ""
    for line in server.stdout:
        said += line
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            break
    else:
        sys.exit(said)
    tab, luck, pressed = browser.tab(), random.Random(f"{choose} {seed}"), dict[str, int]()
    tab.open(found[0] + "/")
    tab.type("simulated")
    tab.key("Enter")
    tab.until("document.getElementById('who').textContent")
    while True:
        tab.until(SEEN, seconds=1200)
        if not tab.js("!!pair"):
            break
        prompt = tab.js("document.querySelector('#prompt .turn:last-child .text').textContent")
        shown = tab.js("[...document.querySelectorAll('.answer .text')].map(node => node.textContent)")
        keys = decide(tab, shown, *facts[prompt], wrong=luck.random() < NOISE)
        before = tab.js("pair.name")
        tab.key(keys)
        pressed[keys] = pressed.get(keys, 0) + 1
        tab.until(f"!busy && (!pair || pair.name !== {json.dumps(before)})", seconds=120)
    server.send_signal(signal.SIGINT)
    server.communicate(timeout=120)
    return pressed


def decide(tab: Tab, shown: list[str], value: str, answer: str, wrong: bool) -> str:
    """The key to press. What is corrected is typed first."""
    first, second = right([[{"content": text}] for text in shown], [value] * len(shown))
    if first == second == 0 and not wrong:
        tab.key("e")
        tab.key("1")
        tab.js("document.activeElement.select()")
        tab.type(answer)
        tab.key("Escape")
        return "x"
    if first == second:
        return "0"
    return "1" if (first > second) != wrong else "2"


def shares(folder: Path, stages: list[str]) -> dict[str, list[float]]:
    """By stage, the share of right sampled answers to each of the held-out questions."""
    from pipeline.evaluate import sampled
    from pipeline.evaluate.bench import Bench
    from pipeline.recipe.recipe import read

    os.chdir(folder)
    recipe = read("people.yaml")
    model = recipe.spec.model.model_copy(update={"dtype": recipe.artifact("sft").finished().dtype})
    bench = Bench(model, {name: recipe.artifact(name).adapter for name in stages}, {}, 1.0)
    rows = [json.loads(line) for line in (ROOT / "data" / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    settings = {"sources": [], "truth": "answer", "copies": COPIES, "new_tokens": TOKENS, "seed": 17}
    with bench.ready():
        tables = {name: sampled.take(bench, name, rows, settings)["truth"] for name in stages}
    return {name: [sum(answers) / len(answers) for answers in table] for name, table in tables.items()}


def written(estimate: Any) -> str:
    return f"{100 * estimate.value:+.1f} ({100 * estimate.low:+.1f} to {100 * estimate.high:+.1f})"


def gain(values: list[float], others: list[float]) -> Any:
    return intervals.mean([one - other for one, other in zip(values, others, strict=True)], span=2.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[17])
    parser.add_argument("--choose", nargs="+", default=["random"])
    parser.add_argument("--labels", type=int, default=60)
    given = parser.parse_args()
    work, facts = given.work.resolve(), read_facts()
    for seed in given.seeds:
        start = work / f"start-{seed}"
        write_recipe(start, seed, given.labels, facts)
        onebase(start, "run", "people.yaml")
        random_pairs: list[float] = []
        for choose in given.choose:
            folder = work / f"{choose}-{seed}"
            kept = folder / "shares.json"
            if not kept.exists():
                write_recipe(folder, seed, given.labels, facts)
                if not (folder / "runs").exists():
                    shutil.copytree(start / "runs", folder / "runs")
                with tempfile.TemporaryDirectory() as profile, Browser(Path(profile)) as browser:
                    keys = []
                    for _ in range(ROUNDS):
                        keys.append(label(folder, browser, facts, choose, seed))
                        onebase(folder, "run", "people.yaml")
                shown = shares(folder, ["sft", *(f"dpo-{number + 1}" for number in range(ROUNDS))])
                kept.write_text(json.dumps({"keys": keys, "right": shown}), encoding="utf-8")
            keys, found = json.loads(kept.read_text(encoding="utf-8")).values()
            last = found[f"dpo-{ROUNDS}"]
            told = [f"{name} {sum(values) / len(values):.1%}" for name, values in found.items()]
            print(f"seed {seed}, {choose}: right {', '.join(told)}; keys {keys}", flush=True)
            print(f"  gain over sft in points: {written(gain(last, found['sft']))}", flush=True)
            if choose == "random":
                random_pairs = last
            elif random_pairs:
                print(f"  over random pairs: {written(gain(last, random_pairs))}", flush=True)


if __name__ == "__main__":
    main()

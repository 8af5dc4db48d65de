"""Does the labelling page lose or double a vote, and how long does the next pair take? Four browsers vote at once, the
server is killed again and again, and every row is counted afterwards. Needs Chromium.

    python scripts/label_load.py --votes 1000 --browsers 4 --kills 5
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]

from browser import Browser, Tab
from make_tiny_base import make_tiny_base
from test_label import Server, begin, draw, make_recipe

from pipeline.data.votes import read_votes

CLOCK = """
window.waits = [];
document.addEventListener("keydown", () => { window.pressed = performance.now(); }, true);
new MutationObserver(() => requestAnimationFrame(() => waits.push(performance.now() - pressed)))
  .observe(document.getElementById("answers"), { childList: true });
"""


def work(tab: Tab, votes: int, luck: random.Random, waits: list[float]) -> None:
    for _ in range(votes):
        before = tab.js("pair.name")
        tab.key(luck.choice("120x"))
        tab.until(f"!busy && (!pair || pair.name !== '{before}')", seconds=120)
    waits += tab.js("waits")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--votes", type=int, default=1000)
    parser.add_argument("--browsers", type=int, default=4)
    parser.add_argument("--kills", type=int, default=5)
    given = parser.parse_args()
    each = given.votes // given.browsers
    with tempfile.TemporaryDirectory() as name, Browser(Path(name) / "chromium") as browser:
        folder = Path(name)
        recipe = make_recipe(make_tiny_base(folder / "base"), folder, prompts=given.votes + 10)
        draw(recipe, folder)
        server = Server(folder)
        people = [f"person {number}" for number in range(given.browsers)]
        tabs = {person: begin(browser, server.url, person) for person in people}
        waits: list[float] = []
        threads = []
        for number, tab in enumerate(tabs.values()):
            tab.js(CLOCK)
            threads.append(threading.Thread(target=work, args=[tab, each, random.Random(number), waits]))
        started = time.monotonic()
        for thread in threads:
            thread.start()
        labels, killed = folder / "labels", 0
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.05)
            written = sum(file.read_bytes().count(b"\n") for file in labels.glob("[!.]*.jsonl"))
            if killed < given.kills and written >= (killed + 1) * given.votes // (given.kills + 1):
                server.end(signal.SIGKILL)
                server = Server(folder, port=server.port)
                killed += 1
        seconds = time.monotonic() - started
        votes, told = read_votes(labels)
        seen = {person: tab.js("document.getElementById('progress').textContent") for person, tab in tabs.items()}
        server.end()
    waits.sort()
    pairs, ids = {vote.pair for vote in votes}, {vote.id for vote in votes}
    print(f"{len(votes)} votes of {given.votes} in {seconds:.0f} s, {killed} kills; {len(ids)} ids, {len(pairs)} pairs")
    print(f"told by the pages: {', '.join(seen.values())}; told of the files: {told or 'nothing'}")
    print(f"from key to next pair: median {waits[len(waits) // 2]:.0f} ms, p95 {waits[int(0.95 * len(waits))]:.0f} ms")
    assert len(votes) == len(ids) == len(pairs) == each * given.browsers and not told


if __name__ == "__main__":
    main()

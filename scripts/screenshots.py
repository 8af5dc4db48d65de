"""Photograph the first screen of a run's report, light and dark, for these docs. Needs Chromium or Chrome on PATH.

    onebase report recipes/quickstart.yaml
    python scripts/screenshots.py runs/quickstart [--to docs/pictures]

Writes report.png and report-dark.png; of a page in Chinese (onebase report --lang zh) report-zh.png, which takes a
font that has Chinese (apt install fonts-noto-cjk).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTH, TALLEST = 1000, 800
DARK, LIGHT = 0, 1
"""Blink's numbers of the colour scheme that a person prefers."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder, as runs/quickstart")
    parser.add_argument("--to", type=Path, default=Path("docs/pictures"), metavar="DIR")
    given = parser.parse_args()
    page = given.run / "report" / "report.html"
    if not page.is_file():
        parser.error(f"{page} is not there: make it with onebase report RECIPE")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        parser.error(f"no browser on PATH, looked for {', '.join(BROWSERS)}: install Chromium (apt install chromium)")
    given.to.mkdir(parents=True, exist_ok=True)
    text = page.read_text(encoding="utf-8")
    chinese = '<html lang="zh' in text
    for name, scheme in [("report-zh.png", LIGHT)] if chinese else [("report.png", LIGHT), ("report-dark.png", DARK)]:
        picture = photograph(browser, text, scheme)
        picture.save(given.to / name, optimize=True)
        print(f"{given.to / name}: {picture.width} x {picture.height}, {(given.to / name).stat().st_size // 1024} KiB")


def photograph(browser: str, text: str, scheme: int) -> Image.Image:
    """The page down to the end of its first screen.

    Raises subprocess.CalledProcessError if the browser fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        # Without what follows the first screen, so that the picture ends where it does.
        first = Path(folder) / "first.html"
        first.write_text(text[: text.index("<nav>")] + "</main></body></html>", encoding="utf-8")
        taken = Path(folder) / "taken.png"
        subprocess.run(
            [
                *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
                *(f"--user-data-dir={folder}/profile", f"--window-size={WIDTH},{TALLEST}"),
                *(f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={taken}", first.as_uri()),
            ],
            check=True,
            capture_output=True,
            timeout=120,
        )
        whole = Image.open(taken).convert("RGB")
    return cut(whole)


def cut(picture: Image.Image, margin: int = 16) -> Image.Image:
    """Without the empty ground below."""
    ground = Image.new("RGB", picture.size, picture.getpixel((0, picture.height - 1)))
    box = ImageChops.difference(picture, ground).getbbox()
    return picture.crop((0, 0, picture.width, min(picture.height, (box[3] if box else 0) + margin)))


if __name__ == "__main__":
    main()

"""Which stage goes on from which, as a picture: the base on top, each stage below what it is made from."""

from __future__ import annotations

from html import escape

from pipeline.evaluate.stored import Link
from pipeline.report.figures import BASE, FAINT, FONT, INK, SOFT

BOX_WIDTH, BOX_HEIGHT, GAP_X, GAP_Y = 150, 50, 14, 34
LONGEST = 25


def drawn(chain: list[Link], notes: dict[str, str], base: str, colours: dict[str, str]) -> str:
    """An SVG. `chain`: the stages in order. `notes`: a short line under each name.
    `colours`: of each stage."""
    rows: list[list[str]] = [["base"]]
    depth = {"base": 0}
    parents: dict[str, list[tuple[str, bool]]] = {"base": []}
    for stage in chain:
        if stage.parent and stage.parent not in depth:  # an adapter from the Hub
            depth[stage.parent], parents[stage.parent] = 1, [("base", False)]
            rows += [[]] * (2 - len(rows))
            rows[1] = [*rows[1], stage.parent]
        above = [(stage.parent or "base", False)]
        above += [(source, True) for source in stage.rewards if source in depth]
        depth[stage.name] = 1 + max(depth[name] for name, _ in above)
        parents[stage.name] = above
        while len(rows) <= depth[stage.name]:
            rows.append([])
        rows[depth[stage.name]].append(stage.name)
    width = max(len(row) for row in rows) * (BOX_WIDTH + GAP_X) + GAP_X
    place = {
        name: (
            (width - len(row) * (BOX_WIDTH + GAP_X) + GAP_X) / 2 + column * (BOX_WIDTH + GAP_X),
            6 + level * (BOX_HEIGHT + GAP_Y),
        )
        for level, row in enumerate(rows)
        for column, name in enumerate(row)
    }
    kinds = {name: name for name in place} | {stage.name: stage.kind for stage in chain}
    parts = []
    for name, above in parents.items():
        for parent, paid in above:
            (x1, y1), (x2, y2) = place[parent], place[name]
            x1, y1, x2 = x1 + BOX_WIDTH / 2, y1 + BOX_HEIGHT, x2 + BOX_WIDTH / 2
            bend = (y1 + y2) / 2
            dash = ' stroke-dasharray="4 4"' if paid else ""
            parts.append(
                f'<path d="M{x1:.0f} {y1:.0f} C{x1:.0f} {bend:.0f} {x2:.0f} {bend:.0f} {x2:.0f} {y2:.0f}" '
                f'fill="none" stroke="{FAINT}" stroke-width="1.5"{dash}/>'
            )
    for name, (x, y) in place.items():
        shade = colours.get(name, BASE)
        note = base if name == "base" else notes.get(name, "")
        note = note if len(note) <= LONGEST else f"{note[: LONGEST - 1]}…"
        title = name if kinds[name] == name else f"{name} ({kinds[name]})"
        title = title if len(title) <= LONGEST else f"{title[: LONGEST - 1]}…"
        parts.append(
            f'<rect x="{x:.0f}" y="{y:.0f}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="8" fill="var(--paper, #fff)" '
            f'stroke="{shade}" stroke-width="1.8"/>'
            f'<text x="{x + BOX_WIDTH / 2:.0f}" y="{y + 21:.0f}" text-anchor="middle" font-weight="700" '
            f'font-size="14" fill="{INK}">{escape(title)}</text>'
            f'<text x="{x + BOX_WIDTH / 2:.0f}" y="{y + 38:.0f}" text-anchor="middle" font-size="11" '
            f'fill="{SOFT}">{escape(note)}</text>'
        )
    height = 12 + len(rows) * BOX_HEIGHT + (len(rows) - 1) * GAP_Y
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" font-family="{FONT}">{"".join(parts)}</svg>'
    )

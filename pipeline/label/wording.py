"""The words of the page, and the guidelines that stand beside the answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.language.say import say, spoken

REASONS = ("wrong", "made up", "beside the question", "too long", "too short", "unsafe", "badly written")


@dataclass(frozen=True)
class Guidelines:
    """A Markdown file as HTML, and its second headings, each a row in which answers can be compared."""

    html: str
    rows: list[str]


def read_guidelines(file: str | None) -> Guidelines:
    """A recipe's own, or ours: helpful, truthful, harmless."""
    from markdown_it import MarkdownIt

    own = Path(__file__).with_name("guidelines.zh.md" if spoken() == "zh" else "guidelines.md")
    text = (Path(file) if file else own).read_text(encoding="utf-8")
    # Without HTML and links of its own: the page loads nothing, whoever wrote the guidelines.
    markdown = MarkdownIt("commonmark", {"html": False}).disable(["image", "link", "autolink"])
    tokens = markdown.parse(text)
    opened = [place for place, token in enumerate(tokens) if token.type == "heading_open" and token.tag == "h2"]
    return Guidelines(markdown.render(text), [tokens[place + 1].content for place in opened])


def words() -> dict[str, object]:
    """What the page says, in the language that is spoken."""
    return {
        "title": say("Which answer is better?"),
        "name": say("Your name"),
        "begin": say("Begin"),
        "password": say("Password"),
        "log_in": say("Log in"),
        "wrong_password": say("That is not the password."),
        "guidelines": say("Guidelines"),
        "roles": {
            "system": say("System"),
            "user": say("Person"),
            "assistant": say("Assistant"),
            "tool": say("Tool"),
        },
        "answer": say("Answer"),
        "better": say("is better"),
        "tie": say("Equally good"),
        "bad": say("Both bad"),
        "skip": say("Skip"),
        "undo": say("Undo"),
        "edit": say("Correct it"),
        "editing": say("Write the right answer here. Esc leaves the box, then vote."),
        "edited": say("Corrected. Now vote."),
        "more": say("More: how much better, by which guideline, why"),
        "strength": say("How much better"),
        "strengths": [say("a little"), say("clearly"), say("by far")],
        "equal": say("equal"),
        "reasons": say("What is wrong with the worse one"),
        "tags": [
            say("wrong"),
            say("made up"),
            say("beside the question"),
            say("too long"),
            say("too short"),
            say("unsafe"),
            say("badly written"),
        ],
        "tag_names": list(REASONS),
        "rank": say("Choose the best, then the next best, and so on."),
        "waiting": say("The model is writing answers. This takes a moment."),
        "finished": say("You have seen every pair. Thank you."),
        "lost": say("The server does not answer. Your vote is kept here and sent again."),
        "progress": say(
            "{done} done, {seconds} s each, {left} ready", done="{done}", seconds="{seconds}", left="{left}"
        ),
        "keys": say("Keys: 1 and 2 choose, 0 equally good, x both bad, s skip, u undo, e and a number correct, m more"),
    }

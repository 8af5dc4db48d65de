"""Talk to a trained policy in the terminal, with the template and the end-of-turn tokens it was trained with.

What it gets wrong can be corrected on the spot and kept as a demonstration for the next fine-tuning.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.contracts import DEMONSTRATION
from pipeline.disk.artifact import Artifact
from pipeline.errors import UserError
from pipeline.models.quiet import quiet
from pipeline.recipe.recipe import read
from pipeline.runs.dtype import settle
from pipeline.stages.stage import BASE

if TYPE_CHECKING:
    from pipeline.evaluate.bench import Bench

HELP = """\
/system TEXT   set the system prompt (without TEXT: none) and start again
/save TEXT     keep the last question with TEXT as its right answer
               (without TEXT: with the answer that was given)
/history       show the conversation
/reset         start again
/quit          leave (or Ctrl-D)"""
Say = Callable[[str], Any]


@dataclass
class Chat:
    """A conversation with one policy, or the same questions to several. Each has its own history."""

    bench: Bench
    policies: list[str]
    corrections: Path
    new_tokens: int = 256
    temperature: float = 0.0
    histories: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    system: str = ""
    stopped: str = ""
    """The last question, where its answer was stopped: no history holds it, but it can still be corrected."""
    opening: str = ""
    """Who answers, as the first line says it."""
    kept: tuple[int, int] | None = None
    """Where in the file the last exchange was kept, from byte to byte: to correct it again replaces it."""

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        start = [{"role": "system", "content": self.system}] if self.system else []
        self.histories = {policy: list(start) for policy in self.policies}
        self.stopped, self.kept = "", None

    def hold(self, lines: Iterable[str], say: Say) -> None:
        """Answer line after line; `say` is given text as it is to appear, pieces of answers among it."""
        for line in lines:
            text = line.strip()
            if text in ("/quit", "/exit"):
                return
            if text.startswith("/"):
                say(self.command(text) + "\n")
            elif text:
                self.ask(text, say)

    def ask(self, text: str, say: Say) -> None:
        """One question to every policy, the answers streamed one below the other."""
        self.stopped, self.kept = "", None
        asked = {policy: [*self.histories[policy], {"role": "user", "content": text}] for policy in self.policies}
        answers = {}
        for policy, history in asked.items():
            if len(self.policies) > 1:
                say(f"[{policy}] ")
            try:
                answers[policy] = self.answer(policy, history, say)
            except KeyboardInterrupt:
                self.stopped = text
                say("\n(stopped; the question is forgotten, unless you answer it: /save TEXT)\n")
                return
            except UserError as error:
                say(f"{error}\n")
                return
            say("\n")
        # All at once: histories in which one policy was asked what another was not would tell nothing side by side.
        for policy, answer in answers.items():
            self.histories[policy] = [*asked[policy], {"role": "assistant", "content": answer}]

    def answer(self, policy: str, history: list[dict[str, str]], say: Say) -> str:
        """What a policy says next, streamed token by token. Raises UserError where the window is full."""
        import torch
        from transformers import TextStreamer

        from pipeline.data import render
        from pipeline.data.tokens import Unrenderable, stop_ids, without_marks
        from pipeline.models.base import computing

        class Streamer(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                say(text)

        actors, tokenizer = self.bench.actors, self.bench.tokenizer
        try:
            ids = render.prompt(tokenizer, {"prompt": history})
        except Unrenderable as error:
            raise UserError(f"{error}. Use other words, or start again with /reset") from error
        window = getattr(actors.config, "max_position_embeddings", None) or len(ids) + self.new_tokens
        room = min(self.new_tokens, window - len(ids))
        if room < 1:
            raise UserError(f"the conversation fills the model's window of {window} tokens. Start again with /reset")
        prompt_BT = torch.tensor([ids], device=actors.device)
        # From all tokens, as training and evaluation sample; transformers alone would take the 50 likeliest.
        whole = {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        sampled = whole if self.temperature else {"do_sample": False}
        with self.bench.acting_as(policy), torch.no_grad(), computing(self.bench.model):
            told_BT = self.bench.model.generate(  # type: ignore[no-untyped-call]
                input_ids=prompt_BT,
                attention_mask=torch.ones_like(prompt_BT),
                max_new_tokens=room,
                eos_token_id=stop_ids(tokenizer),
                pad_token_id=tokenizer.pad_token_id,
                streamer=Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
                **sampled,
            )
        return without_marks(tokenizer, str(tokenizer.decode(told_BT[0, len(ids) :], skip_special_tokens=True))).strip()

    def command(self, text: str) -> str:
        """Do what a line that begins with a slash asks; what to show for it."""
        word, _, rest = text.partition(" ")
        if word == "/system":
            if spelt := self._marks(rest):
                return f"not set: the text holds {spelt}"
            self.system = rest.strip()
            self.reset()
            return f"system prompt: {self.system or '(none)'}; a new conversation"
        if word == "/reset":
            self.reset()
            return "a new conversation"
        if word == "/history":
            told = [
                f"[{policy}] {message['role']}: {message['content']}"
                for policy, history in self.histories.items()
                for message in history
            ]
            return "\n".join(told) or "nothing has been said yet"
        if word == "/save":
            return self.save(rest.strip())
        return HELP if word == "/help" else f"there is no command {word}. The commands are:\n{HELP}"

    def save(self, correction: str) -> str:
        """Append the last exchange, with the right answer, to the file of corrections as a demonstration."""
        first = self.policies[0]
        if self.stopped and not correction:
            return "the answer was stopped: say what is right, /save TEXT"
        if self.stopped:
            asked = {
                policy: [*told, {"role": "user", "content": self.stopped}] for policy, told in self.histories.items()
            }
        else:
            asked = {policy: told[:-1] for policy, told in self.histories.items()}
            if self.histories[first][-1:] in ([], [{"role": "system", "content": self.system}]):
                return "there is no answer to keep yet"
        right = {"role": "assistant", "content": correction or self.histories[first][-1]["content"]}
        # As prompt and completion only this answer carries loss: those before it may be wrong.
        row = {"prompt": asked[first], "completion": [right]}
        reason = DEMONSTRATION.check(row) or self._marks(right["content"])
        if reason:
            return f"not kept: {reason}"
        again = self._write(json.dumps(row, ensure_ascii=False) + "\n")
        for policy in self.policies:
            self.histories[policy] = [*asked[policy], right]
        self.stopped = ""
        rows = sum(1 for _ in self.corrections.open(encoding="utf-8"))
        what = (
            "replaced" if again else "kept" if correction or len(self.policies) == 1 else f"kept, as {first} said it,"
        )
        return f"{what} in {self.corrections} ({rows} by now): name it, or add it, as data.path of an sft stage"

    def _marks(self, text: str) -> str:
        """What an sft stage would refuse of a text; empty where it is fit."""
        from pipeline.data.tokens import marks

        spelt = marks(self.bench.tokenizer, text)
        return f"{spelt[0]!r}, a special token that would end or forge a turn: write it otherwise" if spelt else ""

    def _write(self, line: str) -> bool:
        """Append a row to the corrections. Whether it took the place of an earlier one for the same exchange."""
        self.corrections.parent.mkdir(parents=True, exist_ok=True)
        with self.corrections.open("ab") as file:
            start, row = file.tell(), line.encode()
            before, self.kept = self.kept, None
            again = before is not None and before[1] == start  # nobody else has written since
            if before is not None and again:
                start = before[0]
                file.truncate(start)
            file.write(row)
        self.kept = (start, start + len(row))
        return again


def open_chat(run: Path, policies: list[str], corrections: Path, new_tokens: int, temperature: float) -> Chat:
    """Load what a run left. Raises UserError naming the policies there are."""
    if not os.path.isfile(run / "recipe.yaml"):
        raise UserError(
            f"{run} is not the folder of a run (it has no recipe.yaml). Name a folder such as runs/quickstart"
        )
    recipe = read(run / "recipe.yaml")
    there = [
        name for name in recipe.order() if recipe.kind(name).answers and Artifact(run / name).manifest() is not None
    ]
    chosen = policies or there[-1:] or [BASE]
    if len(set(chosen)) < len(chosen):
        raise UserError(
            f"--compare {' '.join(chosen)}: name two different ones (there is: {', '.join([*there, BASE])})"
        )
    for name in chosen:
        if name in recipe.stages and not recipe.kind(name).answers:
            what = "a reward model" if recipe.kind(name).ranks else "a classifier"
            raise UserError(f"'{name}' is {what}, which gives no answers (there is: {', '.join([*there, BASE])})")
        if name not in (*there, BASE):
            raise UserError(f"no finished policy '{name}' in {run} (there is: {', '.join([*there, BASE])})")
    for name in chosen:
        if name != BASE:
            Artifact(run / name).verify()

    quiet()
    from pipeline.evaluate.bench import Bench

    asked = [name for name in chosen if name != BASE] or there
    model = settle(recipe.spec.model, {name: Artifact(run / name).finished().dtype for name in asked})
    folders = {name: Artifact(run / name).adapter for name in chosen if name != BASE}
    unasked = not policies and not there
    base = Path(recipe.spec.model.base).name
    opening = f"no stage has finished: you talk to the base, {base}" if unasked else f"{' and '.join(chosen)} of {base}"
    return Chat(Bench(model, folders, {}, 1.0), chosen, corrections, new_tokens, temperature, opening=opening)


def talk(chat: Chat) -> None:
    """In the terminal, until Ctrl-D."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  input() then edits lines, remembers them, and takes any length
    print(f"{chat.opening}; /help lists the commands\n")

    def typed() -> Iterable[str]:
        while True:
            try:
                yield input("> ")
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\n(Ctrl-D leaves)")

    with chat.bench.ready():
        chat.hold(typed(), lambda text: print(text, end="", flush=True))

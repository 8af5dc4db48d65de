"""What a person sees while a stage trains, what is kept of its way, and how it is stopped: callbacks for a Trainer, or
for PPO's loop."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from peft import PeftModel
from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Column
from transformers import TrainerCallback

from pipeline.disk.artifact import mark_checkpoint
from pipeline.disk.atomic import written_whole
from pipeline.language.say import say
from pipeline.models import adapters
from pipeline.models.computed import take_computed
from pipeline.models.out_of_memory import say_split
from pipeline.models.processes import any_process

if TYPE_CHECKING:
    from pipeline.stages.stage import Context

PARTS = 4
PASSED_ON = 2.0
"""Seconds within which a second Ctrl-C is the first one, passed on by a launcher."""


class Progress(TrainerCallback):
    """A live bar with loss, tokens/s and time left; plain lines where the output is no terminal. Each logged step also
    goes to metrics.jsonl and to the trackers."""

    def __init__(self, ctx: Context, resumed: bool) -> None:
        self.ctx, self.resumed = ctx, resumed
        self.bar: Bar | None = None
        self.loss, self.speed, self.seen = "", "", (0.0, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if model is not None:
            take_computed(model)  # what was measured before training is none of it
        if not state.is_world_process_zero:
            return
        self.ctx.out.note_steps(state.max_steps)
        if self.resumed:
            told = say("going on from step {step} of {all}", step=state.global_step, all=state.max_steps)
            print(f"  {told}", flush=True)
        self.began, self.first_step = time.monotonic(), state.global_step
        self.seen = (math.nan if self.resumed else 0.0, time.monotonic())  # some trainers go on counting
        if sys.stdout.isatty() and (bar := make_bar(Console())):
            self.bar = bar
            self.bar.start()
            self.task = self.bar.add_task(
                self.ctx.out.name, total=state.max_steps, completed=state.global_step, note="", whole=""
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args is not None and args.logging_strategy == "steps" and state.global_step in (1, state.max_steps):
            control.should_log = True  # logging_steps may be more than there are; ppo logs each
        if self.bar:
            left = self.bar.tasks[0].time_remaining
            whole = "" if left is None else self._whole_run(left)
            self.bar.update(
                self.task, completed=state.global_step, note=f"{self.loss} {self.speed}".strip(), whole=whole
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        packed = {} if model is None else take_computed(model)
        self.ctx.log(state.global_step, logs | packed)
        tokens, then = self.seen
        now = time.monotonic()
        fresh = float(logs.get("num_tokens", 0)) - tokens
        self.speed = say("{n} tok/s", n=f"{fresh / (now - then):.0f}") if fresh > 0 and now > then else ""
        self.seen = (float(logs.get("num_tokens", 0)), now)
        self.loss = f"{say('loss')} {logs['loss']:.4f}"
        if "reward" in logs and "kl" in logs:
            self.loss = f"{say('reward')} {logs['reward']:+.2f}  kl {round(logs['kl'], 2) or 0.0:.2f}"
        if not self.bar:
            done = state.global_step - self.first_step
            left = (now - self.began) / max(done, 1) * (state.max_steps - state.global_step)
            step = say("step {step}", step=f"{state.global_step}/{state.max_steps}")
            parts = (
                self.ctx.out.name,
                step,
                self.loss,
                self.speed,
                say("{time} left{whole}", time=clock(left), whole=self._whole_run(left)),
            )
            print("  " + "  ".join(filter(None, parts)), flush=True)

    def _whole_run(self, left: float) -> str:
        after = self.ctx.after_training
        return "" if after is None else say(", the run about {time}", time=clock(left + after))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar:
            self.on_step_end(args, state, control)
            self.bar.stop()
            self.bar = None


def make_bar(console: Console) -> Bar | None:
    """A bar, with as much beside it as one line has room for; None where escape codes are not wanted."""
    if console.no_color or console.is_dumb_terminal:
        return None
    columns: list[ProgressColumn] = [TextColumn("  {task.description}")]
    if console.width >= 60:
        columns.append(BarColumn(bar_width=None, table_column=Column(ratio=1)))
    columns.append(TextColumn("{task.completed}/{task.total}"))
    if console.width >= 80:
        columns.append(TextColumn("{task.fields[note]}"))
    whole = "{task.fields[whole]}" if console.width >= 100 else ""
    columns += [TimeRemainingColumn(), TextColumn(say("left") + whole)]
    return Bar(*columns, console=console, expand=True)


class Checkpoints(TrainerCallback):
    """Marks each checkpoint whole after its last file, and only then removes the ones before it."""

    def __init__(self, fingerprint: str, keep: int) -> None:
        self.fingerprint, self.keep = fingerprint, keep

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        for file in folder.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        mark_checkpoint(folder, self.fingerprint)
        keep_newest(folder, self.keep)


class Snapshots(TrainerCallback):
    """Keeps the adapter as it is after a quarter, a half and three quarters of the steps, so that an evaluation can
    show the way that the policy took."""

    def __init__(self, ctx: Context, model: PeftModel) -> None:
        self.ctx, self.model = ctx, model

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        due = {round(state.max_steps * part / PARTS) for part in range(1, PARTS)} - {0, state.max_steps}
        if state.is_world_process_zero and state.global_step in due:
            with written_whole(self.ctx.out.snapshot(state.global_step)) as folder:
                adapters.save(self.model, folder)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def keep_newest(newest: Path, keep: int) -> None:
    """Remove the checkpoints before `newest`, of which `keep` may stay in all."""
    older = sorted((other for other in newest.parent.glob("checkpoint-*") if other != newest), key=step_of)
    for other in older[: max(0, len(older) + 1 - keep)]:
        shutil.rmtree(other, ignore_errors=True)


class Stop(TrainerCallback):
    """Turns Ctrl-C and SIGTERM into a checkpoint and a clean end; a second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.requested = False
        self.requested_at = 0.0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _request(self, number: int, frame: Any) -> None:
        if self.requested:
            # A launcher of several processes passes on the signal that they have had already, at once; or SIGTERM.
            if number == signal.SIGINT and time.monotonic() - self.requested_at > PASSED_ON:
                raise KeyboardInterrupt
            return
        self.requested, self.requested_at = True, time.monotonic()
        print("  " + say("stopping after this step ..."), flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if any_process(self.requested):
            self.requested = control.should_save = control.should_training_stop = True


def note_split(ctx: Context, step: int, rows: int, left: int, later: str = "") -> None:
    """Say, and keep in metrics.jsonl, that after `step` steps memory did not hold so many rows at once."""
    say_split(rows, left, f"step {step + 1}: ", later)
    if PartialState().is_main_process:
        ctx.log(step, {"out_of_memory": rows, "rows_at_once": left})


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"

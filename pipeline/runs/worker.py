"""One stage in one process: data in, run, seal.

accelerate launch -m pipeline.runs.worker RECIPE STAGE [--runs DIR] [--after-training SECONDS]
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
import threading
import traceback
from pathlib import Path

from pipeline.errors import BrokenInvariant, Interrupted, UserError
from pipeline.language.say import say, say_again, speak
from pipeline.recipe.recipe import read
from pipeline.runs.environment import ERROR_MARK, EVERYWHERE, LANGUAGE, WATCH, complete_own
from pipeline.runs.stage import run_stage

DISK_FULL = ("No space left", "File too large", "inline_container", "StreamWriter")
"""What libraries say of it without an errno; the last two are torch's writer."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="pipeline.runs.worker", description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("stage")
    parser.add_argument("--runs", default="runs", type=Path)
    parser.add_argument("--after-training", type=float, metavar="SECONDS")
    given = parser.parse_args()
    complete_own(EVERYWHERE)
    speak(os.environ.get(LANGUAGE, "en"))
    if os.environ.get(WATCH):
        threading.Thread(target=_die_with_runner, daemon=True).start()
    sys.exit(_guarded(given.recipe, given.stage, given.runs, given.after_training))


def _guarded(recipe: str, stage: str, runs: Path, after_training: float | None = None) -> int:
    """Run the stage; turn what a person can act upon into one message."""
    try:
        run_stage(read(recipe), stage, runs, after_training)
        return 0
    except UserError as error:
        return _fail(str(error), 2)
    except BrokenInvariant as error:
        return _fail(f"stage '{stage}' stopped, because a check of what it works with failed:\n  {error}", 3)
    except Interrupted as error:
        what = say_again(str(error))
        print("  " + say("{stage}: {what}; a checkpoint was saved", stage=stage, what=what), flush=True)
        return 130
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        traceback.print_exc()
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        return _fail(_disk_full(runs, error) if full else f"stage '{stage}' failed: {error}", 2)
    except Exception as error:
        traceback.print_exc()
        if any(words in str(error) for words in DISK_FULL):
            return _fail(_disk_full(runs, error), 2)
        if "out of memory" in str(error).lower():
            return _fail(
                f"stage '{stage}' ran out of memory. Halve per_device_train_batch_size and double "
                "gradient_accumulation_steps (the result is the same), or set gradient_checkpointing: true.",
                2,
            )
        return _fail(f"stage '{stage}' failed: {type(error).__name__}: {error}", 1)


def _disk_full(runs: Path, error: Exception) -> str:
    return f"the disk of {runs} is full ({error}). Nothing half-written counts as done: free some space and run again."


def _fail(message: str, status: int) -> int:
    print(f"{ERROR_MARK}{message}", file=sys.stderr, flush=True)
    return status


def _die_with_runner() -> None:
    """The runner holds the other end of stdin; if it is killed, the pipe closes, and so does this process."""
    # Not through sys.stdin: a thread blocked in its buffer makes the interpreter abort when it shuts down.
    while os.read(0, 1):
        pass
    os._exit(137)


if __name__ == "__main__":
    main()

"""Libraries without their talk, where a person waits for one thing in the terminal."""

from __future__ import annotations

import logging
import warnings


def quiet() -> None:
    """Keep what libraries say while they load and save a model away from a conversation, or from one who only waits."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)

"""Libraries made quiet, for commands whose output a person reads."""

from __future__ import annotations

import logging
import warnings


def quiet() -> None:
    """Turn off what libraries print while they load and save a model."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)

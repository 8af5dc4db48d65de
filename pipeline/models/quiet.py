"""Libraries made quiet, for commands whose output a person reads."""

from __future__ import annotations

import logging
import warnings


def quiet_from_the_start() -> None:
    """What can be turned off before any library is imported: some of them warn while they are."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)


def quiet() -> None:
    """Turn off what libraries print while they load and save a model."""
    from transformers.utils import logging as transformers_logging

    quiet_from_the_start()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]

"""Why a candidate cannot take part in a row."""

import warnings
from collections.abc import Callable


class Refused(Exception):
    """A candidate cannot serve a row; the message says why."""


def trying(call: Callable):
    """Runs ``call``, whose failure becomes Refused with the reason; PyTorch's warnings don't reach the terminal."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            return call()
        except Exception as e:
            raise Refused(reason(e, caught)) from e


NO_REASON = ("runtime disabled", "not used because")  # SDPA's warnings about backends that were not requested


def reason(error: BaseException, caught=()) -> str:
    """Returns the first line of the error, or the warnings in which SDPA explains why no kernel is available."""
    lines = []
    if "No available kernel" in str(error):
        lines = [str(w.message).split(" (Triggered internally")[0].strip() for w in caught]
        lines = [line for line in lines if line and not any(phrase in line for phrase in NO_REASON)]
    lines = lines or [str(error)]
    text = "; ".join(line.strip().splitlines()[0] for line in dict.fromkeys(lines) if line.strip())
    text = text or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."

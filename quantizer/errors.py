"""What can go wrong, in classes that a caller can tell apart. A message says what, where, and what to do."""


class QGraftError(Exception):
    """Base of all errors that qgraft raises on purpose."""


class PlanError(QGraftError, ValueError):
    """Recipe and model do not fit; nothing was touched. One problem a line."""


class CalibrationError(QGraftError, RuntimeError):
    """The calibration data could not be run through the model."""


class QuantizeError(QGraftError, RuntimeError):
    """A layer could not be quantized. Layers before it are finished, the others as they were."""


class CheckpointError(QGraftError, RuntimeError):
    """A checkpoint is damaged, incomplete, or not for this model; nothing was loaded."""


def some(items: list[str], between: str = ", ", show: int = 5) -> str:
    """The first of them, for a message, and how many more there are."""
    more = f"{between}... and {len(items) - show} more" if len(items) > show else ""
    return between.join(items[:show]) + more

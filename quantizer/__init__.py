"""The operation: recipe + model -> plan -> calibrate -> graft -> report -> save."""

from .errors import CalibrationError, CheckpointError, PlanError, QGraftError, QuantizeError
from .plan import Plan, PlannedLayer
from .quantizer import Quantizer
from .report import LayerReport, Report

__all__ = [
    "CalibrationError",
    "CheckpointError",
    "LayerReport",
    "Plan",
    "PlanError",
    "PlannedLayer",
    "QGraftError",
    "QuantizeError",
    "Quantizer",
    "Report",
]

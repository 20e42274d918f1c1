"""Measures of a trained classifier on a split of images."""

from __future__ import annotations

from m2mkd_fast.evaluate.accuracy import evaluate_accuracy, evaluate_topk
from m2mkd_fast.evaluate.calibration import expected_calibration_error
from m2mkd_fast.evaluate.frontier import FrontierPoint, measure_frontier

__all__ = ["FrontierPoint", "evaluate_accuracy", "evaluate_topk", "expected_calibration_error", "measure_frontier"]

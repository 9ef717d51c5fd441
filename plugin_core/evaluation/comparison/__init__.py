"""Comparing detectors on one ground truth: accuracy, whether a difference is real, its causes."""

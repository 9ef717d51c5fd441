"""Measuring detectors: comparison, contextual bias, panoptic quality, long tails."""

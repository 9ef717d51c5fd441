"""Checking and reading COCO-format datasets before a training does."""

"""Drawn scenes in the layout of COCO 2017; ``make_synthetic_coco.py`` is the command line."""

from .dataset import ArgumentError, Summary, make_dataset
from .draw import Rendering, render
from .scene import Scene, Settings, Thing, image_generator, sample_scene
from .vocabulary import STUFF, THINGS, companions

__all__ = [
    "STUFF",
    "THINGS",
    "ArgumentError",
    "Rendering",
    "Scene",
    "Settings",
    "Summary",
    "Thing",
    "companions",
    "image_generator",
    "make_dataset",
    "render",
    "sample_scene",
]

"""Trainings by recipe: :class:`Recipe` says what, :class:`Trainer` does it, and a run folder holds what came of it."""

from .data import DataSet, Split, TensorSplit, open_data
from .recipe import Recipe, builtin_recipes, load_recipe
from .trainer import Outcome, Progress, Trainer

__all__ = [
    "DataSet",
    "Outcome",
    "Progress",
    "Recipe",
    "Split",
    "TensorSplit",
    "Trainer",
    "builtin_recipes",
    "load_recipe",
    "open_data",
]

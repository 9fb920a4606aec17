"""Recipes: one YAML file says everything about a run."""

from dteframe.recipe.loader import LoadedRecipe, load_recipe
from dteframe.recipe.schema import Recipe, TrainingConfig, json_schema

__all__ = ["LoadedRecipe", "Recipe", "TrainingConfig", "json_schema", "load_recipe"]

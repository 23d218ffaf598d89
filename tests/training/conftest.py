"""Tiny models and records."""

from tests.training.fixtures import models, shards, subjects

__all__ = ["models", "shards", "subjects"]

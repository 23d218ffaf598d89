"""Errors of the data stages."""

from __future__ import annotations


class DataError(ValueError):
    """Data that a stage cannot work with; the message names the file or column and the cure."""


class BrokenImage(DataError):
    """Image bytes that cannot be used; the row is put aside with the message, and the run goes on."""

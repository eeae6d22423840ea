"""Errors that a caller may want to tell apart; everything else is a ValueError or TypeError."""

from __future__ import annotations


class KfadeError(Exception):
    """Base of the errors below."""


class NonFiniteError(KfadeError, ValueError):
    """A NaN or infinity turned up; the message names the batch and where it was seen."""


class DataError(KfadeError, ValueError):
    """A data file cannot be read; the message names the file and the line."""


class MissingLibraryError(KfadeError, ImportError):
    """A library that this needs is not installed; the message names the extra that brings it."""


class RankError(KfadeError, RuntimeError):
    """Another rank of a process group failed or has ended; the message names it, and why if it could say so."""


class StorageError(KfadeError, ValueError):
    """A saved directory or file is missing, incomplete, corrupt, or belongs to something else."""


class UnsupportedLayerError(KfadeError, ValueError):
    """A selected layer cannot be handled exactly; the message names it and says why."""


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop, by Ctrl-C here or at another rank, and has ended in good order; says how to go on."""

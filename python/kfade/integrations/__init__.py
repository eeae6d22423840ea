"""Other people's libraries on this one's operations; each file imports its library only when it is called."""

from __future__ import annotations

from ..errors import KfadeError


class UnsupportedPeerError(KfadeError, RuntimeError):
    """Another library has a version, or internals, that an integration was not written for."""


__all__ = ["UnsupportedPeerError"]

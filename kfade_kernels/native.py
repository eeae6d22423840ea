"""The native module `kfade_kernels._C` (sources in `csrc/`), where it was built: nothing needs it."""

from __future__ import annotations

import importlib
from typing import Any

module: Any = None
missing: str | None = None
"""Why there is no module, or None."""

try:
    module = importlib.import_module("._C", __package__)
except ModuleNotFoundError:
    missing = "the native module is not built"
except ImportError as error:
    missing = f"the native module does not load: {error}"

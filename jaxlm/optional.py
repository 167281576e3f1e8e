"""Packages that only some sources, tokenizers and precisions need."""

import importlib
from typing import Any


def optional(module: str, extra: str = "data") -> Any:
    """Imports a module where it is used.

    Raises:
        ImportError: it isn't installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} isn't there ({error}): pip install 'jaxlm[{extra}]'") from error

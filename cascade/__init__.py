"""Cascade: cascaded text-to-video diffusion that can be trained, distilled, evaluated and trusted."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cascade.api import Cascade

__all__ = ["Cascade", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`Cascade` when it is asked for: it needs torch, which takes a second to load."""
    if name != "Cascade":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cascade.api import Cascade

    return Cascade

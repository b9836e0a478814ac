"""The library: a house of rooms, each used through what its `__init__` offers.

Arrows point down: engine, report and evaluation -> lake, scoring -> alfa, prompts, images -> storage -> schemas.
For programs that want scores and nothing else there is `pipeline.ZeroShotDetector`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.scoring import Prediction, ZeroShotDetector

__all__ = ["Prediction", "ZeroShotDetector"]


def __getattr__(name: str) -> Any:
    """Imports the names in __all__ when they are first used: they need torch, which takes seconds to import."""
    if name in __all__:
        from pipeline import scoring

        return getattr(scoring, name)
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}")

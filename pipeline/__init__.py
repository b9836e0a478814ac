"""The library: a house of rooms, each used through what its `__init__` offers.

Arrows point down: engine, report and evaluation -> lake, scoring -> alfa, prompts, images -> storage -> schemas.
For programs that want scores and nothing else there is `pipeline.ZeroShotDetector`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.scoring import Prediction, ZeroShotDetector

__all__ = ["Prediction", "ZeroShotDetector"]


def __getattr__(name: str) -> Any:
    """Imports what is offered here when it is first asked for: torch takes seconds, and rooms below need none of it."""
    if name in __all__:
        from pipeline import scoring

        return getattr(scoring, name)
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}")

"""Results that others have published, in percent, as means over all classes of a data set, for comparison.

Every row was read at its source. WinCLIP's own rows (ViT-B-16-plus-240) were read in the table of MuSc's authors. MuSc
compares each test image with all others of its class. There is no row of ALFA itself, because only its abstract could
be read: it says that its PRO is 12.1 (MVTec AD) and 8.9 (VisA) above the best earlier method, and gives no other
figure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Benchmark = Literal["mvtec", "visa"]

TITLES: dict[Benchmark, str] = {"mvtec": "MVTec AD, 15 classes", "visa": "VisA, 12 classes"}


@dataclass(frozen=True)
class Published:
    """A published result in percent; None where a number was not published.

    note: distinguishes the row from others of its method. source: where its numbers come from.
    """

    method: str
    image_auroc: float
    image_aupr: float
    image_f1_max: float
    pixel_auroc: float
    pixel_pro: float | None
    pixel_f1_max: float | None
    note: str
    source: str
    pixel_aupr: float | None = None


_WINCLIP = "https://arxiv.org/abs/2303.14814"
_AGAIN = "https://github.com/zqhang/Accurate-WinCLIP-pytorch"
_MUSC = "https://github.com/xrli-U/MuSc"

PUBLISHED: dict[Benchmark, tuple[Published, ...]] = {
    "mvtec": (
        Published("WinCLIP", 91.8, 96.5, 92.9, 85.1, 64.6, 31.7, "ViT-B-16-plus-240", _WINCLIP),
        Published("WinCLIP", 90.4, 95.6, 92.7, 82.3, 61.9, 24.8, "reimplementation", _AGAIN, 18.2),
        Published("WinCLIP+", 95.2, 97.3, 94.7, 96.2, None, None, "4 good images", _WINCLIP),
        Published("MuSc", 97.8, 99.1, 97.5, 97.3, 93.8, 62.6, "ViT-L-14-336, 518 px", _MUSC, 62.7),
        Published("MuSc", 94.8, 97.6, 95.4, 96.3, 87.7, 52.2, "ViT-B-16-plus-240", _MUSC, 50.3),
    ),
    "visa": (
        Published("WinCLIP", 78.1, 81.2, 79.0, 79.6, 56.8, 14.8, "ViT-B-16-plus-240", _WINCLIP),
        Published("WinCLIP", 75.5, 78.7, 78.2, 73.2, 51.0, 9.0, "reimplementation", _AGAIN, 5.4),
        Published("WinCLIP+", 87.3, 88.8, 84.2, 97.2, 87.6, 47.0, "4 good images", _WINCLIP),
        Published("MuSc", 92.8, 93.5, 89.5, 98.8, 92.7, 48.8, "ViT-L-14-336, 518 px", _MUSC, 45.1),
        Published("MuSc", 82.6, 85.1, 81.6, 96.1, 72.4, 37.8, "ViT-B-16-plus-240", _MUSC, 33.4),
    ),
}

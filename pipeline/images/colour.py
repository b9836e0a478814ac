"""Colours that a photo means by a profile of its own (Display P3, Adobe RGB, CMYK), as sRGB, which the model knows."""

from __future__ import annotations

import functools
import io

from PIL import Image, ImageCms

_MOST_BYTES = 4_000_000


def choose_transform(image: Image.Image) -> ImageCms.ImageCmsTransform | None:
    """How colours of an opened photo become those of sRGB. None where it has no profile, that of sRGB, or a broken one,
    as in any viewer."""
    profile = image.info.get("icc_profile")
    if not isinstance(profile, bytes) or not 0 < len(profile) <= _MOST_BYTES:
        return None
    return _transform(profile, "CMYK" if image.mode == "CMYK" else "RGB")


@functools.lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(own):
            return None
        return ImageCms.buildTransform(own, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None

"""Converts colours from a photo's own profile (Display P3, Adobe RGB, CMYK) to sRGB, which the model was trained on."""

from __future__ import annotations

import functools
import io

from PIL import Image, ImageCms

_MAX_PROFILE_BYTES = 4_000_000


def choose_transform(image: Image.Image) -> ImageCms.ImageCmsTransform | None:
    """Returns the transform from the colour profile of an opened photo to sRGB.

    None if the photo has no profile, that of sRGB, or a broken one, which is ignored as viewers do.
    """
    profile = image.info.get("icc_profile")
    if not isinstance(profile, bytes) or not 0 < len(profile) <= _MAX_PROFILE_BYTES:
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

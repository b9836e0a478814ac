"""The image formats that are read, by what files begin with, and what a file is that none of them can be."""

from __future__ import annotations

import contextlib

from PIL import AvifImagePlugin, Image

from schemas.tables import ErrorType

# With `formats` given, Pillow does not load the plugins by itself.
Image.init()
# Photos are decoded side by side already; each decoder's own threads would take memory for nothing.
AvifImagePlugin.DEFAULT_MAX_THREADS = 1
with contextlib.suppress(ImportError):
    import pillow_heif

    pillow_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False, decode_threads=1)

FORMATS = tuple(
    name
    for name in ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "AVIF", "JPEG2000", "PPM", "HEIF")
    if name in Image.OPEN  # HEIF is there with an extra package alone, AVIF where Pillow was built with it
)
"""Pillow's names. Left out are formats without a signature, which would take any bytes for an image, documents, and
those whose decoders are programs of their own (EPS, WMF)."""

_MAGIC = (
    *(b"\xff\xd8", b"\x89PNG", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"RIFF", b"GIF8"),
    *(b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  "),
)
_CONTAINERS = {
    "AVIF": (b"avif", b"avis"),
    "HEIF": (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"),
}


def explain_unknown(data: bytes) -> tuple[ErrorType, str]:
    """Why no decoder has taken the bytes for an image."""
    container = next((name for name, brands in _CONTAINERS.items() if data[8:12] in brands), None)
    if data[4:8] == b"ftyp" and container is not None and container not in FORMATS:
        return ErrorType.UNREADABLE, (
            f"it is a photo in {container}, and no decoder for it is installed on this worker: "
            "pip install 'alfa-pipeline[heic]'"
        )
    if data.startswith(_MAGIC) or (data[4:8] == b"ftyp" and container is not None):
        kind = ErrorType.TRUNCATED if len(data) < 64 else ErrorType.CORRUPT
        return kind, f"it starts like an image, but its header cannot be read ({len(data)} bytes)"
    return ErrorType.NOT_AN_IMAGE, (
        "its bytes are no JPEG, PNG, BMP, TIFF, WebP, GIF, AVIF, HEIC, JPEG 2000 or PNM, whatever its name says"
    )

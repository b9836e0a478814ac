"""The image formats that are read, and the explanation of files that are in none of them."""

from __future__ import annotations

import contextlib

from PIL import AvifImagePlugin, Image

from schemas.tables import ErrorType

# Image.open does not load the plugins if it is given `formats`.
Image.init()
# Several photos are decoded at once already, so further threads of a decoder would only cost memory.
AvifImagePlugin.DEFAULT_MAX_THREADS = 1
with contextlib.suppress(ImportError):
    import pillow_heif

    pillow_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False, decode_threads=1)

FORMATS = tuple(
    name
    for name in ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "AVIF", "JPEG2000", "PPM", "HEIF")
    if name in Image.OPEN  # HEIF needs an extra package, AVIF a Pillow that was built with it
)
"""Pillow's names of the formats. Left out are formats without a signature, which would accept any bytes, documents, and
formats that are decoded by external programs (EPS, WMF)."""

_MAGIC = (
    *(b"\xff\xd8", b"\x89PNG", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"RIFF", b"GIF8"),
    *(b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  "),
)
_CONTAINERS = {
    "AVIF": (b"avif", b"avis"),
    "HEIF": (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"),
}


def explain_unknown(data: bytes) -> tuple[ErrorType, str]:
    """Explains why no decoder accepts the bytes. Returns the error type and a message."""
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

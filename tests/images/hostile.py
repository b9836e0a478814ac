"""Makes images that no camera takes but a bucket may contain: from odd but valid to built to harm.

`hostile_files(seed)` gives more than 2,000 (name, bytes), always the same for a seed.
"""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import pillow_heif
from PIL import Image, PngImagePlugin

pillow_heif.register_heif_opener()

_CUTS = 26
_FLIPS = 22
_SIDE = 40, 24
"""Width and height of most: the harm is in the header, not in the number of pixels."""

Tags = dict[int, tuple[str, Sequence[int]]]
"""TIFF tag -> kind (B, H, I or Q as in struct) and values."""


def hostile_files(seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """(file name, bytes), names distinct and with a suffix of an image."""
    chance = random.Random(seed)
    seeds = {**_photos(), **_odd_tiffs(), **_odd_pngs()}
    yield from seeds.items()
    for name, data in seeds.items():
        yield from _damaged(name, data, chance)
    yield from _harmful().items()


def png(width: int, height: int, *chunks: tuple[bytes, bytes], depth: int = 8, colour: int = 2) -> bytes:
    """A PNG with a header that claims width x height, and then whatever chunks (tag, data) are given."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    every = ((b"IHDR", header), *chunks, (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(tag, data) for tag, data in every)


def png_chunk(tag: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))


def black_png(width: int, height: int, *, depth: int = 8, colour: int = 0) -> bytes:
    """A whole, valid PNG, all zeros: a thousandth of its pixels in bytes. colour: 0 grey, 2 RGB, 4 LA, 6 RGBA."""
    row = 1 + (width * depth * {0: 1, 2: 3, 4: 2, 6: 4}[colour] + 7) // 8
    packer, rows = zlib.compressobj(1), max(1, 2**20 // row)
    body = b"".join(packer.compress(bytes(row * min(rows, height - top))) for top in range(0, height, rows))
    return png(width, height, (b"IDAT", body + packer.flush()), depth=depth, colour=colour)


def tiff(tags: Tags, pixels: bytes, *, order: str = "<", big: bool = False, following: int | None = None) -> bytes:
    """A TIFF of one directory; tag 273 or 324 gets the place of the pixels where it is given without values.

    following: offset of the next directory; None: the last.
    """
    kinds = {"B": 1, "H": 3, "I": 4, "Q": 16}
    word, slot = ("Q", 8) if big else ("I", 4)
    start = 16 if big else 8
    entry_size, head = (20, 8) if big else (12, 2)
    extra_at = start + head + entry_size * len(tags) + slot
    extra = b""
    place = extra_at + sum(
        len(values) * struct.calcsize(kind)
        for kind, values in tags.values()
        if len(values) * struct.calcsize(kind) > slot
    )
    entries = b""
    for tag, (kind, values) in sorted(tags.items()):
        data = struct.pack(f"{order}{len(values) or 1}{kind}", *(values or [place]))
        if len(data) > slot:
            value = struct.pack(order + word, extra_at + len(extra))
            extra += data
        else:
            value = data.ljust(slot, b"\0")
        entries += struct.pack(f"{order}HH{word}", tag, kinds[kind], len(values) or 1) + value
    mark = b"II" if order == "<" else b"MM"
    if big:
        front = mark + struct.pack(order + "HHHQ", 43, 8, 0, start) + struct.pack(order + "Q", len(tags))
    else:
        front = mark + struct.pack(order + "HI", 42, start) + struct.pack(order + "H", len(tags))
    return front + entries + struct.pack(order + word, following or 0) + extra + pixels


def grey_tags(width: int, height: int, size: int, **changes: tuple[str, Sequence[int]]) -> Tags:
    """An uncompressed grey TIFF in one strip. changes: `t` and the number of a tag -> its kind and values."""
    tags: Tags = {
        256: ("I", [width]),
        257: ("I", [height]),
        258: ("H", [8]),
        259: ("H", [1]),
        262: ("H", [1]),
        273: ("I", []),
        277: ("H", [1]),
        278: ("I", [height]),
        279: ("I", [size]),
    }
    return tags | {int(name[1:]): value for name, value in changes.items()}


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    """The file that Pillow writes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _photo(mode: str = "RGB", seed: int = 1) -> Image.Image:
    """A smooth picture with some noise on it."""
    width, height = _SIDE
    y, x = np.mgrid[0:height, 0:width]
    noise = np.random.default_rng(seed).integers(0, 40, (height, width, 3))
    base = np.stack([x * 5, y * 8, (x + y) * 3], axis=-1) + noise
    return Image.fromarray(base.clip(0, 255).astype(np.uint8)).convert(mode)


def _deep(kind: str) -> Image.Image:
    ramp = np.linspace(-3 if kind == "float32" else 0, 60_000, _SIDE[0] * _SIDE[1]).reshape(_SIDE[1], _SIDE[0])
    return Image.fromarray(ramp.astype(kind))


def _photos() -> dict[str, bytes]:
    """Each format in each of its ways, valid."""
    photo, exif = _photo(), Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a part"
    frames = {"save_all": True, "append_images": [_photo(seed=2), _photo(seed=3)]}
    files = {
        "baseline.jpg": encode(photo, "JPEG"),
        "progressive.jpg": encode(photo, "JPEG", progressive=True),
        "cmyk.jpg": encode(_photo("CMYK"), "JPEG"),
        "grey.jpeg": encode(_photo("L"), "JPEG"),
        "turned.jpg": encode(photo, "JPEG", exif=exif),
        "444.jpg": encode(photo, "JPEG", subsampling=0, quality=100),
        "restart.jpg": encode(photo, "JPEG", restart_marker_blocks=1),
        "rgb.bmp": encode(photo, "BMP"),
        "palette.bmp": encode(_photo("P"), "BMP"),
        "bit.bmp": encode(_photo("1"), "BMP"),
        "alpha.bmp": encode(_photo("RGBA"), "BMP"),
        "lossy.webp": encode(photo, "WEBP"),
        "lossless.webp": encode(photo, "WEBP", lossless=True),
        "alpha.webp": encode(_photo("RGBA"), "WEBP", lossless=True),
        "animated.webp": encode(photo, "WEBP", duration=50, **frames),
        "animated.png": encode(photo, "PNG", **frames),
        "pages.tif": encode(photo, "TIFF", **frames),
        "float.tif": encode(_deep("float32"), "TIFF"),
        "int32.tif": encode(_deep("int32"), "TIFF"),
        "16bit.tif": encode(_deep("uint16"), "TIFF"),
        "16bit.png": encode(_deep("uint16"), "PNG"),
        "cmyk.tif": encode(_photo("CMYK"), "TIFF"),
        "lab.tif": encode(Image.new("LAB", _SIDE, (120, 10, 200)), "TIFF"),
        "ycc.tif": encode(_photo("YCbCr"), "TIFF"),
        "pair.mpo": encode(photo, "MPO", save_all=True, append_images=[_photo(seed=2)]),
        "palette.gif": encode(_photo("P"), "GIF"),
        "animated.gif": encode(photo, "GIF", duration=50, **frames),
        "rgb.avif": encode(photo, "AVIF"),
        "alpha.avif": encode(_photo("RGBA"), "AVIF"),
        "animated.avif": encode(photo, "AVIF", **frames),
        "rgb.heic": encode(photo, "HEIF"),
        "alpha.heic": encode(_photo("RGBA"), "HEIF"),
        "rgb.jp2": encode(photo, "JPEG2000"),
        "rgba.jp2": encode(_photo("RGBA"), "JPEG2000"),
        "bare.j2k": encode(photo, "JPEG2000", no_jp2=True),
        "16bit.jp2": encode(_deep("uint16"), "JPEG2000"),
        "rgb.ppm": encode(photo, "PPM"),
        "grey.pgm": encode(_photo("L"), "PPM"),
        "16bit.pgm": encode(_deep("uint16"), "PPM"),
        "12bit.ppm": b"P6 9 7 4095\n" + struct.pack(">189H", *range(0, 3780, 20)),
        "plain.ppm": b"P3\n# by hand\n9 7 255\n" + b"".join(b"%d " % number for number in range(189)),
        "plain.pbm": b"P1 4 2\n0101 1 0 1 0\n",
        "bit.pbm": encode(_photo("1"), "PPM"),
        "float.pfm": encode(_deep("float32"), "PPM"),
    }
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        files[f"{compression}.tiff"] = encode(photo, "TIFF", compression=compression)
    files["group4.tiff"] = encode(_photo("1"), "TIFF", compression="group4")
    for mode in ("1", "L", "LA", "P", "RGBA"):
        files[f"mode-{mode}.png"] = encode(_photo(mode), "PNG")
    files["see-through.png"] = encode(_photo("P"), "PNG", transparency=bytes(range(256)))
    files["key-colour.png"] = encode(photo, "PNG", transparency=(10, 20, 30))
    return files


def _odd_tiffs() -> dict[str, bytes]:
    """By hand, what Pillow does not write: tiles, big-endian, BigTIFF, 16-bit RGB, nested directories."""
    width, height = 32, 32
    grey = bytes(range(256)) * 4
    size = len(grey)
    tiles: Tags = {k: v for k, v in grey_tags(width, height, size).items() if k not in (273, 278, 279)}
    tiles |= {322: ("I", [width]), 323: ("I", [height]), 324: ("I", []), 325: ("I", [size])}
    rgb16 = grey_tags(8, 8, 384, t258=("H", [16, 16, 16]), t262=("H", [2]), t277=("H", [3]))
    return {
        "big-endian.tif": tiff(grey_tags(width, height, size), grey, order=">"),
        "bigtiff.tif": tiff(grey_tags(width, height, size), grey, big=True),
        "bigtiff-big-endian.tif": tiff(grey_tags(width, height, size), grey, big=True, order=">"),
        "tiled.tif": tiff(tiles, grey),
        "rgb16.tif": tiff(rgb16, bytes(384)),
        "16bit-big-endian.tif": tiff(grey_tags(16, 16, 512, t258=("H", [16])), bytes(512), order=">"),
        "inverted.tif": tiff(grey_tags(width, height, size, t262=("H", [0])), grey),
        "float64.tif": tiff(grey_tags(8, 8, 512, t258=("H", [64]), t339=("H", [3])), bytes(512)),
        "not-a-number.tif": tiff(
            grey_tags(8, 8, 256, t258=("H", [32]), t339=("H", [3])),
            struct.pack("<64f", *[float("nan"), float("inf")] * 32),
        ),
        "ring-of-pages.tif": tiff(grey_tags(width, height, size), grey, following=8),
        "nested-in-itself.tif": tiff(grey_tags(width, height, size, t330=("I", [8]), t34665=("I", [8])), grey),
        "many-nested.tif": tiff(grey_tags(width, height, size, t330=("I", [8] * 500)), grey),
        "no-next-page.tif": tiff(grey_tags(width, height, size), grey, following=2**31),
    }


def _odd_pngs() -> dict[str, bytes]:
    photo, exif = _photo(), Image.Exif()
    exif[0x0112] = 8
    notes = PngImagePlugin.PngInfo()
    notes.add_text("a", "b" * 50, zip=True)
    notes.add_itxt("Kommentar", "ein Teil", zip=True)
    idat = (b"IDAT", zlib.compress(bytes(25 * 8)))
    return {
        "interlaced.png": _interlaced(),
        "notes.png": encode(photo, "PNG", pnginfo=notes),
        "turned.png": encode(photo, "PNG", exif=exif),
        "rgb16.png": png(4, 4, (b"IDAT", zlib.compress(bytes((1 + 4 * 6) * 4))), depth=16),
        "colour-profile.png": encode(photo, "PNG", icc_profile=b"no profile" * 20),
        "wrong-exif.png": png(8, 8, (b"eXIf", b"MM\0*" + b"\xff" * 20), idat),
        "long-exif.jpg": encode(
            photo, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\xff\xff\xff\xff\x06\0\0\0"
        ),
        "wrong-exif.jpg": encode(photo, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
        "turned-wrong-exif.jpg": encode(
            photo,
            "JPEG",
            exif=b"Exif\0\0"
            + tiff({0x0112: ("H", [6]), 0x8769: ("I", [8]), 0x010F: ("I", [2**31]), 0x8825: ("Q", [1, 2])}, b""),
        ),
    }


def _interlaced() -> bytes:
    """Adam7, 8 x 8 grey: seven passes, each with its filter bytes."""
    passes = [(1, 1), (1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (8, 4)]
    body = b"".join((b"\0" + bytes([number * 30] * width)) * height for number, (width, height) in enumerate(passes))
    header = bytearray(png(8, 8, (b"IDAT", zlib.compress(body)), colour=0))
    header[28] = 1
    header[29:33] = struct.pack(">I", zlib.crc32(bytes(header[12:29])))
    return bytes(header)


def _damaged(name: str, data: bytes, chance: random.Random) -> Iterator[tuple[str, bytes]]:
    """One file cut at many lengths, with bits flipped, with its dimensions overwritten, under another name."""
    stem, _, suffix = name.rpartition(".")
    lengths = {
        *range(0, min(12, len(data)), 3),
        *(len(data) * step // _CUTS for step in range(1, _CUTS)),
        len(data) - 1,
    }
    for length in sorted(lengths):
        yield f"{stem}-{suffix}-cut-{length}.{suffix}", data[:length]
    for number in range(_FLIPS):
        broken = bytearray(data)
        reach = len(data) if number % 2 else min(len(data), 200)  # every other one in the header
        for _ in range(1 + number // 4):
            broken[chance.randrange(reach)] ^= 1 << chance.randrange(8)
        yield f"{stem}-{suffix}-flip-{number}.{suffix}", bytes(broken)
    start = chance.randrange(len(data) // 2)
    yield f"{stem}-{suffix}-hole.{suffix}", data[:start] + bytes(64) + data[start + 64 :]
    yield f"{stem}-{suffix}-tail.{suffix}", data + bytes(chance.randrange(256) for _ in range(500))
    others = [other for other in ("jpg", "png", "tif", "bmp", "webp", "gif", "avif", "jp2", "ppm") if other != suffix]
    yield f"{stem}-{suffix}-named.{chance.choice(others)}", data


def _claiming(width: int, height: int) -> dict[str, bytes]:
    """Small files that claim a size, in each format."""
    bmp, jpeg = bytearray(encode(_photo(), "BMP")), bytearray(encode(_photo(), "JPEG"))
    bmp[18:26] = struct.pack("<ii", width, height)
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", min(height, 65535), min(width, 65535))
    webp = bytearray(encode(_photo("RGBA"), "WEBP"))
    webp[24:30] = struct.pack("<I", (width - 1) % 2**24)[:3] + struct.pack("<I", (height - 1) % 2**24)[:3]
    gif, jp2 = bytearray(encode(_photo("L"), "GIF")), bytearray(encode(_photo(), "JPEG2000"))
    avif, heic = bytearray(encode(_photo(), "AVIF")), bytearray(encode(_photo(), "HEIF"))
    for data in (avif, heic):
        place = data.index(b"ispe") + 8
        data[place : place + 8] = struct.pack(">II", width, height)
    gif[6:10] = struct.pack("<HH", min(width, 65535), min(height, 65535))
    place = jp2.index(b"ihdr") + 4
    jp2[place : place + 8] = struct.pack(">II", height, width)
    stream = bytearray(jp2)
    place = stream.index(b"\xff\x51") + 6
    stream[place : place + 8] = stream[place + 16 : place + 24] = struct.pack(">II", width, height)
    strips = grey_tags(width, height, 1024)
    deflated = zlib.compress(bytes(1024))
    packed = grey_tags(width, height, len(deflated), t259=("H", [8]))
    tiles = {k: v for k, v in grey_tags(64, 64, 0).items() if k not in (273, 278, 279)}
    tiles |= {259: ("H", [8]), 322: ("I", [width]), 323: ("I", [height]), 324: ("I", []), 325: ("I", [len(deflated)])}
    deep = grey_tags(width, height, len(deflated), t259=("H", [8]), t258=("H", [32]), t339=("H", [3]))
    return {
        "png": png(width, height, (b"IDAT", zlib.compress(bytes(1000)))),
        "bmp": bytes(bmp),
        "jpg": bytes(jpeg),
        "webp": bytes(webp),
        "gif": bytes(gif),
        "avif": bytes(avif),
        "heic": bytes(heic),
        "jp2": bytes(jp2),
        "stream.jp2": bytes(stream),
        "ppm": b"P6 %d %d 255\n" % (width, height) + bytes(1000),
        "pgm": b"P5 %d %d 4095\n" % (width, height) + bytes(1000),
        "plain.pgm": b"P2 %d %d 4095\n" % (width, height) + b"1 " * 1000,
        "tif": tiff(strips, bytes(1024)),
        "deflate.tif": tiff(packed, deflated),
        "tile.tif": tiff(tiles, deflated),
        "float.tif": tiff(deep, deflated),
    }


def _hidden(kind: str) -> bytes:
    """A container that claims a small picture around the stream of one of 4.2 megapixels."""
    data = bytearray(encode(Image.new("RGB", (2100, 2000)), kind))
    place = data.index(b"ispe") + 8
    data[place : place + 8] = struct.pack(">II", *_SIDE)
    return bytes(data)


def _harmful() -> dict[str, bytes]:
    files = {
        "empty.jpg": b"",
        "zeros.png": bytes(4096),
        "text.jpg": b"no image at all\n",
        "page.png": b"<!doctype html><title>404</title>",
        "vector.png": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "postscript.tif": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "archive.jpg": b"PK\x03\x04" + bytes(60),
        "icon.bmp": encode(_photo(), "ICO", sizes=[(16, 16)]),
        "dds.png": encode(_photo(), "DDS"),
        "qoi.png": encode(_photo(), "QOI"),
        "encapsulated.jpg": encode(_photo(), "EPS"),
    }
    for side in (0, 1, 1500, 2000, 60_000, 2**31 - 1, 2**32 - 1):
        files |= {
            f"claims-{side}.{kind}": data
            for kind, data in _claiming(min(side, 2**31 - 1), min(side, 2**31 - 1)).items()
        }
    for width, height in ((1, 60_000), (60_000, 1), (2_000_000, 2), (2, 2_000_000)):
        files |= {f"claims-{width}x{height}.{kind}": data for kind, data in _claiming(width, height).items()}
    bomb = zlib.compress(bytes(200_000_000), 9)
    idat = (b"IDAT", zlib.compress(bytes(25 * 8)))
    files |= {
        "bomb-ztxt.png": png(8, 8, (b"zTXt", b"a\0\0" + bomb), idat),
        "bomb-itxt.png": png(8, 8, (b"iTXt", b"a\0\1\0\0\0" + bomb), idat),
        "bomb-iccp.png": png(8, 8, (b"iCCP", b"a\0\0" + bomb), idat),
        "bomb-idat.png": png(8, 8, (b"IDAT", bomb)),
        "many-texts.png": png(8, 8, *[(b"zTXt", b"a\0\0" + zlib.compress(bytes(1_000_000)))] * 80, idat),
        "bomb-deflate.tif": tiff(grey_tags(8, 8, len(bomb), t259=("H", [8])), bomb),
        "many-strips.tif": tiff(
            grey_tags(8, 8, 64, t278=("I", [1]), t273=("I", [200] * 50_000), t279=("I", [64] * 50_000)), bytes(64)
        ),
        "many-samples.tif": tiff(grey_tags(8, 8, 64, t277=("H", [65_535]), t258=("H", [8] * 65_535)), bytes(64)),
        "long-strip.tif": tiff(grey_tags(8, 8, 2**31), bytes(64)),
        "pages-in-a-row.tif": encode(_photo(), "TIFF", save_all=True, append_images=[_photo()] * 60),
    }
    for mode, colour in (("grey", 0), ("rgb", 2), ("la", 4), ("rgba", 6)):
        for depth in (8, 16):
            files[f"large-{mode}-{depth}.png"] = black_png(1900, 2000, depth=depth, colour=colour)
    files["large-float.tif"] = encode(Image.new("F", (1900, 2000), 1.5), "TIFF", compression="tiff_adobe_deflate")
    files["large-int32.tif"] = encode(Image.new("I", (2000, 1900), 70_000), "TIFF", compression="tiff_adobe_deflate")
    files["large-progressive.jpg"] = encode(Image.new("RGB", (1900, 2000)), "JPEG", progressive=True, subsampling=0)
    for kind in ("AVIF", "HEIF", "JPEG2000"):
        files[f"large.{kind}.jpg"] = encode(Image.new("RGBA", (1900, 2000)), kind)
    files["large.gif"] = encode(Image.new("P", (1900, 2000)), "GIF")
    files["large.pgm"] = encode(Image.new("I;16", (1900, 2000)), "PPM")
    files["hidden-size.avif"] = _hidden("AVIF")
    files["hidden-size.heic"] = _hidden("HEIF")
    files["large.webp"] = encode(Image.new("RGBA", (1900, 2000)), "WEBP", lossless=True, method=0)
    return files

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.images import ImageError, Isolation, decode_image, isolation
from schemas.tables import ErrorType
from tests.images.hostile import encode

OPTIONS = {"size": (8, 8), "interpolation": "nearest", "max_pixels": 1000}  # nearest needs no torch
BROKEN = (
    "import os, signal, time\nfrom PIL import BmpImagePlugin\nBmpImagePlugin.BmpImageFile._open = lambda self: {}\n"
)


@pytest.mark.parametrize(
    ("deed", "word"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        pytest.param("os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL", marks=pytest.mark.slow),
        pytest.param("os.abort()", "SIGABRT", marks=pytest.mark.slow),
        ("os._exit(3)", "exit code 3"),
        ("time.sleep(1000)", "did not end within 5 s"),
    ],
)
def test_a_decoder_that_ends_its_process_or_never_ends_is_told(
    deed: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoder of BMP is broken in the new process alone, as by a bug in a codec."""
    (tmp_path / "sitecustomize.py").write_text(BROKEN.format(deed))
    monkeypatch.syspath_prepend(tmp_path)
    other, bad = (encode(Image.new("RGB", (20, 10)), kind) for kind in ("PNG", "BMP"))
    with Isolation() as isolated:
        for _ in range(2):
            with pytest.raises(ImageError, match=word) as caught, monkeypatch.context() as patch:
                if "sleep" in deed:
                    patch.setattr(isolation, "LIMIT_S", 5.0)
                isolated.decode(bad, **OPTIONS)
            assert caught.value.error_type is ErrorType.CRASHED
            assert isolated.decode(other, **OPTIONS).source_width == 20


def test_isolation_changes_nothing_else() -> None:
    data = encode(Image.effect_noise((20, 10), 50), "PNG")
    with Isolation() as isolated:
        alone, here = isolated.decode(data, **OPTIONS), decode_image(data, **OPTIONS)
        np.testing.assert_array_equal(alone.pixels, here.pixels)
        with pytest.raises(ImageError) as caught:
            isolated.decode(data[:50], **OPTIONS)
    assert caught.value.error_type in (ErrorType.TRUNCATED, ErrorType.CORRUPT)

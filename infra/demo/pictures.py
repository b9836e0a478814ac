"""Makes the pictures of the README and of the report anew, from a night of the demo: result.jpg and report.jpg.

`make pictures` runs it. The picture of the report needs chromium and chromedriver (Debian: chromium, chromium-driver).
If they are missing, that picture is left unchanged, and a line says so.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from jobs.score import run_score
from schemas.job import parse_job, read_job_yaml

HERE = Path(__file__).parent
SHOWN = {"hazelnut": 2, "capsules": 2}
"""How many of the most anomalous photos of each class result.jpg shows."""
HEIGHT, GAP = 200, 8
PARTITIONS = pa.schema([("run_date", pa.string()), ("class_name", pa.string())])
PAGE = (1280, 1330)
FLAGS = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --hide-scrollbars"


def main() -> None:
    console = Console()
    # The report names the folder of the photos: one that says nothing about the machine.
    with tempfile.TemporaryDirectory(prefix="alfa-demo-") as folder:
        images, output = Path(folder, "images"), Path(folder, "out")
        shutil.copytree(HERE / "images", images)
        document = read_job_yaml((HERE / "job.yaml").read_text())
        job = parse_job(document, flags={"dataset.images": str(images), "output.uri": str(output)})
        run_score(job, console)
        draw_result(output / "scores").save(HERE / "result.jpg", quality=88)
        console.print(f"written: {HERE / 'result.jpg'}")
        (report,) = output.glob("runs/*/report/index.html")
        picture = photograph(report)
        if picture is None:
            console.print("report.jpg is left as it is: it needs selenium, and chromium and chromedriver on PATH")
            return
        picture.save(HERE / "report.jpg", quality=85)
        console.print(f"written: {HERE / 'report.jpg'}")


def draw_result(scores: Path) -> Image.Image:
    """The most anomalous photos of each class, a row a photo: the photo, its map over it, its mask."""
    table = ds.dataset(scores, partitioning=ds.partitioning(PARTITIONS, flavor="hive")).to_table()
    rows = table.sort_by([("score", "descending")]).to_pylist()
    strips = []
    for class_name, count in SHOWN.items():
        members = [row for row in rows if row["class_name"] == class_name]
        # As the report's heat maps: colours span the maps of the class.
        maps = [np.asarray(Image.open(row["map_uri"])) for row in members]
        span = min(map_.min() for map_ in maps), max(map_.max() for map_ in maps)
        strips += [draw_strip(row, map_, span) for row, map_ in list(zip(members, maps, strict=True))[:count]]
    width = max(strip.width for strip in strips)
    sheet = Image.new("RGB", (width + 2 * GAP, len(strips) * (HEIGHT + GAP) + GAP), "white")
    for place, strip in enumerate(strips):
        sheet.paste(strip, ((sheet.width - strip.width) // 2, GAP + place * (HEIGHT + GAP)))
    return sheet


def draw_strip(row: dict[str, Any], anomaly_map: NDArray[np.uint16], span: tuple[int, int]) -> Image.Image:
    """A photo, its map over it, its mask, side by side."""
    photo = Image.open(row["image_uri"]).convert("RGB")
    low, high = span
    shade = np.clip((anomaly_map.astype(np.float32) - low) / max(high - low, 1), 0, 1)
    colours = (matplotlib.colormaps["inferno"](shade)[..., :3] * 255).astype(np.uint8)
    heat = Image.blend(photo, Image.fromarray(colours), 0.6)
    mask = Image.open(row["mask_uri"]).convert("RGB")
    width = round(photo.width * HEIGHT / photo.height)
    strip = Image.new("RGB", (3 * width + 2 * GAP, HEIGHT), "white")
    for place, part in enumerate((photo, heat, mask)):
        strip.paste(part.resize((width, HEIGHT), Image.Resampling.LANCZOS), (place * (width + GAP), 0))
    return strip


def photograph(page: Path) -> Image.Image | None:
    """The top of a page as a browser shows it; None where there is no browser."""
    browser, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    try:
        from selenium import webdriver
    except ImportError:
        return None
    if browser is None or driver is None:
        return None
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in FLAGS.split():
        options.add_argument(flag)
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)) as chrome:
        chrome.set_window_size(PAGE[0], PAGE[1] + 200)  # the window's own bars take some of it
        chrome.get(page.as_uri())
        return Image.open(io.BytesIO(chrome.get_screenshot_as_png())).convert("RGB").crop((0, 0, *PAGE))


if __name__ == "__main__":
    main()

"""The report as its readers use it: in a real browser, from file://."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.report import write_report
from pipeline.storage import Store
from tests.report.nights import failed, prompt_set, publish, save_photo, scored
from tests.report.page import HOSTILE

webdriver: Any = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (pip install -e '.[dev]')")

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="chromium and chromedriver are not on PATH (Debian: chromium, chromium-driver)"
)
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1280,900 "
    "--force-prefers-reduced-motion"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a report on 40 bolts, 3 nuts, an error, and an image of each hostile name. Bolt 39 was normal."""
    folder = tmp_path_factory.mktemp("night")
    photos = folder / "in"
    rows = [scored(f"bolt/{n:02}.jpg", "bolt", round(0.1 + 0.02 * n, 2), photos) for n in range(40)]
    rows += [scored(f"nut/{n}.jpg", "nut", 0.3 + 0.2 * n, photos) for n in range(3)]
    rows.append(failed("nut/broken.jpg", "nut", photos, HOSTILE[1]))
    for text in HOSTILE:
        evidence = [{"prompt": text, "defect": text, "weight": 1.0, "similarity": 0.5}]
        rows.append(scored(f"x/{text}.jpg", text, 0.95, photos, explanation=evidence))
        rows[-1]["regions"][0]["defect"] = text
    for number in range(30, 40):
        save_photo(photos / "bolt" / f"{number}.jpg", number)
    earlier = [{**row, "is_anomalous": False} if row["image_key"] == "bolt/39.jpg" else row for row in rows]
    publish(folder / "out", photos, earlier, night="2026-01-01")
    commit = publish(folder / "out", photos, rows, [prompt_set(name) for name in ("bolt", "nut", *HOSTILE)])
    return Path(write_report(Store(str(folder / "out")), commit)).as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture
def tab(browser: Any, page: str) -> Iterator[Any]:
    """The freshly opened page; whatever a test does on it, the console stays silent and nothing planted runs."""
    browser.get(page)
    yield browser
    assert browser.get_log("browser") == []
    assert browser.execute_script("return window.planted") is None


def find(tab: Any, selector: str) -> list[Any]:
    return list(tab.find_elements("css selector", selector))


def choose(tab: Any, selector: str, value: str) -> None:
    find(tab, f"{selector} option[value='{value}']")[0].click()


def press(tab: Any, *keys: str) -> None:
    for key in keys:
        tab.switch_to.active_element.send_keys(key)


def focused(tab: Any) -> Any:
    return tab.execute_script("return document.activeElement")


def scores(tab: Any, selector: str) -> list[float]:
    found = tab.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(e => e.dataset.score)", selector
    )
    return [float(score) for score in found if score is not None]


def test_filters_leave_what_they_name(tab: Any) -> None:
    total = len(HOSTILE) + 43
    assert find(tab, "#shown")[0].text == f"{total} of {total} in the gallery" and len(find(tab, ".card")) == 24
    names = [option.text for option in find(tab, "#by-class option")]
    choose(tab, "#by-class", str(names.index("nut") - 1))
    assert [card.get_attribute("aria-label").split(",")[0] for card in find(tab, ".card")] == ["nut"] * 3
    choose(tab, "#by-state", "1")
    assert scores(tab, ".card") == pytest.approx([0.7])
    find(tab, "[data-view=list]")[0].click()
    choose(tab, "#by-state", "2")
    assert "nut/broken.jpg" in find(tab, "#rows tr")[0].text and HOSTILE[1] in find(tab, "#rows tr")[0].text
    find(tab, "#reset")[0].click()
    find(tab, "#by-score")[0].send_keys("0.8")
    assert len(find(tab, "#rows tr")) == 5 + len(HOSTILE)
    find(tab, "#by-text")[0].send_keys("no such image")
    assert find(tab, "#nothing")[0].is_displayed() and not find(tab, "#rows tr")


def test_a_click_on_a_class_shows_it_alone_and_headings_sort(tab: Any) -> None:
    button = next(one for one in find(tab, "button[data-class]") if one.text == "nut")
    button.click()
    assert len(find(tab, ".card")) == 3
    find(tab, "#classes th:nth-child(2) button")[0].click()
    assert find(tab, "#classes tbody th")[0].text == "bolt"
    find(tab, "#reset")[0].click()
    find(tab, "[data-view=list]")[0].click()
    heading = find(tab, "th[data-order=score]")[0]
    for direction in ("descending", "ascending"):
        heading.find_element("tag name", "button").click()
        shown = scores(tab, "#rows tr")
        assert heading.get_attribute("aria-sort") == direction and len(shown) > 40
        assert shown == sorted(shown, reverse=direction == "descending")


def test_pages_hold_every_image_once(tab: Any) -> None:
    seen: list[str] = []
    while True:
        seen += [card.get_attribute("aria-label") for card in find(tab, ".card")]
        if not find(tab, "#next")[0].is_enabled():
            break
        find(tab, "#next")[0].click()
    assert len(seen) == len(set(seen)) == 43 + len(HOSTILE)


def test_the_keyboard_moves_opens_switches_and_closes(tab: Any) -> None:
    choose(tab, "#order", "-score")
    tab.execute_script("document.activeElement.blur()")
    press(tab, "j", "j", "j", "k")
    assert focused(tab).get_attribute("data-place") == "1"
    press(tab, "\ue007")  # Enter
    assert find(tab, "#viewer")[0].is_displayed() and find(tab, "#place")[0].text.startswith("2 of ")
    press(tab, "\ue014", "m")  # right arrow
    assert (
        find(tab, "#place")[0].text.startswith("3 of ") and find(tab, "#frame")[0].get_attribute("data-mode") == "mask"
    )
    press(tab, "\ue00c")  # Esc
    assert not find(tab, "#viewer")[0].is_displayed() and focused(tab).get_attribute("data-place") == "2"
    press(tab, "/", "nut")
    assert len(find(tab, ".card")) == 3
    press(tab, "\ue00c")
    assert len(find(tab, ".card")) == 24
    press(tab, "?")
    assert find(tab, "#help")[0].is_displayed()


def test_a_changed_image_opens_whatever_the_filters_hide_and_gives_the_focus_back(tab: Any) -> None:
    choose(tab, "#by-state", "0")
    (button,) = find(tab, "#since [data-exhibit]")
    button.click()
    assert find(tab, "#viewer-title")[0].text == button.text == "bolt/39.jpg"
    press(tab, "\ue00c")  # Esc
    assert not find(tab, "#viewer")[0].is_displayed() and focused(tab) == button


def test_hostile_names_are_text_everywhere(tab: Any) -> None:
    names = [option.text for option in find(tab, "#by-class option")]
    assert set(HOSTILE) <= set(names)
    for text in HOSTILE:
        find(tab, "#by-text")[0].clear()
        find(tab, "#by-text")[0].send_keys(text)
        find(tab, ".card")[0].click()
        said = find(tab, "#viewer")[0].text
        assert said.count(text) >= 4  # name, region, prompt, file
        find(tab, "#close")[0].click()


def test_map_and_mask_lie_where_the_grid_says(tab: Any) -> None:
    """Row 1, column 2 of the 6 x 8 grid is hot: its centre is at 2.5/8 of the width and 1.5/6 of the height."""
    pixel = (
        "const c = document.querySelector('.card .' + arguments[0]);"
        "const copy = new OffscreenCanvas(c.width, c.height).getContext('2d', {willReadFrequently: true});"
        "copy.drawImage(c, 0, 0);"
        "return [...copy.getImageData(arguments[1] * c.width, arguments[2] * c.height, 1, 1).data]"
    )
    hot, cold = (2.5 / 8, 1.5 / 6), (6.5 / 8, 4.5 / 6)
    assert tab.execute_script(pixel, "heat", *hot)[0] > 200 and tab.execute_script(pixel, "heat", *cold)[3] == 0
    assert tab.execute_script(pixel, "mask", *hot)[3] == 0 and tab.execute_script(pixel, "mask", *cold)[3] == 190
    find(tab, ".card")[0].click()
    frame, region = (find(tab, name)[0].rect for name in ("#frame", ".box"))
    assert (region["x"] - frame["x"]) / frame["width"] == pytest.approx(50 / 200, abs=0.01)
    assert (region["y"] - frame["y"]) / frame["height"] == pytest.approx(25 / 150, abs=0.01)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_one_column_without_scrolling_sideways(tab: Any, scheme: str) -> None:
    try:
        tab.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        tab.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        assert tab.execute_script("return document.documentElement.scrollWidth") == 390
        assert len({card.rect["x"] for card in find(tab, ".card")}) == 1
        colours = tab.execute_script("const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]")
        ink, paper = (sum(map(int, text[4:-1].split(","))) for text in colours)
        assert (ink > paper) == (scheme == "dark") and abs(ink - paper) > 500
    finally:
        tab.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        tab.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})

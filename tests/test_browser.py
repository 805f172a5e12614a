"""The widget in Debian's Chromium: every tab, as wide as a phone and as a laptop.

Skipped where there is no Chromium, unless CATS_BROWSER=required.
"""

import os
import shutil
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import small_network
from PIL import Image
from playwright.sync_api import expect, sync_playwright

import ddpm_helpers as helpers

BROWSER = next(filter(None, map(shutil.which, ["chromium", "chromium-browser"])), None)
REASON = "There is no Chromium: install it with `apt-get install chromium`."
if BROWSER is None and os.environ.get("CATS_BROWSER") == "required":
    raise RuntimeError(REASON)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=REASON)

STEPS = 4  # of the network
expect.set_options(timeout=30_000)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a small network's checkpoint, m.pt, and later those of others."""
    folder, ddpm = tmp_path_factory.mktemp("browser"), helpers.notebook()
    helpers.save_model(folder / "m.pt", small_network(ddpm), {})
    return folder


@pytest.fixture(scope="module")
def server(place):
    """The address of a widget."""
    helpers.launch(helpers.widget(vars(helpers.notebook()), place / "m.pt"), inline=False)
    yield helpers._launched[0].local_url
    helpers._launched.pop().close(verbose=False)


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as playwright:
        camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
        options = dict(executable_path=BROWSER, args=["--no-sandbox", *camera])
        browser = playwright.chromium.launch(**options)
        yield browser
        browser.close()


@pytest.fixture(params=[(390, "dark"), (1280, "light")], ids=["phone", "laptop"])
def page(request, chromium, server):
    """The widget's page; afterwards, nothing may have gone wrong behind it."""
    width, scheme = request.param
    page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.set_default_timeout(30_000)
    complaints = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
    page.on("request", lambda r: complaints.append(r.url) if away(r.url) else None)
    page.goto(server)
    expect(page.get_by_role("button", name="Make cats")).to_be_visible()
    yield page
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.close()
    assert not complaints


def ddpm():
    return helpers.notebook()


def model(place):
    return ddpm().load_model(place / "m.pt")


def same(shown, run):
    """Whether the pictures are those that a generator of (s, x_s, x_0) ends with."""
    *_, (_, x, _) = run
    for picture, expected in zip(shown, ddpm().to_bytes(x).cpu(), strict=True):
        assert np.array_equal(picture, np.asarray(helpers.to_image(expected)))


def away(url):
    return not url.startswith(("http://127.0.0.1:", "data:", "blob:"))


def tab(page, name):
    page.get_by_role("tablist").get_by_role("tab", name=name, exact=True).click()


def fill(page, label, value):
    page.get_by_label(label, exact=False).and_(page.locator("input[type=number]:visible")).fill(
        str(value)
    )


def finished(page, words):
    expect(page.locator(".block.status:visible")).to_contain_text(words)
    expect(page.get_by_role("button", name="Singles (zip)")).to_be_enabled()


def download(page, name, folder):
    with page.expect_download() as waiting:
        page.get_by_role("button", name=name).click()
    path = folder / waiting.value.suggested_filename
    waiting.value.save_as(path)
    return path


def pixels(file):
    return np.asarray(helpers.open_picture(file)).astype(int)


def singles(path):
    with zipfile.ZipFile(path) as archive:
        return {Path(name).stem: pixels(archive.open(name)) for name in archive.namelist()}


def sizes(page, selector):
    return page.eval_on_selector_all(
        f"{selector} >> visible=true", "all => all.map(e => [e.clientWidth, e.naturalWidth])"
    )


def test_generate_and_more_of_its_kind(page, place, tmp_path):
    fill(page, "How many cats", 5)
    fill(page, "Seed of the first cat", 11)
    fill(page, "Steps", STEPS)
    page.get_by_role("button", name="Make cats").click()
    finished(page, "5 cats by m.pt in")

    options = ["generate", "--count", "5", "--seed", "11", "--steps", str(STEPS)]
    options += ["--model", str(place / "m.pt"), "--scale", "8"]
    helpers.main([*options, "--out", str(tmp_path / "command.png")])
    helpers.main([*options, "--out", str(tmp_path / "command")])
    grid = download(page, "Grid (PNG)", tmp_path)
    assert np.array_equal(pixels(grid), pixels(tmp_path / "command.png"))
    shown = singles(download(page, "Singles (zip)", tmp_path))
    assert list(shown) == [f"cat_{seed:05d}" for seed in range(11, 16)]
    for name, picture in shown.items():
        assert picture.shape == (24, 24, 3)
        assert np.array_equal(picture, pixels(tmp_path / "command" / f"{name}.png"))
    assert Image.open(download(page, "Film (GIF)", tmp_path)).n_frames == STEPS

    cats = page.locator(".cats:visible").first
    assert cats.locator(".caption-label").all_inner_texts() == ["11", "12", "13", "14", "15"]
    for width, natural in sizes(page, ".cats img"):
        assert natural == 24 and width > 60
    for width, _ in sizes(page, ".image-frame img"):
        assert width > 150

    image, status = (
        page.locator(".image-frame img:visible").first,
        page.locator(".block.status:visible"),
    )
    before = image.get_attribute("src")
    page.locator("input[type=range][aria-label*='Look back']:visible").fill("1")
    expect(status).to_contain_text("t = ")
    expect(image).not_to_have_attribute("src", before)

    cats.get_by_role("button", name="Thumbnail 3 of 5").click()
    finished(page, "Cat 13 and its kind by m.pt in")
    kin = singles(download(page, "Singles (zip)", tmp_path))
    same(kin.values(), ddpm().variations(model(place), 13, 0.4, 8))
    expect(page.locator(".cats:visible").nth(1).locator("img")).to_have_count(8)

    page.get_by_role("button", name="Make cats").click()  # a new crowd: the old kind goes
    finished(page, "5 cats by m.pt in")
    expect(page.locator(".cats:visible")).to_have_count(1)
    expect(cats.locator(".selected")).to_have_count(0)


def test_morph(page, place, tmp_path):
    tab(page, "Morph")
    fill(page, "From the cat of seed", 3)
    fill(page, "to the cat of seed", 4)
    fill(page, "Pictures on the way", 5)
    page.get_by_role("button", name="Morph", exact=True).click()
    finished(page, "From cat 3 to cat 4 by m.pt in")
    shown = singles(download(page, "Singles (zip)", tmp_path))
    same(shown.values(), ddpm().morph(model(place), 3, 4, 5))
    film = Image.open(download(page, "Film (GIF)", tmp_path))
    assert film.n_frames >= 2 * 5 - 1
    assert len(sizes(page, ".image-frame img")) == 3


def test_repaint_what_the_mouse_painted_over(page, place, tmp_path):
    tab(page, "Repaint")
    fill(page, "Seed of the cat", 6)
    page.get_by_role("button", name="Repaint", exact=True).click()
    expect(page.get_by_text("Take a cat or upload a picture first.")).to_be_visible()
    with page.expect_response(lambda answer: answer.url.endswith(".png")):
        page.get_by_role("button", name="Take this cat").click()
    time.sleep(1)  # the editor makes room for it
    paint(page, (0.3, 0.4), (0.7, 0.4))
    page.get_by_role("button", name="Repaint", exact=True).click()
    finished(page, "Repainted by m.pt in")
    shown = singles(download(page, "Singles (zip)", tmp_path))
    cat = helpers.to_image(ddpm().draw(model(place), 1, 6)[0])
    changed = np.mean([abs(v - np.asarray(cat)).max(axis=2) > 0 for v in shown.values()], axis=0)
    rows, columns = np.nonzero(changed)
    assert len(shown) == 4 and changed[9, 8:16].mean() > 0.5  # along the stroke
    assert 5 <= rows.min() and rows.max() <= 13 and columns.min() >= 4 and columns.max() <= 19


def paint(page, start, end):
    """Draw a line with the mouse over the picture in the editor, in shares of its size."""
    canvas = page.locator("canvas:visible").first
    zoom = page.get_by_text("%").and_(page.locator(":visible")).last
    box = canvas.bounding_box()
    size = 480 * int(zoom.inner_text().strip("% ")) / 100
    left, top = (box["x"] + (box["width"] - size) / 2, box["y"] + (box["height"] - size) / 2)
    page.mouse.move(left + start[0] * size, top + start[1] * size)
    page.mouse.down()
    page.mouse.move(left + end[0] * size, top + end[1] * size, steps=8)
    page.mouse.up()
    time.sleep(1)  # the editor sends what was painted a moment later


def test_from_a_picture(page, place, tmp_path):
    helpers.save_png(helpers.scribble(64), tmp_path / "mine.png")
    tab(page, "From a picture")
    page.get_by_role("button", name="Draw as a cat").click()
    expect(page.get_by_text("Choose a picture first.")).to_be_visible()
    choose = page.locator("input[type=file]").last
    (tmp_path / "text.png").write_text("no picture")
    choose.set_input_files(tmp_path / "text.png")
    expect(page.get_by_text("This file cannot be read as a picture")).to_be_visible()
    page.get_by_label("Remove Image").click()
    page.locator("input[type=file]").last.set_input_files(tmp_path / "mine.png")
    fill(page, "Strength", 0.5)
    fill(page, "Seed of the first cat", 2)
    expect(page.locator("img[src*='mine.png']:visible")).to_be_visible()
    page.get_by_role("button", name="Draw as a cat").click()
    finished(page, "Drawn from your picture by m.pt in")
    shown = singles(download(page, "Singles (zip)", tmp_path))
    mine = helpers.read_upload(tmp_path / "mine.png", 24)
    same(shown.values(), ddpm().from_picture(model(place), mine, 0.5, 4, 2))


def test_a_photo_by_the_webcam(page, tmp_path):
    tab(page, "From a picture")
    page.get_by_label("Capture from camera").click()
    page.get_by_text("Click to Access Webcam").click()
    page.wait_for_function("[...document.querySelectorAll('video')].some(v => v.currentTime > 0.5)")
    page.get_by_label("capture photo").click()
    expect(page.get_by_label("Remove Image")).to_be_visible()
    fill(page, "Strength", 0)
    page.get_by_role("button", name="Draw as a cat").click()
    finished(page, "Drawn from your picture by m.pt in")
    for picture in singles(download(page, "Singles (zip)", tmp_path)).values():
        red, green, blue = picture[2:-2, 2:-2].mean(axis=(0, 1))
        assert green > 2 * max(red, blue)  # Chromium's film for tests is green


def test_stop_nonsense_dice_and_another_network(page, place, network, tmp_path):
    fill(page, "Steps", 2000)
    page.get_by_role("button", name="Make cats").click()
    expect(page.get_by_text("The number of steps must be from 1 to 1000.")).to_be_visible()
    page.get_by_label("Algorithm 2").check()
    expect(page.get_by_label("Steps").and_(page.locator("input"))).to_have_value("1000")
    page.get_by_role("button", name="Make cats").click()
    expect(page.locator(".block.status:visible")).to_contain_text("t = ")
    page.locator("button:visible", has_text="Stop").click()
    # only what can be seen: a late answer may leave a hidden "Error" of gradio's
    expect(page.locator(".block.status:visible")).to_have_text("Stopped.", use_inner_text=True)

    seed = page.get_by_label("Seed of the first cat").and_(page.locator("input:visible"))
    page.get_by_role("button", name="Roll the dice").and_(page.locator(":visible")).first.click()
    expect(seed).not_to_have_value("0")

    page.get_by_label("DDIM").check()
    expect(page.get_by_label("Steps").and_(page.locator("input"))).to_have_value("50")
    helpers.save_model(place / "new_model.pt", network(seed=5), {})
    page.get_by_label("Network").click()
    page.get_by_role("option", name="new_model.pt").click()
    fill(page, "Seed of the first cat", 1)
    fill(page, "How many cats", 2)
    fill(page, "Steps", STEPS)
    page.get_by_role("button", name="Make cats").click()
    finished(page, "2 cats by new_model.pt in")
    shown = singles(download(page, "Singles (zip)", tmp_path))
    same(shown.values(), ddpm().sample(network(seed=5), 2, 1, STEPS, "ddim"))
    (place / "new_model.pt").unlink()

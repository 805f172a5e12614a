"""The widget over HTTP, as a browser talks to it, and what it does with strange files."""

import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, small_network
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

import ddpm_helpers as helpers

FIELDS = ("x", "x_0", "film", "scrub", "cats", "status", "png", "gif", "zip")


def pixels(picture):
    """Bytes (C, H, W) or an image file as an array (H, W, C)."""
    if isinstance(picture, torch.Tensor):
        return picture.permute(1, 2, 0).numpy()
    return np.asarray(helpers.open_picture(picture))


class User:
    """Somebody with the page open."""

    def __init__(self, address=None):
        self.client = Client(address or helpers._launched[0].local_url, verbose=False)

    def ask(self, name, *values):
        """What a tab shows in the end: the last value of each of its parts."""
        job, shown = self.client.submit(*values, api_name=f"/{name}"), {}
        job.result()
        for outputs in job.outputs():
            for field, output in zip(FIELDS, outputs, strict=True):
                update = isinstance(output, dict) and output.get("__type__") == "update"
                if not update or "value" in output:
                    shown[field] = output["value"] if update else output
        return SimpleNamespace(**shown)

    def pictures(self, *values):
        return [pixels(cat["image"]) for cat in self.ask(*values).cats]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a small network in m.pt, and a widget running there."""
    folder, ddpm = tmp_path_factory.mktemp("widget"), helpers.notebook()
    helpers.save_model(folder / "m.pt", small_network(ddpm), {})
    helpers.launch(helpers.widget(vars(ddpm), folder / "m.pt"))
    yield folder
    while helpers._launched:
        helpers._launched.pop().close(verbose=False)


@pytest.fixture
def model(network):
    """The network in m.pt."""
    return network()


@pytest.fixture
def user(place):
    """Someone in front of the widget, which draws by m.pt."""
    return User()


def last(run, ddpm):
    *_, (_, x, _) = run
    return [pixels(picture) for picture in ddpm.to_bytes(x)]


def same(shown, expected):
    return len(shown) == len(expected) and all(
        np.array_equal(*both) for both in zip(shown, expected)
    )


# ------------------------------------------------------------------------------------- the tabs


def test_generate_gives_the_cats_of_the_seeds_to_the_pixel(ddpm, model, user):
    page = user.ask("generate", "m.pt", 5, 40, 3, "ddpm", 1.5)
    expected = ddpm.draw(model, 5, 40, 3, "ddpm", guidance=1.5)
    assert [cat["caption"] for cat in page.cats] == ["40", "41", "42", "43", "44"]
    assert same([pixels(cat["image"]) for cat in page.cats], [pixels(p) for p in expected])
    assert "5 cats by m.pt in" in page.status
    grid = pixels(page.png)
    assert np.array_equal(grid[::8, ::8], pixels(helpers.grid(expected, 3, padding=0)))
    assert grid.shape == (2 * 24 * 8, 3 * 24 * 8, 3)
    with zipfile.ZipFile(page.zip) as archive:
        assert archive.namelist() == [f"cat_000{seed}.png" for seed in range(40, 45)]
        assert same([pixels(archive.open(n)) for n in archive.namelist()], map_pixels(expected))
    film = Image.open(page.gif)
    assert film.n_frames == 3 and film.format == "GIF"


def map_pixels(pictures):
    return [pixels(picture) for picture in pictures]


def test_both_pictures_appear_while_it_works_and_can_be_looked_back_at(ddpm, model, user):
    job = user.client.submit("m.pt", 2, 0, 100, "ddpm", api_name="/generate")
    job.result()
    shown = [o for o in job.outputs() if isinstance(o[5], str) and o[5].startswith("t = ")]
    assert len(shown) > 1 and all(o[0] and o[1] for o in shown)
    (frames,) = [o[3]["maximum"] for o in job.outputs() if "maximum" in (o[3] or ())]
    assert frames == 51  # every second of the 100 steps, and the last
    x, x_0, status = user.client.predict(1, api_name="/look_back")
    (s, first, believed), *_ = ddpm.sample(model, 2, 0, 100, "ddpm")
    assert status == f"t = {s}"
    assert np.array_equal(pixels(x), pixels(helpers.grid(ddpm.to_bytes(first), 2)))
    assert np.array_equal(pixels(x_0), pixels(helpers.grid(ddpm.to_bytes(believed), 2)))


def test_morph_goes_from_cat_to_cat(ddpm, model, user):
    shown = user.pictures("morph", "m.pt", 3, 8, 6)
    assert same(shown, last(ddpm.morph(model, 3, 8, 6), ddpm))
    assert abs(shown[0].astype(int) - pixels(ddpm.draw(model, 1, 3)[0])).max() <= 1
    assert abs(shown[-1].astype(int) - pixels(ddpm.draw(model, 1, 8)[0])).max() <= 1


def painting(tmp_path, where):
    """What the editor sends when the half left of `where` was painted over."""
    layer = np.zeros((480, 480, 4), np.uint8)
    layer[:, :where] = (255, 50, 120, 255)
    Image.fromarray(layer).save(tmp_path / "layer.png")
    layers = [handle_file(tmp_path / "layer.png")]
    return {"background": None, "layers": layers, "composite": None}


def test_repaint_keeps_what_was_not_painted_over(ddpm, model, user, tmp_path):
    user.client.predict("m.pt", 7, api_name="/take_cat")
    cat, keep = ddpm.draw(model, 1, 7)[0], torch.ones(24, 24, dtype=torch.bool)
    keep[:, :9] = False
    shown = user.pictures("repaint", "m.pt", painting(tmp_path, 9 * 20), 2, 5)
    assert same(shown, last(ddpm.repaint(model, cat, keep, 2, 5), ddpm))
    for picture in shown:
        assert np.array_equal(picture[:, 9:], pixels(cat)[:, 9:])
        assert (picture[:, :9] != pixels(cat)[:, :9]).mean() > 0.5


def test_repaint_takes_an_uploaded_picture(user, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 50, 3), np.uint8)).save(
        tmp_path / "mine.png"
    )
    user.client.predict("m.pt", handle_file(tmp_path / "mine.png"), api_name="/take_picture")
    (shown,) = user.pictures("repaint", "m.pt", painting(tmp_path, 240), 1, 0)
    mine = pixels(helpers.read_upload(tmp_path / "mine.png", 24))
    assert np.array_equal(shown[:, 12:], mine[:, 12:])


def test_from_a_picture_depends_on_picture_and_strength(ddpm, model, user, tmp_path):
    helpers.save_png(helpers.scribble(64), tmp_path / "mine.png")
    mine, file = helpers.read_upload(tmp_path / "mine.png", 24), handle_file(tmp_path / "mine.png")
    shown = user.pictures("from_picture", "m.pt", file, 0.5, 3, 9)
    assert same(shown, last(ddpm.from_picture(model, mine, 0.5, 3, 9), ddpm))
    (shown,) = user.pictures("from_picture", "m.pt", file, 0, 1, 9)
    assert np.array_equal(shown, pixels(mine))


def test_checkpoints_beside_it_can_be_chosen_when_they_appear(ddpm, network, user, place):
    torch.save({"format": "another"}, place / "foreign.pt")
    (place / "text.pt").write_text("no checkpoint")
    helpers.save_model(place / "new_model.pt", network(seed=5), {})
    choices = user.client.predict(api_name="/refresh")["choices"]
    assert [name for name, _ in choices] == ["m.pt", "new_model.pt"]
    shown = user.pictures("generate", "new_model.pt", 2, 7, 3, "dpm")
    assert same(shown, map_pixels(ddpm.draw(network(seed=5), 2, 7, 3)))


# ------------------------------------------------------------------------------------- nonsense


@pytest.mark.parametrize(
    "name, values, words",
    [
        ("generate", ("m.pt", 0, 0, 20, "dpm"), "number of cats must be from 1 to 64"),
        ("generate", ("m.pt", 65, 0, 20, "dpm"), "number of cats must be from 1 to 64"),
        ("generate", ("m.pt", 2, -5, 20, "dpm"), "seed must be from 0"),
        ("generate", ("m.pt", 2, 2**40, 20, "dpm"), "seed must be from 0"),
        ("generate", ("m.pt", 2, None, 20, "dpm"), "seed must be a whole number"),
        ("generate", ("m.pt", 2, 0, 0, "dpm"), "steps must be from 1 to 1000"),
        ("generate", ("m.pt", 2, 0, 1.5, "dpm"), "steps must be a whole number"),
        ("generate", ("m.pt", 2, 0, 3, "magic"), 'sampler is "dpm"'),
        ("generate", ("m.pt", 2, 0, 3, "dpm", 4), "guidance must be from 0 to 3"),
        ("generate", ("none.pt", 2, 0, 3, "dpm"), "There is no"),
        ("generate", ("../m.pt/..", 2, 0, 3, "dpm"), "There is no"),
        ("morph", ("m.pt", 1, "x", 5), "seed must be a whole number"),
        ("morph", ("m.pt", 1, 2, 1), "number must be from 2 to 24"),
        ("take_cat", ("m.pt", -1), "seed must be from 0"),
        ("repaint", ("m.pt", None, 4, 0), "Take a cat or upload a picture first"),
        ("from_picture", ("m.pt", None, 0.5, 4, 0), "Choose a picture first"),
    ],
)
def test_nonsense_gets_one_sentence_and_no_stack_trace(user, name, values, words, capfd):
    with pytest.raises(AppError, match=words):
        user.ask(name, *values)
    assert "Traceback" not in capfd.readouterr().err
    assert user.ask("generate", "m.pt", 1, 0, 1, "dpm").cats


def test_a_painting_that_is_none_gets_one_sentence(user, tmp_path, capfd):
    user.client.predict("m.pt", 7, api_name="/take_cat")
    (tmp_path / "junk.png").write_text("no picture")
    junk = {"background": None, "layers": [handle_file(tmp_path / "junk.png")], "composite": None}
    for value, words in [(junk, "cannot be read"), (painting(tmp_path, 0), "Paint over the part")]:
        with pytest.raises(AppError, match=words):
            user.ask("repaint", "m.pt", value, 2, 0)
    assert "Traceback" not in capfd.readouterr().err


def png(width, height, rows):
    """A black PNG of 1 bit per pixel that promises height rows and holds `rows` of them."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    data = zlib.compress(bytes((width // 8 + 1) * rows), 1)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def strange_file(name, folder):
    path = folder / f"{name}.png"
    if name == "text":
        path.write_text("I am no picture")
    elif name == "empty":
        path.write_bytes(b"")
    elif name == "truncated":
        path.write_bytes(png(64, 64, 10)[:-40])
    elif name == "bomb":
        path.write_bytes(png(60_000, 60_000, 1))
    elif name == "large":
        path.write_bytes(png(10_000, 10_000, 10_000))
    elif name == "vector":
        path.write_text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>')
    elif name == "printer":
        Image.new("RGB", (9, 9)).save(path, "EPS")  # would start another program
    return path


@pytest.mark.parametrize(
    "name, words",
    [
        *((name, "cannot be read") for name in ("text", "empty", "truncated", "vector", "printer")),
        *((name, "too many pixels") for name in ("bomb", "large")),
    ],
)
def test_strange_uploads_are_refused_in_one_sentence(user, tmp_path, name, words, capfd):
    file = handle_file(strange_file(name, tmp_path))
    for tab, values in [
        ("from_picture", ("m.pt", file, 0.5, 1, 0)),
        ("take_picture", ("m.pt", file)),
        ("check", ("m.pt", file)),
    ]:
        with pytest.raises(AppError, match=words):
            user.client.predict(*values, api_name=f"/{tab}")
    assert "Traceback" not in capfd.readouterr().err
    assert user.ask("generate", "m.pt", 1, 0, 1, "dpm").cats


def test_a_hundred_megapixels_from_a_camera_are_welcome(user, tmp_path):
    large = Image.new("L", (10_000, 10_000), 40)
    large.paste(220, (0, 0, 5_000, 10_000))
    large.save(tmp_path / "large.jpg", quality=50)
    (shown,) = user.pictures("from_picture", "m.pt", handle_file(tmp_path / "large.jpg"), 0, 1, 0)
    assert abs(shown[:, :10].astype(int) - 220).max() < 9
    assert abs(shown[:, 14:].astype(int) - 40).max() < 9


def test_uploads_are_turned_upright_and_put_on_white(user, tmp_path):
    upright = helpers.to_image(helpers.scribble(200))
    exif = Image.Exif()
    exif[274] = 6  # "turn me by 90 degrees clockwise"
    upright.rotate(90).save(tmp_path / "turned.jpg", quality=95, exif=exif)
    clear = Image.new("RGBA", (200, 200), (200, 0, 0, 0))
    clear.paste((0, 0, 0, 255), (100, 0, 200, 200))
    clear.save(tmp_path / "clear.png")

    def shown(name):
        file = handle_file(tmp_path / name)
        return user.pictures("from_picture", "m.pt", file, 0, 1, 0)[0].astype(int)

    assert abs(shown("turned.jpg") - np.asarray(helpers.fit(upright, 24))).mean() < 4
    assert (shown("clear.png")[:, :11] > 250).all() and (shown("clear.png")[:, 13:] < 5).all()


# ---------------------------------------------------------------------------- many users, stopping


def test_ten_people_at_once_all_get_their_cats(ddpm, model, user):
    people = [User() for _ in range(10)]
    with ThreadPoolExecutor(10) as pool:
        jobs = [
            pool.submit(person.pictures, "generate", "m.pt", 4, 100 * i, 5, "dpm")
            for i, person in enumerate(people)
        ]
    for i, job in enumerate(jobs):
        assert same(job.result(), map_pixels(ddpm.draw(model, 4, 100 * i, 5)))


def test_the_network_is_warm_before_the_first_click(ddpm, place):
    counts = []

    def sample(model, count, *values):
        counts.append(count)
        yield from ddpm.sample(model, count, *values)

    helpers.widget(vars(ddpm) | {"sample": sample}, place / "m.pt")
    assert counts == [16]


# -------------------------------------------------------------------------------------- the server


def test_temporary_files_go_away(user, monkeypatch):
    made, mkdtemp = [], tempfile.mkdtemp

    def watched(*values, **options):
        made.append(Path(mkdtemp(*values, **options)))
        return str(made[-1])

    monkeypatch.setattr(tempfile, "mkdtemp", watched)
    assert user.ask("generate", "m.pt", 2, 0, 2, "dpm").zip
    ours = [folder for folder in made if folder.name.startswith("ddpm-cats-")]
    assert ours and not any(folder.exists() for folder in ours)
    assert helpers._launched[0].delete_cache


def test_command_line_serves_the_widget_until_interrupted(ddpm, model, place):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(ROOT / "ddpm_helpers.py"), "widget", "--port", str(port)]
    command += ["--model", "m.pt"]
    pipes = dict(cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with subprocess.Popen(command, **pipes) as server:
        try:
            assert f"http://127.0.0.1:{port}" in server.stdout.readline()
            shown = User(f"http://127.0.0.1:{port}").pictures("generate", "m.pt", 2, 3, 2, "dpm")
            for picture, expected in zip(shown, ddpm.draw(model, 2, 3, 2), strict=True):
                difference = abs(picture.astype(int) - pixels(expected))
                assert difference.max() <= 4  # it may draw with 16 bits
            second = subprocess.run(command, **pipes | {"stderr": subprocess.PIPE, "stdout": None})
            assert second.returncode == 2 and f"Port {port} is taken" in second.stderr
            server.send_signal(signal.SIGINT)
            assert server.wait(30) == 0
            assert "Traceback" not in server.stdout.read()
        finally:
            server.kill()


def test_command_line_says_what_is_wrong_with_the_checkpoint(tmp_path):
    command = [sys.executable, str(ROOT / "ddpm_helpers.py"), "widget", "--model", "none.pt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "There is no" in done.stderr and "Traceback" not in done.stderr


# ------------------------------------------------- with widgets of their own, which end the other


@pytest.fixture
def slow(ddpm, place):
    """Someone in front of a widget that draws slowly, and the steps it has taken."""
    steps = []

    def sample(*values):
        for step in ddpm.sample(*values):
            steps.append(step[0])
            time.sleep(0.01)
            yield step

    helpers.launch(helpers.widget(vars(ddpm) | {"sample": sample}, place / "m.pt"))
    steps.clear()
    return User(), steps


def test_stop_acts_at_the_next_step_and_what_there_is_can_be_looked_at(slow):
    user, steps = slow
    job = user.client.submit("m.pt", 1, 0, 1000, "ddpm", api_name="/generate")
    while len(steps) < 10:
        time.sleep(0.01)
    x, x_0, _, scrub, _, status = user.client.predict(api_name="/stop")
    taken = len(steps)
    job.result()
    assert len(steps) <= taken + 1 < 900
    assert status == "Stopped." and x and x_0 and scrub["maximum"] > 9
    assert user.client.predict(1, api_name="/look_back")[2] == "t = 999"
    assert user.ask("generate", "m.pt", 1, 0, 2, "dpm").cats


def test_only_this_computer_and_only_one_at_a_time(ddpm, place):
    first = helpers._launched[0]
    assert first.server_name == "127.0.0.1" and not first.share and first.share_url is None
    helpers.launch(helpers.widget(vars(ddpm), place / "m.pt"))
    assert len(helpers._launched) == 1 and not first.is_running

"""Downloading photos, from servers good and bad; no network is needed."""

import contextlib
import http.server
import io
import socket
import struct
import subprocess
import threading
import time
import zipfile

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from test_command_line import run

import ddpm_helpers as helpers

INSIDE = f"cat-dataset-{helpers.COMMIT}/cats/"
CLEAN = [2, 3, 4, 7, 29842]  # what the list of clean photos holds here
NAMES = {f"cat_{n}.png" for n in CLEAN}


def photo(seed, size=64):
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    return png.getvalue()


def archive(changes=(), leave_out=(), extra=()):
    """The bytes of an archive with nine photos, laid out as GitHub does."""
    members = {f"{INSIDE}cat_{n}.png": photo(n) for n in [*range(8), 29842]}
    members |= {INSIDE: b"", f"{INSIDE}../README.txt": b"hello", **dict(extra)}
    members |= {f"{INSIDE}cat_{n}.png": content for n, content in dict(changes).items()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in members.items():
            if name not in {f"{INSIDE}cat_{n}.png" for n in leave_out}:
                file.writestr(name, content)
    return buffer.getvalue()


WHOLE = archive()
HALF = len(WHOLE) // 2


class Server(http.server.ThreadingHTTPServer):
    """Answers with `answer(handler, start)`, start being the Range asked for; takes notes."""

    daemon_threads = True

    def __init__(self, answer):
        self.requests, self.released = [], threading.Event()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked = self.headers.get("Range")
                self.server.requests.append(asked)
                with contextlib.suppress(OSError):  # the client has hung up
                    answer(self, int(asked[6:-1]) if asked else 0)

            def log_message(self, *_):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/cats.zip"


def reply(handler, body, status=200, length=None, **headers):
    handler.send_response(status)
    if length != "none":
        handler.send_header("Content-Length", str(len(body) if length is None else length))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def reply_part(handler, start, body=WHOLE, until=None, at=None):
    """The rest of the body, of which only the bytes before `until` are really sent."""
    if not start:
        return reply(handler, body[:until], length=len(body))
    part = f"bytes {start if at is None else at}-{len(body) - 1}/{len(body)}"
    reply(handler, body[start:until], 206, len(body) - start, Content_Range=part)


@pytest.fixture
def serve(monkeypatch):
    """Start a Server; all are stopped at the end."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers = []

    def start(answer):
        servers.append(Server(answer))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,)).start()
        return servers[-1]

    yield start
    for server in servers:
        server.released.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def fetch(tmp_path, monkeypatch):
    """Download without patience into tmp_path/deep/cats; returns the folder."""
    monkeypatch.setattr(helpers, "clean_numbers", lambda: CLEAN)

    def download(url, **options):
        options = dict(tries=3, timeout=0.3, pause=0, cache_folder=tmp_path / "cache") | options
        helpers.download_cats(url=url, to=tmp_path / "deep" / "cats", **options)
        return tmp_path / "deep" / "cats"

    return download


@pytest.fixture
def fails(fetch, tmp_path):
    """Check that a download fails with a sentence, and leaves nothing where pictures belong."""

    def check(url, words, **options):
        before = {p for p in tmp_path.rglob("*") if "cache" not in p.parts}
        with pytest.raises(helpers.UsageError, match=words) as raised:
            fetch(url, **options)
        message = str(raised.value)
        assert "\n" not in message and message.endswith(".") and "by hand" in message
        after = {p for p in tmp_path.rglob("*") if "cache" not in p.parts}
        assert not [p for p in after - before if not p.is_dir() or p.name.startswith(".")]

    return check


def names(folder):
    return {p.name for p in folder.iterdir()}


def test_the_clean_photos_arrive_as_they_are_and_only_once(serve, fetch, tmp_path, capsys):
    server = serve(lambda handler, _: reply(handler, WHOLE))
    folder = fetch(server.url)
    assert names(folder) == NAMES
    assert all((folder / f"cat_{n}.png").read_bytes() == photo(n) for n in CLEAN)
    assert "5 photos are new in" in capsys.readouterr().out
    fetch(server.url)
    assert "already" in capsys.readouterr().out and server.requests == [None]
    assert not list((tmp_path / "cache").iterdir())


def test_all_of_them_and_none_is_overwritten(serve, fetch, capsys):
    folder = fetch(serve(lambda handler, _: reply(handler, WHOLE)).url)
    (folder / "cat_3.png").write_text("mine")
    (folder / "cat_7.png").unlink()
    fetch(serve(lambda handler, _: reply(handler, WHOLE)).url, everything=True)
    assert names(folder) == NAMES | {f"cat_{n}.png" for n in range(8)}
    assert (folder / "cat_3.png").read_text() == "mine"
    assert (folder / "cat_7.png").read_bytes() == photo(7)
    assert "5 photos are new" in capsys.readouterr().out  # 7, and 0, 1, 5, 6


def test_an_archive_fetched_by_hand_is_kept(fetch, tmp_path):
    (tmp_path / "by hand.zip").write_bytes(WHOLE)
    assert names(fetch(str(tmp_path / "by hand.zip"))) == NAMES
    (tmp_path / "deep" / "cats" / "cat_3.png").unlink()
    (tmp_path / "by hand.zip").write_bytes(archive({3: b"no"}))
    with pytest.raises(helpers.UsageError, match="cat_3.png is damaged"):
        fetch(str(tmp_path / "by hand.zip"))
    assert (tmp_path / "by hand.zip").exists()


def test_a_cut_connection_is_taken_up_where_it_broke(serve, fetch):
    server = serve(lambda handler, start: reply_part(handler, start, until=None if start else HALF))
    folder = fetch(server.url)
    assert server.requests == [None, f"bytes={HALF}-"]
    assert all((folder / f"cat_{n}.png").read_bytes() == photo(n) for n in CLEAN)


def test_the_next_call_goes_on_as_well(serve, fetch, fails):
    upto = [HALF // 2, HALF, None]
    server = serve(lambda handler, start: reply_part(handler, start, until=upto.pop(0)))
    fails(server.url, "cut again and again", tries=2)
    assert names(fetch(server.url)) == NAMES
    assert server.requests == [None, f"bytes={HALF // 2}-", f"bytes={HALF}-"]


def test_a_server_that_cannot_go_on_begins_again(serve, fetch):
    lengths = [HALF, None]
    server = serve(lambda handler, _: reply(handler, WHOLE[: lengths.pop(0)], length=len(WHOLE)))
    folder = fetch(server.url)
    assert server.requests == [None, f"bytes={HALF}-"]
    assert all((folder / f"cat_{n}.png").read_bytes() == photo(n) for n in CLEAN)


def test_a_part_that_was_not_asked_for_is_refused(serve, fetch):
    cut = [HALF, None, None]
    server = serve(lambda handler, start: reply_part(handler, start, until=cut.pop(0), at=3))
    folder = fetch(server.url)
    assert server.requests == [None, f"bytes={HALF}-", None]
    assert all((folder / f"cat_{n}.png").read_bytes() == photo(n) for n in CLEAN)


def test_a_reset_connection_is_tried_again(serve, fetch):
    def answer(handler, start):
        if not start:
            reply(handler, WHOLE[:HALF], length=len(WHOLE))
            time.sleep(0.1)
            reset = struct.pack("ii", 1, 0)
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            handler.connection.close()
        else:
            reply_part(handler, start)

    assert names(fetch(serve(answer).url)) == NAMES


@pytest.mark.parametrize("after", [0, HALF])
def test_a_server_that_stalls_is_left(serve, fails, after):
    def answer(handler, start):
        if after:
            reply(handler, WHOLE[:after], length=len(WHOLE))
        handler.server.released.wait(20)

    server, started = serve(answer), time.monotonic()
    fails(server.url, "timed out", tries=2)
    assert len(server.requests) == 2 and time.monotonic() - started < 5


def test_a_server_that_trickles_is_left(serve, fails):
    def answer(handler, start):
        reply(handler, WHOLE[:4], length=len(WHOLE))
        for _ in range(200):
            handler.server.released.wait(0.02)
            handler.wfile.write(b"x")

    started = time.monotonic()
    fails(serve(answer).url, "slower than 1,000 bytes per second", tries=2)
    assert time.monotonic() - started < 5


def test_a_stall_is_overcome(serve, fetch):
    def answer(handler, start):
        reply_part(handler, start, until=None if start else HALF)
        if not start:
            handler.server.released.wait(20)

    server = serve(answer)
    assert names(fetch(server.url)) == NAMES and server.requests == [None, f"bytes={HALF}-"]


@pytest.mark.parametrize("length", [10 * len(WHOLE), "none"])
def test_a_whole_archive_is_enough_whatever_size_was_announced(serve, fetch, length):
    assert names(fetch(serve(lambda h, _: reply(h, WHOLE, length=length)).url)) == NAMES


def test_a_size_that_is_too_small_is_a_cut(serve, fails):
    server = serve(lambda handler, _: reply(handler, WHOLE, length=HALF))
    fails(server.url, "cut again and again")
    assert server.requests == [None, f"bytes={HALF}-", f"bytes={HALF}-"]


def test_nothing_left_to_send_means_from_the_start(serve, fetch):
    def answer(handler, start):
        if start:
            return reply(handler, b"", 416, Content_Range=f"bytes */{HALF}")
        whole = len(handler.server.requests) > 1
        reply(handler, WHOLE if whole else WHOLE[:HALF])

    server = serve(answer)
    assert names(fetch(server.url)) == NAMES
    assert server.requests == [None, f"bytes={HALF}-", None]


def test_a_flood_is_stopped(serve, monkeypatch, fails, tmp_path):
    receive = helpers._receive
    monkeypatch.setattr(helpers, "_receive", lambda *a: receive(*a, largest=1_000_000))

    def answer(handler, start):
        reply(handler, WHOLE, length="none")
        for _ in range(300):
            handler.wfile.write(bytes(100_000))

    server = serve(answer)
    fails(server.url, "larger than 1,000,000 bytes")
    assert len(server.requests) == 1 and not list((tmp_path / "cache").iterdir())


def test_redirects_are_followed_and_going_on_works_behind_them(serve, fetch):
    real = serve(lambda handler, start: reply_part(handler, start, until=None if start else HALF))
    server = serve(lambda handler, _: reply(handler, b"", 302, Location=real.url))
    assert names(fetch(server.url)) == NAMES
    assert real.requests == [None, f"bytes={HALF}-"]


def test_redirects_for_ever_or_to_strange_places_are_refused(serve, fails, tmp_path):
    loop = serve(lambda handler, _: reply(handler, b"", 302, Location=handler.path + "x"))
    fails(loop.url, "infinite loop")
    assert len(loop.requests) < 15
    (tmp_path / "secret.zip").write_bytes(WHOLE)
    for place in [(tmp_path / "secret.zip").as_uri(), "ftp://127.0.0.1/cats.zip", "data:,PK"]:
        strange = serve(lambda handler, _: reply(handler, b"", 301, Location=place))  # noqa: B023
        fails(strange.url, "not allowed|unknown url type")


@pytest.mark.parametrize("status", [200, 404, 503])
def test_a_web_page_is_no_archive(serve, fails, status):
    page = b"<html>Please log in to the hotel's network"
    server = serve(lambda handler, _: reply(handler, page, status, Content_Type="text/html"))
    fails(server.url, {200: "not a ZIP file", 404: "404 Not Found", 503: "503 Service"}[status])
    assert len(server.requests) == (3 if status == 503 else 1)


def test_a_web_page_does_not_spoil_what_had_arrived(serve, fetch, fails):
    answers = [
        lambda handler, start: reply_part(handler, start, until=HALF),
        lambda handler, start: reply(handler, b"<html>Please log in"),
        reply_part,
    ]
    server = serve(lambda handler, start: answers.pop(0)(handler, start))
    fails(server.url, "not a ZIP file")
    assert names(fetch(server.url)) == NAMES and server.requests[-1] == f"bytes={HALF}-"


def test_without_a_network_it_says_how_to_go_on(fails):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # and nobody listens
        fails(f"http://127.0.0.1:{free.getsockname()[1]}/cats.zip", "refused.* in a browser and")
    fails("http://there.is.no.such.place.invalid/cats.zip", "Cannot fetch", tries=1)
    for address in ["file:///etc/passwd", "ftp://127.0.0.1/a.zip", "cats.zip", ""]:
        fails(address, "begins with https://")
    fails("http://[/", "Cannot fetch")


EVIL = ["../cat_2.png", "/cat_2.png", "../../evil.png", "/tmp/ddpm-evil.png", "C:\\evil.png"]
EVIL += [f"{INSIDE}../../cat_5.png", f"{INSIDE}cat_../../cat_5.png", f"{INSIDE}a/cat_5.png"]
EVIL += [f"{INSIDE}cat_0005.png", f"{INSIDE}cat_1000000.png", f"{INSIDE}cat_٣.png"]


def test_names_in_the_archive_cannot_choose_where_to_write(serve, fetch, tmp_path):
    body = archive(extra={name: photo(99) for name in EVIL})
    folder = fetch(serve(lambda handler, _: reply(handler, body)).url, everything=True)
    assert names(folder) == NAMES | {f"cat_{n}.png" for n in range(8)}
    assert (folder / "cat_2.png").read_bytes() == photo(2)
    files = {p for p in tmp_path.rglob("*") if p.is_file()}
    assert {p.parent for p in files} == {folder}


def test_links_in_the_archive_are_no_pictures(serve, fails):
    link = zipfile.ZipInfo(f"{INSIDE}cat_7.png")
    link.external_attr = 0o120777 << 16
    buffer = io.BytesIO(archive(leave_out=[7]))
    with zipfile.ZipFile(buffer, "a") as file:
        file.writestr(link, "/etc/passwd")
    fails(serve(lambda handler, _: reply(handler, buffer.getvalue())).url, "cat_7.png is damaged")


def damaged(body, needle=b"IDAT"):
    """One byte within a picture is another: the picture's and the ZIP file's sums are wrong."""
    at = body.index(needle, len(body) // 3) + 100
    return body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]


@pytest.mark.parametrize(
    "body, words",
    [
        (archive(leave_out=[3, 4]), "lacks 2 photos, cat_3.png"),
        (archive({4: photo(4)[:2000]}), "cat_4.png is damaged"),
        (archive({4: photo(4, size=63)}), "cat_4.png is damaged or not of 64x64"),
        (archive({4: b"<html>"}), "cat_4.png is damaged"),
        (archive({4: photo(4) + bytes(2_000_000)}), "cat_4.png is damaged"),
        (damaged(WHOLE), r"cat_\d.png is damaged"),
        (WHOLE.replace(helpers.COMMIT.encode(), 40 * b"f"), "lacks 5 photos"),
        (WHOLE[:4] + WHOLE[-22:], "not the archive that it should be"),
    ],
)
def test_archives_that_are_not_what_was_meant(serve, fails, fetch, tmp_path, body, words):
    fails(serve(lambda handler, _: reply(handler, body)).url, words, everything=True)
    assert not list((tmp_path / "cache").iterdir()), "the next call must begin anew"
    assert NAMES <= names(fetch(serve(lambda handler, _: reply(handler, WHOLE)).url))


def test_a_full_disk_leaves_nothing_and_keeps_the_archive(serve, fetch, tmp_path, monkeypatch):
    server = serve(lambda handler, _: reply(handler, WHOLE))
    write, written = helpers.Path.write_bytes, []

    def full(path, data):
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(write(path, data))

    monkeypatch.setattr(helpers.Path, "write_bytes", full)
    with pytest.raises(helpers.UsageError, match="No space left on device; make room"):
        fetch(server.url)
    assert not list((tmp_path / "deep" / "cats").iterdir())
    monkeypatch.undo()
    monkeypatch.setattr(helpers, "clean_numbers", lambda: CLEAN)
    assert names(fetch(server.url)) == NAMES and server.requests == [None]


def test_the_list_of_clean_photos():
    numbers = helpers.clean_numbers()
    assert len(numbers) == 8181 and numbers == sorted(set(numbers))
    assert numbers[:6] == [0, 5, 6, 9, 11, 15] and numbers[-1] == 29837
    assert (ROOT / "cats_large" / "clean.txt").read_text().startswith("# ")


def test_from_the_command_line(serve, tmp_path, capsys):
    numbers = helpers.clean_numbers()
    same = photo(0)  # one photo will do for all
    whole = archive({n: same for n in numbers})
    server = serve(lambda handler, _: reply(handler, whole))
    assert not helpers.main(["download", "--url", server.url, "--to", str(tmp_path / "new")])
    assert "8,181 photos are new in" in capsys.readouterr().out
    assert names(tmp_path / "new") == {f"cat_{n}.png" for n in numbers}
    page = serve(lambda handler, _: reply(handler, b"<html>"))
    error = run("download", "--url", page.url, "--to", "none", cwd=tmp_path, code=2).stderr
    assert "by hand" in error and not (tmp_path / "none").exists()


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone")
def test_git_never_takes_a_photo():
    def ignored(name):
        command = ["git", "check-ignore", "-q", "--no-index", f"cats_large/{name}"]
        return subprocess.run(command, cwd=ROOT).returncode == 0

    for name in ["cats/cat_0.png", "cats/cat_29842.png", "cats/me.jpg", "cats/.download-a/5"]:
        assert ignored(name)
    assert ignored("photos/a.jpg") and ignored("cats/more/cat_1000000.png")
    assert not ignored("cats/cat_1000000.png") and not ignored("cats/cat_1002047.png")
    assert not ignored("clean.txt") and not ignored("README.md")

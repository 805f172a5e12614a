"""All but the diffusion: pictures, plots, GIFs, checkpoints, the widget, the command line.

The diffusion itself (schedule, network, loss, training, sampling) is defined once, in
DDPM_cats.ipynb. `notebook()` hands those definitions to Python programs:

    import ddpm_helpers
    ddpm = ddpm_helpers.notebook()
    cats = ddpm.draw(ddpm.load_model("model.pt"), count=16, seed=7)  # bytes (16, 3, 24, 24)
"""

import argparse
import ast
import contextlib
import hashlib
import http.client
import importlib
import inspect
import io
import json
import linecache
import math
import os
import re
import secrets
import sys
import tempfile
import threading
import time
import types
import urllib.error
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache, partial, wraps
from pathlib import Path

import numpy as np
import psutil
import torch
from IPython.core.inputtransformer2 import TransformerManager
from PIL import Image, ImageDraw, ImageOps
from torchvision.utils import make_grid
from tqdm import tqdm

PROJECT = Path(__file__).resolve().parent
CATS = (PROJECT / "cats_large" / "cats").resolve()
COMMIT = "c463f7f29d538bf46e5972f040ba16ddddfba533"
ARCHIVE = f"https://github.com/AnnikaV9/cat-dataset/archive/{COMMIT}.zip"
SAMPLERS = {"dpm": "DPM-Solver++", "ddim": "DDIM", "ddpm": "Algorithm 2"}  # and how we call them
ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"}


class UsageError(ValueError):
    """Something that the user can mend; the message is one sentence that says how."""

    def _render_traceback_(self):  # IPython shows this in place of a stack trace
        return [f"{type(self).__name__}: {self}"]


# ---------------------------------------------------------------- the notebook's definitions


@cache
def notebook(path=PROJECT / "DDPM_cats.ipynb"):
    """The notebook as a module: its imports, functions and classes, without running it."""
    module = types.ModuleType("ddpm_cats")
    module.__file__ = str(path)
    sys.modules.setdefault("ddpm_helpers", sys.modules[__name__])
    sys.modules[module.__name__] = module
    cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
    for number, cell in enumerate(cells):
        if cell["cell_type"] != "code":
            continue
        source = TransformerManager().transform_cell("".join(cell["source"]))  # %magic, !command
        try:
            tree = ast.parse(source)
        except SyntaxError as error:
            raise UsageError(f"Cell {number} of {path} is not valid Python: {error}.") from None
        kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
        tree.body = [node for node in tree.body if isinstance(node, kinds)]
        name = f"{path}, cell {number}"
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)  # for tracebacks
        exec(compile(tree, name, "exec"), vars(module))
    return module


def overrides(parameters, prefix="DDPM_"):
    """The parameters (upper-case names) that environment variables such as DDPM_MODE change."""
    changed = {}
    for variable, text in os.environ.items():
        name = variable.removeprefix(prefix)
        if name == variable:
            continue
        if name not in parameters or not name.isupper():
            raise UsageError(f"There is no parameter {name}, which {variable} wants to set.")
        kind = type(parameters[name])
        try:
            changed[name] = kind(text)
        except ValueError:
            raise UsageError(f"{variable} must be of type {kind.__name__}, not {text!r}.") from None
    return changed


def check_parameters(p):
    """Raise UsageError if one of the notebook's parameters, by name, makes no sense."""
    if p["MODE"] not in ("lesson", "full", "skip"):
        raise UsageError(f'MODE is "lesson", "full" or "skip", not {p["MODE"]!r}.')
    lowest = dict(SIZE=8, TIMESTEPS=20, EPOCHS=1, BATCH_SIZE=1, FILM_STEPS=1, JUDGED=2, SEED=0)
    lowest |= dict(LESSON_EPOCHS=1, LESSON_PICTURES=2)
    for name, least in lowest.items():
        if type(p[name]) is not int or p[name] < least:
            raise UsageError(f"{name} must be a whole number from {least}, not {p[name]!r}.")
    if p["SIZE"] % 4 or p["SIZE"] > 64:
        raise UsageError(f"SIZE must be a multiple of 4 from 8 to 64, not {p['SIZE']}.")
    if not 0 < p["LEARNING_RATE"] < 1:
        raise UsageError(f"LEARNING_RATE must be between 0 and 1, not {p['LEARNING_RATE']!r}.")


# ------------------------------------------------------------------------------------ pictures


def find_pictures(folder, tell=False):
    """The picture files in a folder and the folders inside it, sorted by name.

    The project's own pictures, drawn by its network, are left out if there are others.
    """
    folder = Path(folder).expanduser()
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())
    if not found:
        what = "holds no pictures" if folder.is_dir() else "is not a folder"
        kinds = ", ".join(sorted(e[1:] for e in ENDINGS))
        raise UsageError(f"{folder} {what}: put pictures there ({kinds}), or name another folder.")
    others = [p for p in found if not _is_drawn(p)]
    if tell and 0 < len(others) < len(found):
        print(f"Left out {len(found) - len(others)} pictures that the network drew")
    return others or found


def _is_drawn(path):
    """Whether it is one of the pictures that come with the project."""
    return bool(re.fullmatch(r"cat_100\d{4}\.png", path.name)) and path.parent.resolve() == CATS


def open_picture(path, at_least=None):
    """A file as an upright RGB PIL image; transparent parts become white.

    at_least: a size in pixels below which a JPEG need not be decoded (saves time).
    """
    image = Image.open(path)
    if at_least:
        image.draft("RGB", (at_least, at_least))
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey
        image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def fit(image, size):
    """The central square of a PIL image, shrunk (antialiased) or enlarged to size x size."""
    return ImageOps.fit(image, (size, size), method=Image.Resampling.BICUBIC)


def load_pictures(folder, size, cache_folder=PROJECT / ".cache", channels=0):
    """All pictures of a folder as bytes (N, C, size, size), sorted by name; see `find_pictures`.

    channels: 3 is colour, 1 is grey; 0 is grey if all pictures are, else colour. The result is
    cached until a file, the folder, the size or `channels` changes. A line each is printed about
    files that cannot be read and are left out, about pictures that repeat others, and if there
    are so few that the network will learn them by heart.
    """
    paths = find_pictures(folder, tell=True)
    root = Path(folder).expanduser().resolve()
    key = hashlib.sha256(f"{root} {size} {channels}".encode()).hexdigest()[:16]
    stats = [(str(p), s.st_size, s.st_mtime_ns) for p in paths for s in [p.stat()]]
    state = hashlib.sha256(repr(("bicubic 2", stats)).encode()).hexdigest()
    cached = Path(cache_folder) / f"pictures-{key}.pt"
    try:
        stored = torch.load(cached, weights_only=True, mmap=True)  # a file of gigabytes will do
    except Exception:  # no cache, or a damaged one: read the pictures again
        stored = {}
    if stored.get("state") != state:
        stored = {"state": state} | _read_pictures(paths, size, channels)
        with contextlib.suppress(UsageError):  # no room for it: the next start takes longer
            write_file(cached, lambda part: torch.save(stored, part))
    for note in stored["notes"]:
        print(note)
    return stored["pictures"]


def _read_pictures(paths, size, channels):
    """What `load_pictures` keeps: the pictures and the notes to print."""

    def read(path):
        try:
            image = fit(open_picture(path, at_least=3 * size), size)
            image = np.asarray(image.convert("L") if channels == 1 else image)
            return image.reshape(size, size, -1).transpose(2, 0, 1)
        except Exception:  # whatever the damage, one bad file must not stop the others
            return None

    pictures = np.empty((len(paths), channels or 3, size, size), np.uint8)
    kept, unreadable, colour, notes = [], [], channels > 0, []
    with ThreadPoolExecutor() as pool, tqdm(total=len(paths), mininterval=1, unit="") as bar:
        bar.set_description("reading pictures")
        for start in range(0, len(paths), 1000):  # a hundred thousand tasks would take memory
            some = paths[start : start + 1000]
            for path, picture in zip(some, pool.map(read, some)):
                bar.update()
                if picture is None:
                    unreadable.append(path.name)
                    continue
                pictures[len(kept)] = picture
                colour = colour or (picture != picture[:1]).any()
                kept.append(path)
    if not kept:
        example = f"{paths[0]} for example"
        raise UsageError(f"None of the {len(paths)} files can be read as a picture, {example}.")
    pictures = pictures[: len(kept)]
    pictures = torch.from_numpy(pictures if colour else pictures[:, :1].copy())
    if unreadable:
        more = f" and {len(unreadable) - 10} more" if len(unreadable) > 10 else ""
        left_out, listed = len(unreadable), ", ".join(unreadable[:10])
        notes = [f"Left out {left_out} of {len(paths)} files that cannot be read: {listed}{more}"]
    if len(kept) < 500:
        few = f"Fewer than 500 pictures ({len(kept)}): the network will learn them by heart"
        notes.append(f"{few} and draw copies")
    count, pair = find_repeats(pictures)
    if count:
        example = " and ".join(str(kept[i]) for i in pair)
        notes.append(f"Pictures that nearly repeat another: {count}, for example {example}")
    return {"pictures": pictures, "notes": notes}


def find_repeats(pictures, tolerance=2.5):
    """Of bytes (N, C, H, W), how many pictures nearly repeat another, and the first such pair.

    They are shrunk to 8x8 pixels of grey and compared; tolerance: the root of the mean squared
    difference. Means differ by less than that, so only pictures of like means are compared.
    """
    shrink = torch.nn.AdaptiveAvgPool2d(8)
    tiny = [shrink(p.float().mean(1, keepdim=True)).flatten(1) for p in pictures.split(1000)]
    tiny = torch.cat(tiny) - 128
    order = tiny.mean(dim=1).argsort()
    tiny = tiny[order]  # (N, 64), the darkest first
    means, repeats, pair = tiny.mean(dim=1), torch.zeros(len(tiny), dtype=torch.bool), ()
    for i in range(0, len(tiny), 128):
        some = tiny[i : i + 128]
        end = int(torch.searchsorted(means, some[-1].mean() + tolerance))
        near = (torch.cdist(some, tiny[i:end]) / 8 < tolerance).triu(1)
        if near.any():
            repeats[i:end] |= near.any(dim=0)
            pair = pair or order[i + near.nonzero()[0]].sort().values.tolist()
    return int(repeats.sum()), pair


def check_picture(picture, config):
    """`picture` itself, if it is bytes (C, H, W) as a network of this configuration draws them."""
    shape = (config["channels"], config["size"], config["size"])
    if picture.dtype != torch.uint8 or tuple(picture.shape) != shape:
        raise UsageError(
            f"The picture must be bytes of shape {shape}, not {tuple(picture.shape)} "
            f"of {picture.dtype}: `fit` shrinks and `to_picture` converts."
        )
    return picture


def scribble(size, channels=3):
    """What a child calls a cat, on green: bytes (channels, size, size)."""
    image = Image.new("RGB", (240, 240), (150, 190, 140))
    pen, fur = ImageDraw.Draw(image), (226, 150, 70)
    pen.polygon([(35, 120), (40, 10), (115, 70)], fill=fur)  # ears
    pen.polygon([(205, 120), (200, 10), (125, 70)], fill=fur)
    pen.ellipse([30, 45, 210, 230], fill=fur)  # face
    pen.ellipse([80, 140, 160, 220], fill=(250, 235, 215))  # muzzle
    for x in (85, 155):
        pen.ellipse([x - 20, 95, x + 20, 135], fill=(60, 120, 60))  # eyes
        pen.ellipse([x - 7, 98, x + 7, 132], fill="black")
    pen.polygon([(105, 150), (135, 150), (120, 170)], fill=(200, 90, 100))  # nose
    return to_picture(fit(image, size).convert("RGB" if channels == 3 else "L"))


def to_picture(image):
    """PIL image -> bytes (C, H, W)."""
    array = np.array(image)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())


# ------------------------------------------------------------------------------------ download


def download_cats(
    everything=False,
    url=ARCHIVE,
    to=CATS,
    tries=4,
    timeout=20,
    pause=1,
    cache_folder=PROJECT / ".cache",
):
    """Put the photos of a public set into a folder, as cat_N.png; what is there stays as it is.

    everything: all 29,843, not just the clean, distinct ones of cats_large/clean.txt.
    url: the address of the archive, or the name of its file. tries, timeout, pause: how often
    to try, after how many seconds without news to try again, and the first wait before that.
    Raises UsageError if that fails; then nothing new is in the folder, and the next call goes on
    with what has arrived, if the server can.
    """
    to = Path(to).expanduser()
    if not everything and not _missing(clean_numbers(), to):
        print(f"The {len(clean_numbers()):,} photos are in {to} already")
        return
    by_hand = (
        f"to get the set by hand, open {ARCHIVE} in a browser and run `python ddpm_helpers.py "
        "download --url FILE` with the name of the file it saves"
    )
    archive = Path(url).expanduser()
    fetched = not archive.is_file()
    if fetched:
        name = hashlib.sha256(url.encode()).hexdigest()[:16]
        archive = Path(cache_folder) / f"cats-{name}.zip.part"
        try:
            _fetch(url, archive, tries, timeout, pause)
        except ConnectionError as error:
            raise UsageError(f"{error}; try again later, or, {by_hand}.") from None
    try:
        count = _unpack(archive, to, everything)
    except OSError as error:
        why = error.strerror or error
        raise UsageError(f"Cannot write to {to}: {why}; make room or use another place.") from None
    except Exception as error:  # what zipfile raises for damaged archives is a long list
        if fetched:
            archive.unlink()
        message = f"{url} is not the archive that it should be ({error}); try again, or, {by_hand}."
        raise UsageError(message) from None
    if fetched:
        archive.unlink()
    print(f"{count:,} photos are new in {to}")


def clean_numbers():
    """The numbers of the set's clean, distinct photos, rising: cats_large/clean.txt."""
    text = (PROJECT / "cats_large" / "clean.txt").read_text().partition("\n")[2]
    spans = re.findall(r"(\d+)(?:-(\d+))?", text)
    return [n for first, last in spans for n in range(int(first), int(last or first) + 1)]


def _missing(numbers, folder):
    return [n for n in numbers if not os.path.lexists(folder / f"cat_{n}.png")]


def _fetch(url, part, tries, timeout, pause):
    """Download a ZIP file, going on with what is there; raises ConnectionError."""
    why = "not an address that begins with https:// or http://, and not a file"
    for attempt in range(tries if url.startswith(("https://", "http://")) else 0):
        if zipfile.is_zipfile(part):  # the end is there
            return
        time.sleep(pause * (2**attempt - 1))
        try:
            _receive(url, part, timeout)
            why = "the connection is cut again and again"
        except urllib.error.HTTPError as error:
            why = f"{error.code} {error.reason}".splitlines()[0]
            if error.code == 416:  # there is no more to be had, and it is no ZIP file
                part.unlink(missing_ok=True)
            elif error.code < 500 and error.code != 429:
                break
        except ValueError as error:
            why = error
            break
        except (OSError, http.client.HTTPException) as error:
            why = getattr(error, "reason", None) or str(error) or type(error).__name__
    if not zipfile.is_zipfile(part):
        raise ConnectionError(f"Cannot fetch {url} ({why})")


def _receive(url, part, timeout, slowest=1000, largest=10**9):
    """One request that appends to the file `part`, or begins it anew if the server wants so.

    Raises ValueError for what trying again will not mend, OSError or HTTPException for the rest.
    """
    opener = urllib.request.OpenerDirector()  # no file://, no ftp://, wherever we are led
    handlers = "ProxyHandler HTTPHandler HTTPSHandler HTTPRedirectHandler UnknownHandler"
    for name in f"{handlers} HTTPDefaultErrorHandler HTTPErrorProcessor".split():
        opener.add_handler(getattr(urllib.request, name)())
    have = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    with opener.open(urllib.request.Request(url, headers=headers), timeout=timeout) as response:
        if response.status == 206:
            if not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                part.unlink(missing_ok=True)
                raise OSError("the server sent another part than it was asked for")
            block = response.read1(1 << 16)
        else:
            have, block = 0, response.read(4)
            if block and block != b"PK\3\4":
                raise ValueError("what it sends is not a ZIP file")
        length = response.headers.get("Content-Length", "")
        total = have + int(length) if length.isdigit() else None
        part.parent.mkdir(parents=True, exist_ok=True)
        size, before, since = have, have, time.monotonic()
        with (
            open(part, "ab" if have else "wb") as file,
            tqdm(desc="downloading", initial=have, total=total, unit="B", unit_scale=True) as bar,
        ):
            while block:
                file.write(block)
                bar.update(len(block))
                size += len(block)
                if size > largest:
                    part.unlink()
                    raise ValueError(f"it is larger than {largest:,} bytes")
                if time.monotonic() - since > timeout:
                    if size - before < slowest * timeout:
                        raise OSError(f"it is slower than {slowest:,} bytes per second")
                    before, since = size, time.monotonic()
                block = response.read1(1 << 16)


def _unpack(archive, to, everything):
    """Write those photos of the archive that are not there yet; returns how many.

    All are checked before the first one is put in its place. The names in the archive choose
    what is read, but never where it is written to."""
    with zipfile.ZipFile(archive) as content:
        members = {}
        for member in content.infolist():
            pattern = rf"cat-dataset-{COMMIT}/cats/cat_(0|[1-9]\d{{0,4}})\.png"
            if match := re.fullmatch(pattern, member.filename, re.ASCII):
                members[int(match[1])] = member
        lacking = [n for n in clean_numbers() if n not in members]
        if lacking:
            raise ValueError(f"it lacks {len(lacking):,} photos, cat_{lacking[0]}.png for one")
        numbers = _missing(sorted(members) if everything else clean_numbers(), to)
        to.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=to) as folder:
            for n in tqdm(numbers, "unpacking", unit=""):  # without .png: no pictures yet
                Path(folder, str(n)).write_bytes(_photo(content, members[n]))
            for n in numbers:
                os.replace(Path(folder, str(n)), to / f"cat_{n}.png")
    return len(numbers)


def _photo(content, member):
    """The bytes of a picture in a ZipFile, checked; raises ValueError."""
    try:
        if member.file_size < 1_000_000:
            data = content.read(member)
            with Image.open(io.BytesIO(data), formats=["PNG", "JPEG"]) as image:
                image.load()
                if image.size == (64, 64):
                    return data
    except Exception:  # whatever the damage
        pass
    raise ValueError(f"{Path(member.filename).name} is damaged or not of 64x64 pixels")


# --------------------------------------------------------------------------------------- files


def write_file(path, write):
    """Call write(temporary path), then move the result to `path`: all of it or nothing."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        why = getattr(error, "strerror", None) or str(error).splitlines()[0]
        message = f"Cannot write {path}: {why}; make room or choose another place."
        raise UsageError(message) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


@cache
def _scratch():
    return tempfile.TemporaryDirectory(prefix="ddpm-cats-")  # gone when Python ends


def scratch_file(name):
    """A path in a new temporary folder, for what nobody wants to keep."""
    return Path(tempfile.mkdtemp(dir=_scratch().name)) / name


def fingerprint(content):
    """16 digits that tell one file's content from another, or one set of pictures: bytes."""
    return hashlib.sha256(content).hexdigest()[:16]


def save_model(path, model, record):
    """Weights, configuration and training record in one file of plain tensors and numbers."""
    weights = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    content = {"format": "ddpm-cats 1", "predicts": "v", "config": model.config}
    content |= {"record": record, "weights": weights}
    write_file(path, lambda part: torch.save(content, part))


def read_model(path, network):
    """Build `network(**config)` from a file written by `save_model`; its `record` is set too."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"There is no {path}: train a network first, or name another checkpoint.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        ours = content["format"] == "ddpm-cats 1" and content["predicts"] == "v"
    except Exception:
        ours = False
    if not ours:
        raise UsageError(f"{path} is damaged or not a checkpoint of this project: fetch it again.")
    try:
        model = network(**content["config"])
        model.load_state_dict(content["weights"])
    except (KeyError, TypeError, RuntimeError, ValueError):
        raise UsageError(
            f"{path} holds another network than this notebook defines: train anew."
        ) from None
    model.record = content["record"]
    return model.eval()


def describe(record):
    """The training record of a checkpoint as text, a line each."""
    return "\n".join(f"  {k}: {v}" for k, v in record.items() if not isinstance(v, list))


def learned_from(model, pictures, seed):
    """Whether a network from a checkpoint was trained on just these bytes (N, C, H, W), less
    those that were held out by this seed."""
    content = fingerprint(pictures.contiguous().numpy())
    return (model.record.get("content"), model.record.get("seed")) == (content, seed)


class TrainingRun:
    """The files of one training: `out`, the best model, and beside it `out` with the ending
    .training: all that is needed to go on after the last whole epoch, to the bit."""

    def __init__(self, out, pictures, settings, model, average, optimizer, rng, accelerator):
        """Load what there is into model, average (networks), optimizer and rng (a Generator).

        settings: numbers that must be the same on resuming. Raises UsageError if `out` cannot
        be written, or if it or its state file belong to another training."""
        self.out, self.state_file = Path(out), Path(out).with_suffix(".training")
        content = fingerprint(pictures.contiguous().numpy())
        self.settings = {"pictures": len(pictures), "content": content} | settings
        self.settings |= {k: str(v) for k, v in model.config.items()}
        self.model, self.average, self.optimizer, self.rng = model, average, optimizer, rng
        self.accelerator = accelerator
        self.epoch, self.best, self.seconds, self.heldout = 0, math.inf, 0.0, []
        if self.state_file.exists():
            self._go_on()
        elif self.out.exists():
            raise UsageError(f"{out} exists already: move it away, or choose another name.")
        self.started = time.time()
        if accelerator.is_main_process:
            for left_behind in self.out.parent.glob(f".{self.out.stem}.*.part"):  # when killed
                left_behind.unlink(missing_ok=True)
        accelerator.wait_for_everyone()  # nobody writes before all have looked
        self._save()  # now, so that a full disk shows before hours are spent

    def _go_on(self):
        try:
            state = torch.load(self.state_file, map_location="cpu", weights_only=True)
            settings = state["settings"]
        except Exception:
            raise UsageError(f"{self.state_file} is damaged: delete it to train anew.") from None
        if state["epoch"] > 0 and not self.out.exists():
            raise UsageError(
                f"{self.state_file} is there but {self.out} is gone: put it back to go on, "
                f"or delete {self.state_file.name} to train anew."
            )
        changed = [k for k in self.settings if settings.get(k) != self.settings[k]]
        if changed:
            was = ", ".join(f"{k} was {settings.get(k)}, is {self.settings[k]}" for k in changed)
            raise UsageError(
                f"{self.state_file} belongs to another training ({was}): delete it and "
                f"{self.out.name} to train anew, or choose another name."
            )
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["rng_device"] == self.rng.device.type:
            self.rng.set_state(state["rng"])
        else:  # a CPU cannot go on with a GPU's random numbers: take new ones
            self.rng.manual_seed(self.settings["seed"] + state["epoch"])
        self.epoch, self.best = state["epoch"], state["best"]
        self.seconds, self.heldout = state["seconds"], state["heldout"]
        if self.out.exists():  # an interrupted epoch may have left a better one
            record = torch.load(self.out, map_location="cpu", weights_only=True)["record"]
            self.best = min(self.best, record["heldout_loss"])

    def _save(self):
        if self.accelerator.is_main_process:
            state = {"settings": self.settings, "epoch": self.epoch, "best": self.best}
            state |= {"seconds": self.seconds, "heldout": self.heldout}
            state |= {"model": self.model.state_dict(), "average": self.average.state_dict()}
            state |= {"optimizer": self.optimizer.state_dict(), "rng": self.rng.get_state()}
            state |= {"rng_device": self.rng.device.type}
            write_file(self.state_file, lambda part: torch.save(state, part))

    def check(self, loss, where):
        """Stop a training that has lost its way; the files stay as they are."""
        if not math.isfinite(loss):
            kept = f"The best weights so far are in {self.out}. " if self.out.exists() else ""
            raise UsageError(
                f"The loss became {float(loss)} {where}. {kept}"
                f"Move it and {self.state_file.name} away and train anew, "
                f"with a smaller learning rate than {self.settings['lr']}."
            )

    def keep_if_best(self, loss):
        """Write the average to `out` if its held-out loss is the lowest so far."""
        if loss < self.best and self.accelerator.is_main_process:
            self.best = loss
            copied = ("pictures", "content", "batch_size", "lr", "seed")
            record = {k: self.settings[k] for k in copied}
            record |= {"epochs": self.epoch, "heldout_loss": loss, "device": device_name()}
            record |= {"processes": self.accelerator.num_processes}
            record |= {"seconds": round(self._clock()), "torch": str(torch.__version__)}
            record |= {"heldout_losses": [round(x, 6) for x in self.heldout]}  # after each epoch
            save_model(self.out, self.average, record)

    def interrupted(self, examine):
        """Keep what there is if it is the best, unless Python itself is about to end."""
        if not sys.is_finalizing():
            with self.accelerator.autocast():
                self.keep_if_best(examine())

    def _clock(self):
        return self.seconds + time.time() - self.started

    def after_step(self, step, per_epoch, loss, examine):
        """Watch the loss; at the end of an epoch, examine, keep the best, save the state.

        Returns the examination's result, or None within an epoch."""
        if step % 10 == 0:
            self.check(loss.item(), f"at step {step + 1}")
        if (step + 1) % per_epoch:
            return None
        with self.accelerator.autocast():
            loss = examine()
        self.epoch += 1
        self.check(loss, f"in epoch {self.epoch}")
        self.heldout.append(loss)
        self.keep_if_best(loss)
        self.seconds, self.started = self._clock(), time.time()
        self._save()
        return loss


# -------------------------------------------------------------------------------------- device


def device_name():
    """What the training ran on, for the record."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if torch.backends.mps.is_available():
        return "Apple GPU"
    return f"CPU, {torch.get_num_threads()} threads"


@cache
def bf16_is_faster():
    """Whether 16-bit convolutions pay here: asked of the GPU, measured on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.backends.mps.is_available():
        return False
    conv = torch.nn.Conv2d(64, 64, 3, padding=1).to(memory_format=torch.channels_last)
    x = torch.randn(16, 64, 24, 24).to(memory_format=torch.channels_last)

    def seconds(dtype):
        layer, picture, best = conv.to(dtype), x.to(dtype), math.inf
        for _ in range(12):  # the fastest counts, as others may be at work
            start = time.perf_counter()
            with torch.enable_grad():
                layer(picture).sum().backward()
            best = min(best, time.perf_counter() - start)
        return best

    return seconds(torch.bfloat16) < 0.8 * seconds(torch.float32)


def _is_first_process():
    return os.environ.get("RANK", "0") == "0"


def drawing_precision():
    """A context in which networks calculate with 16 bits, if that is faster here.

    The pictures change by a few levels of 255 at most: by 3 in 64 cats."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.autocast(kind, torch.bfloat16, enabled=bf16_is_faster())


# --------------------------------------------------------------------------------------- plots


def grid(pictures, columns=8, padding=1):
    """Bytes (N, C, H, W) -> one picture, bytes (3, h, w), row by row on white."""
    return make_grid(pictures, nrow=columns, padding=padding, pad_value=255)


def to_image(picture, scale=1):
    """Bytes (C, H, W) -> PIL image, each pixel enlarged to scale x scale."""
    array = picture.permute(1, 2, 0).cpu().numpy()
    image = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def save_png(picture, path, scale=1):
    """Write bytes (C, H, W) as a PNG, each pixel enlarged to scale x scale."""
    image = to_image(picture, scale)
    write_file(path, lambda part: image.save(part, format="PNG"))


def _draw(axis, picture, title=None):
    axis.imshow(np.asarray(to_image(picture).convert("RGB")), interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    if title:
        axis.set_title(title, fontsize=8)


def show_figure(figure):
    """Show a matplotlib figure as a PNG of 256 colours: a third of the bytes in the notebook."""
    from IPython import display
    from matplotlib import pyplot as plt

    figure.tight_layout(pad=0.5)
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=80, bbox_inches="tight", pad_inches=0.05)
    plt.close(figure)
    Image.open(drawn).convert("RGB").quantize(256, kmeans=1).save(small, "PNG", optimize=True)
    display.display(display.Image(small.getvalue(), format="png"))


def show_rows(rows, titles=None, width=10):
    """Plot {label: bytes (N, C, H, W)}, a row each; `titles` go above the first row."""
    from matplotlib import pyplot as plt

    columns = max(len(row) for row in rows.values())
    size = width / columns
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(width, size * 1.12 * len(rows)), squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for row, (label, pictures) in enumerate(rows.items()):
        for column, picture in enumerate(pictures):
            axes[row, column].axis("on")
            _draw(axes[row, column], picture, titles[column] if titles and row == 0 else None)
        axes[row, 0].set_ylabel(label, fontsize=8)
    show_figure(figure)


def show_before_after(folder, size, count=10):
    """Plot the first readable pictures of a folder above what becomes of them at size x size."""
    before, after = [], []
    for path in find_pictures(folder):
        with contextlib.suppress(Exception):  # `load_pictures` names what cannot be read
            image = open_picture(path, at_least=200)
            shrunk = fit(image, size)
            image.thumbnail((200, 200))
            for row, picture in ((before, image), (after, shrunk)):
                row.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
        if len(after) == count:
            break
    show_rows({"file": before, f"{size}x{size}": after})


class TrainingView:
    """A progress bar with loss and time left; in a notebook also a live picture of the losses
    and a row of samples after each epoch."""

    def __init__(self, show=True):
        self.bar, self.display, self.show = None, None, show
        self.losses, self.heldout, self.samples, self.drawn = [], [], {}, 0.0

    def update(self, progress):
        """Take in a `Progress` of the notebook's `train`."""
        if self.bar is None:
            done, total = progress.step - 1, progress.steps
            quiet = not _is_first_process()
            self.bar = tqdm(desc="training", initial=done, total=total, disable=quiet)
        self.bar.update()
        if progress.heldout is not None:
            self.heldout.append((progress.step, progress.heldout))
        if progress.step % 5 == 0 or progress.heldout is not None:
            self.losses.append((progress.step, float(progress.loss)))
            heldout = f"{self.heldout[-1][1]:.4f}" if self.heldout else "-"
            self.bar.set_postfix(loss=f"{self.losses[-1][1]:.4f}", heldout=heldout, refresh=False)
        if self.show and (progress.heldout is not None or time.time() - self.drawn > 5):
            self._redraw()

    def add_samples(self, label, pictures):
        """Show bytes (N, C, H, W) in a row of their own; the newest five rows stay."""
        self.samples[label] = pictures
        self.samples = dict(list(self.samples.items())[-5:])
        self._redraw()

    def close(self):
        """End the progress bar."""
        if self.bar is not None:
            self.bar.close()

    def _redraw(self):
        from IPython.display import display
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 3), dpi=80, layout="tight")
        left, right = figure.subplots(1, 2)
        if self.losses:
            left.plot(*zip(*self.losses), lw=0.7, alpha=0.6, label="of a batch")
        if self.heldout:
            left.plot(*zip(*self.heldout), "o-", ms=3, label="held out, average")
        left.set(yscale="log", xlabel="step", title="loss")
        if self.losses or self.heldout:
            left.legend(fontsize=8)
        right.axis("off")
        if self.samples:
            _draw(right, grid(torch.cat(list(self.samples.values())), columns=8))
            right.set_title("after " + ", ".join(self.samples), fontsize=8)
        if self.display is None:
            self.display = display(figure, display_id=True)
        else:
            self.display.update(figure)
        self.drawn = time.time()


def even_in_log_snr(alphas_bar, frames, faintest=-9, clearest=9):
    """The t in 0..T whose log signal-to-noise ratios are nearest to evenly spaced ones: (k,),
    rising, without repeats, 0 and T among them; k <= frames.

    faintest, clearest: the log ratios beyond which nothing can be seen to change."""
    a = alphas_bar[1:].double()
    log_snr = (a / (1 - a)).log().clamp(faintest, clearest)
    wanted = torch.linspace(log_snr[0], log_snr[-1], frames - 1, dtype=torch.float64)
    t = 1 + (log_snr[None, :] - wanted[:, None]).abs().argmin(dim=1)
    t[-1] = len(a)
    return torch.cat([torch.zeros(1, dtype=t.dtype), t.unique()])


def gif_folder(data):
    """Where films go: gifs/own, which git ignores, if they may show pictures of your own."""
    return Path("gifs") if all(map(_is_drawn, find_pictures(data))) else Path("gifs/own")


def save_gif(
    frames, path, columns=3, scale=4, seconds=4, hold=1.5, best=-1, limit=500_000, passes=3
):
    """Write frames as an endless GIF of less than `limit` bytes.

    Each frame is a list of panels, bytes (N, C, H, W), that are shown side by side as grids.
    One palette serves all frames, so colours don't flicker; it suits frame number `best` best,
    and gets better with slow `passes`. The last frame is held. Raises UsageError if not even the
    smallest version is small enough.
    """
    images = []
    for panels in frames:
        grids = [grid(panel.cpu(), columns) for panel in panels]
        gap = torch.full_like(grids[0][:, :, :4], 255)
        parts = [part for g in grids for part in (g, gap)][:-1]
        images.append(to_image(torch.cat(parts, dim=2)).convert("RGB"))
    typical = 3 * [images[best]] + images[::3]
    montage = Image.fromarray(np.concatenate([np.asarray(i) for i in typical]))
    tries = [(scale, n, 1) for n in (128, 96, 64, 48)]
    tries += [(s, 64, 1) for s in range(scale - 1, 0, -1)] + [(1, 64, 2), (1, 48, 4)]
    for scale, colours, leap in tries:  # fewer colours first, then smaller, then fewer frames
        palette = montage.quantize(colours, method=Image.Quantize.MEDIANCUT, kmeans=passes)
        first, *rest = [
            i.quantize(palette=palette, dither=Image.Dither.NONE).resize(
                (i.width * scale, i.height * scale), Image.Resampling.NEAREST
            )
            for i in images[::-leap][::-1]
        ]
        gif = io.BytesIO()
        still = [int(1000 * seconds * leap / len(images))] * len(rest) + [int(1000 * hold)]
        options = dict(append_images=rest, duration=still, loop=0)
        first.save(gif, format="GIF", save_all=True, **options)
        if gif.tell() < limit:
            write_file(path, lambda part: part.write_bytes(gif.getvalue()))  # noqa: B023
            return
    raise UsageError(f"{path} is larger than {limit} bytes: use fewer frames or pictures.")


# ------------------------------------------------------------------------------------ measures


def quality_record(checkpoint):
    """What benchmarks/quality.py found for just this checkpoint and the photos it learned from:
    a dict of numbers and curves, {} if it was not measured."""
    try:
        text = (PROJECT / "benchmarks" / "quality.json").read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    found = json.loads(text).get(Path(checkpoint).name)
    if found and found["file"] == fingerprint(Path(checkpoint).read_bytes()):
        return found
    return {}


@cache
def _cat_faces():
    """OpenCV's detector of cat faces, or None."""
    try:
        import cv2

        name = os.path.join(cv2.data.haarcascades, "haarcascade_frontalcatface.xml")
        return cv2.CascadeClassifier(name)
    except (ImportError, AttributeError):  # not installed, or version 5, which has no cascades
        return None


def face_share(pictures):
    """The share of bytes (N, 3, H, W) in which OpenCV finds a cat's face; None without OpenCV.

    Each picture becomes 96 pixels wide, its histogram is evened out, and 16 pixels of its edge
    colours are put around it. A face is 48 wide or more, and found at two places or sizes."""
    if _cat_faces() is None:
        return None
    import cv2

    found = 0
    for picture in pictures.permute(0, 2, 3, 1).cpu().numpy():
        grey = cv2.cvtColor(np.ascontiguousarray(picture), cv2.COLOR_RGB2GRAY)
        grey = cv2.equalizeHist(cv2.resize(grey, (96, 96), interpolation=cv2.INTER_CUBIC))
        grey = cv2.copyMakeBorder(grey, 16, 16, 16, 16, cv2.BORDER_REPLICATE)
        faces = _cat_faces().detectMultiScale(grey, 1.1, 2, minSize=(48, 48))
        found += len(faces) > 0
    return found / len(pictures)


def show_race():
    """Plot and print what benchmarks/race.py found out: how good each sampler is in n steps."""
    from matplotlib import pyplot as plt

    race = json.loads((PROJECT / "benchmarks" / "race.json").read_text(encoding="utf-8"))
    figure, axis = plt.subplots(figsize=(6, 2.8))
    print("times the floor (seconds for 16 cats on two CPU cores)")
    for sampler, name in SAMPLERS.items():
        rows = [row for row in race["rows"] if row["sampler"] == sampler]
        course = [(r["steps"], r["times the floor"], r["seconds for 16"]) for r in rows]
        print(f"{name:12}", *(f"{n} steps: {d:.1f} ({s:.1f} s)" for n, d, s in course), sep="  ")
        axis.loglog(*list(zip(*course))[:2], "o-", ms=4, label=name)
    axis.axhline(1, color="gray", lw=0.7)
    marks = sorted({row["steps"] for row in race["rows"]})
    marks = [n for n, after in zip(marks, [*marks[1:], math.inf]) if after > 1.3 * n]  # legible
    axis.set_xticks(marks, marks, minor=False)
    axis.set_xticks([], minor=True)
    axis.set_yticks([1, 2, 5, 10, 20, 50], [1, 2, 5, 10, 20, 50])
    axis.set(xlabel="steps", ylabel="times the floor", title=f"{race['cats']} cats each")
    axis.legend()
    show_figure(figure)


def show_levels(panels, ylabel):
    """Plot {title: (levels, {who: {of which pictures: curve}})}, a panel each: a colour for
    each `who`, dashed from the second kind of pictures on."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.8 * len(panels), 2.8), sharey=True, squeeze=False
    )
    for axis, (title, (levels, curves)) in zip(axes[0], panels.items()):
        for colour, (who, kinds) in zip(("tab:blue", "tab:red", "tab:green"), curves.items()):
            for style, (kind, curve) in zip(("-", "--"), kinds.items()):
                axis.plot(levels, curve, style, color=colour, label=f"{who}, {kind}", lw=1.3)
        axis.set(xlabel="t", title=title)
    axes[0, 0].set(ylabel=ylabel, ylim=(-2, 1.35 * axes[0, 0].get_ylim()[1]))
    axes[0, 0].legend(fontsize=8, ncols=2, loc="upper left")
    show_figure(figure)


def quality_table(columns, separator="  "):
    """Dicts of numbers, as in benchmarks/quality.json, as text: a column each."""

    def percent(x):
        return "-" if x is None else f"{x:.0%}"

    rows = {
        "": lambda q: f"{q['name']}, {q['data']}",
        "pictures judged": lambda q: f"{q['judged']:,}",
        "nearest picture, new : held out": lambda q: f"{q['nearest'][0]:.2f}",
        "- the closest 1 %": lambda q: f"{q['nearest'][1]:.2f}",
        "Fréchet distance": lambda q: "{:.3f} ± {:.3f}".format(*q["distance"]),
        "- real to real: the floor": lambda q: "{:.3f} ± {:.3f}".format(*q["floor"]),
        "- times the floor": lambda q: f"{q['distance'][0] / q['floor'][0]:.1f}",
        "faces found": lambda q: percent(q["faces"][0]),
        "- in held-out pictures": lambda q: percent(q["faces"][1]),
        "loss, held out : learned from": lambda q: f"{q['loss'][1] / q['loss'][0]:.3f}",
    }
    table = [[name, *(text(q) for q in columns)] for name, text in rows.items()]
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = [separator.join(map(str.ljust, line, widths)).rstrip() for line in table]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------- the widget

STYLE = """
.pixels img, .pixels canvas {image-rendering: pixelated}
.pixels .image-frame, .pixels .image-frame img {width: 100%; height: auto; object-fit: contain}
.pixels label.float {position: static}
.cats .grid-wrap {min-height: 0; max-height: none; overflow: visible}
.cats .grid-container {grid-template-columns: repeat(8, 1fr); padding: 0}
.cats .thumbnail-lg {display: block; height: auto; aspect-ratio: auto}
.cats .thumbnail-lg > img {height: auto; aspect-ratio: 1}
.cats .caption-label.caption-label {position: static; max-width: none; opacity: 1}
.cats .caption-label {text-align: center}
.wrap:has(> .error) {display: none}
.dice {align-self: end; height: 44px}
@media (max-width: 640px) {
  .page {margin: 0 -20px; width: auto}
  .cats .grid-container {grid-template-columns: repeat(4, 1fr)}
  .tab-container.tab-container button {padding: 0 8px; font-size: 14px}
}
"""
_launched = []  # the widget that is running, if any


def find_checkpoints(folder):
    """The names of this project's checkpoints in a folder, sorted."""
    names = []
    for path in sorted(Path(folder).glob("*.pt")):
        with contextlib.suppress(Exception):  # damaged, or somebody else's
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            if content["format"] == "ddpm-cats 1":
                names.append(path.name)
    return names


def read_upload(path, size, channels=3):
    """A stranger's file as bytes (channels, size, size); UsageError says why not."""
    try:
        with Image.open(path) as image:  # reads no more than the header
            pixels, kind = image.width * image.height, image.format
            thrifty = kind == "JPEG" and "progressive" not in image.info  # decoded at an eighth
        if kind not in ("JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF"):
            raise ValueError(kind)
        if pixels <= (150e6 if thrifty else 50e6):
            image = fit(open_picture(path, at_least=3 * size), size)
            return to_picture(image.convert("L") if channels == 1 else image)
    except Image.DecompressionBombError:
        pass
    except Exception:  # whatever the damage
        kinds = "JPEG, PNG, WebP, BMP or GIF"
        message = f"This file cannot be read as a picture: choose another one, {kinds}."
        raise UsageError(message) from None
    raise UsageError("This picture has too many pixels: shrink it, then try again.")


def _number(what, value, lowest, highest, kind=int):
    if not isinstance(value, (int, float)) or not math.isfinite(value) or kind(value) != value:
        raise UsageError(f"{what} must be a {'whole ' if kind is int else ''}number.")
    if not lowest <= value <= highest:
        raise UsageError(f"{what} must be from {lowest} to {highest}.")
    return kind(value)


def _seed(value):
    return _number("The seed", value, 0, 2**32 - 1)


def _painted(editor, value, size):
    """Where the picture of a gradio.ImageEditor was painted over: bool (size, size)."""
    painted = torch.zeros(size, size, dtype=torch.bool)
    try:
        for layer in editor.preprocess(editor.data_model(**value))["layers"]:
            touched = layer.getchannel("A").point(lambda alpha: 255 * (alpha > 0))
            shrunk = touched.resize((size, size), Image.Resampling.BOX)
            painted |= to_picture(shrunk)[0] > 64  # more than a quarter of the pixel
    except Exception:
        raise UsageError("The painting cannot be read: take a cat and paint again.") from None
    if not painted.any():
        raise UsageError("Paint over the part that is to be drawn anew, then press the button.")
    return painted


def _square(count):
    return math.ceil(math.sqrt(count))  # columns of a grid


def _there_and_back(pictures):
    """Frames for `save_gif` that rest at both ends."""
    there = [[picture[None]] for picture in pictures]
    return there + 4 * there[-1:] + there[::-1]


def _downloads(folder, pictures, labels, columns, film):
    """Write cats.png, cats.gif and cats.zip, of single PNGs, into a folder; their paths."""
    png, gif, archive = (Path(folder) / f"cats.{ending}" for ending in ("png", "gif", "zip"))
    save_png(grid(pictures, columns, padding=0), png, scale=8)
    width = sum(grid(panel, columns).shape[2] for panel in film[0])
    save_gif(film, gif, columns, min(12, 800 // width + 1), limit=5_000_000, passes=0)
    with zipfile.ZipFile(archive, "w") as file:
        for label, picture in zip(labels, pictures):
            with file.open(f"cat_{label.zfill(5)}.png", "w") as single:
                to_image(picture).save(single, "PNG")
    return str(png), str(gif), str(archive)


def widget(definitions, checkpoint="model.pt"):
    """The generator's page, a gradio.Blocks, to `launch`.

    definitions: the notebook's, {name: object}. checkpoint: the one to begin with; those beside
    it in its folder can be chosen too.
    """
    import gradio as gr

    ddpm, first = types.SimpleNamespace(**definitions), Path(checkpoint).resolve()
    loading, load = threading.Lock(), lru_cache(4)(lambda path, changed: ddpm.load_model(path))

    def get(name):
        """The network of a checkpoint in the folder, loaded once for all."""
        path = first.parent / Path(str(name)).name
        with loading:
            return load(path, path.stat().st_mtime if path.exists() else None)

    for _ in ddpm.sample(get(first.name), 16, 0, 4):  # so that the first click need not wait
        pass

    # What happens on a click. Values come as the browser sent them and are checked here.

    def told(function):
        """The user's mistakes are told in one sentence."""

        @wraps(function)
        def handler(*values):
            try:
                yield from function(*values)
            except UsageError as error:
                raise gr.Error(str(error), print_exception=False) from None

        return handler

    def unique(picture):
        """An image with a file of its own: gradio writes equal ones to the same file, anew each
        time, perhaps while a browser is reading it."""
        image = to_image(picture)
        image.info["key"] = secrets.token_hex(8)
        return image

    def show(panel, record, number):
        x, x_0, t = record.frames[min(number, len(record.frames)) - 1]
        columns = panel.columns or _square(len(x))
        x, x_0 = (unique(grid(pictures, columns)) for pictures in (x, x_0))
        return {panel.x: x, panel.x_0: x_0, panel.status: f"t = {t}"}

    def show_last(panel, record):
        """Show the last step and let the slider go back from there."""
        count = len(record.frames)
        slider = gr.Slider(maximum=max(count, 2), value=count, interactive=count > 1)
        return show(panel, record, count) | {panel.scrub: slider}

    def stop_it(panel, record):
        if record:
            record.stopped = True
        shown = show_last(panel, record) if record and record.frames else {}
        return shown | {panel.status: "Stopped."}

    def stream(panel, run, labels, what, film=None):
        """Show a generator of (s, x_s, x_0) at work, then its pictures, then the downloads."""
        started, shown, every = time.time(), 0.0, 1
        record = types.SimpleNamespace(frames=[], stopped=False)
        waiting = {button: gr.DownloadButton(interactive=False) for button in panel.downloads}
        waiting |= {panel.scrub: gr.Slider(interactive=False), panel.record: record}
        yield waiting | {panel.cats: gr.Gallery(visible=True)}
        for number, (s, x, x_0) in enumerate(run):
            if record.stopped:
                return
            if number % every == 0 or s == 0:
                record.frames.append((ddpm.to_bytes(x).cpu(), ddpm.to_bytes(x_0).cpu(), s))
            if len(record.frames) > 64:  # too many to remember: keep every second one
                del record.frames[1::2]
                every *= 2
            if s > 0 and time.time() - shown > 0.15:
                shown = time.time()
                yield show(panel, record, len(record.frames))
        pictures = record.frames[-1][0]
        cats = [(unique(picture), label) for picture, label in zip(pictures, labels)]
        what = f"{what} in {time.time() - started:.1f} seconds"
        yield show_last(panel, record) | {panel.cats: cats, panel.status: what}
        thinned = record.frames[:: -(len(record.frames) // 24 + 1)][::-1]
        film = film(pictures) if film else [(x, x_0) for x, x_0, _ in thinned]
        with tempfile.TemporaryDirectory(prefix="ddpm-cats-") as folder:  # gradio makes copies
            columns = panel.columns or _square(len(pictures))
            paths = _downloads(folder, pictures, labels, columns, film)
            ready = [gr.DownloadButton(value=path, interactive=True) for path in paths]
            yield dict(zip(panel.downloads, ready)) | {panel.film: paths[1]}

    def seeds(count, seed, most=16):
        count, seed = _number("The number of cats", count, 1, most), _seed(seed)
        return count, seed, [str(seed + i) for i in range(count)]

    def upload(name, file):
        if not file:
            raise UsageError("Choose a picture first.")
        config = get(name).config
        return read_upload(file["path"], config["size"], config["channels"])

    @told
    def generate(name, count, seed, steps, sampler, guidance):
        model, (count, seed, labels) = get(name), seeds(count, seed, 64)
        steps = _number("The number of steps", steps, 1, model.config["timesteps"])
        guidance = _number("The guidance", guidance, 0, 3, float)
        run = ddpm.sample(model, count, seed, steps, sampler, guidance)
        yield from stream(made, run, labels, f"{count} cat{'s'[: count - 1]} by {name}")

    @told
    def more(name, amount, event: gr.SelectData):
        seed = _seed(int(event.value["caption"]))
        run = ddpm.variations(get(name), seed, _number("The difference", amount, 0, 1, float), 8)
        labels = [str(seed), *(f"{seed}-{i}" for i in range(1, 8))]
        yield from stream(kin, run, labels, f"Cat {seed} and its kind by {name}")

    def forget():
        """A new crowd: nobody in it is chosen, and the old one's kind goes."""
        return gr.Gallery(selected_index=None), gr.Gallery(visible=False)

    @told
    def morph(name, seed_a, seed_b, frames):
        a, b, frames = _seed(seed_a), _seed(seed_b), _number("Their number", frames, 2, 24)
        labels = [str(a), *(f"{i / (frames - 1):.0%}" for i in range(1, frames - 1)), str(b)]
        run = ddpm.morph(get(name), a, b, frames)
        yield from stream(way, run, labels, f"From cat {a} to cat {b} by {name}", _there_and_back)

    @told
    def take_cat(name, seed):
        yield on_canvas(ddpm.draw(get(name), 1, _seed(seed))[0])

    @told
    def take_picture(name, file):
        yield on_canvas(upload(name, file))

    def on_canvas(picture):
        image = to_image(picture, max(1, 480 // picture.shape[2]))
        return picture, {"background": image, "layers": [], "composite": None}

    @told
    def repaint(name, picture, painting, count, seed):
        model, (count, seed, labels) = get(name), seeds(count, seed)
        if picture is None:
            raise UsageError("Take a cat or upload a picture first.")
        if picture.shape[2] != model.config["size"]:
            raise UsageError("The other network's pictures have another size: take a cat again.")
        painted = _painted(canvas, painting, picture.shape[2])
        run = ddpm.repaint(model, picture, ~painted, count, seed)
        yield from stream(mended, run, labels, f"Repainted by {name}")

    @told
    def check(name, file):
        yield upload(name, file) if file else None

    @told
    def from_picture(name, file, strength, count, seed):
        picture, (count, seed, labels) = upload(name, file), seeds(count, seed)
        strength = _number("The strength", strength, 0, 1, float)
        run = ddpm.from_picture(get(name), picture, strength, count, seed)
        yield from stream(drawn, run, labels, f"Drawn from your picture by {name}")

    def usual_steps(name, sampler):
        return ddpm.samplers(get(name).config["timesteps"])[sampler]

    # What the page looks like.

    def seed_box(label, value=0):
        with gr.Row():
            seed = gr.Number(value, precision=0, label=label, min_width=120, scale=2)
            dice = gr.Button("Roll the dice", size="sm", min_width=90, elem_classes="dice")
        dice.click(lambda: secrets.randbelow(1_000_000), outputs=seed, queue=False)
        return seed

    def gallery(label, **options):
        options |= dict(columns=8, height="auto", object_fit="contain", allow_preview=False)
        options |= dict(format="png", buttons=[], interactive=False)
        return gr.Gallery(label=label, elem_classes=["pixels", "cats"], **options)

    def panel(hint, columns=None, film=False, label="Cats, by seed"):
        """Where a tab shows its work, its pictures and the downloads."""
        p = types.SimpleNamespace(columns=columns)
        p.status = gr.Markdown(hint, elem_classes="status")
        with gr.Row():
            options = dict(format="png", buttons=["fullscreen"], min_width=140)
            options |= dict(elem_classes="pixels", interactive=False)
            p.x = gr.Image(label="In hand: x_t", **options)
            p.x_0 = gr.Image(label="Believed in: x_0", **options)
            p.film = gr.Image(label="Film", visible=film, **options)
        p.scrub = gr.Slider(1, 2, 1, step=1, label="Look back, step by step", interactive=False)
        p.cats = gallery(label)
        with gr.Row():
            options = dict(interactive=False, size="sm", min_width=90)
            names = ("Grid (PNG)", "Film (GIF)", "Singles (zip)")
            p.downloads = [gr.DownloadButton(name, **options) for name in names]
        p.record = gr.State()
        options = dict(queue=False, trigger_mode="always_last", show_progress="hidden")
        options |= dict(outputs=[p.x, p.x_0, p.status], api_name="look_back")
        p.scrub.input(partial(show, p), [p.record, p.scrub], **options)
        return p

    def start(event, p, stop, function, inputs, **options):
        outputs = [p.x, p.x_0, p.film, p.scrub, p.cats, p.status, p.record, *p.downloads]
        options |= dict(preprocess=False, show_progress="minimal")
        options |= dict(show_progress_on=[p.status, p.cats])
        run = event(function, [chosen, *inputs], outputs, **options)
        options = dict(cancels=run, queue=False, api_name="stop")  # cancels what still waits
        stop.click(partial(stop_it, p), p.record, outputs[:6], **options)

    def buttons(text):
        with gr.Row():
            go = gr.Button(text, variant="primary", min_width=120)
            return go, gr.Button("Stop", min_width=80)

    page = gr.Blocks(title="DDPM cats", analytics_enabled=False, delete_cache=(600, 3600))
    left, right = dict(scale=2, min_width=280), dict(scale=5, min_width=300)
    with page, gr.Column(elem_classes="page"):
        chosen = gr.Dropdown([first.name], value=first.name, label="Network")

        with gr.Tab("Generate"), gr.Row():
            with gr.Column(**left):
                count = gr.Slider(1, 64, 16, step=1, label="How many cats")
                seed = seed_box("Seed of the first cat")
                usual = ddpm.samplers(get(first.name).config["timesteps"])
                kinds = [(SAMPLERS.get(kind, kind), kind) for kind in usual]
                sampler = gr.Radio(kinds, value=kinds[0][1], label="Sampler")
                steps = gr.Number(usual[kinds[0][1]], precision=0, label="Steps")
                weight = inspect.signature(ddpm.guided).parameters["guidance"].default
                guidance = gr.Slider(0, 3, weight, label="Guidance (0: none, 3: all alike)")
                go, stop = buttons("Make cats")
            with gr.Column(**right):
                made = panel("Press **Make cats**.", label="By seed: click on a cat for its kind")
                amount = gr.Slider(0, 1, 0.4, label="How different its kind may be")
                kind = gallery("More of its kind", visible=False)
                kin = types.SimpleNamespace(**vars(made) | {"cats": kind, "columns": 4})
        start(go.click, made, stop, generate, [count, seed, steps, sampler, guidance])
        start(made.cats.select, kin, stop, more, [amount])
        go.click(forget, None, [made.cats, kind], queue=False, show_progress="hidden")
        sampler.change(usual_steps, [chosen, sampler], steps, queue=False)

        with gr.Tab("Morph"), gr.Row():
            with gr.Column(**left):
                ends = [seed_box("From the cat of seed", 5), seed_box("to the cat of seed", 9)]
                count = gr.Slider(2, 24, 12, step=1, label="Pictures on the way")
                go, stop = buttons("Morph")
            with gr.Column(**right):
                hint = "Choose two seeds and press **Morph**."
                way = panel(hint, columns=4, film=True, label="The way from cat to cat")
        start(go.click, way, stop, morph, [*ends, count])

        with gr.Tab("Repaint"), gr.Row():
            with gr.Column(**left):
                taken = seed_box("Seed of the cat", 5)
                with gr.Row():
                    take = gr.Button("Take this cat", size="sm", min_width=100)
                    options = dict(file_types=["image"], size="sm", min_width=100)
                    other = gr.UploadButton("Upload a picture", **options)
                gr.Markdown("Paint over what is to be drawn anew:")
                picture, brush = gr.State(), gr.Brush(60, ["#ff3377"], color_mode="fixed")
                options = dict(sources=(), transforms=(), layers=False, buttons=[], format="png")
                options |= dict(canvas_size=(480, 480), show_label=False, elem_classes="pixels")
                canvas = gr.ImageEditor(type="pil", brush=brush, **options)
                count = gr.Slider(1, 16, 4, step=1, label="How many versions")
                seed = seed_box("Seed of the first version")
                go, stop = buttons("Repaint")
            with gr.Column(**right):
                mended = panel("Take a cat, paint over a part of it, press **Repaint**.")
        raw = dict(outputs=[picture, canvas], preprocess=False)
        take.click(take_cat, [chosen, taken], **raw)
        other.upload(take_picture, [chosen, other], **raw)
        start(go.click, mended, stop, repaint, [picture, canvas, count, seed])

        with gr.Tab("From a picture"), gr.Row():
            with gr.Column(**left):
                options = dict(sources=["upload", "webcam", "clipboard"], height=300, buttons=[])
                file = gr.Image(type="filepath", label="A photo or a scribble", **options)
                strength = gr.Slider(0, 1, 0.6, label="Strength (0: yours, 1: any cat)")
                count = gr.Slider(1, 16, 4, step=1, label="How many cats")
                seed = seed_box("Seed of the first cat")
                go, stop = buttons("Draw as a cat")
            with gr.Column(**right):
                drawn = panel("Choose a picture, press **Draw as a cat**.")
        file.input(check, [chosen, file], gr.State(), preprocess=False, show_progress="hidden")
        start(go.click, drawn, stop, from_picture, [file, strength, count, seed])

        def refresh():
            return gr.Dropdown(find_checkpoints(first.parent))

        gr.on([page.load, chosen.focus], refresh, None, chosen, queue=False, show_progress="hidden")
    return page.queue(default_concurrency_limit=2)


def launch(page, share=False, **options):
    """Show a `widget` in the notebook, on this computer only; the one before is closed."""
    import gradio as gr

    while _launched:
        _launched.pop().close(verbose=False)
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    options = (
        dict(server_name="127.0.0.1", height=900, css=STYLE, theme=theme, quiet=True) | options
    )
    options = dict(footer_links=["settings"], max_file_size="100mb") | options
    page.launch(share=share, prevent_thread_lock=True, **options)
    _launched.append(page)
    print(f"The generator runs at {page.local_url}")


# -------------------------------------------------------------------------------- command line


def _start_all_processes():
    """`accelerate launch --num_processes N` starts one process only where there is no GPU. Then
    this one gives way to N of them, on PyTorch's own launcher."""
    if torch.accelerator.is_available() or "MASTER_PORT" not in os.environ or "RANK" in os.environ:
        return
    launch = argparse.ArgumentParser(add_help=False)
    launch.add_argument("--num_processes", "--num-processes", type=int, default=1)
    asked, _ = launch.parse_known_args(psutil.Process(os.getppid()).cmdline())
    if asked.num_processes > 1:
        count = f"--nproc_per_node={asked.num_processes}"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", count]
        os.execv(sys.executable, launcher + sys.argv)


def _train(options):
    _start_all_processes()
    ddpm = notebook()
    pictures = load_pictures(options.data, options.size, channels=options.channels)
    out, state = Path(options.out), Path(options.out).with_suffix(".training")
    if state.exists() and not options.resume:
        raise UsageError(f"{state} holds a training: add --resume to go on, or name another --out.")
    if options.resume and not state.exists():
        raise UsageError(f"There is no {state} to resume from: leave --resume away.")
    torch.manual_seed(options.seed)
    model = ddpm.UNet(options.size, pictures.shape[1], timesteps=options.timesteps)
    view = TrainingView(show=False)
    settings = dict(batch_size=options.batch_size, lr=options.lr, seed=options.seed, out=out)
    try:
        for progress in ddpm.train(model, pictures, options.epochs, **settings):
            view.update(progress)
    except KeyboardInterrupt:
        print(f"\nStopped; {out} holds the best so far, --resume goes on.", file=sys.stderr)
    view.close()
    if out.exists() and _is_first_process():
        print(out, describe(ddpm.load_model(out).record), sep="\n")


def _generate(options):
    ddpm = notebook()
    model, out = ddpm.load_model(options.model), Path(options.out)
    if out.suffix.lower() not in ("", ".png", ".gif", ".npy"):
        raise UsageError(f"--out must end in .png, .gif or .npy, or be a folder, not {out.name}.")
    columns, how = _square(options.count), (options.steps, options.sampler, options.guidance)
    if out.suffix.lower() == ".gif":
        save_gif(ddpm.film(model, options.count, options.seed, *how), out, columns)
        return
    starts = range(0, options.count, 128)  # a picture does not depend on those drawn beside it
    batches = [
        ddpm.draw(model, min(128, options.count - i), options.seed + i, *how)
        for i in (tqdm(starts, "drawing") if len(starts) > 1 else starts)
    ]
    pictures = torch.cat(batches)
    if out.suffix == "":
        for i, picture in enumerate(pictures, options.seed):
            save_png(picture, out / f"cat_{i:05d}.png")
    elif out.suffix.lower() == ".npy":
        array = pictures.permute(0, 2, 3, 1).numpy()
        write_file(out, lambda part: _save_array(part, array))
    else:
        save_png(grid(pictures, columns, padding=0), out, options.scale)


def _widget(options):
    page = widget(vars(notebook()), options.model)
    try:
        launch(page, options.share, server_port=options.port, inline=False)
    except OSError:
        message = "No port is free" if options.port is None else f"Port {options.port} is taken"
        raise UsageError(f"{message}: name another one by --port.") from None
    print("Press Ctrl-C to end it.", flush=True)
    page.block_thread()


def _download(options):
    download_cats(options.all, options.url, options.to)


def _save_array(path, array):
    with open(path, "wb") as file:  # np.save would add .npy to the name of the temporary file
        np.save(file, array)


def _whole(lowest, highest):
    def parse(text):
        if not text.lstrip("-").isdigit() or not lowest <= int(text) <= highest:
            message = f"must be a whole number from {lowest} to {highest}, not {text}"
            raise argparse.ArgumentTypeError(message)
        return int(text)

    return parse


def _real(fits, words):
    def parse(text):
        with contextlib.suppress(ValueError):
            if fits(float(text)):
                return float(text)
        raise argparse.ArgumentTypeError(f"must be a number {words}, not {text}")

    return parse


def main(arguments=None):
    """The command line; see `python ddpm_helpers.py --help`."""
    parser = argparse.ArgumentParser(description="Draw cats, or train on pictures of your own.")
    names = "generate | widget | train | download"
    commands = parser.add_subparsers(required=True, metavar=names)
    command = commands.add_parser("generate", help="draw pictures with a trained network")
    command.set_defaults(run=_generate)
    command.add_argument("--count", type=_whole(1, 1_000_000), default=16, help="how many (16)")
    command.add_argument("--seed", type=_whole(0, 2**32), default=0, help="of the first one (0)")
    command.add_argument("--steps", type=_whole(1, 10_000), help="network calls")
    command.add_argument("--sampler", choices=SAMPLERS, default="dpm", help="(dpm)")
    weight = _real(lambda w: 0 <= w <= 10, "from 0 to 10")
    command.add_argument("--guidance", type=weight, help="0 for none, 3 for a lot (0.3)")
    command.add_argument("--model", default=str(PROJECT / "model.pt"), help="checkpoint (model.pt)")
    command.add_argument("--scale", type=_whole(1, 32), default=1, help="enlarge the .png grid (1)")
    command.add_argument(
        "--out", required=True, help=".png grid, .gif film, .npy bytes, or a folder for single .png"
    )
    command = commands.add_parser("widget", help="a page to play with, in your browser")
    command.set_defaults(run=_widget)
    command.add_argument("--port", type=_whole(1, 65_535), help="(the first free one from 7860)")
    command.add_argument("--share", action="store_true", help="open it to others, by a public link")
    command.add_argument("--model", default=str(PROJECT / "model.pt"), help="checkpoint (model.pt)")
    command = commands.add_parser("train", help="train a network on a folder of pictures")
    command.set_defaults(run=_train)
    command.add_argument("--data", required=True, help="folder of pictures")
    command.add_argument("--epochs", type=_whole(1, 1_000_000), default=40, help="passes (40)")
    command.add_argument("--out", default="new_model.pt", help="checkpoint (new_model.pt)")
    command.add_argument("--resume", action="store_true", help="go on after the last whole epoch")
    command.add_argument("--size", type=_whole(8, 256), default=24, help="pixels (24)")
    command.add_argument(
        "--channels", type=int, choices=[0, 1, 3], default=0, help="1 grey, 3 colour (as they are)"
    )
    command.add_argument("--timesteps", type=_whole(20, 10_000), default=1000, help="T (1000)")
    command.add_argument("--batch-size", type=_whole(1, 65_536), default=16, help="(16)")
    rate = _real(lambda lr: 0 < lr < 1, "between 0 and 1")
    command.add_argument("--lr", type=rate, default=1e-3, help="highest learning rate (1e-3)")
    command.add_argument("--seed", type=_whole(0, 2**32), default=0, help="(0)")
    command = commands.add_parser("download", help="fetch photos of cats to learn from")
    command.set_defaults(run=_download)
    command.add_argument("--all", action="store_true", help="near-copies and odd ones too")
    command.add_argument("--url", default=ARCHIVE, help="address or file of the archive (GitHub's)")
    command.add_argument("--to", default=CATS, help="folder (cats_large/cats)")
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except UsageError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(importlib.import_module("ddpm_helpers").main())

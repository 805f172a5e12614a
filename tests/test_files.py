"""Reading pictures of every kind, and checkpoints good and bad."""

import json
import time

import numpy as np
import pytest
import torch
from conftest import blobs
from PIL import Image

import ddpm_helpers as helpers


def gradient(width=60, height=40):
    """Red grows to the right, green downwards, blue is 128."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 128)], -1).astype(np.uint8))


def with_exif(image, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return image, {"exif": exif}


def load_one(tmp_path, name, image, **options):
    image.save(tmp_path / name, **options)
    return helpers.load_pictures(tmp_path, 24, tmp_path / "cache")


EXPECTED = torch.from_numpy(
    np.asarray(gradient().crop((10, 0, 50, 40)).resize((24, 24), Image.Resampling.BICUBIC))
).permute(2, 0, 1)[None]


@pytest.mark.parametrize("ending", ["jpg", "jpeg", "png", "webp", "bmp", "gif", "PNG"])
def test_every_ending(tmp_path, ending):
    pictures = load_one(tmp_path, f"cat.{ending}", gradient())
    assert pictures.shape == (1, 3, 24, 24) and pictures.dtype == torch.uint8
    assert (pictures.int() - EXPECTED.int()).abs().float().mean() < 5


@pytest.mark.parametrize("mode", ["P", "RGBA", "CMYK", "RGB"])
def test_every_colour_mode(tmp_path, mode):
    name = "cat.jpg" if mode == "CMYK" else "cat.png"
    pictures = load_one(tmp_path, name, gradient().convert(mode))
    assert (pictures.int() - EXPECTED.int()).abs().float().mean() < 12


@pytest.mark.parametrize("mode", ["L", "LA", "1", "I;16", "RGB"])
def test_grey_pictures_have_one_channel_unless_three_are_wanted(tmp_path, mode):
    grey = gradient().convert("L")
    if mode == "I;16":
        image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    else:
        image = grey.convert(mode)
    one = load_one(tmp_path, "cat.png", image)
    assert one.shape == (1, 1, 24, 24) and one.is_contiguous()
    assert one[..., :4].float().mean() + 40 < one[..., -4:].float().mean()
    three = helpers.load_pictures(tmp_path, 24, tmp_path / "cache", channels=3)
    assert torch.equal(three, one.expand(1, 3, 24, 24))


def test_one_colour_picture_among_grey_ones_makes_all_colour(folder):
    cache = folder.parent / "cache"
    for i in range(20):
        Image.open(folder / f"{i:02d}.png").convert("L").save(folder / f"{i:02d}.png")
    assert helpers.load_pictures(folder, 24, cache).shape == (20, 1, 24, 24)
    gradient().save(folder / "19.png")
    colour = helpers.load_pictures(folder, 24, cache)
    assert colour.shape == (20, 3, 24, 24)
    assert torch.equal(colour[0, 0], colour[0, 1]) and not torch.equal(colour[19, 0], colour[19, 1])
    for _ in range(2):  # read, then from the cache
        grey = helpers.load_pictures(folder, 24, cache, channels=1)
        assert grey.shape == (20, 1, 24, 24)
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)  # how bright the eye finds them
    assert ((colour[19] * weights).sum(0) - grey[19, 0]).abs().max() < 1.5


def test_transparent_is_white(tmp_path):
    image = gradient().convert("RGBA")
    image.putalpha(0)
    assert (load_one(tmp_path, "cat.png", image) == 255).all()
    Image.new("P", (30, 30)).save(tmp_path / "palette.png", transparency=0)
    assert np.asarray(helpers.open_picture(tmp_path / "palette.png")).min() == 255


@pytest.mark.parametrize("orientation, turn", [(3, Image.ROTATE_180), (6, Image.ROTATE_90)])
def test_photos_taken_with_a_turned_camera_stand_upright(tmp_path, orientation, turn):
    image, options = with_exif(gradient().transpose(turn), orientation)
    pictures = load_one(tmp_path, "cat.png", image, **options)
    assert (pictures.int() - EXPECTED.int()).abs().float().mean() < 2


def test_shrinking_is_antialiased(tmp_path):
    """Black and white lines, one pixel each, become grey."""
    lines = np.zeros((480, 480, 3), np.uint8)
    lines[::2] = 255
    pictures = load_one(tmp_path, "lines.png", Image.fromarray(lines))
    assert ((pictures.int() - 127).abs() < 12).all()


def test_large_jpeg_is_the_same_picture(tmp_path):
    pictures = load_one(tmp_path, "big.jpg", gradient().resize((3000, 2000)), quality=95)
    assert (pictures.int() - EXPECTED.int()).abs().float().mean() < 5


def test_small_pictures_are_enlarged(tmp_path):
    assert load_one(tmp_path, "tiny.png", gradient(5, 3)).shape == (1, 3, 24, 24)


def test_folders_inside_are_searched_and_order_is_by_name(folder):
    inner = folder / "a" / "b"
    inner.mkdir(parents=True)
    Image.new("RGB", (9, 9), (1, 2, 3)).save(inner / "0.png")
    pictures = helpers.load_pictures(folder, 8, folder.parent / "cache")
    where = [p.name for p in helpers.find_pictures(folder)].index("0.png")
    assert len(pictures) == 21 and pictures[where, :, 4, 4].tolist() == [1, 2, 3]


def test_unreadable_files_are_named_in_one_line(folder, capsys):
    (folder / "text.png").write_text("not a picture")
    (folder / "empty.jpg").write_bytes(b"")
    whole = (folder / "00.png").read_bytes()
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    for _ in range(2):  # read, then from the cache
        assert len(helpers.load_pictures(folder, 24, folder.parent / "cache")) == 20
        out = capsys.readouterr().out
        assert out.splitlines() == [
            "Left out 3 of 23 files that cannot be read: empty.jpg, half.png, text.png",
            "Fewer than 500 pictures (20): the network will learn them by heart and draw copies",
        ]


def test_five_hundred_pictures_are_not_called_few(tmp_path, capsys):
    for i, picture in enumerate(blobs(500, 16)):
        helpers.save_png(picture, tmp_path / f"{i}.png")
    helpers.load_pictures(tmp_path, 16, tmp_path / "cache")
    assert "by heart" not in capsys.readouterr().out
    (tmp_path / "0.png").unlink()
    helpers.load_pictures(tmp_path, 16, tmp_path / "cache")
    assert "Fewer than 500 pictures (499)" in capsys.readouterr().out


def scenes(count, size=64, seed=0):
    """Smooth pictures of many colours, bytes (N, 3, S, S), as different as photos are."""
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, size, mode="bicubic", align_corners=True)
    return (smooth * 255).clamp(0, 255).byte()


def test_pictures_that_nearly_repeat_others_are_reported(tmp_path, capsys):
    (tmp_path / "more").mkdir()
    for i, picture in enumerate(scenes(40)):
        image = helpers.to_image(picture)
        image.save(tmp_path / f"{i:02d}.png")
        if i == 5:  # the same file, compressed anew, compressed badly, enlarged
            image.save(tmp_path / "more" / "copy.png")
            image.save(tmp_path / "more" / "copy.jpg", quality=80)
            image.save(tmp_path / "more" / "copy.webp", quality=40)
            image.resize((300, 300)).save(tmp_path / "more" / "large.jpg", quality=60)
        if i == 9:
            image.point(lambda v: v * 0.8).save(tmp_path / "darker.png")
    for size in (64, 16, 16):  # read, read, from the cache
        helpers.load_pictures(tmp_path, size, tmp_path / "cache")
        (line,) = [x for x in capsys.readouterr().out.splitlines() if "repeat" in x]
        words = f"Pictures that nearly repeat another: 4, for example {tmp_path}"
        assert line.startswith(words) and line.count(str(tmp_path)) == 2
        assert "darker" not in line


@pytest.mark.parametrize("size, channels", [(8, 3), (20, 1), (24, 3)])
def test_repeats_are_counted_as_by_comparing_each_with_each(size, channels):
    torch.manual_seed(0)
    pictures = scenes(400, size)[:, :channels]
    copies = pictures[torch.randint(400, (300,))].int()
    wrong = torch.randint(0, 5, (300, 1, 1, 1))  # from none to far more than tolerated
    copies = copies + wrong * torch.randn(copies.shape).sign().int()[:, :, :1, :1]
    pictures = torch.cat([pictures, copies.clamp(0, 255).byte()])
    pictures = pictures[torch.randperm(700)]
    tiny = torch.nn.functional.adaptive_avg_pool2d(pictures.float().mean(1), 8)
    distance = (tiny[:, None] - tiny[None]).square().mean(dim=(2, 3)).sqrt()
    near = distance < 2.5
    count, pair = helpers.find_repeats(pictures)
    assert pair[0] < pair[1] and near[pair[0], pair[1]]
    order = tiny.mean(dim=(1, 2)).argsort()
    assert count == near[order][:, order].triu(1).any(dim=0).sum() and 50 < count < 300


def test_different_pictures_do_not_repeat():
    assert helpers.find_repeats(scenes(3000)) == (0, ())
    assert helpers.find_repeats(scenes(1)) == (0, ())
    assert helpers.find_repeats(torch.zeros(300, 1, 24, 24, dtype=torch.uint8))[0] == 299


def test_the_projects_own_pictures_make_room_for_photos(tmp_path, monkeypatch, capsys):
    cats, cache = tmp_path / "cats_large" / "cats", tmp_path / "cache"
    monkeypatch.setattr(helpers, "CATS", cats)
    for i, picture in enumerate(blobs(3), 1_000_000):
        helpers.save_png(picture, cats / f"cat_{i}.png")
    assert len(helpers.load_pictures(cats, 24, cache)) == 3
    assert "Left out" not in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    for data in ("cats_large/cats", cats, "cats_large"):
        assert helpers.gif_folder(data) == helpers.Path("gifs")
    helpers.save_png(blobs(4)[3], cats / "cat_12.png")
    for data in ("cats_large/cats", cats, "cats_large"):
        assert helpers.find_pictures(data) == [
            helpers.Path(data) / p
            for p in [(cats / "cat_12.png").relative_to(helpers.Path(data).resolve())]
        ]
        assert helpers.gif_folder(data) == helpers.Path("gifs/own")
    for _ in range(2):
        assert torch.equal(helpers.load_pictures(cats, 24, cache), blobs(4)[3:])
        out = capsys.readouterr().out
        assert out.startswith("Left out 3 pictures that the network drew")
    elsewhere = tmp_path / "mine" / "cat_1000000.png"  # a name alone says nothing
    helpers.save_png(blobs(1)[0], elsewhere)
    assert helpers.gif_folder(elsewhere.parent) == helpers.Path("gifs/own")
    assert len(helpers.find_pictures(tmp_path)) == 2


def test_the_pictures_that_come_with_the_project_are_known():
    drawn = list(helpers.CATS.glob("cat_1??????.png"))
    assert len(drawn) == 2048 and all(map(helpers._is_drawn, drawn))


def test_a_picture_too_large_to_be_honest_is_left_out(folder, capsys, monkeypatch):
    Image.new("1", (400, 400)).save(folder / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    assert len(helpers.load_pictures(folder, 24, folder.parent / "cache")) == 20
    assert "bomb.png" in capsys.readouterr().out


def test_folders_without_pictures_say_what_to_do(tmp_path):
    with pytest.raises(helpers.UsageError, match="holds no pictures: put pictures there"):
        helpers.load_pictures(tmp_path, 24)
    with pytest.raises(helpers.UsageError, match="is not a folder"):
        helpers.load_pictures(tmp_path / "nowhere", 24)
    (tmp_path / "a.png").write_text("x")
    with pytest.raises(helpers.UsageError, match="None of the 1 files"):
        helpers.load_pictures(tmp_path, 24, tmp_path / "cache")


def test_cache_is_used_and_rebuilt_when_something_changes(folder, monkeypatch):
    cache, read = folder.parent / "cache", []
    original = helpers.open_picture
    monkeypatch.setattr(
        helpers, "open_picture", lambda *a, **k: read.append(a) or original(*a, **k)
    )

    def load(size=24):
        read.clear()
        return helpers.load_pictures(folder, size, cache)

    first = load()
    assert len(read) == 20
    assert torch.equal(load(), first) and not read
    assert load(16).shape[-1] == 16 and len(read) == 20
    load()
    assert not read, "one size must not push out another"
    Image.new("RGB", (9, 9)).save(folder / "new.png")
    assert len(load()) == 21 and len(read) == 21
    (folder / "new.png").unlink()
    assert len(load()) == 20 and len(read) == 20
    Image.new("RGB", (9, 9)).save(folder / "00.png")
    assert load()[0].sum() == 0 and len(read) == 20
    for damaged in cache.glob("*.pt"):
        damaged.write_bytes(b"nonsense")
    assert len(load()) == 20 and len(read) == 20


def test_second_run_of_many_pictures_takes_less_than_a_second(tmp_path, monkeypatch):
    for i in range(5000):
        (tmp_path / f"{i}.png").write_bytes(b"")
    with pytest.raises(helpers.UsageError, match="None of the 5000"):
        helpers.load_pictures(tmp_path, 24, tmp_path / "cache")
    for i, picture in enumerate(blobs(2)):
        helpers.save_png(picture, tmp_path / f"{i}.png")
    helpers.load_pictures(tmp_path, 24, tmp_path / "cache")
    monkeypatch.delattr(helpers, "open_picture")  # nothing may be read any more
    started = time.perf_counter()
    assert len(helpers.load_pictures(tmp_path, 24, tmp_path / "cache")) == 2
    assert time.perf_counter() - started < 1


def test_reading_does_not_need_a_cache(folder):
    in_the_way = folder.parent / "cache"
    in_the_way.write_text("a file, not a folder")
    assert len(helpers.load_pictures(folder, 24, in_the_way)) == 20


def test_files_are_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "file"
    helpers.write_file(target, lambda part: part.write_text("old"))

    def fail(part):
        part.write_text("new, but only ha")
        raise OSError(28, "No space left on device")

    with pytest.raises(helpers.UsageError, match="No space left on device; make room"):
        helpers.write_file(target, fail)
    assert target.read_text() == "old" and list(target.parent.iterdir()) == [target]


def test_checkpoint_comes_back_as_it_was(ddpm, network, tmp_path):
    model = network(size=32, schedule="linear", timesteps=100)
    helpers.save_model(tmp_path / "m.pt", model, {"epochs": 3})
    again = ddpm.load_model(tmp_path / "m.pt")
    assert again.config == model.config and again.record == {"epochs": 3} and not again.training
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    content = torch.load(tmp_path / "m.pt", weights_only=True)
    assert {"config", "predicts", "record", "weights"} < set(content)


def test_bad_checkpoints_give_one_sentence(ddpm, network, tmp_path):
    with pytest.raises(helpers.UsageError, match="There is no .*missing.pt"):
        ddpm.load_model(tmp_path / "missing.pt")
    good, bad = tmp_path / "good.pt", tmp_path / "bad.pt"
    helpers.save_model(good, network(), {})
    whole = good.read_bytes()
    for content in (b"", b"not a checkpoint", whole[: len(whole) // 2]):
        bad.write_bytes(content)
        with pytest.raises(helpers.UsageError, match="damaged or not a checkpoint"):
            ddpm.load_model(bad)
    torch.save({"weights": torch.zeros(3)}, bad)
    with pytest.raises(helpers.UsageError, match="damaged or not a checkpoint"):
        ddpm.load_model(bad)
    content = torch.load(good, weights_only=True)
    content["config"]["width"] = 24
    torch.save(content, bad)
    with pytest.raises(helpers.UsageError, match="another network"):
        ddpm.load_model(bad)


def test_checkpoints_cannot_run_code(ddpm, tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("code from a checkpoint was run",))

    torch.save({"format": "ddpm-cats 1", "weights": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(helpers.UsageError, match="damaged or not a checkpoint"):
        ddpm.load_model(tmp_path / "evil.pt")


def test_gif_keeps_colours_frames_and_pauses(tmp_path):
    frames = [(blobs(4, seed=i), blobs(4, seed=i + 9)) for i in range(6)]
    helpers.save_gif(frames, tmp_path / "a.gif", columns=2, scale=5, seconds=3, hold=2)
    gif = Image.open(tmp_path / "a.gif")
    assert gif.n_frames == 6 and gif.info["loop"] == 0
    durations = []
    for i in range(6):
        gif.seek(i)
        durations.append(gif.info["duration"])
        left = helpers.grid(frames[i][0], 2)
        shown = np.asarray(gif.convert("RGB"))[2::5, 2::5][:, : left.shape[2]]
        assert np.abs(shown.astype(int) - left.permute(1, 2, 0).numpy()).mean() < 12
    assert durations == [500] * 5 + [2000]


def test_gif_that_cannot_be_made_small_is_refused(tmp_path):
    noise = [(torch.randint(0, 256, (9, 3, 24, 24), dtype=torch.uint8),) for _ in range(30)]
    with pytest.raises(helpers.UsageError, match="larger than 5000"):
        helpers.save_gif(noise, tmp_path / "a.gif", limit=5000)


def test_films_of_large_pictures_shrink_to_fit(tmp_path):
    noise = [torch.randint(0, 256, (2, 6, 3, 64, 64), dtype=torch.uint8) for _ in range(18)]
    helpers.save_gif(noise, tmp_path / "a.gif")  # as the notebook does with SIZE = 64
    assert (tmp_path / "a.gif").stat().st_size < 500_000
    gif = Image.open(tmp_path / "a.gif")
    durations = []
    for i in range(gif.n_frames):
        gif.seek(i)
        durations.append(gif.info["duration"])
    assert durations[-1] == 1500 and sum(durations[:-1]) == pytest.approx(4000, rel=0.15)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_frames_are_even_in_log_snr(ddpm, schedule):
    alphas_bar = ddpm.make_alphas_bar(schedule, 1000).double()
    t = helpers.even_in_log_snr(alphas_bar, 24)
    assert t[0] == 0 and t[-1] == 1000 and (t.diff() > 0).all()
    a = alphas_bar[t[2:-2]]
    gaps = (a / (1 - a)).log().diff().abs()
    assert gaps.max() < 2.5 * gaps.min()


def test_pictures_are_shown_pixel_by_pixel():
    picture = torch.randint(0, 256, (3, 4, 5), dtype=torch.uint8)
    big = np.asarray(helpers.to_image(picture, 3))
    assert big.shape == (12, 15, 3)
    assert (big[1::3, 1::3] == picture.permute(1, 2, 0).numpy()).all()
    assert (big[::3, ::3] == big[2::3, 2::3]).all()


def test_parameters_from_the_environment(monkeypatch):
    monkeypatch.setenv("DDPM_EPOCHS", "7")
    monkeypatch.setenv("DDPM_MODE", "skip")
    parameters = {"EPOCHS": 40, "MODE": "lesson", "SIZE": 24, "other": 1}
    assert helpers.overrides(parameters) == {"EPOCHS": 7, "MODE": "skip"}
    monkeypatch.setenv("DDPM_EPOCHS", "many")
    with pytest.raises(helpers.UsageError, match="DDPM_EPOCHS must be of type int"):
        helpers.overrides(parameters)
    monkeypatch.setenv("DDPM_EPOCHS", "7")
    monkeypatch.setenv("DDPM_MOED", "skip")
    with pytest.raises(helpers.UsageError, match="no parameter MOED"):
        helpers.overrides(parameters)


GOOD = dict(MODE="lesson", SIZE=24, TIMESTEPS=1000, EPOCHS=1, BATCH_SIZE=64, FILM_STEPS=9, SEED=0)
GOOD |= dict(LESSON_EPOCHS=1, LESSON_PICTURES=100, LEARNING_RATE=1e-3, JUDGED=256)


@pytest.mark.parametrize(
    "name, value",
    [("MODE", "fast"), ("SIZE", 26), ("SIZE", 24.0), ("BATCH_SIZE", 0), ("LEARNING_RATE", -1)],
)
def test_parameters_that_make_no_sense(name, value):
    helpers.check_parameters(GOOD)
    with pytest.raises(helpers.UsageError, match=name):
        helpers.check_parameters(GOOD | {name: value})


def test_definitions_survive_magics_and_name_broken_cells(tmp_path):
    cells = [{"cell_type": "code", "source": ["%pip --version\n", "def f():\n", "    return 7\n"]}]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells}))
    assert helpers.notebook(tmp_path / "a.ipynb").f() == 7
    cells[0]["source"] = ["def f(:\n"]
    (tmp_path / "b.ipynb").write_text(json.dumps({"cells": cells}))
    with pytest.raises(helpers.UsageError, match="Cell 0 .* is not valid Python"):
        helpers.notebook(tmp_path / "b.ipynb")

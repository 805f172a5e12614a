"""`python ddpm_helpers.py`, called as a user would."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import ddpm_helpers as helpers


def run(*arguments, cwd, code=0):
    command = [sys.executable, str(ROOT / "ddpm_helpers.py"), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=os.environ)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def model(network, tmp_path):
    helpers.save_model(tmp_path / "m.pt", network(), {})
    return tmp_path / "m.pt"


def test_generate_writes_grid_film_bytes_and_single_pictures(ddpm, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for out in ("cats.png", "cats.gif", "cats.npy", "cats"):
        options = ["--count", 5, "--seed", 7, "--steps", 4, "--model", model, "--out", out]
        assert not helpers.main(["generate", *map(str, options)])  # here, so always in 32 bits
    expected = ddpm.draw(ddpm.load_model(model), 5, 7, 4).permute(0, 2, 3, 1).numpy()
    array = np.load(tmp_path / "cats.npy")
    assert array.shape == (5, 24, 24, 3) and array.dtype == np.uint8
    assert (array == expected).all()
    image = np.asarray(Image.open(tmp_path / "cats.png"))
    assert image.shape == (48, 72, 3)
    assert (image[24:48, 24:48] == array[4]).all()
    single = np.asarray(Image.open(tmp_path / "cats" / "cat_00009.png"))
    assert (single == array[2]).all() and len(list((tmp_path / "cats").iterdir())) == 5
    assert Image.open(tmp_path / "cats.gif").n_frames > 1
    options += ["--guidance", 0]
    assert not helpers.main(["generate", *map(str, options), "--out", "plain.npy"])
    plain = ddpm.draw(ddpm.load_model(model), 5, 7, 4, guidance=0).permute(0, 2, 3, 1).numpy()
    assert (np.load(tmp_path / "plain.npy") == plain).all() and (plain != expected).any()


def test_generate_says_what_is_wrong(model, tmp_path):
    for options, words in [
        (["--out", "cats.jpg", "--model", model], "must end in .png"),
        (["--out", "cats.png", "--model", "none.pt"], "There is no none.pt"),
        (["--out", "cats.png", "--count", "0"], "from 1 to"),
        (["--out", "cats.png", "--seed", "abc"], "whole number"),
        (["--out", "cats.png", "--steps", "2000", "--model", model], "between 1 and 1000"),
        (["--out", "cats.png", "--guidance", "-1"], "a number from 0 to 10, not -1"),
        (["--out", "cats.png", "--guidance", "much"], "a number from 0 to 10, not much"),
    ]:
        error = run("generate", *options, cwd=tmp_path, code=2).stderr
        assert words in error and len(error.strip().splitlines()[-1]) < 200


def test_train_then_resume_then_generate(folder, tmp_path):
    options = ["--data", folder, "--batch-size", 8, "--out", "new.pt", "--size", 8]
    run("train", *options, "--epochs", 1, cwd=tmp_path)
    record = torch.load(tmp_path / "new.pt", weights_only=True)["record"]
    assert record["epochs"] == 1 and record["pictures"] == 20
    error = run("train", *options, "--epochs", 2, cwd=tmp_path, code=2).stderr
    assert "add --resume" in error
    assert "epochs: 2" in run("train", *options, "--epochs", 2, "--resume", cwd=tmp_path).stdout
    run("generate", "--model", "new.pt", "--steps", 2, "--out", "a.npy", cwd=tmp_path)
    assert np.load(tmp_path / "a.npy").shape == (16, 8, 8, 3)


def test_grey_pictures_are_learned_and_drawn_in_grey(folder, tmp_path):
    for path in folder.iterdir():
        Image.open(path).convert("L").save(path)
    options = ["--data", folder, "--batch-size", 8, "--out", "grey.pt", "--size", 8]
    run("train", *options, "--epochs", 1, cwd=tmp_path)
    grey = str(tmp_path / "grey.pt")
    assert torch.load(grey, weights_only=True)["config"]["channels"] == 1
    for out in ("a.npy", "a.png", "a.gif", "a"):
        options = ["--count", "5", "--steps", "2", "--model", grey, "--out", str(tmp_path / out)]
        assert not helpers.main(["generate", *options])
    array = np.load(tmp_path / "a.npy")
    single = Image.open(tmp_path / "a" / "cat_00004.png")
    assert array.shape == (5, 8, 8, 1) and single.mode == "L"
    assert (np.asarray(single) == array[4, :, :, 0]).all()
    whole = np.asarray(Image.open(tmp_path / "a.png").convert("L"))
    assert (whole[8:16, 8:16] == array[4, :, :, 0]).all()
    assert Image.open(tmp_path / "a.gif").n_frames > 1


def test_train_says_what_is_wrong(folder, tmp_path):
    assert "is not a folder" in run("train", "--data", "none", cwd=tmp_path, code=2).stderr
    (tmp_path / "empty").mkdir()
    error = run("train", "--data", "empty", cwd=tmp_path, code=2).stderr
    assert "holds no pictures" in error
    error = run("train", "--data", folder, "--size", 30, cwd=tmp_path, code=2).stderr
    assert "cannot be halved" in error and not list(tmp_path.glob("new_model*"))
    error = run("train", "--data", folder, "--lr", "-1", cwd=tmp_path, code=2).stderr
    assert "between 0 and 1" in error


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_interrupted_training_keeps_what_it_has_and_goes_on(folder, tmp_path):
    command = [sys.executable, str(ROOT / "ddpm_helpers.py"), "train", "--data", str(folder)]
    command += ["--batch-size", "8", "--size", "8", "--out", "new.pt", "--epochs"]
    training = subprocess.Popen([*command, "10000"], cwd=tmp_path, stderr=subprocess.PIPE)
    state, started = tmp_path / "new.training", time.time()
    while not state.exists() or torch.load(state, weights_only=True)["epoch"] < 1:
        assert training.poll() is None and time.time() - started < 100
        time.sleep(0.2)
    training.send_signal(signal.SIGINT)
    error = training.communicate(timeout=60)[1].decode()
    assert training.returncode == 0 and "--resume goes on" in error and "Traceback" not in error
    epoch = torch.load(state, weights_only=True)["epoch"]
    assert epoch >= 1
    subprocess.run([*command, str(epoch + 2), "--resume"], cwd=tmp_path, check=True)
    assert torch.load(state, weights_only=True)["epoch"] == epoch + 2

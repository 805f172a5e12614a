"""Training that is killed, and training by several processes."""

import multiprocessing
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, blobs
from PIL import Image

import ddpm_helpers as helpers

EPOCHS = 30


def train_and_tell(out, steps):
    """In a process of its own: train a small network, counting the steps in shared memory."""
    torch.set_num_threads(1)
    helpers.bf16_is_faster = lambda: False
    ddpm = helpers.notebook()
    torch.manual_seed(0)
    model = ddpm.UNet(width=16, mults=(1, 2))
    for progress in ddpm.train(model, blobs(42), EPOCHS, 8, seed=3, out=out):
        steps.value = progress.step


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_killed_at_ten_random_moments_it_ends_where_it_would_have(tmp_path):
    start = multiprocessing.get_context("forkserver")
    start.set_forkserver_preload(["accelerate", "matplotlib.pyplot", "test_robustness"])
    rng, killed = random.Random(0), 0
    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    while True:
        steps = start.Value("i", 0)
        process = start.Process(target=train_and_tell, args=(parts, steps))
        process.start()
        # somewhere in the work, the saving of checkpoints above all: it is most of the time here
        end = time.monotonic() + 60
        while killed < 10 and process.is_alive() and not steps.value and time.monotonic() < end:
            time.sleep(0.01)
        process.join(rng.uniform(0, 0.5) if killed < 10 else 300)
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        killed += 1
        for path in (parts, parts.with_suffix(".training")):
            if path.exists():
                torch.load(path, weights_only=True)  # whole, or it would raise
    assert process.exitcode == 0 and killed == 10
    assert not list(tmp_path.glob("*.part")) and not list(tmp_path.glob(".*.part"))
    process = start.Process(target=train_and_tell, args=(whole, steps))
    process.start()
    process.join()
    ours, expected = (
        torch.load(p.with_suffix(".training"), weights_only=True) for p in (parts, whole)
    )
    assert ours["heldout"] == expected["heldout"] and len(ours["heldout"]) == EPOCHS
    assert all(torch.equal(v, ours["average"][k]) for k, v in expected["average"].items())


def launch(tmp_path, out, *launcher):
    """The command line's `train` with 32 bits, started by a launcher; its .training file."""
    script = tmp_path / "exact.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import ddpm_helpers\n"
        "ddpm_helpers.bf16_is_faster = lambda: False\n"
        "sys.exit(ddpm_helpers.main())\n"
    )
    options = ["--data", "pictures", "--epochs", "2", "--batch-size", "16", "--out", out]
    command = [*launcher, str(script), "train", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("heldout_loss") == 1  # one process speaks
    return torch.load((tmp_path / out).with_suffix(".training"), weights_only=True)


def test_two_processes_by_accelerate_learn_the_same(tmp_path):
    (tmp_path / "pictures").mkdir()
    for i, picture in enumerate(blobs(34, 32)):
        image = Image.fromarray(picture.permute(1, 2, 0).numpy())
        image.save(tmp_path / "pictures" / f"{i}.png")
    accelerate = Path(sys.executable).parent / "accelerate"
    alone = launch(tmp_path, "one.pt", sys.executable)
    together = launch(tmp_path, "two.pt", str(accelerate), "launch", "--num_processes", "2")
    record = torch.load(tmp_path / "two.pt", weights_only=True)["record"]
    assert record["processes"] == 2 and record["batch_size"] == 16
    assert len(together["heldout"]) == 2
    for ours, expected in zip(together["heldout"], alone["heldout"]):
        assert abs(ours - expected) < 1e-4
    for name, value in alone["model"].items():
        torch.testing.assert_close(together["model"][name], value, atol=1e-4, rtol=1e-3)

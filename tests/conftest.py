"""What all tests share: the notebook's definitions, small networks, small pictures."""

import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ddpm_helpers as helpers  # noqa: E402

# what runs in the background of a shell script, and all that it starts, ignores Ctrl-C otherwise
signal.signal(signal.SIGINT, signal.default_int_handler)

bf16_is_faster = helpers.bf16_is_faster  # the real one; see `quiet_machine`


@pytest.fixture(scope="session")
def ddpm():
    """The notebook as a module."""
    return helpers.notebook()


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch):
    """Numbers of 32 bits, so that results can be compared to the last digit."""
    monkeypatch.setattr(helpers, "bf16_is_faster", lambda: False)


def small_network(ddpm, seed=0, **config):
    """A network that answers something: no layer is zero."""
    torch.manual_seed(seed)
    model = ddpm.UNet(**{"width": 16, "mults": (1, 2)} | config).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@pytest.fixture
def network(ddpm):
    """Make a `small_network`."""
    return lambda seed=0, **config: small_network(ddpm, seed, **config)


def blobs(count, size=24, seed=0):
    """Pictures that something can be learned from: one bright disc each. Bytes (N, 3, S, S)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    centre = rng.uniform(0.3, 0.7, (2, count, 1, 1))
    disc = ((y - centre[0]) ** 2 + (x - centre[1]) ** 2 < 0.06)[:, None]
    colour = rng.integers(100, 255, (count, 3, 1, 1))
    return torch.from_numpy(np.where(disc, colour, 40).astype(np.uint8))


@pytest.fixture
def folder(tmp_path):
    """A folder with twenty small pictures."""
    place = tmp_path / "pictures"
    place.mkdir()
    for i, picture in enumerate(blobs(20, 32)):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(place / f"{i:02d}.png")
    return place

"""The changed recipes of benchmarks/recipe.py do what they say."""

import math
import sys
import time

import pytest
import torch
from conftest import ROOT, blobs
from torch import nn

import ddpm_helpers as helpers

sys.path.insert(0, str(ROOT / "benchmarks"))
import recipe


@pytest.fixture
def own():
    """The notebook's definitions in a copy, to be changed."""
    return helpers.notebook.__wrapped__()


class Knows(nn.Module):
    """Answers what it was told to."""

    def __init__(self, answer, alphas_bar):
        super().__init__()
        self.answer, self.alphas_bar = answer, alphas_bar

    def forward(self, x_t, t):
        return self.answer


@pytest.fixture
def question(own):
    torch.manual_seed(0)
    x_0, t = torch.rand(4, 3, 24, 24) * 2 - 1, torch.tensor([1, 300, 700, 1000])
    return x_0, t, torch.randn_like(x_0), own.make_alphas_bar("cosine", 1000)


@pytest.mark.parametrize("name", ["eps", "x_0"])
def test_networks_that_predict_something_else(own, question, name):
    x_0, t, eps, alphas_bar = question
    recipe.predicting(name)(own)
    right = Knows(eps if name == "eps" else x_0, alphas_bar)
    wrong = Knows(right.answer + 0.5, alphas_bar)
    assert own.diffusion_loss(right, *question).abs().max() == 0
    assert torch.allclose(own.diffusion_loss(wrong, *question), torch.tensor(0.25))
    believed = own.predict(right, own.add_noise(x_0, t, eps, alphas_bar), t)
    assert torch.allclose(believed[0][:3], x_0[:3], atol=1e-3)
    assert torch.allclose(believed[1][:3], eps[:3], atol=1e-3)


def test_min_snr_weights_are_the_papers(own, question):
    x_0, t, eps, alphas_bar = question
    model = Knows(torch.zeros_like(x_0), alphas_bar)
    before = own.diffusion_loss(model, *question)
    recipe.min_snr(own)
    snr = alphas_bar[t].double() / (1 - alphas_bar[t].double())
    expected = before * torch.minimum(snr, torch.tensor(5.0)) / (snr + 1)
    assert torch.allclose(own.diffusion_loss(model, *question), expected.float())


def test_less_noise_is_the_cosine_schedules_shifted_by_the_papers_amount(own):
    recipe.less_noise(own)
    _, t, _ = own.draw_batch(blobs(20_000, size=8), 1000, torch.Generator().manual_seed(0))
    alphas_bar = own.make_alphas_bar("cosine", 1000)
    log_snr = (alphas_bar[t] / (1 - alphas_bar[t])).log()
    u = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    expected = -2 * (u * math.pi / 2).tan().log() + 2 * math.log(64 / 24)  # s of the schedule: 0
    assert torch.allclose(log_snr.quantile(1 - u), expected, atol=0.1)
    assert t.min() == 1 and t.max() <= 1000


def test_common_loss_is_the_notebooks_for_its_own_recipe(own, question):
    x_0, t, eps, alphas_bar = question
    model = Knows(torch.randn_like(x_0), alphas_bar)
    expected = own.diffusion_loss(model, *question).mean()
    found = recipe.heldout_loss(own, model, (x_0, t, eps), alphas_bar)
    assert torch.allclose(found, expected, rtol=1e-3)


def test_rate_by_the_clock_is_the_rate_by_steps(own, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    by_clock = recipe.by_the_clock(own.learning_rate, seconds=200)
    for step in range(400):  # half a second each
        found = by_clock(step, None, 1e-3)
        if step >= 40:
            assert found == pytest.approx(own.learning_rate(step, 400, 1e-3), abs=1e-5)
        now[0] += 0.5
    assert by_clock(400, None, 1e-3) < 1e-5


def test_changed_networks_differ_as_they_should(own):
    weights = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    usual = weights(own.UNet(width=16))
    x, t = torch.randn(2, 3, 24, 24), torch.tensor([1, 1000])
    for change, more in ((recipe.two_blocks, True), (recipe.attention(10_000), False)):
        ddpm = helpers.notebook.__wrapped__()
        change(ddpm)
        model = ddpm.UNet(width=16)
        assert model(x, t).shape == x.shape and (weights(model) > usual) == more
    recipe.patches(own)
    model = own.UNet(width=16, mults=(2, 3))
    assert model(x, t).shape == x.shape and model.first.in_channels == 12
    assert own.draw(model, 1, steps=1).shape == (1, 3, 24, 24)


def test_shifted_pictures_stay_pictures(own):
    recipe.more_changes(own)
    x = own.to_signed(blobs(16))
    changed = own.random_flips(x, torch.Generator().manual_seed(0))
    assert changed.shape == x.shape and changed.abs().max() <= 1
    assert 0.01 < (changed - x).abs().mean() < 0.5


def test_table_shows_means_and_spreads():
    row = {"loss": 0.12, "times the floor": 3.0, "pictures": 5000, "millions": 5.03}
    other = row | {"loss": 0.14, "times the floor": 5.0}
    rows = {recipe.BASE: {"0": row, "1": other}, "no EMA": {"0": row}}
    _, _, first, second = recipe.table(rows, 300)
    assert first.startswith(f"| {recipe.BASE} | 5,000 | 5.0 M | 0.1300 ± 0.0100 | 4.0 ± 1.0 |")
    assert "| 0.1200 | 3.0 | ![](benchmarks/recipe/300/06.png) |" in second


def test_readme_shows_the_results_as_measured():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    measured = recipe.read_json(recipe.RESULTS)
    assert set(measured["300"]) == set(recipe.RECIPES)
    for seconds, results in measured.items():
        rows = list(recipe.table(results, float(seconds)))
        assert len(rows) == 2 + len(results)
        assert [row for row in rows if row not in readme] == []

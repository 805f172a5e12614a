"""What one can do with a trained network: morphs, relatives, repainting, drawing from pictures."""

import math

import pytest
import torch

import ddpm_helpers as helpers


def last(walk):
    """The final x of a walk."""
    *_, (s, x, _) = walk
    assert s == 0
    return x


def differ(a, b):
    """The largest difference of two batches of bytes."""
    return (a.int() - b.int()).abs().max()


def picture(seed=0):
    return torch.randint(0, 256, (3, 24, 24), generator=torch.Generator().manual_seed(seed)).byte()


def test_slerp_against_its_closed_form(ddpm):
    """In the plane of two right-angled vectors it is a turn by the angle."""
    a, b = torch.zeros(2, 1, 2, 2)
    a[0, 0, 0], b[0, 1, 1] = 3.0, 3.0
    for degrees in (0, 30, 45, 90):
        (x,) = ddpm.slerp(a, b, torch.tensor([degrees / 90]))
        angle = math.radians(degrees)
        torch.testing.assert_close(x, math.cos(angle) * a + math.sin(angle) * b)
    torch.testing.assert_close(ddpm.slerp(a, a, torch.tensor([0.5]))[0], a)  # no angle at all


def test_slerp_keeps_the_length_of_noise(ddpm):
    a, b = torch.randn(2, 3, 24, 24)
    lengths = ddpm.slerp(a, b, torch.linspace(0, 1, 9)).flatten(1).norm(dim=1)
    assert lengths.min() > 0.98 * min(a.norm(), b.norm())
    assert torch.lerp(a, b, 0.5).norm() < 0.8 * a.norm()  # what a straight line would do


def test_the_ends_of_a_morph_are_the_two_cats(ddpm, network):
    model = network()
    strip = ddpm.to_bytes(last(ddpm.morph(model, 3, 8, frames=5, steps=6)))
    assert len(strip) == 5
    assert differ(strip[0], ddpm.draw(model, 1, 3, 6)[0]) <= 1
    assert differ(strip[-1], ddpm.draw(model, 1, 8, 6)[0]) <= 1
    assert differ(strip[2], strip[0]) > 5 and differ(strip[2], strip[-1]) > 5


def test_relatives_start_with_the_cat_itself_and_drift_away(ddpm, network):
    model = network()
    near = ddpm.to_bytes(last(ddpm.variations(model, 3, 0.1, count=4, steps=6))).float()
    far = ddpm.to_bytes(last(ddpm.variations(model, 3, 0.8, count=4, steps=6))).float()
    itself = ddpm.draw(model, 1, 3, 6)[0].float()
    assert (near[0] - itself).abs().max() <= 1 and (far[0] - itself).abs().max() <= 1
    assert 0 < (near[1:] - itself).abs().mean() < 0.5 * (far[1:] - itself).abs().mean()
    one = ddpm.to_bytes(last(ddpm.variations(model, 3, count=1, steps=6))).float()
    assert (one[0] - itself).abs().max() <= 1


@pytest.mark.parametrize("rounds", [1, 3])
def test_what_is_kept_stays_to_the_byte_and_the_rest_is_new(ddpm, network, rounds):
    model, keep = network(), torch.zeros(24, 24, dtype=torch.bool)
    keep[:, :10] = True
    x = last(ddpm.repaint(model, picture(), keep, count=3, steps=5, rounds=rounds))
    new = ddpm.to_bytes(x)
    assert (new[:, :, keep] == picture()[:, keep]).all()
    assert (new[:, :, ~keep] != picture()[:, ~keep]).float().mean() > 0.9
    assert differ(new[0], new[1]) > 5


def test_repaint_fits_the_new_to_the_old(ddpm):
    """Pictures of one colour each, from dark to bright, and the perfect denoiser for them: keep
    the left half of one, and the right half must take its colour, more often the more rounds."""
    alphas_bar = ddpm.make_alphas_bar("cosine", 1000)
    colours = torch.linspace(-0.9, 0.9, 5).view(5, 1, 1, 1).expand(-1, 1, 8, 8).double()

    class Best(torch.nn.Module):
        config = dict(size=8, channels=1, timesteps=1000)

        def __init__(self):
            super().__init__()
            self.register_buffer("alphas_bar", alphas_bar)

        def forward(self, x, t):
            a = alphas_bar[t].view(-1, 1, 1, 1).double()
            error = (x[:, None].double() - a[:, None].sqrt() * colours).square().sum((2, 3, 4))
            weight = (-error / (2 * (1 - a.view(-1, 1)))).softmax(1)
            x_0 = torch.einsum("nk,kchw->nchw", weight, colours)
            return ((a.sqrt() * x - x_0) / (1 - a).sqrt()).float()

    keep = torch.zeros(8, 8, dtype=torch.bool)
    keep[:, :4] = True
    kept = ddpm.to_bytes(colours[4]).to(torch.uint8)
    fits = {}
    for rounds in (1, 6):
        x = last(ddpm.repaint(Best(), kept, keep, count=64, steps=20, rounds=rounds))
        fits[rounds] = (x[..., 4:].mean((1, 2, 3)) > 0.6).float().mean()
    assert fits[6] > 0.9 and fits[6] >= fits[1]


def test_strength_0_gives_the_picture_back_and_1_forgets_it(ddpm, network):
    model = network()
    x = last(ddpm.from_picture(model, picture(), 0, count=2))
    assert (ddpm.to_bytes(x) == picture()).all()
    one, other = (last(ddpm.from_picture(model, picture(i), 1, steps=6)) for i in (1, 2))
    assert differ(ddpm.to_bytes(one), ddpm.to_bytes(other)) <= 1
    assert differ(ddpm.to_bytes(one), ddpm.draw(model, 4, 0, 6)) <= 1


def test_little_strength_keeps_more_of_the_picture(ddpm, network):
    model, distance = network(), {}
    for strength in (0.05, 0.3, 0.7):
        x = last(ddpm.from_picture(model, picture(), strength, steps=20))
        distance[strength] = (ddpm.to_bytes(x).float() - picture().float()).abs().mean()
    assert 0 < distance[0.05] < distance[0.3] < distance[0.7]


@pytest.mark.parametrize("strength", [0.2, 0.3, 0.43, 0.5, 0.6, 0.7, 0.701, 0.74, 0.9, 1])
def test_at_no_strength_a_short_stride_comes_before_a_long_one(ddpm, network, strength):
    """DPM-Solver++ extrapolates from one stride to the next, and would overshoot by far."""
    model = network()
    times = [s for s, _, _ in ddpm.from_picture(model, picture(), strength, 1)]
    a = model.alphas_bar[times[:-1]]  # the last, 0, is infinitely far in log SNR
    strides = (a / (1 - a)).log().diff()
    assert (strides[1:] < 2 * strides[:-1]).all()


def test_bad_input_gets_one_sentence(ddpm, network):
    model, keep = network(), torch.ones(24, 24, dtype=torch.bool)
    for strength in (-0.1, 1.1, math.nan):
        with pytest.raises(helpers.UsageError, match="strength must be from 0 to 1"):
            list(ddpm.from_picture(model, picture(), strength))
    for wrong in (picture()[:, :16], picture()[:1], picture().float()):
        with pytest.raises(helpers.UsageError, match="must be bytes of shape"):
            list(ddpm.from_picture(model, wrong, 0.5))
        with pytest.raises(helpers.UsageError, match="must be bytes of shape"):
            list(ddpm.repaint(model, wrong, keep))

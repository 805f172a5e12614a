"""Schedule, network and samplers against closed forms and against diffusers."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import bf16_is_faster
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}  # ours: theirs


def diffusers_ddpm(schedule, timesteps=1000):
    return DDPMScheduler(
        timesteps,
        beta_schedule=SCHEDULES[schedule],
        variance_type="fixed_small",
        prediction_type="v_prediction",
    )


def answer(x, t):
    """A stand-in for the network: any smooth function of x_t and t."""
    return torch.sin(3 * x) + 0.3 * torch.cos(t.view(-1, 1, 1, 1) / 100.0) * x.flip(-1)


class Stub(torch.nn.Module):
    """Looks like a U-Net to the samplers, answers with `function`."""

    config = dict(size=8, channels=3, timesteps=1000)

    def __init__(self, alphas_bar, function):
        super().__init__()
        self.register_buffer("alphas_bar", alphas_bar)
        self.function = function

    def forward(self, x, t):
        return self.function(x, t)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule_equals_diffusers(ddpm, schedule):
    alphas_bar = ddpm.make_alphas_bar(schedule, 1000)
    assert alphas_bar.shape == (1001,) and alphas_bar[0] == 1
    theirs = diffusers_ddpm(schedule).alphas_cumprod
    torch.testing.assert_close(alphas_bar[1:], theirs, rtol=2e-4, atol=1e-7)


def test_cosine_schedule_is_the_paper_s_cosine(ddpm):
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
    expected = torch.tensor([value / f[0] for value in f])
    alphas_bar = ddpm.make_alphas_bar("cosine", 1000)
    torch.testing.assert_close(alphas_bar[:999], expected[:999], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("timesteps", [20, 100, 4000])
def test_no_signal_is_left_at_the_end(ddpm, schedule, timesteps):
    assert ddpm.make_alphas_bar(schedule, timesteps)[-1] < 1e-3


def test_schedule_refuses_what_cannot_work(ddpm):
    with pytest.raises(ValueError, match="take more"):
        ddpm.make_alphas_bar("linear", 1)
    with pytest.raises(ValueError, match="quadratic"):
        ddpm.make_alphas_bar("quadratic", 1000)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_add_noise_equals_diffusers(ddpm, schedule):
    x_0, eps = torch.rand(7, 3, 8, 8) * 2 - 1, torch.randn(7, 3, 8, 8)
    t = torch.tensor([1, 2, 10, 300, 500, 999, 1000])
    ours = ddpm.add_noise(x_0, t, eps, ddpm.make_alphas_bar(schedule, 1000))
    theirs = diffusers_ddpm(schedule).add_noise(x_0, eps, t - 1)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_one_jump_equals_many_steps(ddpm):
    """q(x_t | x_0) has the mean and variance that follow from t single steps."""
    betas = ddpm.cosine_betas(1000)
    mean, variance = 1.0, 0.0
    for beta in betas[1:601].tolist():
        mean, variance = mean * math.sqrt(1 - beta), variance * (1 - beta) + beta
    a = ddpm.make_alphas_bar("cosine", 1000)[600].item()
    assert math.isclose(mean, math.sqrt(a), rel_tol=1e-5)
    assert math.isclose(variance, 1 - a, rel_tol=1e-5)


def test_posterior_equals_bayes_rule(ddpm):
    """q(x_s | x_t, x_0) by multiplying two Gaussian densities on a grid."""
    alphas_bar = ddpm.make_alphas_bar("linear", 1000).double()
    t, s, x_0, x_t = 400, 250, 0.3, -0.8
    a_t, a_s = alphas_bar[t], alphas_bar[s]
    x = torch.linspace(-6, 6, 200_001, dtype=torch.float64)
    step = -((x_t - (a_t / a_s).sqrt() * x) ** 2) / (2 * (1 - a_t / a_s))
    prior = -((x - a_s.sqrt() * x_0) ** 2) / (2 * (1 - a_s))
    weight = (step + prior).softmax(0)
    mean, variance = ddpm.posterior(x_0, x_t, t, s, alphas_bar)
    assert math.isclose((weight * x).sum(), mean, rel_tol=1e-6)
    assert math.isclose((weight * (x - mean) ** 2).sum(), variance, rel_tol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_algorithm_2_equals_diffusers_at_every_step(ddpm, schedule):
    theirs = diffusers_ddpm(schedule)
    alphas_bar = torch.cat([torch.ones(1), theirs.alphas_cumprod])  # ours, up to rounding
    model = Stub(alphas_bar, answer)
    ours_rng, their_rng = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    shape = (2, 3, 8, 8)
    x = torch.randn(shape, generator=their_rng)
    noise = lambda: torch.randn(shape, generator=ours_rng)  # noqa: E731
    steps = list(ddpm.walk(model, noise(), list(range(1000, -1, -1)), ddpm.ddpm_step, noise))
    assert [s for s, _, _ in steps] == list(range(999, -1, -1))
    for s, ours, _ in steps:
        out = theirs.step(answer(x, torch.full((2,), s + 1)), s, x, generator=their_rng)
        torch.testing.assert_close(ours, out.prev_sample, atol=1e-5, rtol=1e-5)
        x = ours


@pytest.mark.parametrize("steps", [1, 10, 50, 1000])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_equals_diffusers_at_every_step(ddpm, steps, eta):
    theirs = DDIMScheduler(
        1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=True,
        timestep_spacing="trailing",
    )
    theirs.set_timesteps(steps)
    times = [t + 1 for t in theirs.timesteps.tolist()] + [0]
    model = Stub(ddpm.make_alphas_bar("cosine", 1000), answer)
    torch.manual_seed(4)
    x, noises = torch.randn(2, 3, 8, 8), torch.randn(steps, 2, 3, 8, 8)
    rule = functools.partial(ddpm.ddim_step, eta=eta)
    ours_noise = iter(noises)
    walk = ddpm.walk(model, x, times, rule, lambda: next(ours_noise))
    for t, z, (s, ours, _) in zip(times, noises, walk):
        options = dict(eta=eta, use_clipped_model_output=True, variance_noise=z)
        out = theirs.step(answer(x, torch.full((2,), t)), t - 1, x, **options)
        torch.testing.assert_close(ours, out.prev_sample, atol=1e-4, rtol=1e-4)
        x = ours
    assert s == 0


def test_ddim_with_all_its_noise_is_algorithm_2(ddpm):
    alphas_bar = ddpm.make_alphas_bar("cosine", 1000)
    x, x_0, z = torch.randn(3, 2, 3, 8, 8)
    for t, s in ((1000, 900), (500, 499), (20, 3), (1, 0)):
        ours = ddpm.ddim_step(x, x_0, t, s, alphas_bar, lambda: z, eta=1.0)
        expected = ddpm.ddpm_step(x, x_0, t, s, alphas_bar, lambda: z)
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "schedule, timesteps", [("cosine", 1000), ("linear", 1000), ("cosine", 50)]
)
def test_sampling_times_are_different_steps_from_T_to_0(ddpm, schedule, timesteps):
    alphas_bar = ddpm.make_alphas_bar(schedule, timesteps)
    for steps in range(1, timesteps + 1):
        times = ddpm.sampling_times(alphas_bar, steps)
        assert len(times) == steps + 1 and times[0] == timesteps and times[-1] == 0
        assert all(t > s for t, s in zip(times, times[1:]))
    with pytest.raises(ValueError, match=f"between 1 and {timesteps} steps"):
        ddpm.sampling_times(alphas_bar, timesteps + 1)


def test_sampling_times_follow_karras(ddpm):
    """Against the closed form of Karras et al. 2022, equation 5."""
    alphas_bar = ddpm.make_alphas_bar("cosine", 1000).double()
    times = ddpm.sampling_times(alphas_bar, 12)
    sigma = ((1 - alphas_bar) / alphas_bar).sqrt()
    for i, t in list(enumerate(times))[1:-2]:
        wanted = (80 ** (1 / 6) + i / 11 * (0.002 ** (1 / 6) - 80 ** (1 / 6))) ** 6
        assert sigma[t - 1] < wanted * 1.0001 and wanted <= sigma[t] * 1.0001


@pytest.mark.parametrize(
    "rule, steps, least, most",
    [
        ("dpm_step", 50, 0.95, 1.05),
        ("dpm_step", 20, 0.95, 1.15),
        ("dpm_step", 10, 0.85, 1.35),
        ("ddim_step", 250, 0.95, 1.0),
        ("ddim_step", 10, 0.4, 0.7),  # straight strides lose variance, as the notebook says
    ],
)
def test_bell_shaped_pictures_keep_their_variance(ddpm, rule, steps, least, most):
    """The best denoiser of N(0, v) is a v / (a v + 1 - a) x: from 1, x_T, to sqrt(v) at the end.

    v: from the brightness of a 24x24 photo, which sums up 1,728 numbers, to detail hardly seen."""
    v = torch.tensor([120.0, 40, 10, 1, 0.1, 0.03], dtype=torch.float64).view(1, -1, 1, 1)
    alphas_bar = ddpm.make_alphas_bar("cosine", 1000).double()

    def best(x, t):
        a = alphas_bar[t].view(-1, 1, 1, 1)
        return (a.sqrt() * x - a.sqrt() * v / (a * v + 1 - a) * x) / (1 - a).sqrt()  # as v

    times, start = ddpm.sampling_times(alphas_bar, steps), torch.full_like(v, 0.01)  # unclipped
    *_, (_, x, _) = ddpm.walk(Stub(alphas_bar, best), start, times, getattr(ddpm, rule))
    kept = (x / start).square() / v
    assert least < kept.min() and kept.max() < most, kept.flatten()


@pytest.mark.parametrize("steps", [1, 2, 10, 20, 50])
def test_dpm_solver_equals_diffusers_at_every_step(ddpm, steps):
    theirs = DPMSolverMultistepScheduler(
        1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        thresholding=True,  # with a largest value of 1: plain clipping
        sample_max_value=1.0,
        final_sigmas_type="zero",
    )
    model = Stub(ddpm.make_alphas_bar("cosine", 1000), answer)
    times = ddpm.sampling_times(model.alphas_bar, steps)
    theirs.set_timesteps(timesteps=[t - 1 for t in times[:-1]])
    x = torch.randn(2, 3, 8, 8)
    for t, (s, ours, _) in zip(times, ddpm.walk(model, x, times, ddpm.dpm_step)):
        out = theirs.step(answer(x, torch.full((2,), t)), t - 1, x)
        torch.testing.assert_close(ours, out.prev_sample, atol=1e-4, rtol=1e-4)
        x = ours
    assert s == 0


@pytest.mark.parametrize("rule", ["ddpm_step", "ddim_step", "dpm_step"])
@pytest.mark.parametrize("steps", [10, 20, 100])
def test_with_the_perfect_denoiser_samples_are_training_pictures(ddpm, rule, steps):
    """For a finite set the best denoiser is a softmax over its pictures."""
    alphas_bar = ddpm.make_alphas_bar("cosine", 1000)
    torch.manual_seed(0)
    training = (torch.rand(5, 3, 8, 8) * 2 - 1).double()

    def best(x, t):
        a = alphas_bar[t].view(-1, 1, 1, 1).double()
        distance = (x[:, None].double() - a[:, None].sqrt() * training).square().sum((2, 3, 4))
        weight = (-distance / (2 * (1 - a.view(-1, 1)))).softmax(1)
        x_0 = torch.einsum("nk,kchw->nchw", weight, training)
        return ((a.sqrt() * x - x_0) / (1 - a).sqrt()).float()  # as v

    model = Stub(alphas_bar, best)
    noise, times = ddpm.Noise(model, 16, 0), ddpm.sampling_times(alphas_bar, steps)
    *_, (s, x, _) = ddpm.walk(model, noise(), times, getattr(ddpm, rule), noise)
    nearest = (x[:, None] - training).abs().amax((2, 3, 4)).amin(1)
    assert s == 0 and nearest.max() < 0.01


def test_x_0_is_clipped(ddpm):
    model = Stub(ddpm.make_alphas_bar("cosine", 1000), lambda x, t: 100 * x)
    noise, times = ddpm.Noise(model, 2, 0), ddpm.sampling_times(model.alphas_bar, 10)
    for rule in (ddpm.ddpm_step, ddpm.ddim_step, ddpm.dpm_step):
        for _, x, x_0 in ddpm.walk(model, noise(), times, rule, noise):
            assert x_0.abs().max() <= 1
        assert x.abs().max() <= 1


@pytest.mark.parametrize("dim", [2, 16, 64])
def test_time_embedding_is_its_definition(ddpm, dim):
    t = torch.tensor([0, 1, 7, 500, 1000])
    embedding = ddpm.time_embedding(t, dim)
    for row, moment in zip(embedding, t.tolist()):
        for i in range(dim // 2):
            omega = 10000 ** (-2 * i / dim)
            assert math.isclose(row[i], math.sin(moment * omega), abs_tol=2e-4)
            assert math.isclose(row[dim // 2 + i], math.cos(moment * omega), abs_tol=2e-4)


@pytest.mark.parametrize("size", [16, 24, 32, (16, 40)])
def test_network_keeps_the_shape(network, size):
    h, w = (size, size) if isinstance(size, int) else size
    x = torch.randn(2, 3, h, w)
    out = network(mults=(1, 2, 3))(x, torch.tensor([1, 1000]))
    assert out.shape == x.shape and out.isfinite().all()


def test_attention_equals_torch_s_own(ddpm):
    torch.manual_seed(0)
    attention, x = ddpm.SelfAttention(16, heads=2), torch.randn(3, 16, 4, 6)
    torch.nn.init.normal_(attention.out.weight)
    q, k, v = attention.qkv(attention.norm(x)).chunk(3, dim=1)
    tokens = [part.flatten(2).unflatten(1, (2, 8)).transpose(2, 3) for part in (q, k, v)]
    mixed = F.scaled_dot_product_attention(*tokens).transpose(2, 3).reshape(x.shape)
    torch.testing.assert_close(attention(x), x + attention.out(mixed), atol=1e-5, rtol=1e-5)
    blind = torch.tensor([True, False, True])
    sees = torch.eye(24, dtype=torch.bool) | ~blind.view(-1, 1, 1, 1)  # blind: itself alone
    mixed = F.scaled_dot_product_attention(*tokens, sees).transpose(2, 3).reshape(x.shape)
    expected = x + attention.out(mixed)
    torch.testing.assert_close(attention(x, blind), expected, atol=1e-5, rtol=1e-5)


def test_network_names_sizes_that_do_not_work(network):
    with pytest.raises(ValueError, match="multiples of 4, not 18 and 24"):
        network(mults=(1, 2, 3))(torch.randn(1, 3, 18, 24), torch.tensor([1]))


def test_network_has_the_agreed_size_and_starts_at_zero(ddpm):
    model = ddpm.UNet()
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 8e6
    assert model(torch.randn(2, 3, 24, 24), torch.tensor([1, 1000])).abs().max() == 0


def test_network_looks_at_time_and_at_far_places(network):
    model, x = network(mults=(1, 2, 3)), torch.randn(1, 3, 24, 24)
    one, other = model(x, torch.tensor([10])), model(x, torch.tensor([700]))
    assert (one - other).abs().max() > 1e-3
    x.requires_grad_()
    model(x, torch.tensor([10]))[0, 0, 0, 0].backward()
    assert x.grad[0, :, -1, -1].abs().max() > 0  # the opposite corner


def test_predict_finds_photo_and_noise_again(ddpm):
    """If the network answers the true v, both come back."""
    alphas_bar = ddpm.make_alphas_bar("cosine", 1000)
    x_0, eps, t = torch.rand(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.tensor([1, 30, 500, 900])
    x_t = ddpm.add_noise(x_0, t, eps, alphas_bar)
    v = diffusers_ddpm("cosine").get_velocity(x_0, eps, t - 1)
    photo, noise = ddpm.predict(Stub(alphas_bar, lambda x, t: v), x_t, t)
    torch.testing.assert_close(photo, x_0, atol=1e-4, rtol=0)
    torch.testing.assert_close(noise, eps, atol=1e-4, rtol=0)


def test_loss_is_the_error_of_eps_and_of_x_0(ddpm):
    """Since the squares of sqrt(alphas_bar) and sqrt(1 - alphas_bar) add up to 1."""
    alphas_bar = ddpm.make_alphas_bar("cosine", 1000)
    model = Stub(alphas_bar, answer)
    x_0, eps = torch.rand(6, 3, 8, 8) * 2 - 1, torch.randn(6, 3, 8, 8)
    t = torch.tensor([5, 100, 200, 400, 700, 990])
    photo, noise = ddpm.predict(model, ddpm.add_noise(x_0, t, eps, alphas_bar), t)
    expected = (noise - eps).square().mean((1, 2, 3)) + (photo - x_0).square().mean((1, 2, 3))
    loss = ddpm.diffusion_loss(model, x_0, t, eps, alphas_bar)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-5)


def test_same_seed_same_picture_alone_or_in_company(ddpm, network):
    model = network()
    together = ddpm.draw(model, 5, seed=10, steps=5)
    alone = ddpm.draw(model, 1, seed=13, steps=5)
    assert (together[3].int() - alone[0].int()).abs().max() <= 1
    assert (together[3] != together[2]).any()
    for sampler in ("dpm", "ddim", "ddpm"):
        assert torch.equal(ddpm.draw(model, 2, 1, 5, sampler), ddpm.draw(model, 2, 1, 5, sampler))


def test_drawing_uses_evaluation_mode_and_no_gradients(ddpm, network):
    model = network().train()
    for _, x, _ in ddpm.sample(model, 1, 0, 2):
        assert not model.training and not x.requires_grad


def test_drawing_in_16_bits_changes_next_to_nothing(ddpm, network, monkeypatch):
    bf16_is_faster.cache_clear()
    with torch.no_grad():  # it has to be asked while drawing, too
        assert type(bf16_is_faster()) is bool
        assert not torch.is_grad_enabled()
    exact = ddpm.draw(network(), 4, 0, 8).int()
    monkeypatch.setattr(ddpm.helpers, "bf16_is_faster", lambda: True)
    rounded = ddpm.draw(network(), 4, 0, 8).int()
    assert (exact - rounded).abs().float().mean() < 2
    alone = ddpm.draw(network(), 1, 2, 8).int()
    assert (alone[0] - rounded[2]).abs().max() <= 1


def test_guidance_steps_away_from_the_belief_of_the_blind(ddpm, network):
    model, x_t = network(), torch.randn(3, 3, 24, 24)
    for block in model.modules():  # a new network's attention adds nothing
        if isinstance(block, ddpm.SelfAttention):
            torch.nn.init.normal_(block.out.weight)
    sigma, everywhere = ((1 - model.alphas_bar) / model.alphas_bar).sqrt(), torch.ones(3) == 1
    for wanted, acts in ((6, False), (4, True), (0.5, True), (0.3, False)):
        t = (sigma < wanted).sum().expand(3)
        x_0, eps = ddpm.predict(model, x_t, t)
        blind = ddpm.predict(model, x_t, t, blind=everywhere)
        assert (blind[0] - x_0).abs().max() > 1e-3
        moved = [x_0 + 2 * (x_0 - blind[0]), eps + 2 * (eps - blind[1])] if acts else [x_0, eps]
        for ours, expected in zip(ddpm.guided(model, x_t, t, 2), moved, strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ddpm.guided(model, x_t, t, 0), (x_0, eps))


def test_guidance_is_the_default_and_can_be_left_out(ddpm, network):
    model = network()
    times, noise = ddpm.sampling_times(model.alphas_bar, 5), ddpm.Noise(model, 2, 3)
    *_, (_, x, _) = ddpm.walk(model, noise(), times, ddpm.dpm_step)
    assert torch.equal(ddpm.draw(model, 2, 3, 5, guidance=0), ddpm.to_bytes(x))
    assert torch.equal(ddpm.draw(model, 2, 3, 5), ddpm.draw(model, 2, 3, 5, guidance=0.3))
    assert not torch.equal(ddpm.draw(model, 2, 3, 5), ddpm.to_bytes(x))


@pytest.mark.parametrize("guidance", [-1.1, 11, math.nan])
def test_impossible_guidance(ddpm, network, guidance):
    with pytest.raises(ValueError, match="guidance must be from -1 to 10"):
        ddpm.draw(network(), 1, guidance=guidance)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_numbers_of_steps(ddpm, network, steps):
    with pytest.raises(ValueError, match="between 1 and 1000"):
        ddpm.draw(network(), 1, 0, steps)


def test_bytes_clip_and_come_back(ddpm):
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(ddpm.to_bytes(ddpm.to_signed(every)), every)
    assert ddpm.to_bytes(torch.tensor([-1.2, 1.1])).tolist() == [0, 255]

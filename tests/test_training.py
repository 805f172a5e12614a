"""Training: it learns, goes on to the bit, keeps the best, and stops with a clear sentence."""

import contextlib
import math

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import blobs

import ddpm_helpers as helpers


def collect(ddpm, model, pictures, epochs, out, stop_after=None, **options):
    """Run `train` and return the list of Progress; stop early as an interrupted kernel would."""
    seen = []
    options = dict(batch_size=8, seed=3) | options
    with contextlib.closing(ddpm.train(model, pictures, epochs, out=out, **options)) as training:
        for progress in training:
            seen.append(progress._replace(average=None))
            if progress.step == stop_after:
                break
    return seen


def weights(path):
    return torch.load(path, weights_only=True)["weights"]


def test_one_batch_can_be_learned_by_heart(ddpm):
    """The loss on four fixed pictures, noises and times goes to nearly zero."""
    torch.manual_seed(0)
    model = ddpm.UNet(width=32, mults=(1, 2))
    x_0, eps = ddpm.to_signed(blobs(4)), torch.randn(4, 3, 24, 24)
    t = torch.tensor([50, 300, 600, 900])
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for step in range(150):
        loss = ddpm.diffusion_loss(model, x_0, t, eps, model.alphas_bar).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = ddpm.learning_rate(step, 150, 3e-3, warm_up=10)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.02 * losses[0]


def test_training_lowers_the_held_out_loss(ddpm, tmp_path):
    torch.manual_seed(0)
    model = ddpm.UNet(width=16, mults=(1, 2))
    seen = collect(ddpm, model, blobs(160), 3, tmp_path / "m.pt", lr=3e-3)
    heldout = [p.heldout for p in seen if p.heldout is not None]
    assert len(seen) == 3 * (152 // 8) and len(heldout) == 3
    assert heldout[2] < 0.7 * heldout[0]
    record = ddpm.load_model(tmp_path / "m.pt").record
    assert record["pictures"] == 160 and record["epochs"] == 3
    assert record["heldout_loss"] == min(heldout)


@pytest.mark.parametrize("stop_after", [10, 14, 24])  # at the end of an epoch and within one
def test_resumed_equals_uninterrupted_to_the_bit(ddpm, network, tmp_path, stop_after):
    pictures = blobs(42)  # 39 to learn from, 4 steps an epoch
    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    through = collect(ddpm, network(), pictures, 6, whole)
    before = collect(ddpm, network(), pictures, 6, parts, stop_after=stop_after)
    after = collect(ddpm, network(seed=99), pictures, 6, parts)
    kept = [p for p in before if p.step <= 4 * (stop_after // 4)]
    assert [p.loss.item() for p in kept + after] == [p.loss.item() for p in through]
    ours, expected = (
        torch.load(p.with_suffix(".training"), weights_only=True) for p in (parts, whole)
    )
    for part in ("model", "average"):
        assert all(torch.equal(v, ours[part][k]) for k, v in expected[part].items())
    assert ours["heldout"] == expected["heldout"]


def test_finished_training_can_be_made_longer(ddpm, network, tmp_path):
    out = tmp_path / "m.pt"
    collect(ddpm, network(), blobs(42), 2, out)
    assert collect(ddpm, network(), blobs(42), 2, out) == []
    more = collect(ddpm, network(), blobs(42), 3, out)
    assert [p.step for p in more] == [9, 10, 11, 12]


def test_interrupted_in_the_first_epoch_leaves_a_usable_model(ddpm, network, tmp_path):
    collect(ddpm, network(), blobs(42), 5, tmp_path / "m.pt", stop_after=2)
    assert ddpm.draw(ddpm.load_model(tmp_path / "m.pt"), 1, 0, 2).shape == (1, 3, 24, 24)


def test_a_better_model_of_an_interrupted_epoch_is_not_overwritten(
    ddpm, network, tmp_path, monkeypatch
):
    out, results = tmp_path / "m.pt", iter([0.5, 0.1, 0.3, 0.4])
    monkeypatch.setattr(ddpm, "examine", lambda *_: next(results))
    collect(ddpm, network(), blobs(42), 2, out, stop_after=6)  # 0.5, then 0.1 when interrupted
    kept = weights(out)
    collect(ddpm, network(), blobs(42), 3, out)  # 0.3, 0.4
    assert all(torch.equal(v, weights(out)[k]) for k, v in kept.items())


def test_kept_weights_are_those_of_the_lowest_held_out_loss(ddpm, network, tmp_path, monkeypatch):
    results = iter([0.5, 0.2, 0.9])
    monkeypatch.setattr(ddpm, "examine", lambda *_: next(results))
    averages = []
    for progress in ddpm.train(network(), blobs(42), 3, 8, seed=3, out=tmp_path / "m.pt"):
        if progress.heldout is not None:
            averages.append({k: v.clone() for k, v in progress.average.state_dict().items()})
    kept = weights(tmp_path / "m.pt")
    assert all(torch.equal(v, kept[k]) for k, v in averages[1].items())
    assert any((v != kept[k]).any() for k, v in averages[2].items())


def test_loss_that_is_not_finite_stops_and_keeps_the_last_good_weights(ddpm, network, tmp_path):
    out = tmp_path / "m.pt"
    collect(ddpm, network(), blobs(42), 2, out)
    state = out.with_suffix(".training")
    damaged = torch.load(state, weights_only=True)
    damaged["model"]["last.bias"] += math.nan
    torch.save(damaged, state)
    good = weights(out)
    with pytest.raises(helpers.UsageError, match="became nan .* m.training away .* smaller"):
        collect(ddpm, network(), blobs(42), 6, out)
    assert all(torch.equal(v, weights(out)[k]) for k, v in good.items())


def test_other_settings_are_not_mixed_up(ddpm, network, tmp_path):
    out = tmp_path / "m.pt"
    collect(ddpm, network(), blobs(42), 1, out)
    with pytest.raises(helpers.UsageError, match="batch_size was 8, is 4"):
        collect(ddpm, network(), blobs(42), 2, out, batch_size=4)
    with pytest.raises(helpers.UsageError, match="pictures was 42, is 30"):
        collect(ddpm, network(), blobs(30), 2, out)
    with pytest.raises(helpers.UsageError, match="content was"):
        collect(ddpm, network(), blobs(42, seed=1), 2, out)
    out.rename(tmp_path / "kept.pt")
    with pytest.raises(helpers.UsageError, match="m.pt is gone: put it back"):
        collect(ddpm, network(), blobs(42), 2, out)
    (tmp_path / "kept.pt").rename(out)
    out.with_suffix(".training").unlink()
    with pytest.raises(helpers.UsageError, match="exists already"):
        collect(ddpm, network(), blobs(42), 2, out)


def test_examination_is_fixed_and_never_learned_from(ddpm):
    pictures = blobs(400)
    learn, exam = ddpm.hold_out(pictures, 1000, seed=1)
    again, same = ddpm.hold_out(pictures, 1000, seed=1)
    assert torch.equal(learn, again) and all(map(torch.equal, exam, same))
    assert len(learn) == 380 and len(exam[0]) >= 256
    both = pictures[learn], ddpm.to_bytes(exam[0])
    as_sets = [{p.numpy().tobytes() for p in part} for part in both]
    assert not as_sets[0] & as_sets[1] and len(as_sets[1]) == 20
    assert exam[1].min() >= 1 and exam[1].max() <= 1000
    assert abs(exam[1].float().mean() - 500) < 5


def test_gradients_in_parts_are_those_of_the_whole_batch(ddpm, network):
    torch.manual_seed(0)
    model, t = network(), torch.tensor([1, 200, 400, 600, 800, 1000])
    batch = torch.randn(6, 3, 8, 8), t, torch.randn(6, 3, 8, 8)
    accelerator, found = ddpm.Accelerator(cpu=True), []
    for pixels in (6 * 64, 128, 64):  # all at once, in threes, one by one
        model.zero_grad()
        loss = ddpm.add_gradients(accelerator, model, batch, model.alphas_bar, pixels)
        found.append(torch.cat([loss[None], *(p.grad.flatten() for p in model.parameters())]))
    model.zero_grad()
    loss = ddpm.diffusion_loss(model, *batch, model.alphas_bar).mean()
    loss.backward()
    whole = torch.cat([loss[None], *(p.grad.flatten() for p in model.parameters())])
    assert whole.abs().max() > 1e-3
    for parts in found:
        assert torch.allclose(parts, whole, atol=1e-5)


def test_times_of_training_are_1_to_T(ddpm):
    rng = torch.Generator().manual_seed(0)
    t = torch.cat([ddpm.draw_batch(blobs(200), 20, rng)[1] for _ in range(10)])
    assert sorted(set(t.tolist())) == list(range(1, 21))


def test_flips_mirror_about_half_of_the_pictures(ddpm):
    x = torch.rand(2000, 1, 2, 4)
    flipped = (ddpm.random_flips(x, torch.Generator().manual_seed(0)) == x.flip(-1)).all((1, 2, 3))
    assert 900 < flipped.sum() < 1100


def test_average_is_the_weighted_mean_it_claims_to_be(ddpm):
    """EDM2's power function: the weight of step i in the average is proportional to i^gamma."""
    model, average = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    values = torch.linspace(1, 3, 500, dtype=torch.float64)
    for step, value in enumerate(values, 1):
        model.weight.data.fill_(value)
        ddpm.update_average(average, model, step)
    weight = torch.arange(1, 501, dtype=torch.float64) ** 16.97
    assert math.isclose(average.weight.item(), (weight * values).sum() / weight.sum(), rel_tol=2e-3)


def test_learning_rate_rises_then_falls_to_nothing(ddpm):
    rates = [ddpm.learning_rate(step, 5000, 1e-3) for step in range(5000)]
    assert rates[0] < 1e-5 and max(rates) <= 1e-3 and rates[-1] < 1e-8
    assert rates[:200] == sorted(rates[:200]) and rates[200:] == sorted(rates[200:])[::-1]


def test_one_picture_is_too_few(ddpm, network, tmp_path):
    with pytest.raises(helpers.UsageError, match="at least 2"):
        collect(ddpm, network(), blobs(1), 1, tmp_path / "m.pt")
    assert len(collect(ddpm, network(), blobs(2), 2, tmp_path / "m.pt")) == 2


def test_place_that_cannot_be_written_shows_at_once(ddpm, network, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(helpers.UsageError, match="Cannot write"):
        collect(ddpm, network(), blobs(42), 1, tmp_path / "file" / "m.pt")


def test_training_in_16_bits_learns_as_well(ddpm, tmp_path, monkeypatch):
    AcceleratorState._reset_state()
    monkeypatch.setattr(helpers, "bf16_is_faster", lambda: True)
    torch.manual_seed(0)
    model = ddpm.UNet(width=16, mults=(1, 2))
    seen = collect(ddpm, model, blobs(160), 2, tmp_path / "m.pt", lr=3e-3)
    AcceleratorState._reset_state()
    heldout = [p.heldout for p in seen if p.heldout is not None]
    assert heldout[1] < 0.9 * heldout[0]
    assert {w.dtype for w in weights(tmp_path / "m.pt").values()} == {torch.float32}

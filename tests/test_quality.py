"""The measures of section 8: against independent computations, and on sets with known faults."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, blobs
from PIL import Image
from scipy.linalg import sqrtm

import ddpm_helpers as helpers

sys.path.insert(0, str(ROOT / "benchmarks"))
import guidance  # noqa: E402
import quality  # noqa: E402


@pytest.fixture(scope="module")
def cats():
    """The starter pictures, shuffled: bytes (2048, 3, 24, 24)."""
    pictures = helpers.load_pictures(ROOT / "cats_large" / "cats", 24)
    return pictures[torch.randperm(len(pictures), generator=torch.Generator().manual_seed(1))]


@pytest.fixture(scope="module")
def judge(ddpm, cats):
    """The features, and those of the pictures that everything is compared with."""
    features = ddpm.learn_features(cats, steps=150)
    return features, features(cats[1000:])


def times_the_floor(ddpm, judge, pictures):
    features, z_real = judge
    distance, floor = ddpm.scores(features(pictures), z_real).mean(dim=1)
    return (distance / floor).item()


def test_frechet_distance_equals_scipy_s_matrix_root(ddpm):
    rng = np.random.default_rng(0)
    for n, m, k in ((400, 300, 12), (300, 300, 40), (9, 50, 20)):  # the last: rank below k
        a, b = rng.normal(size=(n, k)) @ rng.normal(size=(k, k)), rng.normal(size=(m, k)) + 0.3
        s, t = np.cov(a.T), np.cov(b.T)
        expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t - 2 * sqrtm(s @ t).real)
        found = ddpm.frechet_distance(torch.from_numpy(a), torch.from_numpy(b))
        assert found == pytest.approx(expected, rel=1e-5)


def test_frechet_distance_in_closed_form(ddpm):
    z = torch.randn(500, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert ddpm.frechet_distance(z, z) == pytest.approx(0, abs=1e-9)
    assert ddpm.frechet_distance(z, z + 2) == pytest.approx(6 * 4)  # only the centre moves
    spread = torch.cov(z.T).trace().item()
    about = z.mean(0) + 3 * (z - z.mean(0))  # only the width changes: (3 - 1)^2 of the variance
    assert ddpm.frechet_distance(z, about) == pytest.approx(4 * spread)


def test_nearest_equals_brute_force(ddpm, cats):
    x, pictures = cats[:12], cats[12:212]
    distance, found = ddpm.nearest(x, pictures)
    for one, d, picture in zip(x.numpy().astype(float), distance, found.numpy()):
        best = min(
            (np.sqrt(((one - other) ** 2).mean()), other.tolist())
            for p in pictures.numpy().astype(float)
            for other in (p, p[..., ::-1])
        )
        assert d.item() == pytest.approx(best[0], rel=1e-3) and picture.tolist() == best[1]


def test_copies_are_found_mirrored_and_noisy_ones_too(ddpm, cats):
    new, held, learn = cats[:100], cats[100:200], cats[200:]
    yardstick = ddpm.nearest(held, learn)[0].median()
    assert 0.9 < ddpm.nearest(new, learn)[0].median() / yardstick < 1.1
    for copied in (learn[:100], learn[:100].flip(-1)):
        assert ddpm.nearest(copied, learn)[0].max() < 0.2
    noise = torch.randn(100, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    noisy = (learn[:100] + 8 * noise).clamp(0, 255).to(torch.uint8)
    assert ddpm.nearest(noisy, learn)[0].median() / yardstick < 0.3


def test_memory_equals_a_softmax_by_hand(ddpm, network):
    model, pictures = network(), blobs(5, 8)
    memory, rng = ddpm.Memory(pictures, model), torch.Generator().manual_seed(0)
    known = ddpm.to_signed(torch.cat([pictures, pictures.flip(-1)])).double()
    for t in (5, 300, 700, 1000):
        x_t, a = torch.randn(3, 3, 8, 8, generator=rng), model.alphas_bar[t].double()
        x_0, _ = ddpm.predict(memory, x_t, torch.full((3,), t))
        for i in range(3):
            logs = [-((x_t[i] - a.sqrt() * y) ** 2).sum() / (2 * (1 - a)) for y in known]
            weights = [torch.exp(log - max(logs)) for log in logs]
            mean = sum(w * y for w, y in zip(weights, known)) / sum(weights)
            torch.testing.assert_close(x_0[i].double(), mean, atol=2e-3, rtol=0)


def test_memory_draws_only_what_it_knows(ddpm, network):
    model, pictures = network(size=8), blobs(6, 8)
    drawn = ddpm.draw(ddpm.Memory(pictures, model), 12, seed=3, guidance=0)
    distance, _ = ddpm.nearest(drawn, pictures)
    assert distance.max() < 2 and len(drawn.unique(dim=0)) > 1


def test_losses_tell_memory_from_knowledge(ddpm, network, cats):
    learn, held = cats[:500], cats[500:540]
    memory, levels = ddpm.Memory(learn, network()), torch.tensor([50, 300, 600, 1000])
    known, unknown = (ddpm.loss_by_level(memory, x, levels) for x in (learn[:40], held))
    assert known[:2].max() < 1e-4 and unknown[:2].min() > 0.05
    assert unknown[3].item() == pytest.approx(
        known[3].item(), rel=0.3
    )  # only noise: all are equally blind
    again = ddpm.loss_by_level(memory, learn[:40], levels)
    assert torch.equal(known, again)  # the same questions each time


def test_loss_by_level_is_the_training_s_loss(ddpm, network, cats):
    model, x, levels = network(), cats[:6], torch.tensor([100, 900])
    rng = torch.Generator().manual_seed(0)
    for t, loss in zip(levels, ddpm.loss_by_level(model, x, levels)):
        eps, x_0 = torch.randn(6, 3, 24, 24, generator=rng), ddpm.to_signed(x)
        level, alphas_bar = t.expand(6), model.alphas_bar
        expected = ddpm.diffusion_loss(model, x_0, level, eps, alphas_bar).mean()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
        photo, _ = ddpm.predict(model, ddpm.add_noise(x_0, level, eps, alphas_bar), level)
        error = 127.5 * (photo - x_0).square().mean().sqrt()
        found = ddpm.belief_errors({"": {"": loss[None]}}, t[None], alphas_bar)[""][""]
        assert found.item() == pytest.approx(error.item(), rel=1e-3)


def test_known_damage_is_ranked_and_real_pictures_are_at_the_floor(ddpm, judge, cats):
    new, other = cats[:400], cats[400:800]
    assert times_the_floor(ddpm, judge, new) == pytest.approx(1, abs=0.4)
    for name, x in ddpm.damaged(new, other).items():
        assert len(x) == 400 and times_the_floor(ddpm, judge, x) > 1.8, name


@pytest.mark.parametrize("damage", ["noise", "blur", "swapped", "copies", "coats"])
def test_more_damage_is_a_worse_score(ddpm, judge, cats, damage):
    new, other, found = cats[:400], cats[400:800], [1.0]
    whole = ddpm.damaged(new, other)
    for level in (1, 2, 3):
        if damage == "noise":
            rng = torch.Generator().manual_seed(0)
            x = (new + level * 10 * torch.randn(new.shape, generator=rng)).clamp(0, 255).byte()
        elif damage in ("blur", "swapped"):
            worse = whole["blurred" if damage == "blur" else "two halves"]
            x = torch.cat([worse[: 133 * level], new[133 * level :]])
        elif damage == "copies":
            x = new[torch.arange(400) % (80, 20, 5)[level - 1]]
        else:  # a hundred from the darkest half, quarter, tenth of a larger set
            dark = cats[:1000].float().mean(dim=(1, 2, 3)).argsort()
            x = cats[dark[torch.linspace(0, (499, 249, 99)[level - 1], 100).long()]]
        found.append(times_the_floor(ddpm, judge, x))
    assert found == sorted(found) and found[-1] > 3


def test_half_of_the_coats_missing_is_found(ddpm, judge, cats):
    pool = cats[:1000]
    bright = pool.float().mean(dim=(1, 2, 3))
    half, whole = pool[bright < bright.median()], pool[::2]
    assert times_the_floor(ddpm, judge, half) > 1.5 * times_the_floor(ddpm, judge, whole)


def test_features_are_the_same_for_the_same_seed_and_leave_the_dice_alone(ddpm, cats):
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    one, other, third = (ddpm.learn_features(cats[:100], 5, seed)(cats[:9]) for seed in (0, 0, 1))
    assert torch.equal(one, other) and not torch.equal(one, third) and one.shape == (9, 96)
    assert torch.equal(before, torch.random.get_rng_state())
    small = ddpm.learn_features(blobs(5, 16), steps=2)(blobs(3, 16))
    assert small.shape == (3, 96) and small.isfinite().all()


def test_a_score_of_nothing_is_refused(ddpm):
    with pytest.raises(helpers.UsageError, match="at least 2"):
        ddpm.scores(torch.zeros(1, 4), torch.zeros(100, 4))


def test_faces_are_found_in_cats_and_less_in_noise(ddpm, cats):
    pytest.importorskip("cv2")
    x = cats[:60]
    noisy, grey = ddpm.damaged(x, cats[60:120])["noisy"], torch.full_like(x, 128)
    found = [helpers.face_share(pictures) for pictures in (x, noisy, grey)]
    assert found[0] > 0.8 and found[1] < found[0] - 0.1 and found[2] == 0


def test_without_opencv_faces_are_skipped(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    helpers._cat_faces.cache_clear()
    assert helpers.face_share(blobs(2)) is None
    helpers._cat_faces.cache_clear()


def test_told_apart_is_a_guess_where_there_is_nothing_to_see(ddpm, cats):
    torch.manual_seed(0)
    net = guidance.network(ddpm, 3, 4)
    blurred = ddpm.damaged(cats[:900], cats[:900])["blurred"]
    for x, low, high in ((cats[:900], 0.4, 0.6), (blurred, 0.9, 1)):
        share = guidance.told_apart(ddpm, net, x, cats[900:1800], learned=600, epochs=4)
        assert low <= share <= high


def test_second_judge_learns_turns_and_sources(ddpm, cats, tmp_path):
    source = (torch.arange(1000) % 2).long()
    pictures = torch.where(source.bool()[:, None, None, None], 255 - cats[:1000], cats[:1000])
    net = guidance.second_judge(ddpm, pictures[:800], source[:800], steps=150)
    for k in range(4):
        said = guidance.ask(ddpm, net, pictures[800:].rot90(k, (2, 3))).argmax(1)
        assert (said // 4 == source[800:]).float().mean() > 0.8
        assert (said % 4 == k).float().mean() > 0.35  # 0.25 is guessing
    for name in ("b_1.png", "A1.png", "a2.png"):
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    assert guidance.sources(tmp_path).tolist() == [0, 0, 1]


def test_benchmark_measures_a_checkpoint(ddpm, network, cats, judge, tmp_path):
    model = network(size=24)
    helpers.save_model(tmp_path / "small.pt", model, {"epochs": 2, "seed": 0})
    settings = dict(pictures=cats[:64], judge=judge, asked=4)
    result = quality.measure(ddpm, tmp_path / "small.pt", cats[64:400], **settings)
    assert result["judged"] == 64 and result["epochs"] == 2
    assert json.loads(json.dumps(result)) == result
    table = helpers.quality_table([result, result | {"faces": [None, None]}])
    assert "small.pt" in table and table.count("\n") == 9


@pytest.mark.parametrize("name", ["model.pt", "craters.pt"])
def test_shipped_networks_draw_and_their_committed_records_fit(ddpm, name):
    model = ddpm.load_model(ROOT / name)
    assert (ROOT / name).stat().st_size < 25e6 and model.config["size"] == 24
    assert name in helpers.find_checkpoints(ROOT)  # what the widget offers
    few = ddpm.draw(model, 2, seed=0, steps=4)
    assert few.shape == (2, 3, 24, 24) and few.float().std(dim=(1, 2, 3)).min() > 5
    record = helpers.quality_record(ROOT / name)
    assert record["judged"] >= 2000 and "photos" in record["data"]
    assert record["epochs"] == model.record["epochs"]
    assert len(record["losses"]["network"]["held out"]) == len(record["levels"])
    assert name in helpers.quality_table([record])


def test_a_network_that_was_not_measured_has_no_record():
    assert helpers.quality_record(ROOT / "unknown.pt") == {}


def test_another_network_of_the_same_name_has_no_record(tmp_path):
    changed = bytearray((ROOT / "model.pt").read_bytes())
    changed[-1] ^= 1
    (tmp_path / "model.pt").write_bytes(changed)
    assert helpers.quality_record(tmp_path / "model.pt") == {}


def test_race_was_run_with_the_network_that_is_shipped():
    race = json.loads((ROOT / "benchmarks" / "race.json").read_text())
    assert race["file"] == helpers.fingerprint((ROOT / race["model"]).read_bytes())


def test_plot_of_a_training_is_a_picture(tmp_path):
    results = [{"epochs": n, "distance": [3 / n, 0.1], "floor": [0.5, 0.1]} for n in (1, 2, 4)]
    quality.plot(results, tmp_path / "curve.png")
    assert helpers.open_picture(tmp_path / "curve.png").width > 300

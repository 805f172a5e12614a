"""Which recipe learns most in the same time? python benchmarks/recipe.py FOLDER [--seconds N]

Trains the notebook's network again and again for the same number of seconds, with one thing
changed each time, and compares what came of it: loss on held-out pictures, and Fréchet distance
of 256 new ones. Results go to benchmarks/recipe.json, eight samples of each to
benchmarks/recipe/, and a table of all results so far, one for each number of seconds, is printed
as Markdown. `--only NAME...` runs some of the recipes. One takes about six minutes; `--processes 2`
runs two at a time, with half of the CPU cores each.
"""

import argparse
import contextlib
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from quality import FIRST_SEED, judges, plain, read_json, times_the_floor, write_json
from speed import millions, usual_batch

import ddpm_helpers as helpers

BASE = "the notebook's recipe"
RESULTS = Path(__file__).with_suffix(".json")
STRIPS = Path(__file__).with_suffix("")
SAMPLES = 256
PLAIN = dict(steps=10, guidance=0)  # as all pictures of the tables in the README were drawn


def predicting(name):
    """The network's answer is eps or x_0 in place of v, and the loss is measured in that."""

    def change(ddpm):
        def loss(model, x_0, t, eps, alphas_bar):
            answer = model(ddpm.add_noise(x_0, t, eps, alphas_bar), t)
            return (answer - (eps if name == "eps" else x_0)).square().mean(dim=(1, 2, 3))

        def predict(model, x_t, t):
            a = model.alphas_bar[t].view(-1, 1, 1, 1)
            x_0 = model(x_t, t)
            if name == "eps":
                x_0 = (x_t - (1 - a).sqrt() * x_0) / a.sqrt()
            x_0 = x_0.clamp(-1, 1)  # or an eps at high noise would mean anything
            return x_0, (x_t - a.sqrt() * x_0) / (1 - a).sqrt()

        ddpm.diffusion_loss, ddpm.predict = loss, predict

    return change


def min_snr(ddpm, most=5):
    """Hang et al. 2023, equation for v: weight min(SNR, 5) / (SNR + 1)."""
    plain_loss = ddpm.diffusion_loss

    def loss(model, x_0, t, eps, alphas_bar):
        snr = alphas_bar[t] / (1 - alphas_bar[t])
        return snr.clamp(max=most) / (snr + 1) * plain_loss(model, x_0, t, eps, alphas_bar)

    ddpm.diffusion_loss = loss


def less_noise(ddpm):
    """Hoogeboom et al. 2023 (Simple diffusion), section 3.1: the cosine schedule suits 64x64; for
    24x24, where a pixel averages over more of the photo, all noise is 24 / 64 as strong."""
    usual = ddpm.draw_batch

    def draw_batch(pictures, timesteps, rng=None):
        x_0, t, eps = usual(pictures, timesteps, rng)
        sigma = (1 / ddpm.make_alphas_bar("cosine", timesteps) - 1).sqrt().to(t.device)
        return x_0, torch.searchsorted(sigma, sigma[t] * 24 / 64).clamp(min=1), eps

    ddpm.draw_batch = draw_batch


def average(keep):
    """The moving average keeps a fixed share of itself in each step."""

    def change(ddpm):
        @torch.no_grad()
        def update(average, model, step):
            for a, parameter in zip(average.parameters(), model.parameters()):
                a.lerp_(parameter, 1 - keep)

        ddpm.update_average = update

    return change


def no_flips(ddpm):
    ddpm.random_flips = lambda x, generator=None: x


def more_changes(ddpm):
    """Besides flips: a shift by up to a pixel each way, and up to a tenth more or less contrast."""
    flips = ddpm.random_flips

    def change(x, generator=None):
        size, x = x.shape[-1], F.pad(flips(x, generator), (1, 1, 1, 1), mode="replicate")
        dy, dx = torch.randint(0, 3, (2,), generator=generator).tolist()
        contrast = 0.9 + 0.2 * torch.rand(len(x), 1, 1, 1, generator=generator)
        return (x[..., dy : dy + size, dx : dx + size] * contrast).clamp(-1, 1)

    ddpm.random_flips = change


def dropout(ddpm):
    class ResidualBlock(ddpm.ResidualBlock):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.conv_2 = nn.Sequential(nn.Dropout(0.1), self.conv_2)

    ddpm.ResidualBlock = ResidualBlock


def constant_rate(ddpm):
    rate = ddpm.learning_rate
    ddpm.learning_rate = lambda step, steps, highest: rate(min(step, steps // 10), steps, highest)


def no_warm_up(ddpm):
    rate = ddpm.learning_rate
    ddpm.learning_rate = lambda step, steps, highest: rate(step, steps, highest, warm_up=0)


def attention(at_least):
    """Self-attention in all stages of so many channels or more."""

    def change(ddpm):
        class Stage(ddpm.Stage):
            def __init__(self, c_in, c_out, d, attention=False):
                super().__init__(c_in, c_out, d, attention=c_out >= at_least)

        ddpm.Stage = Stage

    return change


def two_blocks(ddpm):
    """As Ho et al. have it: two residual blocks in every stage."""

    class Stage(ddpm.Stage):
        def __init__(self, c_in, c_out, d, attention=False):
            super().__init__(c_in, c_out, d, attention)
            self.second = ddpm.ResidualBlock(c_out, c_out, d)

        def forward(self, x, time, *blind):
            return self.attention(self.second(self.block(x, time), time), *blind)

    ddpm.Stage = Stage


def patches(ddpm):
    """Each 2x2 pixels become the channels of one place, at half the resolution."""

    class UNet(ddpm.UNet):
        def __init__(self, size=24, channels=3, **more):
            super().__init__(size // 2, 4 * channels, **more)
            self.config |= dict(size=size, channels=channels)

        def forward(self, x_t, t):
            return F.pixel_shuffle(super().forward(F.pixel_unshuffle(x_t, 2), t), 2)

    ddpm.UNet = UNet


# name: a change of the notebook's definitions, or settings of its `UNet` or `train`
RECIPES = {
    BASE: {},
    "linear schedule": dict(unet=dict(schedule="linear")),
    "predict eps": dict(change=predicting("eps")),
    "predict x_0": dict(change=predicting("x_0")),
    "min-SNR-5 weights": dict(change=min_snr),
    "EMA of 0.9999": dict(change=average(0.9999)),
    "no EMA": dict(change=average(0)),
    "no flips": dict(change=no_flips),
    "flips, shifts, contrast": dict(change=more_changes),
    "dropout 0.1": dict(change=dropout),
    "learning rate 5e-4": dict(train=dict(lr=5e-4)),
    "learning rate 2e-3": dict(train=dict(lr=2e-3)),
    "constant learning rate": dict(change=constant_rate),
    "no warm-up": dict(change=no_warm_up),
    "batches of 8": dict(train=dict(batch_size=8)),
    "batches of 32": dict(train=dict(batch_size=32)),
    "batches of 64": dict(train=dict(batch_size=64)),
    "width 48": dict(unet=dict(width=48)),
    "width 96": dict(unet=dict(width=96)),
    "widths 64, 128, 128": dict(unet=dict(mults=(1, 2, 2))),
    "two levels: 64, 128": dict(unet=dict(mults=(1, 2))),
    "no attention": dict(change=attention(10_000)),
    "attention at 12x12 too": dict(change=attention(128)),
    "two blocks per stage": dict(change=two_blocks),
    "2x2 patches": dict(change=patches, unet=dict(mults=(2, 3))),
    "less noise": dict(change=less_noise),
}


def by_the_clock(rate, seconds):
    """The learning rate for a training that ends after so many seconds, not steps."""
    start = None

    def learning_rate(step, _, highest):
        nonlocal start
        start = start or time.perf_counter()
        share = min((time.perf_counter() - start) / seconds, 1)
        steps = 1000 if step == 0 else max(step + 1, round(step / share))
        return rate(step, steps, highest)

    return learning_rate


def learn(ddpm, recipe, real, seconds, seed):
    """Train for so many seconds: the moving average of the network, and the pictures seen."""
    recipe.get("change", lambda _: None)(ddpm)
    ddpm.learning_rate = by_the_clock(ddpm.learning_rate, seconds)
    ddpm.examine = lambda *_: 1.0  # the usual one costs time, and decides nothing here
    AcceleratorState._reset_state()
    torch.manual_seed(seed)
    settings = dict(batch_size=usual_batch(ddpm), seed=seed) | recipe.get("train", {})
    with tempfile.TemporaryDirectory() as folder:
        out, model = Path(folder) / "recipe.pt", ddpm.UNet(**recipe.get("unet", {}))
        with contextlib.closing(ddpm.train(model, real, 10_000, out=out, **settings)) as training:
            start = time.perf_counter()
            for progress in training:
                if time.perf_counter() - start > seconds:
                    break
    return progress.average, progress.step * settings["batch_size"]


@torch.no_grad()
def heldout_loss(ddpm, model, exam, usual):
    """Squared error in v at the cosine schedule's noise levels, whatever the network was trained
    for: |eps error|^2 + |x_0 error|^2 at the nearest levels of its own schedule."""
    own, losses = model.alphas_bar, []
    for x_0, t, eps in zip(*(part.to(own.device).split(250) for part in exam)):
        wanted = usual.to(own.device).logit(1e-6)[t]
        level = 1 + (own[1:].logit(1e-6) - wanted[:, None]).abs().argmin(dim=1)
        believed = ddpm.predict(model, ddpm.add_noise(x_0, level, eps, own), level)
        errors = [(b - true).square().mean(dim=(1, 2, 3)) for b, true in zip(believed, (x_0, eps))]
        losses.append(sum(errors).float())
    return torch.cat(losses).mean()


@cache
def pictures_and_judge(folder):
    real = helpers.load_pictures(folder, 24)
    return real, judges(helpers.notebook(), real)


def run(name, seed, folder, seconds, threads):
    """Train by a recipe and examine the result: a row of the table, and its first eight cats."""
    torch.set_num_threads(threads)
    real, judge = pictures_and_judge(folder)
    ddpm = helpers.notebook.__wrapped__()  # a copy of its own, to be changed
    usual, (_, exam) = ddpm.make_alphas_bar("cosine", 1000), ddpm.hold_out(real, 1000, seed)
    model, seen = learn(ddpm, RECIPES[name], real, seconds, seed)
    with helpers.drawing_precision():
        loss = heldout_loss(ddpm, model, exam, usual)
    new = ddpm.draw(model, SAMPLES, FIRST_SEED, **PLAIN)
    row = {"seconds": seconds, "threads": threads, "pictures": seen, "millions": millions(model)}
    row |= {"loss": loss, "times the floor": times_the_floor(ddpm, judge, new).mean()}
    return name, seed, plain(row), new[:8]


def strip_file(name, seconds):
    """The file in STRIPS for eight samples of a recipe trained for so many seconds."""
    return STRIPS / f"{seconds:g}" / f"{list(RECIPES).index(name):02}.png"


def table(results, seconds):
    """Results of one budget as Markdown; more than one seed as mean and half of the range."""
    yield "| | pictures seen | weights | held-out loss | Fréchet distance | eight samples |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name in RECIPES:
        rows = list(results.get(name, {}).values())
        if not rows:
            continue
        loss, distance, seen, millions = (
            [row[k] for row in rows] for k in ("loss", "times the floor", "pictures", "millions")
        )
        texts = [f"{statistics.mean(x):.{n}f}" for x, n in ((loss, 4), (distance, 1))]
        if len(rows) > 1:
            spreads = [(max(x) - min(x)) / 2 for x in (loss, distance)]
            texts = [f"{t} ± {s:.{n}f}" for t, s, n in zip(texts, spreads, (4, 1))]
        strip = f"![](benchmarks/{strip_file(name, seconds).relative_to(STRIPS.parent)})"
        cells = [name, f"{statistics.mean(seen):,.0f}", f"{millions[0]:.1f} M", *texts, strip]
        yield f"| {' | '.join(cells)} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", help="pictures to learn from; none: print the table")
    parser.add_argument("--seconds", type=float, default=300, help="of training for each (300)")
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="(0)")
    parser.add_argument("--processes", type=int, default=1, help="to share the cores among (1)")
    options = parser.parse_args()
    results = read_json(RESULTS)
    names = options.only if options.folder else []
    threads = max(1, torch.get_num_threads() // options.processes)
    fixed = dict(folder=options.folder, seconds=options.seconds, threads=threads)
    pool = ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn"))
    with pool:
        waiting = [pool.submit(run, n, seed, **fixed) for seed in options.seeds for n in names]
        for done in tqdm(as_completed(waiting), "recipes", len(waiting), disable=not waiting):
            name, seed, row, new = done.result()
            tqdm.write(f"{name}, seed {seed}: {json.dumps(row)}")
            rows = results.setdefault(f"{options.seconds:g}", {}).setdefault(name, {})
            rows[str(seed)] = row
            write_json(RESULTS, results)
            if seed == 0:
                file = strip_file(name, options.seconds)
                helpers.save_png(helpers.grid(new, columns=8), file, scale=2)
    for seconds, rows in results.items():
        print(f"\nAfter {seconds} seconds:\n", *table(rows, float(seconds)), sep="\n")


if __name__ == "__main__":
    main()

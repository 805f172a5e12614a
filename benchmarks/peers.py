"""Beside two libraries: python benchmarks/peers.py [FOLDER --minutes 30]

Runs this project's U-Net, denoising_diffusion_pytorch's and diffusers' (install both), of about
the same number of weights, side by side: pictures per second of training, seconds for one pass of
16 pictures, peak memory, and seconds for 16 new pictures by each library's own sampler, with the
ratios. Each trains in its own default way, then in 16 bits like ours. Takes six minutes on two
CPU cores.

With a FOLDER of pictures: what each has learned after so many minutes, this project also after a
sixth of them. `--processes 2` runs two at a time, with half of the CPU cores each.
"""

import argparse
import contextlib
import itertools
import math
import multiprocessing
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from quality import times_the_floor
from recipe import PLAIN, by_the_clock, learn, pictures_and_judge
from speed import millions, seconds, training_rate

import ddpm_helpers as helpers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
JUDGED = 256


class Ours:
    """As the notebook does it: batches of 16, 16 bits where they are faster."""

    name = "this project"

    def __init__(self):
        self.ddpm = helpers.notebook()
        self.network = self.ddpm.UNet().to(DEVICE)
        passes = []  # a guided step takes two
        count = self.network.register_forward_pre_hook(lambda _, x: passes.append(len(x[0])))
        self.ddpm.draw(self.network, 1)
        self.steps = sum(passes)
        count.remove()

    def one_step(self, x):
        return next(self.ddpm.walk(self.network, x, [500, 400], self.ddpm.dpm_step))


class DenoisingDiffusionPytorch:
    """As its Trainer does it: batches of 16, Adam, flips, an average of the weights, 32 bits."""

    name, batch, steps = "denoising_diffusion_pytorch", 16, 1000

    def __init__(self, seconds=None, **more):
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet
        from ema_pytorch import EMA

        self.network = Unet(64, dim_mults=(1, 2, 2)).to(DEVICE)
        self.diffusion = GaussianDiffusion(self.network, image_size=24, **more).to(DEVICE)
        self.optimizer = torch.optim.Adam(self.network.parameters(), 1e-4, betas=(0.9, 0.99))
        self.average = EMA(self.diffusion, beta=0.995, update_every=10)

    def loss(self, pictures):
        return self.diffusion(helpers.notebook().random_flips(pictures / 255))

    def after_step(self):
        self.average.update()

    def one_step(self, x):
        return self.diffusion.p_sample(x, 500)

    def draw(self, count):
        """By DDIM in 100 steps, since all 1000 would take an hour on a CPU."""
        quick = type(self)(sampling_timesteps=100)
        quick.diffusion.load_state_dict(self.average.ema_model.state_dict())
        return (quick.diffusion.sample(batch_size=count) * 255).round().byte()


class Diffusers:
    """As its example for unconditional training: batches of 16, AdamW, a warm-up and half a
    cosine, an average of the weights, eps, 32 bits."""

    name, batch, steps = "diffusers", 16, 50

    def __init__(self, seconds=600):
        from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, UNet2DModel
        from diffusers.training_utils import EMAModel

        self.network = UNet2DModel(
            sample_size=24,
            block_out_channels=(64, 96, 128),
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        ).to(DEVICE)
        self.scheduler, settings = DDPMScheduler(), dict(betas=(0.95, 0.999), weight_decay=1e-6)
        self.rate, self.step = by_the_clock(self.warm_up_and_cosine, seconds), 0
        first = self.rate(0, None, 1e-4)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), first, **settings)
        settings = dict(decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
        self.average = EMAModel(self.network.parameters(), **settings)
        self.pipeline = DDIMPipeline(self.network, DDIMScheduler())
        self.pipeline.set_progress_bar_config(disable=True)

    def loss(self, pictures):
        x_0 = helpers.notebook().random_flips(pictures / 127.5 - 1)
        eps, t = torch.randn_like(x_0), torch.randint(0, 1000, (len(x_0),), device=DEVICE)
        return F.mse_loss(self.network(self.scheduler.add_noise(x_0, eps, t), t).sample, eps)

    @staticmethod
    def warm_up_and_cosine(step, steps, highest, warm_up=500):
        if step < warm_up:
            return highest * step / warm_up
        share = min((step - warm_up) / max(steps - warm_up, 1), 1)
        return highest * (1 + math.cos(math.pi * share)) / 2

    def after_step(self):
        self.average.step(self.network.parameters())
        self.step += 1
        self.optimizer.param_groups[0]["lr"] = self.rate(self.step, None, 1e-4)

    def one_step(self, x):
        return self.pipeline(batch_size=len(x), num_inference_steps=1)

    def draw(self, count):
        self.average.copy_to(self.network.parameters())
        pictures = self.pipeline(batch_size=count, output_type="np").images  # (N, H, W, 3) 0 to 1
        return torch.from_numpy(pictures * 255).round().byte().permute(0, 3, 1, 2)


PEERS = {peer.name: peer for peer in (Ours, DenoisingDiffusionPytorch, Diffusers)}


def train(peer, pictures, bf16=False):
    """Steps without end on bytes (N, C, H, W); yields the time after each."""
    pictures = pictures.to(DEVICE)
    peer.network.train()
    while True:
        batch = pictures[torch.randint(len(pictures), (peer.batch,), device=DEVICE)].float()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
            loss = peer.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.network.parameters(), 1.0)
        peer.optimizer.step()
        peer.optimizer.zero_grad()
        peer.after_step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        yield time.perf_counter()


def rate_of(peer, bf16, steps=24):
    """Pictures per second of training, the median over steps (the first warm up)."""
    if isinstance(peer, Ours):
        return training_rate(peer.ddpm, bf16)
    pictures = torch.randint(0, 256, (2048, 3, 24, 24), dtype=torch.uint8)
    times = itertools.islice(train(peer, pictures, bf16), 2, steps)
    return peer.batch / statistics.median(b - a for a, b in itertools.pairwise(times))


@torch.no_grad()
def speed(name, bf16, threads):
    """One line of the table: millions of weights, pictures per second of training, seconds of a
    pass of 16 pictures, peak memory in MB, seconds for 16 new pictures in its usual steps."""
    torch.set_num_threads(threads)
    peer = PEERS[name]()
    with torch.enable_grad():
        rate = rate_of(peer, bf16)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # kB on Linux
    if DEVICE == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    x, t = torch.randn(16, 3, 24, 24, device=DEVICE), torch.full((16,), 500, device=DEVICE)
    peer.network.eval()
    helpers.bf16_is_faster = lambda: bf16  # for our own drawing
    with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
        one_pass = seconds(lambda: peer.network(x, t), 10)
        drawing = peer.steps * seconds(lambda: peer.one_step(x), 10)
    return millions(peer.network), rate, one_pass, peak, drawing


def compare_speed(rounds, threads):
    """Print medians and ranges; every measurement in a process of its own, in turns."""
    kinds = [(name, bf16) for name in PEERS for bf16 in (False, True)]
    found = {kind: [] for kind in kinds}
    spawn = multiprocessing.get_context("spawn")
    for kind in rounds * kinds:
        with ProcessPoolExecutor(1, spawn) as pool:
            found[kind].append(pool.submit(speed, *kind, threads).result())
    print("| | weights | training, pictures/s | pass of 16 | peak memory | drawing 16 |")
    print("| --- | --- | --- | --- | --- | --- |")
    for (name, bf16), rows in found.items():
        weights, rate, one_pass, peak, drawing = map(statistics.median, zip(*rows))
        cells = [f"{name}, {16 if bf16 else 32} bits", f"{weights:.1f} M", f"{rate:.0f}"]
        cells += [
            f"{one_pass * 1000:.0f} ms",
            f"{peak:.0f} MB",
            f"{drawing:.{0 if drawing > 10 else 2}f} s",
        ]
        print(f"| {' | '.join(cells)} |")
    for name in list(PEERS)[1:]:
        for ours, theirs in ((True, False), (True, True), (False, False)):
            pairs = list(zip(found[Ours.name, ours], found[name, theirs]))
            faster = sorted(mine[1] / other[1] for mine, other in pairs)
            quicker = sorted(other[4] / mine[4] for mine, other in pairs)
            bits = "{} bits against {}".format(*(16 if b else 32 for b in (ours, theirs)))
            print(f"{bits}, {name}: times as fast: training {spread(faster)}", end=", ")
            print(f"drawing {spread(quicker)}")


def spread(values):
    return f"{statistics.median(values):.2f} ({values[0]:.2f} to {values[-1]:.2f})"


def quality(name, folder, minutes, threads, seed=0):
    """Train for so many minutes in its own way, draw and judge: a line of text."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    real, judge = pictures_and_judge(folder)
    if name == Ours.name:
        ddpm = helpers.notebook.__wrapped__()
        model, seen = learn(ddpm, {}, real, 60 * minutes, seed)
        new = ddpm.draw(model, JUDGED, **PLAIN)
    else:
        peer, start = PEERS[name](seconds=60 * minutes), time.perf_counter()
        numbers, _ = helpers.notebook().hold_out(real, 1000, seed)
        with contextlib.closing(train(peer, real[numbers])) as training:
            steps = next(i for i, now in enumerate(training, 1) if now - start > 60 * minutes)
        seen, new = steps * peer.batch, peer.draw(JUDGED)
    new = new.cpu()
    ratio = times_the_floor(helpers.notebook(), judge, new).mean()
    faces = helpers.face_share(new)
    faces = "" if faces is None else f", faces in {faces:.0%}"
    return (
        f"{name}, {minutes:g} minutes, {seen:,} pictures seen: {ratio:.1f} times the floor{faces}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", help="pictures to learn from")
    parser.add_argument("--minutes", type=float, default=30, help="of training for each (30)")
    parser.add_argument("--rounds", type=int, default=3, help="of measuring the speed (3)")
    parser.add_argument("--processes", type=int, default=1, help="trainings at a time (1)")
    options = parser.parse_args()
    threads = torch.get_num_threads()
    if not options.folder:
        compare_speed(options.rounds, threads)
        return
    kinds = [(name, options.minutes) for name in list(PEERS)[1:]]
    kinds += [(Ours.name, options.minutes / 6), (Ours.name, options.minutes)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, spawn) as pool:
        share = max(1, threads // options.processes)
        waiting = [pool.submit(quality, n, options.folder, m, share) for n, m in kinds]
        for task in as_completed(waiting):
            print(task.result(), flush=True)


if __name__ == "__main__":
    main()

"""How fast this machine trains and draws: python benchmarks/speed.py [--threads N]

Prints pictures per second of training in 32 and in 16 bits, and seconds for 16 cats and for one,
with the ratios of what was measured side by side in this run. Takes about two minutes on two CPU
cores.
"""

import argparse
import inspect
import itertools
import statistics
import sys
import time
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ddpm_helpers as helpers


def usual_batch(ddpm):
    """How many pictures the notebook's `train` takes in a step, unless told otherwise."""
    return inspect.signature(ddpm.train).parameters["batch_size"].default


def training_rate(ddpm, bf16, steps=40):
    """Pictures per second, the median over steps (the first two warm up)."""
    AcceleratorState._reset_state()
    helpers.bf16_is_faster = lambda: bf16
    pictures = torch.randint(0, 256, (2048, 3, 24, 24), dtype=torch.uint8)
    out, times = helpers.scratch_file("speed.pt"), []
    for _ in itertools.islice(ddpm.train(ddpm.UNet(), pictures, 2, out=out), steps):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter())
    return usual_batch(ddpm) / statistics.median(b - a for a, b in itertools.pairwise(times[1:]))


def seconds(function, repeats=5):
    """The median time of a call, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def millions(network):
    """Of weights."""
    return sum(p.numel() for p in network.parameters()) / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, help="CPU threads (all cores)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    ddpm, faster = helpers.notebook(), helpers.bf16_is_faster()
    print(f"{helpers.device_name()}, torch {torch.__version__}")
    rates = {bf16: training_rate(ddpm, bf16) for bf16 in (False, True)}
    print(f"training, 32 bits: {rates[False]:.0f} pictures/s")
    print(f"training, 16 bits: {rates[True]:.0f} pictures/s, {rates[True] / rates[False]:.2f} x")

    helpers.bf16_is_faster = lambda: faster
    model = ddpm.load_model(helpers.PROJECT / "model.pt")
    few, usual = ddpm.samplers()["dpm"], seconds(lambda: ddpm.draw(model, 16))
    size = f"{millions(model):.1f} M weights"
    print(f"16 cats, {few} steps, {16 if faster else 32} bits: {usual:.2f} s, {size}")
    print(f"1 cat, {few} steps: {1000 * seconds(lambda: ddpm.draw(model, 1)):.0f} ms")
    slow = seconds(lambda: ddpm.draw(model, 16, 0, 1000, "ddpm", guidance=0), repeats=1)
    print(f"16 cats, 1000 steps: {slow:.1f} s, {slow / usual:.0f} x")


if __name__ == "__main__":
    main()

"""How fast this machine trains and draws: python benchmarks/speed.py [--threads N]

Prints pictures per second of training in 32 and in 16 bits, and seconds for 16 cats, with the
ratios of what was measured side by side in this run. Takes about two minutes on two CPU cores.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ddpm_helpers as helpers

BATCH = 64


def training_rate(ddpm, bf16, steps=12):
    """Pictures per second, the median over steps (the first two warm up)."""
    AcceleratorState._reset_state()
    helpers.bf16_is_faster = lambda: bf16
    pictures = torch.randint(0, 256, (2048, 3, 24, 24), dtype=torch.uint8)
    out = Path(tempfile.mkdtemp()) / "speed.pt"
    times = []
    for _ in itertools.islice(ddpm.train(ddpm.UNet(), pictures, 2, BATCH, out=out), steps):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter())
    return BATCH / statistics.median(b - a for a, b in itertools.pairwise(times[1:]))


def drawing_time(ddpm, model, count, steps, sampler):
    """Seconds for `count` cats."""
    start = time.perf_counter()
    ddpm.draw(model, count, 0, steps, sampler)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, help="CPU threads (all cores)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    ddpm = helpers.notebook()
    print(f"{helpers.device_name()}, torch {torch.__version__}")
    rates = {bf16: training_rate(ddpm, bf16) for bf16 in (False, True)}
    print(f"training, 32 bits: {rates[False]:.0f} pictures/s")
    print(f"training, 16 bits: {rates[True]:.0f} pictures/s, {rates[True] / rates[False]:.2f} x")
    model = ddpm.load_model(helpers.PROJECT / "model.pt")
    drawing_time(ddpm, model, 16, 2, "dpm")  # warm up
    quick = [drawing_time(ddpm, model, 16, 20, "dpm") for _ in range(3)]
    slow = drawing_time(ddpm, model, 16, 1000, "ddpm")
    print(f"16 cats, 20 steps: {statistics.median(quick):.2f} s")
    print(f"16 cats, 1000 steps: {slow:.1f} s, {slow / statistics.median(quick):.0f} x")
    print(f"1 cat, 20 steps: {drawing_time(ddpm, model, 1, 20, 'dpm'):.2f} s")


if __name__ == "__main__":
    main()

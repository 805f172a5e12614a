"""Is it good? Is it copied? python benchmarks/quality.py CHECKPOINT... FOLDER [--json FILE]

Prints the measures of the notebook's section 8 as one table, a column for each checkpoint. FOLDER
holds the pictures that the network was trained on. On two CPU cores, drawing 2,000 new cats takes
about two minutes, all the rest less than one. `--pictures FILE.npy` judges pictures
that were drawn before, as `ddpm_helpers.py generate --out FILE.npy` writes them.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ddpm_helpers as helpers

FIRST_SEED = 5_000_000  # far from those of the pictures in cats_large/
REFERENCE = 6000  # real pictures that the features learn from and distances are measured to
ASKED = 128  # pictures of each kind for the loss by noise level


def draw(ddpm, model, count):
    """Bytes (count, C, H, W)."""
    starts = tqdm(range(0, count, 64), "drawing")
    return torch.cat([ddpm.draw(model, min(64, count - i), FIRST_SEED + i) for i in starts])


def real_pictures(folder, model):
    """The pictures of a folder as this network draws them, bytes (M, C, H, W)."""
    return helpers.load_pictures(folder, model.config["size"], channels=model.config["channels"])


def shuffled(real, seed=0):
    """Bytes (M, C, H, W) in the order in which the first REFERENCE are those judged by."""
    return real[torch.randperm(len(real), generator=torch.Generator().manual_seed(seed))]


def judges(ddpm, real, seed=0):
    """What depends on the real pictures alone: the features and how they describe those."""
    reference = shuffled(real, seed)[:REFERENCE]
    features = ddpm.learn_features(reference, seed=seed)
    return features, features(reference)


def times_the_floor(ddpm, judge, pictures):
    """The distance of bytes (N, C, H, W) to real ones as a multiple of theirs: (draws,)."""
    features, z_real = judge
    distance, floor = ddpm.scores(features(pictures), z_real)
    return distance / floor.mean()


def loss_curves(ddpm, model, pictures, asked=ASKED):
    """Losses by noise level of the network and of the memory, on pictures learned from and not."""
    learn, held = pictures
    levels = torch.linspace(1, model.config["timesteps"], 13).round().long()
    few, memory = (
        {"learned from": learn[:asked], "held out": held[:asked]},
        ddpm.Memory(learn, model),
    )
    with helpers.drawing_precision():
        network = {kind: ddpm.loss_by_level(model, x, levels) for kind, x in few.items()}
    memory = {kind: ddpm.loss_by_level(memory, x[:64], levels) for kind, x in few.items()}
    return levels, {"network": network, "memory": memory}


def measure(ddpm, path, real, samples=2000, pictures=None, judge=None, asked=ASKED):
    """All measures of a checkpoint against real bytes (M, C, H, W): a dict of numbers.

    pictures: bytes (N, C, H, W) to be judged, drawn if there are none."""
    model = ddpm.load_model(path)
    seed = model.record.get("seed", 0)
    if not helpers.learned_from(model, real, seed):
        print(f"{path} was not trained on just these pictures: some held-out ones may be known.")
    numbers, (x_0, *_) = ddpm.hold_out(real, model.config["timesteps"], seed)
    learn, held = real[numbers], ddpm.to_bytes(x_0)[: len(real) - len(numbers)]
    new = draw(ddpm, model, samples) if pictures is None else pictures
    near, yardstick = ddpm.nearest(new, learn)[0], ddpm.nearest(held, learn)[0]
    ratios = [near.quantile(q) / yardstick.quantile(q) for q in (0.5, 0.01)]
    features, z_real = judge or judges(ddpm, real)
    distance, floor = ddpm.scores(features(new), z_real)
    levels, losses = loss_curves(ddpm, model, (learn, held), asked)
    result = {"name": Path(path).name, "file": helpers.fingerprint(Path(path).read_bytes())}
    result |= {"data": f"{len(real):,} photos", "judged": len(new)}
    result |= {"nearest": ratios, "distance": [distance.mean(), distance.std()]}
    result |= {"floor": [floor.mean(), floor.std()]}
    result |= {"faces": [helpers.face_share(new), helpers.face_share(held)]}
    result |= {"loss": [curve.mean() for curve in losses["network"].values()]}
    result |= {"levels": levels, "losses": losses, "epochs": model.record.get("epochs", 0)}
    return plain(result)


def plain(value):
    """Tensors as rounded numbers and lists, for JSON."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def plot(results, path):
    """The score over a training: a PNG."""
    figure, axis = plt.subplots(figsize=(6, 2.8))
    curve = [(r["epochs"], r["distance"][0] / r["floor"][0]) for r in results]
    axis.plot(*zip(*sorted(curve)), "o-", ms=4)
    axis.axhline(1, color="gray", lw=0.7)
    axis.set(xscale="log", yscale="log", xlabel="passes over the pictures")
    axis.set(title="Fréchet distance, times the floor")
    for ticks in (axis.xaxis, axis.yaxis):
        ticks.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ticks.set_major_formatter("{x:g}")
        ticks.set_minor_locator(NullLocator())
    figure.savefig(path, dpi=100, bbox_inches="tight")


def read_json(file):
    """What `write_json` wrote, {} if there is nothing yet."""
    return json.loads(file.read_text()) if file.exists() else {}


def write_json(file, value):
    text = json.dumps(value, indent=1) + "\n"
    helpers.write_file(file, lambda part: part.write_text(text))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="+", help="trained networks, all on the same pictures")
    parser.add_argument("folder", help="the pictures they were trained on")
    parser.add_argument("--samples", type=int, default=2000, help="new cats for each (2000)")
    parser.add_argument("--pictures", help=".npy with pictures to judge instead of new ones")
    parser.add_argument("--json", help="add the results to this file, by checkpoint")
    parser.add_argument("--plot", help="PNG with the score over a training, from its checkpoints")
    parser.add_argument("--threads", type=int, help="CPU threads (all cores)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    ddpm, given, judge = helpers.notebook(), None, None
    if options.pictures:
        array = np.load(options.pictures)
        given = torch.from_numpy(array).permute(0, 3, 1, 2)[: options.samples].contiguous()
    results = []
    for path in options.checkpoint:
        real = real_pictures(options.folder, ddpm.load_model(path))
        judge = judge or judges(ddpm, real)
        results.append(measure(ddpm, path, real, options.samples, given, judge))
    print(helpers.quality_table(results))
    if options.plot:
        plot(results, options.plot)
    if options.json:
        file = Path(options.json)
        write_json(file, read_json(file) | {result["name"]: result for result in results})


if __name__ == "__main__":
    main()

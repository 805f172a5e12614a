"""How many steps, and how much guidance? python benchmarks/guidance.py FOLDER [--rows 12,0.3 ...]

Draws 3,000 cats for each number of steps and guidance and prints a row of the README's table:

* how far the first 2,000 are from photos, by the Fréchet distance of the notebook's section 8;
* the same in the features of a *second judge*, a larger network that learned to tell how far a
  photo is turned and which source it is from (by the letters that the names of the files begin
  with: photos of one source are told by their turns alone);
* in how many of them OpenCV finds a face;
* how often a copy of the second judge, trained to tell these 2,000 from as many photos, is right
  about the last 1,000 and as many other photos: 50 % if they cannot be told apart.

A row takes five to eight minutes on two CPU cores. FOLDER holds the pictures that the network was
trained on.
"""

import argparse
import copy
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from quality import FIRST_SEED, REFERENCE, judges, real_pictures, shuffled, times_the_floor

import ddpm_helpers as helpers

ROWS = ["10,0.3", "12,0.3", "12,0.4", "20,0", "20,0.3", "20,0.4", "20,1"]
DRAWN, LEARNED = 3000, 2000


def sources(folder):
    """A number for each picture of a folder, (M,): from which source its file is."""
    names = [re.match("[a-z]*", path.stem.lower())[0] for path in helpers.find_pictures(folder)]
    return torch.from_numpy(np.unique(names, return_inverse=True)[1])


def network(ddpm, channels, answers):
    """Four convolutions, 128 features, so many answers."""
    body = nn.Sequential(ddpm.layer(channels, 64), ddpm.layer(64, 128, 2), ddpm.layer(128, 128))
    body.extend([ddpm.layer(128, 128, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()])
    return nn.Sequential(body, nn.Linear(128, answers)).to(memory_format=torch.channels_last)


def fit(ddpm, net, batches, steps, highest):
    """Classify batches (x (N, C, H, W) in [-1, 1], answers (N,)) better, step by step."""
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    net.train()
    for step, (x, answers) in zip(tqdm(range(steps), "learning to judge"), batches):
        optimizer.param_groups[0]["lr"] = ddpm.learning_rate(step, steps, highest, warm_up=50)
        with helpers.drawing_precision():
            scores = net(x.contiguous(memory_format=torch.channels_last))
        optimizer.zero_grad()
        F.cross_entropy(scores.float(), answers).backward()
        optimizer.step()
    return net.eval()


def second_judge(ddpm, real, source, steps=2500, seed=0):
    """A network that knows turns and sources of photos, bytes (M, C, H, W) and numbers (M,)."""
    torch.manual_seed(seed)

    def batches():
        while True:
            some, turn = torch.randint(len(real), (64,)), torch.randint(4, (64,))
            x = ddpm.random_flips(ddpm.to_signed(real[some]))
            x = torch.stack([picture.rot90(int(k), (1, 2)) for picture, k in zip(x, turn)])
            yield x, 4 * source[some] + turn

    net = network(ddpm, real.shape[1], 4 * (int(source.max()) + 1))
    return fit(ddpm, net, batches(), steps, 2e-3)


@torch.no_grad()
def ask(ddpm, net, pictures):
    """What a network says of bytes (N, C, H, W): (N, K)."""
    return torch.cat([net(ddpm.to_signed(part)) for part in pictures.split(500)])


def told_apart(ddpm, net, drawn, photos, learned=LEARNED, epochs=8, seed=0):
    """How often a copy of `net`, trained on the first of each, is right about the others: a share.

    drawn, photos: bytes (N, C, H, W), as many of each."""
    torch.manual_seed(seed)
    net = copy.deepcopy(net)
    net[1] = nn.Linear(net[1].in_features, 2)
    x = torch.cat([drawn[:learned], photos[:learned]])
    answers = torch.arange(2).repeat_interleave(learned)

    def batches():
        for _ in range(epochs):
            for some in torch.randperm(len(x)).split(64):
                yield ddpm.random_flips(ddpm.to_signed(x[some])), answers[some]

    fit(ddpm, net, batches(), epochs * -(-len(x) // 64), 1e-3)
    right = [
        ask(ddpm, net, part[learned:]).argmax(1) == i for i, part in enumerate((drawn, photos))
    ]
    return torch.cat(right).float().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="the pictures that the network was trained on")
    parser.add_argument("--model", default=str(helpers.PROJECT / "model.pt"), help="(model.pt)")
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="STEPS,GUIDANCE")
    options = parser.parse_args()
    ddpm = helpers.notebook()
    model = ddpm.load_model(options.model)
    real, source = real_pictures(options.folder, model), sources(options.folder)
    if len(source) != len(real):
        raise helpers.UsageError("Take the files that cannot be read out of the folder first.")
    if len(real) < DRAWN:
        raise helpers.UsageError(
            f"Name a folder of at least {DRAWN:,} pictures, not {len(real):,}."
        )
    first, net = judges(ddpm, real), second_judge(ddpm, real, source)
    features = partial(ask, ddpm, net[0])
    mixed = shuffled(real)
    second = features, features(mixed[:REFERENCE])
    photos = mixed.roll(-REFERENCE, 0)[:DRAWN]  # others than those, as far as there are any
    print("| steps | guidance | times the floor | the same, second judge | faces | told apart |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in tqdm(options.rows, "rows"):
        steps, guidance = row.split(",")
        new = ddpm.draw(model, DRAWN, FIRST_SEED, int(steps), guidance=float(guidance))
        far = [times_the_floor(ddpm, judge, new[:LEARNED]).mean() for judge in (first, second)]
        faces, told = helpers.face_share(new[:LEARNED]), told_apart(ddpm, net, new, photos)
        faces = "" if faces is None else f"{faces:.1%}"
        cells = [steps, guidance, *(f"{x:.2f}" for x in far), faces, f"{told:.1%}"]
        tqdm.write(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

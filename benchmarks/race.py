"""Which sampler needs how many steps? python benchmarks/race.py FOLDER [--model FILE] [--cats N]

Draws the same seeds by each sampler in 1000, 250, 50, 20, 10 and 5 steps, and measures how far
they are from the pictures in FOLDER by the Fréchet distance of the notebook's section 8. Writes
the table to benchmarks/race.json, which the notebook shows. With 1000 cats in each row this takes
three hours on two CPU cores; `--steps 50 20 10 5` a quarter of an hour. Rows that are not run
again stay in the table, if they are of the same network.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from quality import FIRST_SEED, judges, plain, read_json, real_pictures, times_the_floor, write_json

import ddpm_helpers as helpers


def run(ddpm, model, judge, cats, steps, sampler):
    """One row: seconds for 16 cats, and the distance as a multiple of the real-to-real floor."""
    started = time.perf_counter()
    drawn = ddpm.draw(model, cats, FIRST_SEED, steps, sampler)
    seconds = (time.perf_counter() - started) * 16 / cats
    ratio = times_the_floor(ddpm, judge, drawn)
    row = {"sampler": sampler, "steps": steps, "seconds for 16": seconds}
    return plain(row | {"times the floor": ratio.mean(), "spread": ratio.std()})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="the pictures that the network learned from")
    parser.add_argument("--model", default=str(helpers.PROJECT / "model.pt"), help="(model.pt)")
    parser.add_argument("--cats", type=int, default=1000, help="in each row (1000)")
    parser.add_argument("--steps", type=int, nargs="+", default=[1000, 250, 50, 20, 10, 5])
    options = parser.parse_args()
    ddpm = helpers.notebook()
    model = ddpm.load_model(options.model)
    judge = judges(ddpm, real_pictures(options.folder, model))
    course = [(steps, name) for steps in sorted(options.steps) for name in ddpm.samplers()]
    rows = []
    for steps, sampler in tqdm(course, "racing"):
        rows.append(run(ddpm, model, judge, options.cats, steps, sampler))
        tqdm.write(json.dumps(rows[-1]))
    file, drawn_by = Path(__file__).with_suffix(".json"), Path(options.model)
    result = {"model": drawn_by.name, "file": helpers.fingerprint(drawn_by.read_bytes())}
    result["cats"] = options.cats
    known = read_json(file)
    if all(known.get(k) == v for k, v in result.items()):
        rows += [r for r in known["rows"] if (r["steps"], r["sampler"]) not in course]
    result["rows"] = sorted(rows, key=lambda r: (r["sampler"], r["steps"]))
    write_json(file, result)


if __name__ == "__main__":
    main()

"""Which sampler needs how many steps? python benchmarks/race.py FOLDER [--model FILE] [--cats N]

Draws the same seeds by each sampler in 1000, 250, 50, 20, 12, 10 and 5 steps, without guidance,
and measures how far they are from the pictures in FOLDER by the Fréchet distance of the notebook's
section 8. Writes each row to benchmarks/race.json, which the notebook shows, as soon as it is
ready. With 1000 cats in each row all take four hours on two CPU cores, `--steps 50 20 12 10 5` a
quarter of an hour; `--samplers dpm` draws by one of them. Rows that are not run again stay in the
table, if they are of the same network and as many cats.
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
    drawn = ddpm.draw(model, cats, FIRST_SEED, steps, sampler, guidance=0)
    seconds = (time.perf_counter() - started) * 16 / cats
    ratio = times_the_floor(ddpm, judge, drawn)
    row = {"sampler": sampler, "steps": steps, "seconds for 16": seconds}
    return plain(row | {"times the floor": ratio.mean(), "spread": ratio.std()})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = list(helpers.SAMPLERS)
    parser.add_argument("folder", help="the pictures that the network learned from")
    parser.add_argument("--model", default=str(helpers.PROJECT / "model.pt"), help="(model.pt)")
    parser.add_argument("--cats", type=int, default=1000, help="in each row (1000)")
    parser.add_argument("--steps", type=int, nargs="+", default=[1000, 250, 50, 20, 12, 10, 5])
    parser.add_argument("--samplers", nargs="+", choices=names, default=names, help="(all)")
    options = parser.parse_args()
    ddpm = helpers.notebook()
    model = ddpm.load_model(options.model)
    judge = judges(ddpm, real_pictures(options.folder, model))
    file, drawn_by = Path(__file__).with_suffix(".json"), Path(options.model)
    result = {"model": drawn_by.name, "file": helpers.fingerprint(drawn_by.read_bytes())}
    result["cats"] = options.cats
    known, rows = read_json(file), {}
    if all(known.get(k) == v for k, v in result.items()):
        rows = {(r["sampler"], r["steps"]): r for r in known["rows"]}
    course = [(name, steps) for steps in sorted(options.steps) for name in options.samplers]
    for sampler, steps in tqdm(course, "racing"):
        rows[sampler, steps] = row = run(ddpm, model, judge, options.cats, steps, sampler)
        tqdm.write(json.dumps(row))
        write_json(file, result | {"rows": [rows[key] for key in sorted(rows)]})


if __name__ == "__main__":
    main()

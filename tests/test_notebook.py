"""The notebook as it is committed, and run from top to bottom on a few pictures."""

import json

import nbformat
import numpy as np
import papermill
import pytest
from conftest import ROOT, blobs

import ddpm_helpers as helpers

NOTEBOOK = ROOT / "DDPM_cats.ipynb"
CELLS = nbformat.read(NOTEBOOK, 4).cells
CODE = [c for c in CELLS if c.cell_type == "code"]

ASK_THE_WIDGET = """
import json
from gradio_client import Client
client = Client(helpers._launched[0].local_url, verbose=False)
job = client.submit("model.pt", 3, 7, 4, "dpm", api_name="/generate")
job.result()
singles, status = job.outputs()[-2][4:6]  # before the last one, which brings the downloads
print(json.dumps([[s["image"] for s in singles], [s["caption"] for s in singles], status]))
"""


def test_committed_notebook_was_run_in_order_without_errors():
    assert [c.execution_count for c in CODE] == list(range(1, len(CODE) + 1))
    assert not [o for c in CODE for o in c.outputs if o.output_type == "error"]
    assert not [o for c in CODE for o in c.outputs if "Warning" in o.get("text", "")]


def test_committed_notebook_is_small():
    assert NOTEBOOK.stat().st_size < 1_500_000
    assert "widgets" not in nbformat.read(NOTEBOOK, 4).metadata
    pictures = {k for c in CODE for o in c.outputs for k in o.get("data", {}) if "image" in k}
    assert pictures == {"image/png"}


def test_cells_are_short_and_half_of_the_notebook_is_prose():
    assert max(len(c.source.splitlines()) for c in CODE) <= 35
    assert len(CELLS) - len(CODE) > 0.4 * len(CELLS)
    assert [c.metadata.get("tags") for c in CODE].count(["parameters"]) == 1


def test_every_cell_that_makes_a_picture_says_what_to_look_for():
    for before, cell in zip(CELLS, CELLS[1:]):
        if cell.cell_type == "code" and any("image/png" in o.get("data", {}) for o in cell.outputs):
            assert before.cell_type == "markdown" and "**Look for**" in before.source


def run(tmp_path, monkeypatch, pictures, extra="", **parameters):
    """Execute the notebook in a folder of its own; the cells with their outputs."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, 4)
    if extra:
        notebook.cells.append(nbformat.v4.new_code_cell(extra))
    nbformat.write(notebook, tmp_path / "in.ipynb")
    parameters = dict(DATA=str(pictures), CHECKPOINT=str(ROOT / "model.pt"), JUDGED=8) | parameters
    done = papermill.execute_notebook(
        tmp_path / "in.ipynb", None, parameters, cwd=tmp_path, progress_bar=False
    )
    return done.cells


def printed(cells):
    return "".join(o.text for c in cells for o in c.get("outputs", []) if o.get("name") == "stdout")


@pytest.fixture
def few(tmp_path):
    place = tmp_path / "few"
    place.mkdir()
    for i, picture in enumerate(blobs(48, 40)):
        helpers.to_image(picture).save(place / f"{i}.png")
    return place


def test_lesson_from_top_to_bottom_ends_in_a_widget_that_answers(ddpm, few, tmp_path, monkeypatch):
    cells = run(
        tmp_path, monkeypatch, few, ASK_THE_WIDGET, LESSON_EPOCHS=2, BATCH_SIZE=16, FILM_STEPS=25
    )
    out = printed(cells)
    assert "48 pictures" in out and "heldout_loss" in out
    singles, captions, status = json.loads(out.strip().splitlines()[-1])
    assert captions == ["7", "8", "9"] and "3 cats by model.pt in" in status
    shown = np.stack([np.asarray(helpers.open_picture(file)).astype(int) for file in singles])
    assert shown.shape == (3, 24, 24, 3)
    model, differences = ddpm.load_model(ROOT / "model.pt"), []
    for faster in (False, True):  # 16 bits, if the notebook's own measurement liked them better
        monkeypatch.setattr(helpers, "bf16_is_faster", lambda faster=faster: faster)
        expected = ddpm.draw(model, 3, 7, 4).permute(0, 2, 3, 1).numpy()
        differences.append(abs(shown - expected).max())
    assert min(differences) <= 1
    for name in ("forward.gif", "denoising.gif"):
        assert 1000 < (tmp_path / "gifs" / "own" / name).stat().st_size < 500_000
    assert not (tmp_path / "new_model.pt").exists()


def test_lesson_on_pictures_that_are_not_like_those_of_the_network(few, tmp_path, monkeypatch):
    for path in few.iterdir():
        helpers.open_picture(path).convert("L").save(path)
    settings = dict(SIZE=16, TIMESTEPS=100, LESSON_EPOCHS=1, FILM_STEPS=5)
    out = printed(run(tmp_path, monkeypatch, few, **settings))
    assert "was not trained on just these pictures" in out and "draws 24x24" in out


def test_full_trains_keeps_and_uses_a_model_of_its_own(ddpm, few, tmp_path, monkeypatch):
    settings = dict(MODE="full", EPOCHS=1, FILM_STEPS=25, SIZE=16, TIMESTEPS=100)
    cells = run(tmp_path, monkeypatch, few, **settings)
    assert "new_model.pt" in printed(cells)
    model = ddpm.load_model(tmp_path / "new_model.pt")
    assert model.config["size"] == 16 and model.record["pictures"] == 48
    assert "was not trained on just these pictures" not in printed(cells)
    run(tmp_path, monkeypatch, few, **settings)  # again: nothing left to train, no complaint

"""The widget over HTTP, as a browser talks to it."""

import numpy as np
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

import ddpm_helpers as helpers


@pytest.fixture
def client(ddpm, network):
    """A running widget around a small network, and the network."""
    model = network()

    def watch(count, seed, steps, sampler):
        for s, x, _ in ddpm.sample(model, count, seed, steps, sampler):
            yield 1 - s / 1000, ddpm.to_bytes(x)

    helpers.launch(helpers.widget(watch, "some.pt", 1000))
    yield Client(helpers._launched[0].local_url, verbose=False), model
    helpers._launched.pop().close(verbose=False)


def test_pictures_are_the_ones_of_the_seeds_to_the_pixel(ddpm, client):
    client, model = client
    whole, singles, status = client.predict(5, 40, 3, "ddpm", api_name="/generate")
    expected = ddpm.draw(model, 5, 40, 3, "ddpm").permute(0, 2, 3, 1).numpy()
    for single, picture in zip(singles, expected, strict=True):
        assert single["image"].endswith(".png")
        assert (np.asarray(helpers.open_picture(single["image"])) == picture).all()
    assert [single["caption"] for single in singles] == ["40", "41", "42", "43", "44"]
    scale = helpers.open_picture(whole).width // (3 * 25 + 1)
    small = np.asarray(helpers.open_picture(whole))[::scale, ::scale]
    assert (small[1:25, 26:50] == expected[1]).all()
    assert "5 cats in" in status and "some.pt" in status


def test_cats_appear_while_it_works(client):
    client, _ = client
    job = client.submit(2, 0, 200, "ddpm", api_name="/generate")
    job.result()
    status = [output[2] for output in job.outputs()]
    assert len(status) > 2 and all(s.endswith("% ...") for s in status[:-1])


@pytest.mark.parametrize(
    "values, words",
    [
        ((0, 0, 20), "number of cats must be from 1 to 64|Value 0 is less than minimum"),
        ((65, 0, 20), "number of cats must be from 1 to 64|Value 65 is greater than maximum"),
        ((2, -5, 20), "seed must be from 0"),
        ((2, 2**40, 20), "seed must be from 0"),
        ((2, None, 20), "seed must be a whole number"),
        ((2, 0, 0), "steps must be from 1|Value 0 is less than minimum"),
        ((2, 0, 1.5), "steps must be a whole number"),
    ],
)
def test_nonsense_gets_a_clear_message_and_the_widget_lives_on(client, values, words, capfd):
    client, _ = client
    with pytest.raises(AppError, match=words):
        client.predict(*values, "dpm", api_name="/generate")
    if values[0] == 2 and values[2]:  # the sliders' own ends are watched by gradio, noisily
        assert "Traceback" not in capfd.readouterr().err
    assert client.predict(1, 0, 1, "dpm", api_name="/generate")[1]


def test_only_this_computer_and_only_one_at_a_time(ddpm, client):
    first = helpers._launched[0]
    assert first.server_name == "127.0.0.1" and not first.share and first.share_url is None
    helpers.launch(helpers.widget(lambda *_: iter(()), "other.pt", 1000))
    assert len(helpers._launched) == 1 and not first.is_running

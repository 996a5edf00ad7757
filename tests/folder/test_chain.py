"""An export's graphs as one model: what they say, token by token, is what the model says."""

from itertools import islice

import pytest

import refimpl
from export import emit
from export.folder.chain import generate
from export.folder.manifest import read_manifest
from export.run.engines import Engine
from refimpl.errors import InputError

POEM = "登鹳雀楼->王之涣\n夜雨寄北->"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model = refimpl.load()
    folder = emit(model, (8, 1), 64, 3).save(tmp_path_factory.mktemp("chain") / "x")
    return model, folder, read_manifest(folder)[0]


def test_graphs_say_what_the_model_says(exported):
    """The prompt of 16 tokens takes two calls of the larger graphs; one of 13 leaves padding in the second."""
    model, folder, plan = exported
    for ids in (model.token_ids(POEM)[0].tolist(), model.token_ids(POEM)[0].tolist()[:13]):
        said = list(islice(generate(model, folder, plan, Engine(), ids), 6))
        whole = model.trace([*ids, *said[:-1]], taps="lm_head")["lm_head"][0, len(ids) - 1 :]
        assert said == whole.argmax(-1).tolist()


def test_they_go_on_until_the_context_is_full(exported):
    model, folder, plan = exported
    ids = (model.token_ids(POEM)[0].tolist() * 4)[:60]
    said = list(generate(model, folder, plan, Engine(), ids))
    assert len(said) == 64 - 60 + 1  # each but the last was fed again
    whole = model.trace([*ids, *said[:-1]], taps="lm_head")["lm_head"][0, 59:]
    assert said == whole.argmax(-1).tolist()


def test_what_cannot_be_chained(exported, tmp_path):
    model, folder, plan = exported
    with pytest.raises(InputError, match="the prompt has 65 tokens, expected 1 to 64"):
        next(generate(model, folder, plan, Engine(), [5] * 65))
    alone = emit(model, 8, 24, graphs=["model.layers.0.mlp"]).save(tmp_path / "alone")
    with pytest.raises(InputError, match="holds modules alone"):
        next(generate(model, alone, read_manifest(alone)[0], Engine(), [5]))

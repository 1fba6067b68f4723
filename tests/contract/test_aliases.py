"""Names of the operator's own: another name for a model, with defaults of its own, and never in secret."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from tests.contract.helpers import MODEL, checkpoint, envelope, eventually, vectors
from tests.support import RunningServer

SETTINGS = """
model = ["{minilm}", "prompted={folder}"]
rate_limit = 0

[aliases]
plain = "all-MiniLM-L6-v2"
"Text-Embedding-3-Small" = {{ model = "prompted", dimensions = 128, default_prompt_name = "query", price = 0.02 }}
priced = "prompted"

[model_settings.prompted]
default_prompt_name = "document"
price = 0.1
currency = "CNY"

[model_settings.priced]
price = 0.3
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """MiniLM, and a copy of it that has prompts and was trained for shorter vectors, as far as its files go."""
    folder = tmp_path_factory.mktemp("aliases")
    shutil.copytree(checkpoint(), folder / "prompted")
    edit(folder / "prompted" / "config.json", is_matryoshka=True, matryoshka_dimensions=[64, 128, 384])
    prompts = {"query": "find: ", "passage": "text: "}
    edit(folder / "prompted" / "config_sentence_transformers.json", prompts=prompts, default_prompt_name=None)
    (folder / "embedserve.toml").write_text(SETTINGS.format(minilm=MODEL, folder=folder / "prompted"))
    with RunningServer("--config", str(folder / "embedserve.toml")) as running:
        yield running


def edit(path: Path, **values: object) -> None:
    content = json.loads(path.read_text())
    path.unlink()
    path.write_text(json.dumps(content | values))


def listed(server: RunningServer) -> dict[str, dict[str, Any]]:
    models = httpx.get(f"{server.url}/v1/embedding-models", timeout=30).json()["data"]
    return {model["id"]: model for model in models}


def test_an_alias_gives_the_model_s_vectors(server: RunningServer) -> None:
    one, other = server.embed(["a", "b"], model="plain"), server.embed(["a", "b"])
    assert np.array_equal(vectors(one), vectors(other))
    assert one.json()["usage"] == other.json()["usage"]


@pytest.mark.parametrize("asked", ["Text-Embedding-3-Small", "text-embedding-3-small"])
def test_the_answer_has_the_alias_s_name_as_the_operator_spells_it(server: RunningServer, asked: str) -> None:
    answer = server.embed("a", model=asked)
    assert answer.json()["model"] == answer.headers["openai-model"] == "Text-Embedding-3-Small"


def test_its_dimensions_are_a_default(server: RunningServer) -> None:
    name = "text-embedding-3-small"
    full = vectors(server.embed("a", model="prompted", input_type="query"))[0]
    cut = full[:128] / np.linalg.norm(full[:128])
    assert np.abs(vectors(server.embed("a", model=name))[0] - cut).max() < 1e-6
    assert vectors(server.embed("a", model=name, dimensions=64)).shape == (1, 64)
    assert vectors(server.embed("a", model=name, dimensions=384)).shape == (1, 384)
    assert envelope(server.embed("a", model=name, dimensions=100), 400)["param"] == "dimensions"


def test_its_prompt_is_a_default(server: RunningServer) -> None:
    def vector(model: str, **fields: object) -> list[float]:
        row: list[float] = vectors(server.embed("a", model=model, dimensions=384, **fields))[0].tolist()
        return row

    asked_for = vector("prompted", prompt="find: ")
    assert vector("text-embedding-3-small") == asked_for
    assert vector("text-embedding-3-small", prompt="") == vector("prompted", prompt="") != asked_for
    # The model has a default of the operator's too, which an alias without one of its own shares.
    assert vector("prompted") == vector("priced") == vector("prompted", prompt="text: ")


def test_an_alias_is_listed_for_what_it_is(server: RunningServer) -> None:
    models = listed(server)
    assert list(models) == [MODEL, "prompted", "plain", "Text-Embedding-3-Small", "priced"]
    assert [model["alias_of"] for model in models.values()] == [None, None, MODEL, "prompted", "prompted"]
    alias = models["Text-Embedding-3-Small"]
    assert (alias["name"], alias["dimensions"], alias["max_dimensions"]) == ("Text-Embedding-3-Small", 128, 384)
    assert alias["loaded"] is True
    assert models["prompted"]["dimensions"] == 384
    assert models["plain"]["description"] == models[MODEL]["description"]


def test_an_alias_has_a_price_of_its_own_where_it_is_given_one(server: RunningServer) -> None:
    prices = {
        name: (model["pricing"]["per_million_tokens"], model["pricing"]["currency"])
        for name, model in listed(server).items()
    }
    assert prices == {
        MODEL: (0.0, "USD"),
        "prompted": (0.1, "CNY"),
        "plain": (0.0, "USD"),
        "Text-Embedding-3-Small": (0.02, "CNY"),
        "priced": (0.3, "CNY"),
    }


def test_openai_s_lists_know_it(server: RunningServer) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()][2:] == ["plain", "Text-Embedding-3-Small", "priced"]
        model = client.models.retrieve("text-embedding-3-small")
    assert (model.id, model.model_dump()["alias_of"]) == ("Text-Embedding-3-Small", "prompted")
    assert "alias_of" not in httpx.get(f"{server.url}/v1/models/{MODEL}", timeout=30).json()


def test_metrics_and_logs_know_the_model(server: RunningServer) -> None:
    answer = server.embed("a", model="plain")
    metrics = httpx.get(f"{server.url}/metrics", timeout=30).text
    assert f'model="{MODEL}"' in metrics
    assert 'model="plain"' not in metrics
    request = answer.headers["x-request-id"]
    line = json.loads(eventually(lambda: next((one for one in server.log().splitlines() if request in one), "")))
    assert (line["model"], line["alias"]) == (MODEL, "plain")


def test_an_alias_takes_the_place_of_a_closed_model(server: RunningServer) -> None:
    assert server.embed("a", model="text-embedding-3-small").status_code == 200
    assert "[upstreams." in envelope(server.embed("a", model="text-embedding-3-large"), 404)["message"]

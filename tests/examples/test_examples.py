"""The examples as a user runs them, against a running server; what they print makes sense."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from embedserve.models import catalog
from embedserve.server import config
from tests.support import RunningServer

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(server: RunningServer, name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        env={**os.environ, "EMBEDSERVE_URL": server.url},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_semantic_search_finds_answers_that_share_no_word_with_the_question(server: RunningServer) -> None:
    lines = run(server, "semantic_search.py", "Where is my bill?", "How do I get my money back?").splitlines()
    assert [line[0] != " " for line in lines] == [True, False, False, False] * 2
    assert lines[1].endswith("Your invoice is attached to the confirmation that we send by e-mail.")
    assert lines[5].endswith("Refunds are paid to the card that was charged, within five working days.")


def test_the_chat_gets_the_passage_that_answers(server: RunningServer) -> None:
    question = "I'm going on holiday. What should I do with the machine?"
    system, user = json.loads(run(server, "chat_retrieval.py", question))
    assert user == {"role": "user", "content": question}
    assert system["role"] == "system"
    assert "[1] If the machine is not used for more than a week, empty the tank" in system["content"]
    assert "[2] " in system["content"]
    assert "guarantee" not in system["content"]


def test_clusters_are_the_subjects(server: RunningServer) -> None:
    clusters: list[set[str]] = []
    for line in run(server, "clustering.py").splitlines():
        if line.startswith("like "):
            clusters.append(set())
        else:
            clusters[-1].add(line.strip().split()[0])
    assert sorted(clusters, key=sorted) == [
        {"Central", "Government", "Inflation", "Shares"},
        {"Coach", "Goalkeeper", "National", "Striker"},
        {"Fog", "Heat", "Snow", "Storm"},
    ]


def test_duplicates_are_the_rephrased_tickets_and_no_others(server: RunningServer) -> None:
    lines = run(server, "duplicates.py").splitlines()
    pairs = {frozenset(line[6:] for line in lines[first : first + 2]) for first in range(0, len(lines), 2)}
    assert pairs == {
        frozenset({"The app crashes when I open the camera.", "Opening the camera makes the application crash."}),
        frozenset({"I was charged twice for one order.", "My credit card was billed two times for the same order."}),
        frozenset({"Please change my delivery address.", "I would like to change the address my parcel goes to."}),
    }


def test_a_program_for_openai_runs_with_two_lines_changed(server: RunningServer) -> None:
    count, meal, train = run(server, "migrate_from_openai.py").splitlines()
    assert count == "3 vectors of 384, 24 tokens"
    assert float(meal.split()[0]) > 0.6 > 0.1 > float(train.split()[0])


SAMPLE = EXAMPLES / "catalogue.toml"


def test_the_sample_configuration_names_and_prices_what_it_serves() -> None:
    settings = config.load({"config": str(SAMPLE)}, {})
    entries = {name: catalog.find(name) for name in settings.model}
    assert all(entry is not None and entry.id == name for name, entry in entries.items())
    assert set(settings.model_settings) == {*settings.model, *settings.aliases}
    assert all(table["price"] > 0 for table in settings.model_settings.values())


def test_the_samples_aliases_give_vectors_of_the_size_that_programs_expect() -> None:
    sizes = {}
    for name, alias in config.load({"config": str(SAMPLE)}, {}).aliases.items():
        entry = catalog.find(alias.model)
        assert entry is not None
        sizes[name] = alias.settings.get("dimensions", entry.dimensions)
        assert sizes[name] == entry.dimensions or (entry.matryoshka and entry.matryoshka.allows(sizes[name]))
    assert sizes == {
        "text-embedding-3-small": 1536,
        "text-embedding-3-large": 3072,
        "text-embedding-ada-002": 1536,
        "Baichuan-Text-Embedding": 1024,
        "zhipu-embedding-2": 1024,
    }


def test_the_samples_relays_are_valid_once_switched_on(tmp_path: Path) -> None:
    text = re.sub(r"^#(?=\S)", "", SAMPLE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    (tmp_path / "on.toml").write_text(text, encoding="utf-8")
    upstreams = config.load({"config": str(tmp_path / "on.toml")}, {}).upstreams
    assert {name: upstream.key_env for name, upstream in upstreams.items()} == {
        "text-embedding-3-small": "OPENAI_API_KEY",
        "zhipu-embedding-2": "ZHIPU_API_KEY",
    }

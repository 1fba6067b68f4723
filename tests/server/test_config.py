"""Where settings come from, which source wins, and what is said when one is wrong."""

import importlib.util
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from embedserve.models.config import DimensionRange
from embedserve.server.config import Alias, APIKey, ConfigError, ServerConfig, load
from embedserve.server.served import find_models
from embedserve.server.upstreams import CLOSED


def test_flags_win_over_environment_over_file_over_default(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text('rate_limit = 1\nport = 1001\nhost = "0.0.0.0"\n')
    environment = {"EMBEDSERVE_CONFIG": str(file), "EMBEDSERVE_RATE_LIMIT": "2", "EMBEDSERVE_PORT": "1002"}
    config = load({"rate_limit": "3"}, environment)
    assert (config.rate_limit, config.port, config.host) == (3, 1002, "0.0.0.0")
    assert config.front_ends == ServerConfig().front_ends


def test_lists_are_repeated_flags_commas_in_the_environment_and_arrays_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text('model = ["a", "b"]\n')
    assert load({"config": str(file)}, {}).model == ("a", "b")
    assert load({}, {"EMBEDSERVE_MODEL": "a, b"}).model == ("a", "b")
    assert load({"model": ["a", "b"]}, {}).model == ("a", "b")


def test_keys_come_from_flags_and_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nsearch=abc=def\n\ninternal batch=xyz\n")
    config = load({"api_key": ["web=123"], "api_keys_file": str(file)}, {})
    assert config.keys == (APIKey("web", "123"), APIKey("search", "abc=def"), APIKey("batch", "xyz", internal=True))
    assert "abc" not in repr(config)


def test_tables_for_single_models(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text('[model_settings."BAAI/bge-m3"]\ntoken_ids = "native"\nprice = 0.5\n')
    settings = load({"config": str(file)}, {}).model_settings
    assert settings == {"BAAI/bge-m3": {"token_ids": "native", "price": 0.5}}


def test_an_alias_is_an_id_or_a_table(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text(
        '[aliases]\na = "BAAI/bge-m3"\nb = { model = "BAAI/bge-m3", price = 1, default_prompt_name = "q" }\n'
    )
    assert load({"config": str(file)}, {}).aliases == {
        "a": Alias("BAAI/bge-m3"),
        "b": Alias("BAAI/bge-m3", {"price": 1.0, "default_prompt_name": "q"}),
    }


def test_an_upstream_of_a_known_model_needs_no_more_than_its_name_and_the_key(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text('[upstreams."Text-Embedding-3-Large"]\nkey_env = "OPENAI_API_KEY"\ncurrency = "EUR"\n')
    config = load({"config": str(file)}, {})
    [(name, upstream)] = config.upstreams.items()
    assert name == "Text-Embedding-3-Large"
    known = CLOSED["text-embedding-3-large"]
    settings = {"token_ids": "native", "currency": "EUR"}
    assert upstream == replace(known, key_env="OPENAI_API_KEY", settings=settings)
    [model] = find_models(config, {"OPENAI_API_KEY": " sk-1 "}).relayed
    assert model.key == "sk-1"
    assert "sk-1" not in repr(model)


def test_with_upstreams_alone_nothing_runs_here(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text('[upstreams."text-embedding-3-small"]\n')
    assert load({"config": str(file)}, {}).model == ()
    assert load({"config": str(file)}, {"EMBEDSERVE_MODEL": "BAAI/bge-m3"}).model == ("BAAI/bge-m3",)
    file.write_text("[upstreams]\n")
    assert load({"config": str(file)}, {}).model == ServerConfig().model


def test_a_request_may_take_as_long_as_one_of_its_calls(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    for line, whole in (("", 300), ("timeout_seconds = 20", 300), ("timeout_seconds = 900", 900)):
        file.write_text(f"[upstreams.zhipu-embedding-2]\n{line}\n")
        [upstream] = load({"config": str(file)}, {}).upstreams.values()
        assert upstream.request_timeout == whole


def test_an_upstream_of_any_other_model(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text(
        '[upstreams.ours]\nbase_url = "http://10.0.0.7:8080/v1/"\ndimensions = 2048\n'
        "allowed_dimensions = [1024, 256]\nmodel = 'embedding-3'\n"
    )
    upstream = load({"config": str(file)}, {}).upstreams["ours"]
    assert (upstream.base_url, upstream.model, upstream.key_env) == ("http://10.0.0.7:8080/v1", "embedding-3", None)
    assert upstream.matryoshka == DimensionRange(256, 1024, (256, 1024))


def test_the_five_closed_models() -> None:
    facts = {name: (known.dimensions, known.matryoshka, known.max_tokens) for name, known in CLOSED.items()}
    assert facts == {
        "text-embedding-3-small": (1536, DimensionRange(1, 1536), 8192),
        "text-embedding-3-large": (3072, DimensionRange(1, 3072), 8192),
        "text-embedding-ada-002": (1536, None, 8192),
        "Baichuan-Text-Embedding": (1024, None, 512),
        "zhipu-embedding-2": (1024, None, 512),
    }


def test_kubernetes_variable_of_a_service_called_embedserve_is_no_port() -> None:
    environment = {"EMBEDSERVE_PORT": "tcp://10.0.0.7:8000", "EMBEDSERVE_SERVICE_HOST": "10.0.0.7"}
    assert load({}, environment).port == 8000


@pytest.mark.parametrize(
    ("flags", "environment", "content", "message"),
    [
        ({"port": "x"}, {}, "", "--port: expected a whole number from 0 to 65535, not 'x'"),
        ({"port": "٣"}, {}, "", "--port: expected a whole number"),
        ({}, {"EMBEDSERVE_RATE_LIMIT": "-1"}, "", "EMBEDSERVE_RATE_LIMIT: expected a whole number"),
        ({}, {}, "rate_limit = true", "rate_limit: expected a whole number"),
        ({}, {}, "rate_limit = 1.5", "rate_limit: expected a whole number"),
        ({}, {}, "rate_limt = 1", "there is no option 'rate_limt'"),
        ({}, {}, "rate_limit = [", "is not valid TOML"),
        ({}, {}, "model = 3", "model: expected a text, not 3"),
        ({"dtype": "int4"}, {}, "", "--dtype: expected one of auto, float32, float16, bfloat16, int8"),
        ({"device": "gpu"}, {}, "", "--device: expected auto, cpu, cuda or cuda:N"),
        ({"trusted_proxy": ["here"]}, {}, "", "--trusted-proxy: expected an IP address or a network"),
        ({"closed_discovery": "maybe"}, {}, "", "--closed-discovery: expected true or false"),
        ({"shutdown_seconds": "0.2"}, {}, "", "--shutdown-seconds: expected a whole number from 1"),
        ({"api_keys_file": "/does/not/exist"}, {}, "", "--api-keys-file: cannot read /does/not/exist"),
        ({"api_key": ["a=1", "a=2"]}, {}, "", "the key name 'a' is given twice"),
        ({}, {}, "[model_settings]\nx = 1", "expected tables such as"),
        ({}, {}, '[model_settings."m"]\nprize = 1', "there is no setting 'prize'"),
        ({}, {}, '[model_settings."m"]\ntoken_ids = "mine"', "expected one of cl100k, native"),
        ({}, {}, '[model_settings."m"]\nprice = -1', "price: expected a number of at least 0, not -1"),
        ({}, {}, '[model_settings."m"]\nprice = nan', "price: expected a number of at least 0"),
        ({}, {}, "[model_settings.m]\n[model_settings.M]", "M and m are one name"),
        ({}, {}, "aliases = 3", "expected lines such as"),
        ({}, {}, "[aliases]\nx = 1", "expected lines such as"),
        ({}, {}, "[aliases]\nx = ''", "aliases.x: model: expected a text"),
        ({}, {}, "[aliases]\nx = { dimensions = 3 }", "aliases.x: expected `model`"),
        ({}, {}, "[aliases]\nx = { model = 'a', dimension = 3 }", "there is no setting 'dimension'"),
        ({}, {}, "[aliases]\n'\u00fc' = 'a'", "use ASCII"),
        ({}, {}, "[upstreams.x]\nbase_url = 'https://a/v1'", "expected base_url and dimensions"),
        ({}, {}, "[upstreams.zhipu-embedding-2]\nbase_url = 'ftp://a'", "base_url: expected a URL such as"),
        ({}, {}, "[upstreams.zhipu-embedding-2]\nbase_url = 'http://me:secret@a/v1'", "without a user, a key"),
        ({}, {}, "[upstreams.zhipu-embedding-2]\nbase_url = 'http://a:99999/v1'", "base_url: expected a URL"),
        ({}, {}, "[upstreams.zhipu-embedding-2]\nbase_url = 'http:///v1'", "base_url: expected a URL"),
        ({}, {}, "[upstreams.Text-Embedding-3-Small]\ndimensions = 512", '[model_settings."Text-Embedding-3-Small"]'),
        ({}, {}, "[upstreams.text-embedding-ada-002]\ndimensions = 512", "dimensions: expected 1536, the full size"),
        ({}, {}, "[upstreams.zhipu-embedding-2]\ndimensions = 2048", "dimensions: expected 1024, the full size"),
        ({}, {}, "[upstreams.zhipu-embedding-2]\nrequest_timeout = 59", "at least timeout_seconds, 60, not 59"),
        ({}, {}, "[upstreams.zhipu-embedding-2]\nretries = 99", "retries: expected a whole number from 0 to 10"),
        ({}, {}, "[upstreams.zhipu-embedding-2]\ntimeout_seconds = 0", "expected a number of at least 0.1, at most"),
        ({}, {}, "[upstreams.zhipu-embedding-2]\nallowed_dimensions = [2048]", "sizes of at most 1024"),
        ({}, {}, "[upstreams.zhipu-embedding-2]\nallowed_dimensions = 'some'", '"any", or a list of whole numbers'),
    ],
)
def test_what_is_said_of_a_wrong_value(
    flags: dict[str, object], environment: dict[str, str], content: str, message: str, tmp_path: Path
) -> None:
    if content:
        file = tmp_path / "server.toml"
        file.write_text(content)
        flags = {**flags, "config": str(file)}
    with pytest.raises(ConfigError) as caught:
        load(flags, environment)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_key_in_the_place_of_its_variable_is_not_repeated(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    for line in ('key_env = "sk-hunter2"', 'key = "sk-hunter2"'):
        file.write_text(f"[upstreams.text-embedding-3-small]\n{line}\n")
        with pytest.raises(ConfigError) as caught:
            load({"config": str(file)}, {})
        assert "key_env" in str(caught.value)
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "upstreams.zhipu-embedding-2: key_env: the environment variable ZHIPU_KEY is not set"),
        ({"ZHIPU_KEY": "\n"}, "ZHIPU_KEY is not set"),
        ({"ZHIPU_KEY": "\u00fc"}, "a key of printable ASCII"),
    ],
)
def test_a_key_is_missed_by_what_serves_and_by_nothing_else(
    environment: dict[str, str], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "server.toml"
    file.write_text("[upstreams.zhipu-embedding-2]\nkey_env = 'ZHIPU_KEY'")
    config = load({"config": str(file)}, environment)
    with pytest.raises(ConfigError) as caught:
        find_models(config, environment)
    assert message in str(caught.value)


MODEL = "sentence-transformers/all-MiniLM-L6-v2"
MINILM = 'model = "all-MiniLM-L6-v2"\n'
ALIAS_OF_MINILM = MINILM.strip()
UPSTREAM = "base_url = 'http://a'\ndimensions = 1"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[aliases]\nx = "BAAI/bge-m3"', "aliases.x: no model 'BAAI/bge-m3' is served; there are "),
        ('[aliases]\nx = "y"\ny = "all-MiniLM-L6-v2"', "aliases.x: 'y' is an alias itself"),
        ('[aliases]\nx = "x"', "aliases.x: 'x' is an alias itself"),
        ('[aliases]\n"ALL-minilm-l6-v2" = "all-MiniLM-L6-v2"', "is a name of sentence-transformers/all-MiniLM-L6-v2"),
        (f"[aliases]\nx = {{ {ALIAS_OF_MINILM}, dimensions = 64 }}", "x: dimensions: expected 384, the size of"),
        (f"[aliases]\nx = {{ {ALIAS_OF_MINILM}, default_prompt_name = 'q' }}", "has no prompt 'q'; it has none"),
        ("[upstreams.text-embedding-3-small]\n[model_settings.text-embedding-3-small]\ndimensions = 1537", "1 to 1536"),
        (f"{MINILM}[upstreams.'{MODEL.upper()}']\nbase_url = 'http://a'\ndimensions = 1", "two models"),
        # Or texts that are meant for it would leave the machine.
        (f"{MINILM}[upstreams.all-MiniLM-L6-v2]\n{UPSTREAM}", f"is a name of {MODEL} already"),
        ('[model_settings."BAAI/bge-m3"]\nprice = 1', "BAAI/bge-m3: no such model is served"),
        (f"{MINILM}[model_settings]\nall-MiniLM-L6-v2 = {{}}\n'{MODEL}' = {{}}", "stand there twice"),
        ("model = []", "expected a model to serve, or an upstream"),
    ],
)  # fmt: skip
def test_names_that_cannot_be(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        find_models(load({"config": str(file)}, {}))
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["all-MiniLM-L6-v2", "ALL-minilm-l6-v2"])
def test_settings_go_by_any_name_of_a_model(name: str, tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text(f"{MINILM}[model_settings.'{name}']\nprice = 0.5\n")
    assert find_models(load({"config": str(file)}, {})).local[0].settings.price == 0.5


def test_an_empty_key_is_none() -> None:
    with pytest.raises(ConfigError, match="NAME=KEY"):
        load({"api_key": ["a= "]}, {})


def test_a_wrong_key_is_not_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        load({"api_key": ["hunter2"]}, {})
    assert "NAME=KEY" in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "99999"], "--port: expected a whole number"),
        (["--no-such-option"], "unrecognized arguments: --no-such-option"),
        (["--model", "./does-not-exist"], "there is no folder"),
        (["--model", "nobody/nothing"], "nobody/nothing"),
        (["--model", "ours="], "--model: expected NAME=FOLDER, with a folder, not 'ours='"),
        (["--models-dir", "/does/not/exist"], "--models-dir: there is no folder /does/not/exist"),
        (["--device", "cuda:77"], "cuda:77"),
        (["--dtype", "float16", "--device", "cpu"], "float16"),
        (["--host", "192.0.2.1"], "cannot listen on 192.0.2.1"),
        (["--cl100k-file", __file__], "cl100k"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(arguments: list[str], message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "embedserve.server.cli", "serve", "--port", "0", "--log-level", "error", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("embedserve: ")
    assert done.stderr.count("\n") == 1, done.stderr


SOCKS = pytest.mark.skipif(importlib.util.find_spec("socksio") is not None, reason="this httpx speaks SOCKS")


@pytest.mark.parametrize(
    ("base_url", "environment", "message"),
    [
        ("http://256.256.256.256/v1", {}, "upstreams.ours: base_url: expected a URL such as"),
        ("http://[v1.x]/v1", {}, "upstreams.ours: base_url: expected a URL such as"),
        ("http://xn--/v1", {}, "upstreams.ours: base_url: expected a URL such as"),
        ("http://a/v1", {"SSL_CERT_FILE": "/nonexistent"}, "SSL_CERT_FILE=/nonexistent: No such file or directory"),
        ("http://a/v1", {"SSL_CERT_FILE": __file__}, "certificates cannot be read"),
        pytest.param("http://a/v1", {"ALL_PROXY": "socks5://me:hunter2@p:1"}, "pip install", marks=SOCKS),
        ("http://a/v1", {"ALL_PROXY": "gopher://me:hunter2@p:1"}, "(ALL_PROXY): expected a URL such as http://proxy:"),
        ("http://a/v1", {"https_proxy": "http://me:hunter2/3@p:1"}, "(https_proxy): expected a URL such as"),
    ],
)
def test_an_upstream_that_could_never_be_reached_ends_the_command(
    base_url: str, environment: dict[str, str], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "server.toml"
    file.write_text(f"[upstreams.ours]\nbase_url = '{base_url}'\ndimensions = 4\n")
    proxies = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
    clean = {name: value for name, value in os.environ.items() if name.lower() not in proxies}
    done = subprocess.run(
        [sys.executable, "-m", "embedserve.server.cli", "serve", "--port", "0", "--config", str(file)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**clean, **environment},
    )
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stderr.startswith("embedserve: upstreams")
    assert done.stderr.count("\n") == 1, done.stderr
    assert "hunter2" not in done.stderr


def test_other_commands_need_no_upstream_s_key(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text("[upstreams.zhipu-embedding-2]\nkey_env = 'NO_SUCH_KEY'\n")
    for command, status in (("models", 0), ("serve", 2)):
        done = subprocess.run(
            [sys.executable, "-m", "embedserve.server.cli", command, "--config", str(file)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == status, done.stderr
        assert ("NO_SUCH_KEY is not set" in done.stderr) == (status == 2)


def test_an_alias_without_its_model_ends_the_command(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text('[aliases]\n"text-embedding-3-small" = "BAAI/bge-m3"\n')
    done = subprocess.run(
        [sys.executable, "-m", "embedserve.server.cli", "serve", "--port", "0", "--config", str(file)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("embedserve: aliases.text-embedding-3-small: no model 'BAAI/bge-m3' is served")
    assert done.stderr.count("\n") == 1, done.stderr


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "embedserve.server.cli", "serve", "--port", str(port)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 2
    assert f"port {port}" in done.stderr
    assert "--port" in done.stderr
    assert done.stderr.count("\n") == 1

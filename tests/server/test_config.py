"""Where settings come from, which source wins, and what is said when one is wrong."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from embedserve.server.config import APIKey, ConfigError, ServerConfig, load


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
        ({"dtype": "int8"}, {}, "", "--dtype: expected one of auto, float32, float16, bfloat16"),
        ({"device": "gpu"}, {}, "", "--device: expected auto, cpu, cuda or cuda:N"),
        ({"trusted_proxy": ["here"]}, {}, "", "--trusted-proxy: expected an IP address or a network"),
        ({"closed_discovery": "maybe"}, {}, "", "--closed-discovery: expected true or false"),
        ({"shutdown_seconds": "0.2"}, {}, "", "--shutdown-seconds: expected a whole number from 1"),
        ({"api_keys_file": "/does/not/exist"}, {}, "", "--api-keys-file: cannot read /does/not/exist"),
        ({"api_key": ["a=1", "a=2"]}, {}, "", "the key name 'a' is given twice"),
        ({}, {}, "[model_settings]\nx = 1", "expected tables such as"),
        ({}, {}, '[model_settings."m"]\nprize = 1', "there is no setting 'prize'"),
        ({}, {}, '[model_settings."m"]\ntoken_ids = "mine"', "expected one of cl100k, native"),
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

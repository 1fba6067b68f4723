"""Which rate (texts/s, tokens/s) and which latency (p50, p90, p99) do servers with OpenAI's embeddings API give?

    embedserve bench http http://127.0.0.1:8000/v1 theirs=http://127.0.0.1:7997 --clients 1 16 64 --texts 1 32

The servers run already, here or elsewhere; they take turns (rounds.py) on texts of random words. The client is this
process (load.py); what it costs is measured against a stub and printed as its limit. Tokens are the first server's
`usage.prompt_tokens`, for all, as the texts are the same; ratios are of texts. Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace

from embedserve.benchmarks import bench, machine
from embedserve.benchmarks.load import Target
from embedserve.benchmarks.parties import Party, PartyError, Scenario, Server, first_model
from embedserve.benchmarks.progress import Progress
from embedserve.benchmarks.rounds import Run
from embedserve.benchmarks.texts import common_words
from embedserve.server.config import ConfigError

__all__ = ["main", "scenarios"]


def main(options: argparse.Namespace) -> int:
    """Measure the servers; the exit status. Raises ConfigError."""
    key = os.environ.get(options.api_key_env) if options.api_key_env else None
    if options.api_key_env and not key:
        raise ConfigError(f"--api-key-env: the variable {options.api_key_env} is not set")
    names = [name for name, _ in options.servers]
    if len(set(names)) < len(names):
        raise ConfigError("two servers have the same name: name them apart, as in a=URL b=URL")
    todo = scenarios(options)
    # A round may wait for one request that hangs, and a warm-up likewise, and then a server is out or goes on.
    options.limit = (2 + len(todo) * (options.rounds + 1) * len(names)) * (options.seconds + 2 * options.timeout + 5)
    with Progress(0) as progress:
        others = machine.Others()
        time.sleep(0.5)
        run = Run(options, common_words(), machine.describe() | {"cores_busy_before": others.cores()}, progress)
        try:
            parties: list[Party] = []
            for name, url in options.servers:
                target = Target(url, options.model or "", key, options.encoding_format)
                try:
                    model = options.model or first_model(target, options.timeout)
                except PartyError as error:
                    run.out[name] = str(error)
                    progress.print(f"{name} is out: {error}")
                    continue
                parties.append(Server(name, Target(url, model, key, options.encoding_format), options.timeout))
            run.measure(parties, todo)
        except KeyboardInterrupt:
            return bench.interrupted()
    for name, why in run.out.items():
        print(f"{name} could not be measured: {why}", file=sys.stderr)
    if run.errors:
        print(f"{run.errors.total()} requests were answered with errors, or not at all", file=sys.stderr)
    if run.errors["429"]:
        print("429 is a server's limit of requests, of ours --rate-limit: 0 switches it off", file=sys.stderr)
    return 1 if run.out or run.errors else 0


def scenarios(options: argparse.Namespace) -> list[Scenario]:
    """Closed loops first, so that an open one can take its share of what they reached."""
    kinds: list[str | tuple[int, int]] = list(options.kinds)
    if options.words:
        lowest, highest = options.words
        if lowest > highest:
            raise ConfigError(f"--words: expected FROM at most TO, not {lowest} {highest}")
        kinds = [(lowest, highest)]
    found: list[Scenario] = []
    for kind in kinds:
        shown = kind if isinstance(kind, str) else f"{kind[0]} to {kind[1]} words"
        for size in options.texts:
            name = f"{shown}, {size} a request"
            any_ = Scenario(name, kind, 0, size, seconds=options.seconds)
            found += [replace(any_, name=f"{name}, {n} clients", clients=n) for n in options.clients]
            if options.rates:
                found += [replace(any_, name=f"{name}, open at {rate:g}/s", rate=rate) for rate in options.rates]
            else:
                found += [replace(any_, name=f"{name}, open at {each:.0%}", share=each) for each in options.shares]
    return found

"""How much host memory does loading a model take, over the size of its weights in the dtype in which they run?

Each shape is written as a checkpoint with random weights and loaded by the native backend in a fresh process, which has
imported everything and run one linear layer before. Peak is the largest resident set since then (the kernel's VmHWM),
with the pages of mapped files that the process has touched, less what was resident before; kept is what stays, split
into memory of its own and pages of files.

    python -m embedserve.benchmarks.loading
    python -m embedserve.benchmarks.loading --shapes bge-base --device cuda --dtype float16 --output -

Ends in one JSON line a shape, appended to benchmarks/results/loading.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from embedserve.benchmarks import jsonl, machine, shapes

RESULTS = jsonl.FOLDER / "loading.jsonl"

SHAPES = {
    "bge-base": ("bge-base", "float32"),
    "bge-base, stored in half": ("bge-base", "float16"),
    "Qwen3-Embedding-0.6B": ("qwen3-0.6b", "bfloat16"),
}
"""The shape, and the dtype that the weights are stored in."""


def measure(folder: Path, device: str, dtype: str) -> dict[str, Any]:
    """Load a checkpoint in a fresh process; what `_load` says of it."""
    command = [
        sys.executable,
        "-m",
        "embedserve.benchmarks.loading",
        "--load",
        str(folder),
        "--device",
        device,
        "--dtype",
        dtype,
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=600)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def _resident() -> dict[str, int]:
    """The figures of the kernel about this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmHWM", "VmRSS", "RssAnon", "RssFile")}


def _load(folder: Path, device_name: str, dtype_name: str) -> dict[str, Any]:
    """Load a checkpoint in this process, which must not have loaded another. Sizes in bytes."""
    from embedserve.server import threads

    threads.set_patience()  # before torch is loaded
    import torch

    from embedserve.kernels import dispatch
    from embedserve.models.config import read_config
    from embedserve.models.native import NativeBackend

    device, dtype = torch.device(device_name), getattr(torch, dtype_name)
    config = read_config(folder)
    # The libraries' own buffers, and the modules that they import when first called, are no part of a model.
    linear = dispatch.choose(device, dtype).linear(torch.ones(64, 64, device=device, dtype=dtype), None, None)
    linear(torch.ones(16, 64, device=device, dtype=dtype))
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM begins anew
    before = _resident()
    model = NativeBackend(config, device, dtype)
    after = _resident()
    weights = shapes.parameters(json.loads((folder / "config.json").read_bytes())) * dtype.itemsize
    assert model  # it lives until here
    return {
        "weights": weights,
        "peak": after["VmHWM"] - before["VmRSS"],
        "peak_over_weights": round((after["VmHWM"] - before["VmRSS"]) / weights, 3),
        "kept_own": after["RssAnon"] - before["RssAnon"],
        "kept_of_files": after["RssFile"] - before["RssFile"],
    }


def main() -> None:
    """Measure each shape and write its line."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="of models")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="float32", help="in which the model runs")
    parser.add_argument("--output", default=str(RESULTS), help="file that the lines are appended to, - for none")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)  # what `measure` calls
    options = parser.parse_args()
    if options.load:
        print(json.dumps(_load(options.load, options.device, options.dtype)))
        return

    for shape in options.shapes:
        name, stored = SHAPES[shape]
        with tempfile.TemporaryDirectory() as folder:
            shapes.write(Path(folder), shapes.SHAPES[name], stored=stored)
            report = measure(Path(folder), options.device, options.dtype)
        line = {"benchmark": "loading", "shape": shape, "stored": stored, **report}
        line["machine"] = machine.accelerator(options.device) | {
            "dtype": options.dtype,
            "kernel": ".".join(os.uname().release.split(".")[:2]),
            "libc": " ".join(platform.libc_ver()),
        }
        print(json.dumps(line))
        jsonl.append(line, options.output)


if __name__ == "__main__":
    main()

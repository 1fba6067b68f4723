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
import math
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from embedserve.benchmarks import jsonl, machine

RESULTS = jsonl.FOLDER / "loading.jsonl"

BERT_BASE: dict[str, Any] = {
    "architectures": ["BertModel"],
    "hidden_act": "gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "type_vocab_size": 2,
    "vocab_size": 30522,
}
QWEN3_0_6B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 32768,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "vocab_size": 151669,
}
SHAPES = {
    "bge-base": (BERT_BASE, "float32"),
    "bge-base, stored in half": (BERT_BASE, "float16"),
    "Qwen3-Embedding-0.6B": (QWEN3_0_6B, "bfloat16"),
}
"""config.json, and the dtype that the weights are stored in."""


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint with this config.json."""
    width, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {}
    if config["model_type"] == "qwen3":
        head, queries, kv = config["head_dim"], config["num_attention_heads"], config["num_key_value_heads"]
        shapes |= {"embed_tokens.weight": (vocabulary, width), "norm.weight": (width,)}
        layer = {
            "input_layernorm": (width,),
            "self_attn.q_proj": (queries * head, width),
            "self_attn.k_proj": (kv * head, width),
            "self_attn.v_proj": (kv * head, width),
            "self_attn.o_proj": (width, queries * head),
            "self_attn.q_norm": (head,),
            "self_attn.k_norm": (head,),
            "post_attention_layernorm": (width,),
            "mlp.gate_proj": (inner, width),
            "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner),
        }
        for index in range(config["num_hidden_layers"]):
            shapes |= {f"layers.{index}.{name}.weight": shape for name, shape in layer.items()}
        return shapes
    for name, rows in (
        ("word", vocabulary),
        ("position", config["max_position_embeddings"]),
        ("token_type", config["type_vocab_size"]),
    ):
        shapes[f"embeddings.{name}_embeddings.weight"] = (rows, width)
    linears = {
        "attention.self.query": (width, width),
        "attention.self.key": (width, width),
        "attention.self.value": (width, width),
        "attention.output.dense": (width, width),
        "attention.output.LayerNorm": (width,),
        "intermediate.dense": (inner, width),
        "output.dense": (width, inner),
        "output.LayerNorm": (width,),
    }
    named = {"embeddings.LayerNorm": (width,)} | {
        f"encoder.layer.{index}.{name}": shape
        for index in range(config["num_hidden_layers"])
        for name, shape in linears.items()
    }
    for name, shape in named.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def write_checkpoint(folder: Path, config: dict[str, Any], stored: str) -> None:
    """Write config.json and model.safetensors with random weights of the dtype `stored`."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.empty(shape, dtype=getattr(torch, stored)).normal_(std=0.02, generator=generator)
        for name, shape in tensor_shapes(config).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors")


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
    values = sum(
        math.prod(shape) for shape in tensor_shapes(json.loads((folder / "config.json").read_bytes())).values()
    )
    weights = values * dtype.itemsize
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
        config, stored = SHAPES[shape]
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(Path(folder), config, stored)
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

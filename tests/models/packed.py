"""What tests of packed families share: random weights, random texts, and the comparison with a reference."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embedserve.kernels import dispatch
from embedserve.models import registry
from embedserve.models.batch import PackedBatch, PackedRows
from embedserve.models.config import read_config

CPU = torch.device("cpu")
LENGTHS = (1, 5, 60, 5, 17)


@torch.no_grad()
def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Give every parameter random values, the same ones each time, of a size that keeps activations near 1.

    As initialised, biases are 0 and norms 1, so that leaving one out would not show.
    """
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        norm = "norm" in name.lower() and name.endswith("weight")
        scale = 0.1 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5
        parameter.copy_(torch.randn_like(parameter) * scale + norm)
    return model.eval()


def load(folder: Path, *, reference: bool = False) -> Any:
    """The family that the folder's config.json names, with the fast kernels or the reference ones."""
    config = read_config(folder)
    kernels = dispatch.choose(CPU, torch.float32, reference=reference)
    with torch.inference_mode():
        return registry.family(config.family)(config, CPU, torch.float32, kernels)


def random_texts(lengths: Sequence[int] = LENGTHS, first: int = 4, vocab: int = 101) -> list[Tensor]:
    """Texts of random ids from `first` on: below lie the special tokens."""
    generator = np.random.default_rng(1)
    return [torch.from_numpy(generator.integers(first, vocab, length, dtype=np.int32)) for length in lengths]


def pack(texts: Sequence[Tensor]) -> PackedBatch:
    lengths = np.array([len(text) for text in texts], dtype=np.int32)
    return PackedBatch.on_cpu(PackedRows.pack(torch.cat(list(texts)).numpy().astype(np.int32), lengths))


@torch.inference_mode()
def states_of(run: Callable[[PackedBatch], Tensor], texts: Sequence[Tensor]) -> list[Tensor]:
    """Each text's states, [tokens, hidden], in the order of `texts`, computed in one batch."""
    batch = pack(texts)
    rows = torch.split(run(batch), batch.host.lengths.tolist())
    found = dict(zip(batch.host.order.tolist(), rows, strict=True))
    return [found[index] for index in range(len(texts))]


@torch.inference_mode()
def expected_states(model: Any, texts: Sequence[Tensor], **inputs: Tensor) -> list[Tensor]:
    """Each text's states, computed by a model of transformers one at a time."""
    return [model(input_ids=text[None].long(), **inputs).last_hidden_state[0] for text in texts]


def largest_difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest distance of two vectors, relative to the length of the expected one."""
    return max(
        ((a.double() - b.double()).norm(dim=-1) / b.double().norm(dim=-1)).max().item()
        for a, b in zip(found, expected, strict=True)
    )

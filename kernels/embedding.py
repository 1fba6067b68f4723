"""The first states of an encoder: a row of the word table for each token, and of the position table, normalised."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from embedserve.kernels.norm import layer_norm


def embed(
    ids: Tensor, words: Tensor, positions: Tensor, table: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """`layer_norm(words[id] + table[position])`; without table, `layer_norm(words[id])`.

    ids and positions are int32 [tokens], each less than the rows of its table; words is [vocabulary, hidden], table
    [positions, hidden], weight and bias are [hidden]. Returns [tokens, hidden] in the dtype of words. What is the same
    for every token, such as BERT's type row, is added to one of the tables when the model is loaded.
    Source: Devlin et al. 2018 (arXiv:1810.04805).
    """
    states = F.embedding(ids, words)
    if table is not None:
        states.add_(F.embedding(positions, table))
    return layer_norm(states, weight, bias, eps)

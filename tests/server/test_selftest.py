"""The self-test: what is right passes, and each kind of what is wrong fails the check that is meant for it."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import XLMRobertaConfig, XLMRobertaModel

from embedserve.models import catalog, golden
from embedserve.models.golden import Scores, TokenWeights
from embedserve.server import config
from embedserve.server.cli import main as command
from embedserve.server.runner import Runner
from embedserve.server.selftest import Check, LoadedModel, checks, consistency, published
from embedserve.server.served import LocalModel, find_models

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
PARAPHRASES = "cosine with a paraphrase in other words, less that with another meaning in the same words"


@pytest.fixture(scope="module")
def folder() -> Path:
    return catalog.locate(MINILM, None)


def model_of(argument: str) -> LocalModel:
    (model,) = find_models(config.load({"model": [argument]}, {}))
    assert isinstance(model, LocalModel)
    return model


def load(model: LocalModel) -> Runner:
    return Runner.load(model.config.folder, config=model.config, device="cpu", threads=2)


@pytest.fixture(scope="module")
def minilm() -> LoadedModel:
    model = model_of(MINILM)
    return LoadedModel(model, load(model))


def failed(results: Sequence[Check]) -> list[str]:
    return [check.what for check in results if check.passed is False]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        command(["selftest", *arguments, "--device", "cpu", "--threads", "2"])
    assert isinstance(ended.value.code, int)
    return ended.value.code, capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------- real weights


def test_minilm_gives_every_published_value(capsys: pytest.CaptureFixture[str]) -> None:
    status, out = run(capsys, "all-minilm-l6-v2")
    assert status == 0, out
    assert "FAIL" not in out
    assert out.count("sentence-transformers' tests") == 1
    assert out.count("fastembed's tests") == 1
    assert out.count("Text Embeddings Inference's tests") == 4
    assert f"{MINILM}: 14 checks passed, 0 failed." in out


def test_json_has_a_line_for_each_check(capsys: pytest.CaptureFixture[str]) -> None:
    status, out = run(capsys, MINILM, "--json")
    assert status == 0
    lines = [json.loads(line) for line in out.splitlines()]
    assert len(lines) == 14
    hello = next(line for line in lines if "'hello world'" in line["what"])
    assert hello["passed"]
    assert hello["expected"] == [-0.034478, 0.03102, 0.00673, 0.02611, -0.039362]
    assert hello["difference"] < 1e-5 < hello["tolerance"] == 1e-3
    assert hello["source"] == "fastembed's tests"


@pytest.fixture
def disturbed(folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of MiniLM whose tensors went through a function."""

    def copy(change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
        shutil.copytree(folder, tmp_path / "model")
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "model" / "model.safetensors")
        return tmp_path / "model"

    return copy


def exchange_queries_and_keys(tensors: dict[str, torch.Tensor]) -> None:
    for layer in range(6):
        query, key = (f"encoder.layer.{layer}.attention.self.{name}.bias" for name in ("query", "key"))
        tensors[query], tensors[key] = tensors[key], tensors[query]


def drop_the_last_norms_bias(tensors: dict[str, torch.Tensor]) -> None:
    tensors["encoder.layer.5.output.LayerNorm.bias"].zero_()


@pytest.mark.parametrize("change", [exchange_queries_and_keys, drop_the_last_norms_bias])
def test_weights_that_are_subtly_wrong_fail_the_published_values_alone(
    capsys: pytest.CaptureFixture[str],
    disturbed: Callable[..., Path],
    change: Callable[[dict[str, torch.Tensor]], None],
) -> None:
    status, out = run(capsys, f"{MINILM}={disturbed(change)}")
    assert status == 1
    wrong = [line for line in out.splitlines() if line.startswith("FAIL")]
    assert "FAIL  first 5 components of 'hello world'" in wrong
    assert "FAIL  first 8 components of 'What is Deep Learning?'" in wrong
    # In themselves they are as consistent as before.
    assert not [line for line in wrong if "batch" in line or "norm of" in line]


def forget_everything(tensors: dict[str, torch.Tensor]) -> None:
    torch.manual_seed(0)
    for name, tensor in tensors.items():
        if name.endswith("weight") and "LayerNorm" not in name:
            tensor.normal_(std=0.02)


def test_untrained_weights_are_told_without_a_published_value(
    capsys: pytest.CaptureFixture[str], disturbed: Callable[..., Path]
) -> None:
    _, out = run(capsys, f"{MINILM}={disturbed(forget_everything)}")
    assert f"FAIL  {PARAPHRASES}" in out.splitlines()
    _, out = run(capsys, MINILM)
    assert f"pass  {PARAPHRASES}" in out.splitlines()


def test_a_model_of_which_nothing_is_published_says_so(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    status, out = run(capsys, f"private={folder}")
    assert status == 0
    assert "Nothing published of its vectors is known here" in out
    assert "private: 7 checks passed, 0 failed." in out


def test_a_model_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        command(["selftest", "BAAI/bge-m3", "--models-dir", str(tmp_path)])
    assert ended.value.code == 2
    assert "BAAI--bge-m3" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------- consistency, with a mistake


class Faulty(LoadedModel):
    """MiniLM, whose vectors go through `fault`."""

    def __init__(self, right: LoadedModel, fault: Callable[[Any], Any]) -> None:
        self.model, self.info, self._right, self._fault = right.model, right.info, right, fault

    def tokens(self, *arguments: Any) -> list[int]:
        return self._right.tokens(*arguments)

    def dense(self, texts: Sequence[str], **fields: Any) -> Any:
        return self._fault(self._right.dense(texts, **fields))


def unit(vectors: Any) -> Any:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def leak_from_the_neighbour(vectors: Any) -> Any:
    return unit(vectors + 1e-3 * np.roll(vectors, 1, axis=0))


def forget_to_normalise(vectors: Any) -> Any:
    return vectors * np.float32(1.01)


def give_no_number(vectors: Any) -> Any:
    vectors[-1, 5] = np.nan
    return vectors


def depend_on_the_moment(vectors: Any) -> Any:
    vectors[0, 0] += np.random.default_rng().uniform(1e-6, 2e-6)
    return vectors


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        (leak_from_the_neighbour, "each text alone, and in a batch: largest difference"),
        (forget_to_normalise, "norm of full vectors: the worst"),
        (give_no_number, "texts with a vector of finite numbers"),
        (depend_on_the_moment, "the same batch twice: bytes that differ"),
    ],
)
def test_an_inconsistent_model_fails_the_check_for_it(
    minilm: LoadedModel, fault: Callable[[Any], Any], check: str
) -> None:
    assert not failed(list(consistency(minilm)))
    assert check in failed(list(consistency(Faulty(minilm, fault))))


def test_a_cut_without_a_second_normalisation_fails(minilm: LoadedModel) -> None:
    trained = replace(minilm.model.config, matryoshka=catalog.DimensionRange(32, 384))
    right = Faulty(minilm, lambda vectors: vectors)
    right.model = replace(minilm.model, config=trained)
    assert not failed(list(consistency(right)))

    class Cuts(Faulty):
        def dense(self, texts: Sequence[str], *, dimensions: int | None = None, **fields: Any) -> Any:
            return super().dense(texts, **fields)[:, :dimensions]

    wrong = Cuts(minilm, lambda vectors: vectors)
    wrong.model = right.model
    assert "norm of vectors cut to 32: the worst" in failed(list(consistency(wrong)))


@pytest.mark.parametrize(("noise", "passes"), [(2e-4, True), (1e-2, False)])
def test_half_precision_is_compared_with_float32(minilm: LoadedModel, noise: float, passes: bool) -> None:
    class Half:
        """What a runner in half precision gives: MiniLM's vectors with some noise."""

        info = replace(minilm.info, dtype="float16")

        def run(self, *arguments: Any) -> Any:
            embedded = minilm._runner.run(*arguments)
            rows = embedded.arrays["dense"]
            wave = noise * np.sin(np.arange(len(rows.elements), dtype=np.float32))
            return replace(embedded, arrays={"dense": replace(rows, elements=rows.elements + wave)})

    asked = []

    def load_as(dtype: str) -> Any:
        asked.append(dtype)
        return Half() if dtype == "float16" else minilm._runner

    last = list(checks(minilm.model, load_as, "float16"))[-1]
    assert asked == ["float16", "float32"]
    assert last.what == "float16 and float32: smallest cosine"
    assert last.passed is passes


# ---------------------------------------------------------------------------------------------------------- bge-m3


class Published(LoadedModel):
    """A bge-m3 that has the sparse weights of the README, vectors that are easy to multiply, and no weights."""

    def __init__(self, minilm: LoadedModel, weights: dict[str, dict[int, float]]) -> None:
        config = replace(minilm.model.config, outputs=("dense", "sparse", "colbert"))
        self.model, self.info, self._weights = replace(minilm.model, config=config), minilm.info, weights

    def dense(self, texts: Sequence[str], **fields: Any) -> Any:
        return np.array([[0.6, 0.8], [1.0, 0.0]], dtype=np.float32)[: len(texts)]

    def sparse(self, texts: Sequence[str]) -> list[dict[int, float]]:
        return [self._weights[text] for text in texts]

    def colbert(self, texts: Sequence[str]) -> Any:
        return [np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[0.6, 0.8]])][: len(texts)]


def test_scores_of_three_outputs_by_hand(minilm: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    # Dense: 0.36 + 0.64 = 1. Sparse: 2·3 shared of token 7, nothing of 8 and 9. Multi-vector: of the query's two tokens
    # the first has its best cosine, 1, with itself, as has the second. (0.4·1 + 0.2·6 + 0.4·1) / 1 = 2.
    model = Published(minilm, {"q": {7: 2.0, 8: 5.0}, "d": {7: 3.0, 9: 1.0}})
    value = Scores("README", ("q",), ("d",), ((2.0,),), tolerance=1e-6, weights=(0.4, 0.2, 0.4))
    monkeypatch.setattr(golden, "_PUBLISHED", {"x": (value, replace(value, scores=((2.1,),)))})
    right, wrong = published("x", model)
    assert right.passed
    assert wrong.passed is False
    assert right.what == "dense and sparse and multi-vector scores of 1 query and 1 document, the first 'q'"


def test_sparse_weights_go_by_the_decoded_token(minilm: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    water, runs = (minilm.tokens(word)[1] for word in ("water", "runs"))
    values = tuple(
        TokenWeights("README", "text", weights)
        for weights in ({"water": 0.5}, {"water": 0.51}, {"water": 0.5, "runs": 0.1}, {})
    )
    monkeypatch.setattr(golden, "_PUBLISHED", {"x": values})
    assert [check.passed for check in published("x", Published(minilm, {"text": {water: 0.5}}))] == [
        True,
        False,  # another weight
        False,  # a token is missing
        False,  # one too many
    ]
    both = Published(minilm, {"text": {water: 0.5, runs: 0.1}})
    assert [check.passed for check in published("x", both)] == [False, False, True, False]


def test_weights_that_are_no_numbers_fail(minilm: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Published(minilm, {"text": {-1: float("nan")}})
    monkeypatch.setattr(golden, "_PUBLISHED", {"x": (TokenWeights("README", "text", {"water": 0.5}, 1.0),)})
    assert [check.passed for check in published("x", model)] == [False]


def test_bge_m3s_checks_run_through_all_three_outputs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Random weights under the name of bge-m3: consistent, and wrong in everything that is published."""
    torch.manual_seed(1)
    sizes = {"vocab_size": 64, "hidden_size": 1024, "num_hidden_layers": 1, "num_attention_heads": 16}
    architecture = XLMRobertaConfig(
        **sizes, intermediate_size=96, max_position_embeddings=8194, type_vocab_size=1, layer_norm_eps=1e-5,
        bos_token_id=0, pad_token_id=1, eos_token_id=2, architectures=["XLMRobertaModel"],
    )  # fmt: skip
    XLMRobertaModel(architecture, add_pooling_layer=False).save_pretrained(tmp_path)
    for name, outputs in (("sparse", 1), ("colbert", 1024)):
        tensors = {"weight": torch.randn(outputs, 1024), "bias": torch.randn(outputs)}
        save_file(tensors, tmp_path / f"{name}_linear.safetensors")
    words = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "is": 4, "What": 5, "BGE": 6, "water": 7, "Water": 8}
    tokenizer = tokenizers.Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))

    status, out = run(capsys, f"BAAI/bge-m3={tmp_path}")
    assert status == 1
    lines = out.splitlines()
    assert "FAIL  sparse weights of 'What is BGE M3?'" in lines
    assert "FAIL  multi-vector scores of 2 queries and 2 documents, the first 'What is BGE M3?'" in lines
    assert "FAIL  cosines of 2 queries and 2 documents, the first 'What is BGE M3?'" in lines
    assert "pass  each text alone, and in a batch: largest difference" in lines
    assert "pass  8200 words cut to 8192 tokens by END: number, special tokens around" in lines
    assert "pass  sparse weights of each text alone, and in a batch: largest difference" in lines
    assert "pass  multi-vectors of each text alone, and in a batch: largest difference" in lines

    (tmp_path / "sparse_linear.safetensors").unlink()
    _, out = run(capsys, f"BAAI/bge-m3={tmp_path}")
    lines = out.splitlines()
    assert "skip  published values of the output sparse" in lines
    assert "FAIL  multi-vector scores of 2 queries and 2 documents, the first 'What is BGE M3?'" in lines
    assert "pass  each text alone, and in a batch: largest difference" in lines


# ------------------------------------------------------------------------------------------------------------ the data


def test_published_values_are_of_models_in_the_catalogue() -> None:
    unknown = [name for name in golden._PUBLISHED if catalog.find(name) is None]
    assert not unknown
    without = {entry.id for entry in catalog.CATALOG if not golden.published(entry.id)}
    assert without == {"BAAI/bge-base-zh-v1.5", "netease-youdao/bce-embedding-base_v1"}


def test_prompts_of_published_values_are_the_catalogues() -> None:
    for name, values in golden._PUBLISHED.items():
        entry = catalog.find(name)
        assert entry is not None
        prompts = {value.prompt for value in values if isinstance(value, Scores | golden.Components)}
        assert prompts <= {"", entry.prompts.get("query")}


def test_the_published_score_of_all_outputs_is_the_weighted_sum_of_the_single_ones() -> None:
    """The README's own figures fit together, so the formula is the one that made them."""
    scores = {value.weights: np.array(value.scores) for value in golden.published("BAAI/bge-m3")[1:6]}
    single = [scores[weights] for weights in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))]
    for weights in ((0.4, 0.2, 0.0), (0.4, 0.2, 0.4)):
        mean = sum(w * one for w, one in zip(weights, single, strict=True)) / sum(weights)
        assert np.abs(scores[weights] - mean).max() < 5e-4

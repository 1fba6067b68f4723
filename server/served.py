"""The models that this server serves: from what `--model` names to settings, prompts and tokenizer. No torch."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from embedserve.models import catalog
from embedserve.models.catalog import CatalogEntry
from embedserve.models.config import ModelConfig
from embedserve.models.errors import ModelNotFoundError
from embedserve.server.config import ConfigError, ModelSettings, ServerConfig
from embedserve.server.tokenizer import Tokenizer

__all__ = ["ServedModel", "ServedModels", "find_models"]


@dataclass(frozen=True)
class ServedModel:
    """One model: everything that the front end knows of it."""

    id: str
    config: ModelConfig
    entry: CatalogEntry | None
    """What the catalogue knows; None for a folder that is not in it."""
    settings: ModelSettings
    tokenizer: Tokenizer
    created: int
    """Unix time: the weights' publication, or the folder's last change."""

    @property
    def names(self) -> tuple[str, ...]:
        """What a request may call it, besides its id: the id's last part, and the catalogue's aliases."""
        return (self.id.rpartition("/")[2], *(self.entry.aliases if self.entry else ()))

    @property
    def prompts(self) -> Mapping[str, str]:
        """What `input_type` and `prompt_name` put before a text, by name. Where a model's files call it ``passage``,
        the prompt of documents goes by both names."""
        prompts = dict(self.config.prompts)
        if "passage" in prompts:
            prompts.setdefault("document", prompts["passage"])
        return prompts

    @property
    def default_prompt(self) -> str:
        """What is put before a text when a request does not say: nothing, unless the model's files say so."""
        return self.config.default_prompt

    @property
    def dimensions(self) -> int:
        """The size of a vector when a request does not say."""
        return self.config.default_dimension


class ServedModels:
    """The served models by name: ids, their last parts and aliases, in any case."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        """Raises `ConfigError` where two models have the same id."""
        self._models = tuple(models)
        self._by_name: dict[str, ServedModel] = {}
        short_names = [name.lower() for model in models for name in set(model.names)]
        for model in models:
            for name in model.names:
                # What two models could be called means neither: a guess would give vectors of the wrong one.
                if short_names.count(name.lower()) == 1:
                    self._by_name[name.lower()] = model
        ids = [model.id.lower() for model in models]
        for model in models:
            if ids.count(model.id.lower()) > 1:
                raise ConfigError(f"--model: two models are called {model.id!r}; name one of them: NAME=FOLDER")
            self._by_name[model.id.lower()] = model

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models)

    def find(self, name: str) -> ServedModel | None:
        """The model that a request means by this name, if there is one."""
        return self._by_name.get(name.lower())


def find_models(config: ServerConfig) -> ServedModels:
    """Find every model that the configuration names, read its settings and load its tokenizer.

    Raises `ConfigError`, `ModelError` or `TokenizerError`, whose messages name the model, the file and the remedy.
    """
    if config.models_dir is not None and not config.models_dir.is_dir():
        raise ConfigError(f"--models-dir: there is no folder {config.models_dir}")
    models = []
    for argument in config.model:
        name, folder = _locate(argument, config.models_dir)
        if not (name.isascii() and name.isprintable()):
            raise ConfigError(f"--model: {name!r} cannot be an id, which goes into headers: use ASCII, NAME=FOLDER")
        model_config = catalog.configure(folder, name)
        entry = catalog.find(name)
        models.append(
            ServedModel(
                id=name,
                config=model_config,
                entry=entry,
                settings=config.model_settings.get(name, ModelSettings()),
                tokenizer=Tokenizer.load(
                    model_config.weights_folder / "tokenizer.json",
                    max_tokens=model_config.max_tokens,
                    lower_case=model_config.do_lower_case,
                    bert_normalizer=model_config.bert_normalizer,
                ),
                created=(entry and entry.created) or int(_last_change(folder)),
            )
        )
    served = ServedModels(models)
    unknown = set(config.model_settings) - {model.id for model in served}
    if unknown:
        raise ConfigError(f"model_settings: {', '.join(sorted(unknown))}: no such model is served")
    return served


def _locate(argument: str, models_dir: Path | None) -> tuple[str, Path]:
    """What `--model` says → the id to serve under, and the folder."""
    name, equals, folder = argument.partition("=")
    if equals and name and not argument.startswith(("/", ".", "~")):
        return name, _folder(folder)
    entry = catalog.find(argument)
    if entry is not None:
        return entry.id, catalog.locate(entry.id, models_dir)
    path = Path(argument).expanduser()
    if argument.startswith((".", "/", "~")) or path.is_dir():
        path = _folder(argument)
        known = catalog.find(path.resolve().name)
        return (known.id if known else path.resolve().name), path
    return argument, catalog.locate(argument, models_dir)


def _folder(text: str) -> Path:
    path = Path(text).expanduser()
    if not path.is_dir():
        raise ModelNotFoundError(f"--model: there is no folder {path}")
    return path


def _last_change(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:
        return time.time()

"""The models that requests may name: from what the operator configured to settings, prompts and tokenizer. No torch."""

import dataclasses
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embedserve.models import catalog
from embedserve.models.catalog import CatalogEntry
from embedserve.models.config import DimensionRange, ImageSettings, ModelConfig
from embedserve.models.errors import ModelNotFoundError
from embedserve.server.config import Alias, ConfigError, ModelSettings, ServerConfig, Upstream
from embedserve.server.errors import UnknownModelError
from embedserve.server.tokenizer import Tokenizer
from embedserve.server.upstreams import closed_model

__all__ = ["LocalModel", "RelayedModel", "ServedModel", "ServedModels", "find_models", "locate"]


@dataclass(frozen=True)
class _Model(ABC):
    """What an endpoint may ask of any model, wherever it runs.

    id: what engines, metrics and logs call it. name: what clients call it, the id or the operator's alias.
    settings: the operator's, under this name. created: Unix time.
    """

    id: str
    name: str
    settings: ModelSettings
    created: int

    @property
    def alias_of(self) -> str | None:
        """The id, where the name is another."""
        return self.id if self.name != self.id else None

    @property
    def short_names(self) -> tuple[str, ...]:
        """What a request may call the model besides, as long as it means no other."""
        return (self.id.rpartition("/")[2],)

    @property
    def dimensions(self) -> int:
        """The size of a vector when a request does not say."""
        return self.settings.dimensions or self._own_dimensions

    @property
    def default_prompt(self) -> str:
        """What is put before a text when a request does not say: nothing, unless the operator or the model's files
        say so."""
        name = self.settings.default_prompt_name
        return self._own_prompt if name is None else self.prompts[name]

    @property
    @abstractmethod
    def size(self) -> int:
        """The full size of a vector."""

    @property
    @abstractmethod
    def matryoshka(self) -> DimensionRange | None:
        """The sizes that a vector may have besides, or None."""

    @property
    @abstractmethod
    def prompts(self) -> Mapping[str, str]:
        """What `input_type` and `prompt_name` put before a text, by name."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """What it can give of an input, names of `arrays.OUTPUTS`."""
        return ("dense",)

    @property
    def images(self) -> ImageSettings | None:
        """How images are prepared; None where it takes none."""
        return None

    @property
    def instruction(self) -> str | None:
        """The template that a query's instruction is put into, at ``{instruction}``; None where it has none."""
        return None

    @property
    @abstractmethod
    def _own_dimensions(self) -> int: ...

    @property
    @abstractmethod
    def _own_prompt(self) -> str: ...


@dataclass(frozen=True)
class LocalModel(_Model):
    """A model that our engines run. `created`: the weights' publication, or the folder's last change.

    entry: what the catalogue knows; None for a folder that is not in it.
    """

    config: ModelConfig
    entry: CatalogEntry | None
    tokenizer: Tokenizer

    @property
    def short_names(self) -> tuple[str, ...]:
        """The id's last part, and the catalogue's aliases."""
        return (*super().short_names, *(self.entry.aliases if self.entry else ()))

    @property
    def size(self) -> int:
        """See the base class."""
        return self.config.dimension

    @property
    def matryoshka(self) -> DimensionRange | None:
        """The sizes that it was trained for."""
        return self.config.matryoshka

    @property
    def prompts(self) -> Mapping[str, str]:
        """Those of its files. Where they call it ``passage``, the prompt of documents goes by both names."""
        prompts = dict(self.config.prompts)
        if "passage" in prompts:
            prompts.setdefault("document", prompts["passage"])
        return prompts

    @property
    def outputs(self) -> tuple[str, ...]:
        """Those of its weights."""
        return self.config.outputs

    @property
    def images(self) -> ImageSettings | None:
        """As its files say."""
        return self.config.images

    @property
    def instruction(self) -> str | None:
        """The one that it was trained with."""
        return self.config.instruction

    @property
    def _own_dimensions(self) -> int:
        return self.config.default_dimension

    @property
    def _own_prompt(self) -> str:
        return self.config.default_prompt


@dataclass(frozen=True)
class RelayedModel(_Model):
    """A model whose requests go to an upstream. `created`: when this server began to offer it.

    key: what the upstream asks for, if anything. It is never printed.
    """

    upstream: Upstream
    key: str | None = field(repr=False)

    @property
    def size(self) -> int:
        """See the base class."""
        return self.upstream.dimensions

    @property
    def matryoshka(self) -> DimensionRange | None:
        """The sizes that the upstream can be asked for."""
        return self.upstream.matryoshka

    @property
    def prompts(self) -> Mapping[str, str]:
        """None that are known here: what the upstream does to a text is its own."""
        return {}

    @property
    def _own_dimensions(self) -> int:
        return self.upstream.dimensions

    @property
    def _own_prompt(self) -> str:
        return ""


ServedModel = LocalModel | RelayedModel


class ServedModels:
    """The models by name: ids, their last parts and aliases, in any case."""

    def __init__(self, models: Sequence[ServedModel], aliases: Sequence[ServedModel] = ()) -> None:
        """`aliases`: some of the models once more, under another name. Raises `ConfigError` where names clash."""
        self._models = tuple(models)
        self._aliases = tuple(aliases)
        self._by_name: dict[str, ServedModel] = {}
        short_names = [name.lower() for model in models for name in set(model.short_names)]
        for model in models:
            for name in model.short_names:
                # What two models could be called means neither: a guess would give vectors of the wrong one.
                if short_names.count(name.lower()) == 1:
                    self._by_name[name.lower()] = model
        ids = [model.id.lower() for model in models]
        for model in models:
            if ids.count(model.id.lower()) > 1:
                raise ConfigError(f"--model: two models are called {model.id!r}; name one of them: NAME=FOLDER")
            self._by_name[model.id.lower()] = model
            for other in models:
                # A model that runs here must not be taken for one elsewhere: its texts would leave the machine.
                short = {name.lower() for name in other.short_names}
                if isinstance(model, RelayedModel) and other is not model and model.id.lower() in short:
                    raise ConfigError(f"upstreams: {model.id!r} is a name of {other.id} already; choose another")
        for alias in aliases:
            if (other := self._by_name.setdefault(alias.name.lower(), alias)) is not alias:
                raise ConfigError(f"aliases: {alias.name!r} is a name of {other.id} already; choose another")

    def __iter__(self) -> Iterator[ServedModel]:
        """What is listed: every model, then every alias."""
        return iter(self._models + self._aliases)

    @property
    def local(self) -> tuple[LocalModel, ...]:
        """Those that run here, once each."""
        return tuple(model for model in self._models if isinstance(model, LocalModel))

    @property
    def relayed(self) -> tuple[RelayedModel, ...]:
        """Those that run elsewhere, once each."""
        return tuple(model for model in self._models if isinstance(model, RelayedModel))

    def get(self, name: str) -> ServedModel:
        """The model that a request means by this name. Raises `UnknownModelError`."""
        model = self._by_name.get(name.lower())
        if model is None:
            raise UnknownModelError(name, closed=closed_model(name) is not None)
        return model


def find_models(config: ServerConfig, environment: Mapping[str, str] = os.environ) -> ServedModels:
    """Find every model that the configuration names, read its settings and load its tokenizer; the keys of upstreams
    come from the environment.

    Raises `ConfigError`, `ModelError` or `TokenizerError`, whose messages name the model, the file and the remedy.
    """
    if config.models_dir is not None and not config.models_dir.is_dir():
        raise ConfigError(f"--models-dir: there is no folder {config.models_dir}")
    models: list[ServedModel] = [_load(argument, config.models_dir) for argument in config.model]
    models += [_relay(name, upstream, environment) for name, upstream in config.upstreams.items()]
    if not models:
        raise ConfigError("--model: expected a model to serve, or an upstream in the file of --config")
    given = _settings_by_listed_name(config, ServedModels(models))
    models = [_with_settings(model, given.get(model.name.lower(), {})) for model in models]
    by_name = ServedModels(models)
    aliases = []
    for name, alias in config.aliases.items():
        model = dataclasses.replace(_target(name, alias, config, by_name), name=name)
        aliases.append(_with_settings(model, {**given.get(name.lower(), {}), **alias.settings}))
    return ServedModels(models, aliases)


def _settings_by_listed_name(config: ServerConfig, models: ServedModels) -> dict[str, Mapping[str, Any]]:
    """The operator's settings by the name under which a model or an alias is listed, in lower case.

    Raises `ConfigError` for a name that means none, and where two names mean one model.
    """
    aliases = {name.lower() for name in config.aliases}
    settings: dict[str, Mapping[str, Any]] = {}
    for name, given in config.model_settings.items():
        try:
            listed = name.lower() if name.lower() in aliases else models.get(name).name.lower()
        except UnknownModelError:
            raise ConfigError(f"model_settings: {name}: no such model is served") from None
        if listed in settings:
            raise ConfigError(f"model_settings: {name}: the settings of this model stand there twice")
        settings[listed] = given
    return settings


def _load(argument: str, models_dir: Path | None) -> LocalModel:
    """The model that `--model` says."""
    name, folder = locate(argument, models_dir)
    if not (name.isascii() and name.isprintable()):
        raise ConfigError(f"--model: {name!r} cannot be an id, which goes into headers: use ASCII, NAME=FOLDER")
    config = catalog.configure(folder, name)
    entry = catalog.find(name)
    tokenizer = Tokenizer.load(
        config.weights_folder / "tokenizer.json",
        max_tokens=config.max_tokens,
        lower_case=config.do_lower_case,
        bert_normalizer=config.bert_normalizer,
        append=config.append_token_ids,
        vocab_size=config.vocab_size,
    )
    published = entry.created if entry else None
    created = int(_last_change(folder)) if published is None else published
    return LocalModel(name, name, ModelSettings(), created, config, entry, tokenizer)


def _relay(name: str, upstream: Upstream, environment: Mapping[str, str]) -> RelayedModel:
    key = None if upstream.key_env is None else _key(upstream.key_env, environment, f"upstreams.{name}")
    return RelayedModel(name, name, ModelSettings(**upstream.settings), int(time.time()), upstream, key)


def _key(variable: str, environment: Mapping[str, str], where: str) -> str:
    key = environment.get(variable, "").strip()
    if not key:
        raise ConfigError(
            f"{where}: key_env: the environment variable {variable} is not set; it holds the upstream's key"
        )
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"{where}: key_env: expected a key of printable ASCII in the environment variable {variable}")
    return key


def _target(name: str, alias: Alias, config: ServerConfig, models: ServedModels) -> ServedModel:
    """The model that an alias means. Raises `ConfigError`."""
    try:
        return models.get(alias.model)
    except UnknownModelError:
        pass
    if alias.model.lower() in {other.lower() for other in config.aliases}:
        raise ConfigError(f"aliases.{name}: {alias.model!r} is an alias itself; name the model that it stands for")
    raise ConfigError(
        f"aliases.{name}: no model {alias.model!r} is served; there are {', '.join(model.id for model in models)}"
    )


def _with_settings(model: ServedModel, given: Mapping[str, Any]) -> ServedModel:
    """The model with the settings that the operator gave for its name, checked. Raises `ConfigError`."""
    settings = dataclasses.replace(model.settings, **given)
    size, prompt = settings.dimensions, settings.default_prompt_name
    fits = size is None or size == model.size or (model.matryoshka is not None and model.matryoshka.allows(size))
    if not fits:
        expected = model.matryoshka or f"{model.size}, the size of {model.id}"
        raise ConfigError(f"{model.name}: dimensions: expected {expected}, not {size}")
    if prompt is not None and prompt not in model.prompts:
        names = ", ".join(model.prompts) or "none"
        raise ConfigError(f"{model.name}: default_prompt_name: {model.id} has no prompt {prompt!r}; it has {names}")
    return dataclasses.replace(model, settings=settings)


def locate(argument: str, models_dir: Path | None) -> tuple[str, Path]:
    """What `--model` says → the id to serve under, and the folder. Raises `ConfigError` or `ModelError`."""
    name, equals, folder = argument.partition("=")
    if equals and name and not argument.startswith(("/", ".", "~")):
        if not folder:
            raise ConfigError(f"--model: expected NAME=FOLDER, with a folder, not {argument!r}")
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

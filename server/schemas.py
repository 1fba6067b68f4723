"""The body of POST /v1/embeddings: JSON → `EmbeddingRequest`, or the API error that names what is wrong.

The checks run in the order in which OpenAI's run, because the first one that fails is what the client is told.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from embedserve.models.config import MAX_PROMPT_CHARACTERS, DimensionRange
from embedserve.server.errors import InvalidRequestError, invalid_input, request_too_long
from embedserve.server.served import ServedModel, ServedModels
from embedserve.server.tokenizer import Truncate

__all__ = ["EmbeddingRequest", "parse_embedding_request"]

ENCODING_FORMATS = ("float", "base64")
INPUT_TYPES = {
    "query": "query",
    "search_query": "query",
    "retrieval.query": "query",
    "document": "document",
    "search_document": "document",
    "passage": "document",
    "retrieval.passage": "document",
}
"""What a request may call an input type → the name of its prompt."""

MAX_TOKEN_ID = (1 << 31) - 1


@dataclass(frozen=True)
class Inputs:
    """What is to be embedded: token arrays, or texts and images, whose places among all inputs stand beside them.

    An image is what the client sent, base64 or a data URI.
    """

    token_arrays: Sequence[Sequence[int]] = ()
    texts: Sequence[str] = ()
    text_positions: Sequence[int] = ()
    images: Sequence[str] = ()
    image_positions: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.token_arrays) + len(self.texts) + len(self.images)


@dataclass(frozen=True)
class EmbeddingRequest:
    """A request that holds together."""

    model: ServedModel
    inputs: Inputs
    encoding_format: str
    dimensions: int
    outputs: Sequence[str]
    prompt: str
    truncate: Truncate
    user: str | None


def parse_embedding_request(body: bytes, models: ServedModels, max_inputs: int, max_tokens: int) -> EmbeddingRequest:
    """Read a body of at most `max_inputs` inputs and `max_tokens` token ids.

    `null` for an optional field means absent. Raises `InvalidRequestError` and its kin.
    """
    fields = _load(body, max_values=4 * (max_tokens + max_inputs))
    name = fields.get("model")
    if name is None or name == "":
        raise InvalidRequestError("you must provide a model parameter")
    if not isinstance(name, str):
        raise _wrong_type("model", "a string", name)
    model = models.get(name)
    inputs = _input(fields.get("input"), model, max_inputs, max_tokens)
    encoding_format = fields.get("encoding_format")
    if encoding_format is None:
        encoding_format = "float"
    elif encoding_format not in ENCODING_FORMATS:
        raise InvalidRequestError(
            f"Invalid value for 'encoding_format' = {_shown(encoding_format)}. "
            f"Supported values: {list(ENCODING_FORMATS)}.",
            param="encoding_format",
        )
    user = fields.get("user")
    if user is not None and not isinstance(user, str):
        raise _wrong_type("user", "a string", user)
    return EmbeddingRequest(
        model=model,
        inputs=inputs,
        encoding_format=encoding_format,
        dimensions=_dimensions(fields.get("dimensions"), model),
        outputs=_outputs(fields.get("outputs"), model),
        prompt=_prompt(fields, model),
        truncate=_truncate(fields.get("truncate")),
        user=user,
    )


def _load(body: bytes, max_values: int) -> Mapping[str, Any]:
    # Nothing else runs while a body is parsed. A text is parsed in no time, but 30 MiB of empty lists took 0.9 s, and
    # in a busy front end 3.7. To count takes 27 ms.
    if _has_more_values(body, max_values):
        raise InvalidRequestError(f"The body of the request holds more than {max_values} JSON values.")
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        # Its message tells the place and never quotes the body.
        reason = f"it is not valid JSON: {error}"
    else:
        if isinstance(fields, dict):
            return fields
        reason = f"it is {_kind(fields)}"
    raise InvalidRequestError(
        "We could not parse the JSON body of your request. "
        f"(HINT: the API expects a JSON object, encoded as UTF-8; what was sent is none: {reason}.)"
    )


def _has_more_values(body: bytes, limit: int) -> bool:
    """Whether there are more values in a JSON document, told without parsing it."""

    def separators(part: bytes) -> int:
        return part.count(b",") + part.count(b"[") + part.count(b"{")

    if separators(body) <= limit:
        return False
    # Many of them may stand in texts: count again outside the strings, of which there must not be more either.
    unescaped = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    if unescaped.count(b'"') > 2 * limit:
        return True
    return sum(map(separators, unescaped.split(b'"')[::2])) > limit


def _input(value: Any, model: ServedModel, limit: int, max_tokens: int) -> Inputs:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not value:
        raise invalid_input()
    if _is_token(value[0]):  # one array of tokens
        value = [value]
    if len(value) > limit:
        raise InvalidRequestError(
            f"Invalid 'input': array too long. Expected an array with maximum length {limit}, "
            f"but got an array with length {len(value)} instead.",
            param="input",
        )
    if all(isinstance(item, str) and item for item in value):
        return Inputs(texts=value, text_positions=range(len(value)))
    # Before they are looked at one by one: a body has room for ten million of them.
    tokens = sum(len(item) for item in value if isinstance(item, list))
    if tokens > max_tokens:
        raise request_too_long(tokens, max_tokens)
    if all(isinstance(item, list) and item and all(map(_is_token, item)) for item in value):
        return Inputs(token_arrays=value)
    if any(isinstance(item, dict) for item in value) and all(isinstance(item, dict | str) and item for item in value):
        return _objects(value, model)
    raise invalid_input(_first_wrong(value))


def _first_wrong(items: list[Any]) -> str:
    """Which input is empty or of another kind than the first."""
    kinds: tuple[type, ...] = (list,) if isinstance(items[0], list) else (str, dict)
    for index, item in enumerate(items):
        if not isinstance(item, kinds):
            return f"(input[{index}] is {_kind(item)}.)"
        if not item:
            return f"(input[{index}] is empty.)"
        if isinstance(item, list) and not all(map(_is_token, item)):
            return f"(input[{index}] holds what is no token id.)"
    return ""


def _objects(items: list[Any], model: ServedModel) -> Inputs:
    """Texts and images, some as objects: ``{"text": …}``, ``{"image": …}``, and ``{"bytes": …}`` for an image too."""
    found: dict[str, tuple[list[str], list[int]]] = {"text": ([], []), "image": ([], [])}
    for index, item in enumerate(items):
        fields = {"text": item} if isinstance(item, str) else item
        given = [name for name in ("text", "image", "bytes") if fields.get(name) is not None]
        content = fields[given[0]] if len(given) == 1 else None
        if not isinstance(content, str) or not content:
            raise InvalidRequestError(
                f"Invalid 'input[{index}]': expected an object with one of 'text' and 'image', a string each.",
                param="input",
            )
        kind = "text" if given == ["text"] else "image"
        if kind == "image" and model.images is None:
            raise InvalidRequestError(
                f"Invalid 'input[{index}]': this model takes no images, only texts.", param="input"
            )
        found[kind][0].append(content)
        found[kind][1].append(index)
    (texts, text_positions), (images, image_positions) = found["text"], found["image"]
    return Inputs(texts=texts, text_positions=text_positions, images=images, image_positions=image_positions)


def _is_token(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_TOKEN_ID


def _dimensions(value: Any, model: ServedModel) -> int:
    if value is None:
        return model.dimensions
    size, trained = model.size, model.matryoshka
    if type(value) is not int or value < 1:
        raise _wrong_dimensions(value, trained, size)
    if value == size or value == model.dimensions:
        return value
    if trained is None:
        raise InvalidRequestError("This model does not support specifying dimensions.")
    if not trained.allows(value):
        raise _wrong_dimensions(value, trained, size)
    return value


def _wrong_dimensions(value: Any, trained: DimensionRange | None, size: int) -> InvalidRequestError:
    # In quotes, or "384" would be refused in favour of 384.
    shown = f"'{_shown(value)}'" if isinstance(value, str) else _shown(value)
    return InvalidRequestError(
        f"Invalid value for 'dimensions' = {shown}. Expected {trained or f'{size}, the size of this model'}.",
        param="dimensions",
    )


def _prompt(fields: Mapping[str, Any], model: ServedModel) -> str:
    """What is put before each text."""
    given = [n for n in ("input_type", "task", "prompt_name", "prompt", "instruction") if fields.get(n) is not None]
    if not given:
        return model.default_prompt
    if len(given) > 1:
        raise InvalidRequestError(f"Give at most one of {' and '.join(map(repr, given))}.", param=given[1])
    name = given[0]
    value = fields[name]
    if not isinstance(value, str):
        raise _wrong_type(name, "a string", value)
    if name in ("prompt", "instruction") and len(value) > MAX_PROMPT_CHARACTERS:
        raise InvalidRequestError(
            f"Invalid '{name}': at most {MAX_PROMPT_CHARACTERS} characters, but got {len(value)} instead.", param=name
        )
    if name == "prompt":
        return value
    if name == "instruction":
        if model.instruction is None:
            raise InvalidRequestError(
                "This model has no template for instructions. Use 'prompt' to put a text before each input.",
                param="instruction",
            )
        return model.instruction.replace("{instruction}", value)
    prompts = model.prompts
    if value in prompts:
        return prompts[value]
    if value in INPUT_TYPES:
        # A model that was trained without prompts treats queries and documents alike.
        return prompts.get(INPUT_TYPES[value], "")
    supported = list(dict.fromkeys([*INPUT_TYPES, *prompts]))
    raise InvalidRequestError(
        f"Invalid value for '{name}' = {_shown(value)}. Supported values: {supported}.", param=name
    )


def _truncate(value: Any) -> Truncate:
    if value is None or value is False:
        return Truncate.NONE
    if value is True:
        return Truncate.END
    if isinstance(value, str) and value.isascii() and value.upper() in Truncate.__members__:
        return Truncate[value.upper()]
    raise InvalidRequestError(
        f"Invalid value for 'truncate' = {_shown(value)}. Supported values: {[*Truncate.__members__]}, true and false.",
        param="truncate",
    )


def _outputs(value: Any, model: ServedModel) -> Sequence[str]:
    if value is None:
        return ("dense",)
    # Its length first: whatever looks at each of a million values in turn holds up all other requests.
    named = isinstance(value, list) and 0 < len(value) <= len(model.outputs)
    if not named or not all(value.count(output) == 1 and output in model.outputs for output in value):
        raise InvalidRequestError(
            f"Invalid value for 'outputs' = {_shown(value)}. Supported values for this model: {list(model.outputs)}.",
            param="outputs",
        )
    return [output for output in model.outputs if output in value]


def _wrong_type(name: str, expected: str, value: Any) -> InvalidRequestError:
    return InvalidRequestError(
        f"Invalid type for '{name}': expected {expected}, but got {_kind(value)} instead.", param=name
    )


def _kind(value: Any) -> str:
    names = {bool: "a boolean", int: "an integer", float: "a number", str: "a string", list: "an array"}
    return "null" if value is None else names.get(type(value), "an object")


def _shown(value: Any, length: int = 64) -> str:
    """A value as an error message repeats it: strings bare, as OpenAI does, and nothing at full length."""
    try:
        text = value if isinstance(value, str) else orjson.dumps(value).decode()
    except orjson.JSONEncodeError:  # it reads what is nested deeper than it writes
        text = _kind(value)
    return text if len(text) <= length else text[:length] + "…"

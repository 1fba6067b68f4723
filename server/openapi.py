"""The document at /openapi.json: what is served, with the limits in force and the models that are there."""

from typing import Any

from embedserve.server.arrays import OUTPUTS
from embedserve.server.config import ServerConfig
from embedserve.server.schemas import ENCODING_FORMATS, INPUT_TYPES, MAX_TOKEN_ID
from embedserve.server.served import ServedModels

__all__ = ["EMBEDDINGS_PATHS", "PREFIXES", "openapi_document"]

PREFIXES = ("/v1", "/api/v1")
EMBEDDINGS_PATHS = (*(f"{prefix}/embeddings" for prefix in PREFIXES), "/embeddings")

Schema = dict[str, Any]


def openapi_document(config: ServerConfig, models: ServedModels) -> Schema:
    """OpenAPI 3.1."""
    paths: dict[str, Any] = {path: {"post": _embeddings(config)} for path in EMBEDDINGS_PATHS}
    for prefix in PREFIXES:
        paths[f"{prefix}/models"] = {"get": _get("The models, in OpenAI's shape.", "ModelList", config)}
        paths[f"{prefix}/models/{{id}}"] = {"get": _model(config)}
        paths[f"{prefix}/embedding-models"] = {
            "get": _get("The models, and what there is to know of each.", "EmbeddingModelList", config)
        }
    paths["/health"] = {"get": _operation("The process is alive.", {"200": _json("Alive.", {"type": "object"})})}
    paths["/ready"] = {
        "get": _operation("Every model can be used.", {"200": _json("Ready.", {"type": "object"}), **_errors(503)})
    }
    paths["/metrics"] = {
        "get": _operation(
            "Counters and durations, in Prometheus' format.",
            {"200": {"description": "The metrics.", "content": {"text/plain": {}}}, **_errors(503)},
        )
    }
    paths["/openapi.json"] = {"get": _operation("This document.", {"200": _json("OpenAPI.", {"type": "object"})})}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "embedserve",
            "version": "1",
            "description": "Embeddings of open models, in the shape of OpenAI's API.",
        },
        "paths": paths,
        "components": {
            "schemas": _schemas(config, models),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _operation(summary: str, responses: Schema, **more: Any) -> Schema:
    return {"summary": summary, "responses": responses, **more}


def _security(config: ServerConfig) -> Schema:
    return {"security": [{"bearer": []}, {"x-api-key": []}]} if config.keys else {}


def _get(summary: str, schema: str, config: ServerConfig) -> Schema:
    responses = {"200": _json("The list.", _ref(schema))}
    if config.closed_discovery:
        return _operation(summary, {**responses, **_errors(401)}, **_security(config))
    return _operation(summary, responses)


def _model(config: ServerConfig) -> Schema:
    operation = _get("One model. Its id may hold slashes.", "Model", config)
    name = {"type": "string", "minLength": 1}
    operation["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": name}]
    operation["responses"] |= _errors(404)
    return operation


def _embeddings(config: ServerConfig) -> Schema:
    return _operation(
        "Embed texts.",
        {
            "200": {
                **_json("One vector for each input, in order.", _ref("EmbeddingResponse")),
                "headers": {
                    "x-truncated-inputs": {
                        "description": "How many inputs were cut; absent where none was.",
                        "schema": {"type": "integer"},
                    }
                },
            },
            **_errors(400, 401, 404, 413, 415, 429, 500, 502, 503),
        },
        requestBody={"required": True, "content": {"application/json": {"schema": _ref("EmbeddingRequest")}}},
        **_security(config),
    )


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(description: str, schema: Schema) -> Schema:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


_MEANINGS = {
    400: "The request is not valid; `param` names the field.",
    401: "No key, or a wrong one.",
    404: "No such model.",
    413: "The body is too large.",
    415: "The body is packed with something other than gzip.",
    429: "Too many requests; `retry-after` tells when.",
    500: "Our own fault.",
    502: "The upstream of a relayed model gave no answer that can be used.",
    503: "Not now: the queue is full, a model is loading, an engine restarts, the upstream of a relayed model is away; "
    "`retry-after` tells when.",
}


def _errors(*statuses: int) -> Schema:
    return {str(status): _json(_MEANINGS[status], _ref("Error")) for status in statuses}


def _object(properties: Schema, required: list[str] | None = None) -> Schema:
    return {"type": "object", "properties": properties, "required": required or list(properties)}


def _optional(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _schemas(config: ServerConfig, models: ServedModels) -> Schema:
    string, integer, number = {"type": "string"}, {"type": "integer"}, {"type": "number"}
    text = {"type": "string", "minLength": 1}
    tokens = {
        "type": "array",
        "items": {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID},
        "minItems": 1,
    }
    objects = [
        {"type": "object", "properties": {name: text}, "required": [name], "additionalProperties": False}
        for name in ("text", "image", "bytes")
    ]

    def many(items: Schema) -> Schema:
        return {"type": "array", "items": items, "minItems": 1, "maxItems": config.max_inputs}

    floats = {"type": "array", "items": number}
    model = {"id": string, "object": {"const": "model"}, "created": integer, "owned_by": string}
    nullable_string = _optional(string)
    return {
        "EmbeddingRequest": _object(
            {
                "model": {
                    "type": "string",
                    "description": "An id, its last part, or an alias, in any case.",
                    "examples": [model.name for model in models],
                },
                "input": {
                    "description": f"At most {config.max_request_tokens} tokens in all. Integers are token ids: of "
                    "cl100k, or of the model where the operator says so. Images, base64 or data URIs, are for the "
                    "models that take them.",
                    "anyOf": [text, tokens, *(many(item) for item in (text, tokens, {"anyOf": [text, *objects]}))],
                },
                "encoding_format": _optional({"enum": list(ENCODING_FORMATS)}),
                "dimensions": _optional({"type": "integer", "minimum": 1}),
                "user": nullable_string,
                "input_type": {
                    **nullable_string,
                    "description": f"Chooses the model's prompt: {', '.join(INPUT_TYPES)}, or the name of one.",
                },
                "task": {**nullable_string, "description": "Another name for `input_type`."},
                "prompt_name": {**nullable_string, "description": "Another name for `input_type`."},
                "prompt": {**nullable_string, "description": "Is put before each text."},
                "instruction": {**nullable_string, "description": "Fills the model's own template, where it has one."},
                "outputs": _optional(
                    {
                        "description": "What each input is answered with, of what the model has; by default dense.",
                        "type": "array",
                        "items": {"enum": list(OUTPUTS)},
                        "minItems": 1,
                        "uniqueItems": True,
                    }
                ),
                "truncate": _optional(
                    {
                        "description": "What to do with a text that is too long; NONE refuses it, true is END.",
                        "anyOf": [{"enum": ["NONE", "START", "END"]}, {"type": "boolean"}],
                    }
                ),
            },
            ["model", "input"],
        ),
        "EmbeddingResponse": _object(
            {
                "object": {"const": "list"},
                "data": {
                    "type": "array",
                    "items": _object(
                        {
                            "object": {"const": "embedding"},
                            "index": integer,
                            "embedding": {
                                "description": "Floats, or base64 of little-endian float32.",
                                "anyOf": [floats, string],
                            },
                            "sparse_embedding": {
                                "description": "Weights of token ids; an id that is not there has none.",
                                **_object({"indices": {"type": "array", "items": integer}, "values": floats}),
                            },
                            "colbert_embedding": {
                                "description": "A vector for each token but the first.",
                                "anyOf": [
                                    {"type": "array", "items": floats},
                                    _object({"shape": {"type": "array", "items": integer}, "data": string}),
                                ],
                            },
                        },
                        ["object", "index"],
                    ),
                },
                "model": string,
                "usage": _object({"prompt_tokens": integer, "total_tokens": integer}),
            }
        ),
        "Model": _object({**model, "alias_of": string}, list(model)),
        "ModelList": _object({"object": {"const": "list"}, "data": {"type": "array", "items": _ref("Model")}}),
        "EmbeddingModel": _object(
            {
                **model,
                "name": string,
                "description": string,
                "dimensions": integer,
                "max_dimensions": integer,
                "supports_dimensions": {"type": "boolean"},
                "matryoshka": {"type": ["object", "null"]},
                "max_tokens": integer,
                "pricing": _object({"per_million_tokens": number, "currency": string}),
                "modalities": {"type": "array", "items": string},
                "outputs": {"type": "array", "items": string},
                "languages": {"type": "array", "items": string},
                "prompts": {"type": "object", "additionalProperties": string},
                "instruction": nullable_string,
                "licence": nullable_string,
                "unverified": nullable_string,
                "backends": {"type": "array", "items": string},
                "dtype": nullable_string,
                "backend": nullable_string,
                "device": nullable_string,
                "loaded": {"type": "boolean"},
                "alias_of": nullable_string,
            }
        ),
        "EmbeddingModelList": _object(
            {"object": {"const": "list"}, "data": {"type": "array", "items": _ref("EmbeddingModel")}}
        ),
        "Error": _object(
            {"error": _object({"message": string, "type": string, "param": nullable_string, "code": nullable_string})}
        ),
    }

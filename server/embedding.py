"""From a request that holds together to its arrays: prompts, tokens, pixels, and what runs them."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from embedserve.server.arrays import OUTPUTS, Rows, join
from embedserve.server.client import EngineClient, Images, NotFiniteError, Result, RunError, Texts
from embedserve.server.config import ServerConfig
from embedserve.server.errors import InternalError, InvalidRequestError, request_too_long, text_too_long
from embedserve.server.exchange import Exchange
from embedserve.server.images import MAX_REQUEST_IMAGES, ImagePool, InvalidImageError
from embedserve.server.schemas import EmbeddingRequest
from embedserve.server.served import LocalModel, RelayedModel
from embedserve.server.token_arrays import TokenArrayError, Vocabulary
from embedserve.server.tokenizer import (
    Encoded,
    InvalidTextError,
    RequestTooLongError,
    TextTooLongError,
    TokenizerPool,
    Truncate,
)

if TYPE_CHECKING:
    from embedserve.server.relay import Relay

__all__ = ["MAX_COLBERT_TOKENS", "Embedder"]

MAX_COLBERT_TOKENS = 16_384
"""Tokens of a request that asks for a vector a token: 64 MiB of floats at 1024 components, 170 as JSON."""


class Embedder:
    """Embeds what requests hold, through our engines or a model's upstream."""

    def __init__(
        self,
        config: ServerConfig,
        engine: EngineClient,
        tokenizers: TokenizerPool,
        images: ImagePool,
        vocabulary: Vocabulary,
        relay: "Relay | None" = None,
    ) -> None:
        """`relay`: needed where some of the models are relayed."""
        self._config = config
        self._engine = engine
        self._tokenizers = tokenizers
        self._images = images
        self._vocabulary = vocabulary
        self._relay = relay

    async def embed(self, wanted: EmbeddingRequest, exchange: Exchange) -> Mapping[str, Rows]:
        """The arrays of the outputs asked for, a row for each input; what is learnt on the way goes into the exchange.

        Raises `APIError`. When the caller is cancelled, what has not run yet does not.
        """
        if isinstance(wanted.model, RelayedModel):
            return await self._relayed(wanted, wanted.model, exchange)
        assert isinstance(wanted.model, LocalModel)
        images = len(wanted.inputs.images)
        if images > MAX_REQUEST_IMAGES:
            raise InvalidRequestError(
                f"Invalid 'input': it holds {images} images; at most {MAX_REQUEST_IMAGES} are taken in one request. "
                "Send them in several.",
                param="input",
            )
        with self._images.room(images):
            return await self._computed(wanted, wanted.model, exchange)

    # ------------------------------------------------------------------------------------------------- our engines

    async def _computed(self, wanted: EmbeddingRequest, model: LocalModel, exchange: Exchange) -> Mapping[str, Rows]:
        inputs = wanted.inputs
        start = time.perf_counter()
        exchange.texts = len(inputs)
        texts, images = None, None
        if inputs.texts or inputs.token_arrays:
            encoded = await self._tokenize(wanted, model)
            texts = Texts(encoded.ids, encoded.lengths)
            exchange.tokens, exchange.truncated = len(encoded.ids), encoded.truncated
        if "colbert" in wanted.outputs and exchange.tokens > MAX_COLBERT_TOKENS:
            raise request_too_long(exchange.tokens, MAX_COLBERT_TOKENS)
        if inputs.images:
            images = await self._prepare(wanted, model, exchange)
        exchange.tokenize = time.perf_counter() - start

        if images is None:
            assert texts is not None, "a request has inputs"
            result = await self._run(wanted, texts, inputs.text_positions, exchange)
        elif texts is None:
            result = await self._run(wanted, images, inputs.image_positions, exchange)
        else:
            result = await self._run_both(wanted, texts, images, exchange)
        exchange.queue, exchange.run = result.queue, result.run
        return result.arrays

    async def _tokenize(self, wanted: EmbeddingRequest, model: LocalModel) -> Encoded:
        if wanted.inputs.token_arrays and model.settings.token_ids == "native":
            return _native_tokens(wanted, model)
        texts = await self._texts(wanted)
        # Errors count from the first text; images may stand between.
        positions = wanted.inputs.text_positions or range(len(texts))
        limit = self._config.max_request_tokens
        try:
            return await self._tokenizers.encode(model.tokenizer, texts, wanted.truncate, limit)
        except InvalidTextError as error:
            message = f"Invalid 'input[{positions[error.index]}]': it cannot be tokenised: {error.reason}."
            raise InvalidRequestError(message, param="input") from None
        except TextTooLongError as error:
            raise text_too_long(positions[error.index], error.tokens, error.limit) from None
        except RequestTooLongError as error:
            raise request_too_long(error.tokens, error.limit) from None

    async def _texts(self, wanted: EmbeddingRequest) -> Sequence[str]:
        """The texts of a request, its prompt before each."""
        texts = wanted.inputs.texts
        if wanted.inputs.token_arrays:
            try:
                texts = await self._vocabulary.decode(wanted.inputs.token_arrays)
            except TokenArrayError as error:
                raise InvalidRequestError(str(error), param="input") from None
        return [wanted.prompt + text for text in texts] if wanted.prompt else texts

    async def _prepare(self, wanted: EmbeddingRequest, model: LocalModel, exchange: Exchange) -> Images:
        settings = model.images
        assert settings is not None, "else the request had been refused"
        inputs = wanted.inputs
        exchange.tokens += len(inputs.images) * settings.tokens
        if exchange.tokens > self._config.max_request_tokens:
            raise request_too_long(exchange.tokens, self._config.max_request_tokens)
        try:
            pixels = await self._images.prepare(inputs.images, settings.size)
        except InvalidImageError as error:
            place = inputs.image_positions[error.index]
            raise InvalidRequestError(f"Invalid 'input[{place}]': {error.reason}", param="input") from None
        return Images(pixels, settings.tokens)

    async def _run(
        self, wanted: EmbeddingRequest, items: Texts | Images, positions: Sequence[int], exchange: Exchange
    ) -> Result:
        """Run items that stand at these positions among the inputs; without positions, they are all of them."""
        try:
            return await self._engine.run(wanted.model.id, items, dimensions=wanted.dimensions, outputs=wanted.outputs)
        except NotFiniteError as error:
            index = positions[error.index] if positions else error.index
            raise InternalError(exchange.id, f"The model gave no finite vector for input[{index}].") from None
        except RunError:
            raise InternalError(exchange.id) from None

    async def _run_both(self, wanted: EmbeddingRequest, texts: Texts, images: Images, exchange: Exchange) -> Result:
        """Texts and images run in batches apart, at the same time, and come back as one."""
        inputs = wanted.inputs
        runs = [
            asyncio.ensure_future(self._run(wanted, texts, inputs.text_positions, exchange)),
            asyncio.ensure_future(self._run(wanted, images, inputs.image_positions, exchange)),
        ]
        try:
            results = await asyncio.gather(*runs)
        finally:
            for run in runs:
                run.cancel()
        parts = [
            (np.array(positions, dtype=np.int32), result.arrays)
            for positions, result in zip((inputs.text_positions, inputs.image_positions), results, strict=True)
        ]
        names = [name for output in wanted.outputs for name in OUTPUTS[output]]
        queue = min(result.queue for result in results)
        return Result(
            {name: join(name, len(inputs), parts) for name in names},
            queue=queue,
            run=max(result.queue + result.run for result in results) - queue,
        )

    # --------------------------------------------------------------------------------------------------- upstreams

    async def _relayed(self, wanted: EmbeddingRequest, model: RelayedModel, exchange: Exchange) -> Mapping[str, Rows]:
        assert self._relay is not None
        if wanted.truncate is not Truncate.NONE:
            raise InvalidRequestError(
                "Invalid value for 'truncate': the inputs of a relayed model cannot be cut here. Send shorter ones.",
                param="truncate",
            )
        start = time.perf_counter()
        inputs: Sequence[str] | Sequence[Sequence[int]]
        if wanted.inputs.token_arrays and model.settings.token_ids == "native":
            inputs = _whole_token_arrays(wanted, model.upstream.max_tokens)
        else:
            inputs = await self._texts(wanted)
        exchange.tokenize = time.perf_counter() - start
        start = time.perf_counter()
        relayed = await self._relay.embed(model, inputs, wanted.dimensions)
        exchange.texts, exchange.tokens, exchange.run = len(inputs), relayed.tokens, time.perf_counter() - start
        counts = np.full(len(inputs), wanted.dimensions, dtype=np.int32)
        return {"dense": Rows.of_matrix(relayed.vectors, counts)}


def _native_tokens(wanted: EmbeddingRequest, model: LocalModel) -> Encoded:
    """Token arrays that are the model's own ids, special tokens and all, taken as they stand."""
    arrays = _whole_token_arrays(wanted, model.config.max_tokens)
    for index, tokens in enumerate(arrays):
        if max(tokens) >= model.config.vocab_size:
            raise InvalidRequestError(
                f"Invalid 'input[{index}]': {max(tokens)} is no token id of this model, which has "
                f"{model.config.vocab_size}.",
                param="input",
            )
    lengths = np.array([len(tokens) for tokens in arrays], dtype=np.int32)
    return Encoded(np.concatenate([np.array(t, dtype=np.int32) for t in arrays]), lengths, 0)


def _whole_token_arrays(wanted: EmbeddingRequest, limit: int) -> Sequence[Sequence[int]]:
    """The token arrays of a request, where none has more than `limit` and no prompt should go before them."""
    if wanted.prompt:
        raise InvalidRequestError("A prompt cannot be put before token arrays. Send texts instead.", param="input")
    for index, tokens in enumerate(wanted.inputs.token_arrays):
        if len(tokens) > limit:
            raise text_too_long(index, len(tokens), limit)
    return wanted.inputs.token_arrays

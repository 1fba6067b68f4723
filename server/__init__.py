"""The server: from an HTTP request to vectors and back.

The way of a request:

    front_end.py    a process with uvicorn; several may share the port
      protocol.py   HTTP/1.1 on a connection
      app.py        routes and errors put together
      exchange.py   the request's id, body (gunzip.py), headers, log line
      routes.py     the endpoints: parse → embed → encode
        auth.py, limits.py      who may call, and how often
        schemas.py              JSON → request, or an error that names the field
        served.py               the model it names
      embedding.py  a request → its arrays
        token_arrays.py         cl100k ids → text
        tokenizer.py            text → token ids (text_prefix.py: of as much of it as counts)
        images.py               base64 → pixels (image_files.py: files without their metadata)
      client.py     what it calls to have them run
        wire.py, arrays.py      frames between the processes, and the arrays in them
      relay.py      what it calls where the model runs elsewhere (upstreams.py)
    broker.py       the process with the queue, the limits and the counters
      digests.py    which texts are the same
      cache.py      results of those that came before
      batcher.py    the queue's rules
      metrics.py    the counters
    engine.py       a process for each device: pulls batches
      schedule.py   which of its teams runs a batch, and when the next one is pulled
      teams.py      the threads that run them; on a CPU, how many teams are best
      runner.py     a model on the device: token ids or pixels → vectors
        device.py   which device and dtype
        staging.py  arrays to the device and back, two batches under way
        graphs.py   CUDA graphs of small batches
        precision.py            what bfloat16 and int8 cost and gain on a CPU
        memory.py   the C library keeps what batches free, on a CPU
        bounds.py   how many tokens a batch may have
      threads.py    the CPU's threads
    client.py, encode.py        arrays → response

Around them: cli.py and config.py (tables.py, parsers.py) read the settings, supervisor.py starts and watches the
processes, process.py is what those have in common, errors.py is the tree of errors, openapi.py describes the API,
log.py writes the lines. Beside the server: model_list.py is `embedserve models`, selftest.py `embedserve selftest`.
"""

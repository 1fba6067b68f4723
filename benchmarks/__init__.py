"""Questions with numbers as answers: the tool behind `embedserve bench`, and the scripts of this project's own figures.

Shared by all of them:

    machine.py     what figures depend on: processor, accelerator, versions, who else was at work
    jsonl.py       JSON lines, appended as soon as they are whole; medians with their spread
    texts.py       texts of random words, of the list words.txt
    progress.py    how far a measurement is, on standard error
    shapes.py      checkpoints of known models' shapes with random weights, and the arithmetic of a token

`embedserve bench`, whose options are in bench.py:

    engine.py      bench engine: length × batch in process, and the share of the device's matrix rate
    against.py     bench engine --against: real texts, in turns with sentence-transformers
    http.py        bench http: servers with OpenAI's API, in turns
    rounds.py      the turns, and the figures of them
    parties.py     who takes a turn: what is asked of each, and the side that is a server
    load.py        the client: closed and open loops
    stub.py        a server that costs nothing, which shows what the client costs
    report.py      bench report: a page of plots and tables

Scripts, one question each, which append to results/ (see the Makefile):

    peers.py       rates and latencies over HTTP, against Infinity and sentence-transformers, started and ended here
    host.py        the CPU that a request costs each process of the server
    loading.py     host memory while a model is loaded
    kernels.py     each operation of kernels/, and its share of the limit of memory or arithmetic
    backends.py    backends and dtypes of the CPU, in turns
    figures.py     the tables of README.md and docs/, from results/
"""

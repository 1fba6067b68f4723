"""Questions with numbers as answers: the tool behind `embedserve bench`, and the scripts of this project's own figures.

Shared by all of them:

    machine.py     what figures depend on: processor, accelerator, versions, who else was at work
    jsonl.py       JSON lines, appended as soon as they are whole; medians with their spread
    texts.py       texts of random words

Scripts, one question each, which append to results/:

    engine.py      tokens a second in process, against sentence-transformers
    http_load.py   rates and latencies over HTTP, against Infinity and sentence-transformers (load.py: its client)
    loading.py     host memory while a model is loaded
    figures.py     the tables of README.md and docs/benchmarks.md, from results/
"""

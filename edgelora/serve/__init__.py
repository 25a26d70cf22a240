"""The HTTP server: an app in front, and the engine in a process of its own behind it.

    settings.py   what a server is started with
    protocol.py   what the two processes say to each other
    worker.py     the process that owns the engine
    process.py    starts it, talks to it, and starts it again when it dies
    registry.py   which adapters there are: the folder, what was loaded by hand, what was refused, what is quarantined
    keys.py       who may ask, and for which adapters; limits.py: how much
    usage.py      what was used, across restarts
    bodies.py     OpenAI's request bodies, read as the engine's requests; fields.py has the checks
    replies.py    completions, in OpenAI's shapes
    problems.py   errors, in OpenAI's shape
    metrics.py    what /metrics tells
    server.py     what the routes share
    answering.py  from what was asked to the answer
    app.py        the routes; document.py what /openapi.json says of them
    running.py    the whole server: sockets, signals, the end
    page/         the web page at /

Only this package imports FastAPI, and only `worker.py` the engine. Everything that a client sends is bounded before it
is read, and nothing of it reaches llama.cpp unchecked.
"""

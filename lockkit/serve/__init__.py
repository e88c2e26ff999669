"""An OpenAI-compatible server for an export.

    HTTP -> server.py -> guard.py -> app.py -> engine.py -> rows.py -> onnxruntime

`config.py` holds every setting; `server.py` the process, its socket and slow clients; `guard.py`
what is checked before a request is looked at; `app.py` the endpoints; `protocol.py` their JSON;
`model.py` the export and its tokenizer; `engine.py` continuous batching; `rows.py` the graph with
one cache for all requests; `text.py` tokens to text; `metrics.py` what Prometheus reads.
"""

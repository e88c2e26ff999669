"""An OpenAI-compatible server for an export.

A request passes through these modules:

    HTTP -> server.py -> guard.py -> app.py -> service.py -> engine.py -> batch.py -> onnxruntime

* `config.py`: all settings.
* `server.py`: the process, its socket, and limits on slow clients.
* `guard.py`: checks that come before any endpoint.
* `app.py`: the endpoints. `protocol.py` and `answers.py` have their JSON, `logprobs.py` a
  part of it, `parse.py` reads it, `stream.py` writes server-sent events.
* `service.py`: a request becomes jobs of the engine, and their text becomes the answer.
* `model.py`: the export and its tokenizer.
* `engine.py`: continuous batching. `lockkit/text_stream.py` turns tokens into text.
* `batch.py`: the graph, with one KV cache for all requests.
* `prometheus.py`: metrics for Prometheus.
"""

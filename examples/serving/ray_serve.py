"""`lockkit serve` on Ray Serve: replicas of the server on one or more machines, behind one address.

    pip install 'ray[serve]'
    serve run examples.serving.ray_serve:app export=/models/locked-onnx name=locked

Each replica is a complete server, with its own batching, limits, API key and metrics. Ray distributes the requests
and starts more replicas when requests wait. To run replicas in the container of `Dockerfile`, add `ray[serve]` of the
cluster's version to the image, and set `runtime_env={"image_uri": ...}` below.
"""

from __future__ import annotations

from pathlib import Path

from ray import serve

from lockkit import ServeConfig
from lockkit.serve.server import open_app

RUNNING = 16  # requests that a replica runs at the same time
WAITING = 64  # requests that wait in a replica


def app(arguments: dict[str, str]) -> serve.Application:
    """The application that `serve run` deploys.

    Args:
        arguments: `export`, a folder that exists on every machine, and `name`, the model's name in requests.
    """
    config = ServeConfig(name=arguments.get("name"), max_batch=RUNNING, max_queue=WAITING)

    @serve.deployment(
        max_ongoing_requests=RUNNING + WAITING,
        autoscaling_config={"min_replicas": 1, "max_replicas": 8, "target_ongoing_requests": RUNNING},
        ray_actor_options={"num_cpus": 2, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "2"}}},
        graceful_shutdown_timeout_s=config.shutdown_seconds,
    )
    @serve.ingress(lambda: open_app(Path(arguments["export"]), config))
    class Server:
        """The ASGI application of `lockkit serve`, created in the process of the replica."""

    return Server.bind()

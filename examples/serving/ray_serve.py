"""`lockkit serve` on Ray Serve: replicas of the server, one on each machine or several, behind one address.

    pip install 'ray[serve]'
    serve run examples.serving.ray_serve:app export=/models/locked-onnx name=locked

Every replica is the whole server (batching, limits, key, metrics); Ray spreads the requests and
starts more replicas as they queue up. To run replicas in the container of `Dockerfile`, build it
with `ray[serve]` of the cluster's version and give `runtime_env={"image_uri": ...}` below.
"""

from __future__ import annotations

from pathlib import Path

from ray import serve

from lockkit import ServeConfig
from lockkit.serve.server import open_app

RUNNING = 16  # requests a replica generates for at the same time
WAITING = 64


def app(arguments: dict[str, str]) -> serve.Application:
    """What `serve run` deploys.

    Args:
        arguments: `export`, the folder on every machine, and `name`, the model's name in requests.
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
        """The ASGI application of `lockkit serve`, opened in the replica's own process."""

    return Server.bind()

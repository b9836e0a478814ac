"""All uses of private parts of Ray, each with the reason and the condition under which it can be removed."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import ray
import ray.exceptions
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.experimental import internal_kv

from pipeline.engine.errors import EngineError


@contextlib.contextmanager
def loopback_only() -> Iterator[None]:
    """Makes the servers of a Ray that is started inside listen on 127.0.0.1 only, instead of on all interfaces.

    Ray has one switch for this, meant for macOS and Windows and read when ray is imported. The constant works for this
    process, the variable for the processes that it starts. It can go when `ray.init` takes an address to listen on.
    """
    variable = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    before, constants = os.environ.get(variable), ray._private.ray_constants
    clusters = constants.ENABLE_RAY_CLUSTER
    os.environ[variable], constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = clusters
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


@contextlib.contextmanager
def without_token_hint() -> Iterator[None]:
    """Suppresses Ray's hint that a local cluster needs a token, because only alfa uses that cluster, and has the token.

    RAY_AUTH_MODE=token would do so too, but Ray reads it at import, and it would also apply to clusters that are
    joined. It can go when Ray logs the hint at level INFO.
    """
    logger = logging.getLogger("ray._private.authentication.authentication_token_setup")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def own_sigterm() -> Iterator[None]:
    """Keeps this process's SIGTERM handler, which `ray.init` replaces by one that prints a stack trace and exits.

    With Ray's handler, a job that is stopped could not record that it was interrupted. It can go when `ray.init` leaves
    handlers alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None:  # None: the handler was not set from Python
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def without_prints() -> Iterator[None]:
    """Keeps Ray from printing to stdout, past all logging, that a worker has died or a task is retried.

    ScoringPool and obtain_prompts log what matters, and Ray's own log files have all of it. `log_to_driver` does not
    cover these lines. It can go when Ray logs them.
    """
    worker = ray._private.worker
    before = worker._worker_logs_enabled
    worker._worker_logs_enabled = False
    try:
        yield
    finally:
        worker._worker_logs_enabled = before


def head_answers(timeout_s: float) -> bool:
    """Whether the head of the connected cluster answers in time.

    Raises EngineError if another one answers, as after a restart without Redis: the cluster of this job is gone. Ask it
    before each call that needs the head: if the head is silent, those calls ignore signals until Ray ends the process,
    and if another head answers, `ray.nodes` aborts it. It can go when Ray's public calls take a time limit and raise.
    """
    if ray.util.client.ray.is_connected():  # type: ignore[no-untyped-call]
        return True  # calls through Ray's client raise errors of their own
    try:
        internal_kv.internal_kv_get_gcs_client().check_alive([], timeout_s)  # type: ignore[no-untyped-call]
    except ray.exceptions.AuthenticationError:
        raise EngineError("the head of the Ray cluster was started again, and has lost this job") from None
    except ray.exceptions.RpcError:
        return False
    return True


def head_patience_s() -> float:
    """Returns the seconds for which Ray waits for a silent head before it ends the process.

    Ray reads the variable itself; its documentation names it, but no public call returns the value in force.
    """
    return float(os.environ.get("RAY_gcs_rpc_server_reconnect_timeout_s", 60))  # noqa: SIM112 (Ray's own)


def node_of(actor: Any) -> str | None:
    """Returns the id of the node that Ray has given an actor, also a dead one; None if it had none.

    An actor that dies while it starts has not told it yet, and the error does not say it. Ray's public state API would,
    but it needs the dashboard. It can go when ActorDiedError names the node.
    """
    found: dict[str, Any] = ray._private.state.actors(actor._actor_id.hex())
    return found.get("Address", {}).get("NodeID") or None


def has_autoscaler() -> bool:
    """Whether an autoscaler may add nodes to the connected cluster.

    The first version of the autoscaler writes a status. Clusters without an autoscaler write one too, but with a node
    type for each single node. The second version reports to the head, which counts its reports. It can go when Ray says
    whether a cluster autoscales.
    """
    status = internal_kv._internal_kv_get("__autoscaling_status")
    if status:
        types = json.loads(status).get("autoscaler_report", {}).get("node_type_mapping") or {}
        return any(kind != f"node_{node}" for node, kind in types.items())
    if ray.util.client.ray.is_connected():  # type: ignore[no-untyped-call]
        return False  # the port of the head may be unreachable for a client
    return get_cluster_status(ray.get_runtime_context().gcs_address).stats.autoscaler_version != "0"

"""Private parts of Ray that alfa touches, each with its reason and when it can go. Nothing else touches any."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import threading
from collections.abc import Iterator

import ray
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.experimental import internal_kv


@contextlib.contextmanager
def loopback_only() -> Iterator[None]:
    """Keeps the servers of a Ray that is started inside on 127.0.0.1; else they listen on all interfaces.

    Ray has one switch for it, made for macOS and Windows and read when ray is imported: the constant is for this
    process, the variable for those that it starts. It can go when `ray.init` takes an address to listen on.
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
    """Drops the hint that a local Ray asks for a token: alfa, which alone uses it, has that token.

    RAY_AUTH_MODE=token would do it too, but Ray reads that when it is imported, and it would hold for clusters that
    are joined. It can go when Ray gives the hint at level INFO.
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
    """Keeps this process's handler of SIGTERM, which `ray.init` replaces by one that prints a stack and exits.

    With Ray's, a job that is stopped cannot say that it was interrupted. It can go when `ray.init` leaves handlers
    alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None:  # None: it was not set from Python
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def without_prints() -> Iterator[None]:
    """Keeps Ray from printing to stdout, in colours and past every log: that a worker died, that a task is retried.

    What matters of it is said by ScoringPool and obtain_prompts; all of it is in Ray's own log files. `log_to_driver`
    does not cover it. It can go when Ray logs these lines.
    """
    worker = ray._private.worker
    before = worker._worker_logs_enabled
    worker._worker_logs_enabled = False
    try:
        yield
    finally:
        worker._worker_logs_enabled = before


def has_autoscaler() -> bool:
    """Whether an autoscaler may add nodes to the connected cluster.

    What reports on a cluster without one calls each node a type of its own. The second version of the autoscaler
    reports to the head alone, which counts its reports. It can go when Ray tells whether a cluster autoscales.
    """
    status = internal_kv._internal_kv_get("__autoscaling_status")
    if status:
        types = json.loads(status).get("autoscaler_report", {}).get("node_type_mapping") or {}
        return any(kind != f"node_{node}" for node, kind in types.items())
    if ray.util.client.ray.is_connected():  # type: ignore[no-untyped-call]
        return False  # the head's own port may be out of reach
    return get_cluster_status(ray.get_runtime_context().gcs_address).stats.autoscaler_version != "0"

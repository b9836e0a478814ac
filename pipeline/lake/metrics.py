"""Writes a run's counts in Prometheus' text format, for node-exporter's textfile collector or a Pushgateway."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from schemas.records import RunStats

_STATES = ("running", "done", "failed", "interrupted")


def exposition(stats: RunStats) -> bytes:
    """Renders the stats of a run as metrics. The series stay the same every night; only alfa_run_info names the run."""
    registry = CollectorRegistry()

    def gauge(name: str, doc: str, *labels: str) -> Gauge:
        return Gauge(f"alfa_run_{name}", doc, labels, registry=registry)

    info = gauge("info", "The run; always 1.", "run_id", "run_date", "model")
    info.labels(stats.run_id, str(stats.run_date), stats.model).set(1)
    state = gauge("state", "1 for the state that the run is in.", "state")
    for name in _STATES:
        state.labels(name).set(name == stats.state)
    gauge("images", "Images of the night.").set(stats.images)
    gauge("scored_images", "Images that this job has scored.").set(stats.scored_by_this_job)
    gauge("images_per_second", "Images a second since actors were started.").set(stats.images_per_second)
    rate = gauge("scoring_images_per_second", "Images a second while scoring, without the start of actors.")
    rate.set(stats.rate)
    gauge("total_seconds", "Seconds since this job began.").set(stats.total_seconds or 0.0)
    errors = gauge("errors", "Images without a score, by reason.", "error_type")
    for name, count in stats.errors.items():
        errors.labels(name).set(count)
    anomalous = gauge("anomalous_images", "Images that count as anomalous, by class.", "class_name")
    for name, count in stats.anomalies.items():
        anomalous.labels(name).set(count)
    usage = stats.usage
    gauge("llm_calls", "Calls of the LLM by this job.").set(usage.calls)
    tokens = gauge("llm_tokens", "Tokens that this job has used.", "kind")
    tokens.labels("prompt").set(usage.prompt_tokens)
    tokens.labels("completion").set(usage.completion_tokens)
    for name, moment in (("started", stats.started_at), ("updated", stats.updated_at)):
        if moment is not None:
            gauge(f"{name}_timestamp_seconds", f"When the job was {name}, Unix time.").set(moment.timestamp())
    return generate_latest(registry)

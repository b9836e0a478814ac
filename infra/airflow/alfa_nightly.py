"""Airflow 3: submits the night to a Ray head and follows it. The worker needs `alfa` and RAY_AUTH_TOKEN in its environment.

A retry joins the night's job if it still runs, and resumes it if it died. An invalid job (exit code 2) is not tried
again.

If the bucket has a folder per date (dataset.images: s3://factory/photos/{run_date}), set catchup=True: Airflow then
runs each missed night by itself, one after the other, with its own retries. `alfa backfill` does the same without a
scheduler, so it is not used here. Without a date in the address, each of those nights would score the whole bucket as
it is now, so catchup is off.
"""

from __future__ import annotations

import subprocess
from datetime import datetime, timedelta

from airflow.sdk import dag, task
from airflow.sdk.exceptions import AirflowException, AirflowFailException

JOB = "s3://lake/jobs/nightly.yaml"
HEAD = "http://ray-head:8265"


@dag(
    schedule="30 1 * * *",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
    default_args={"retries": 3, "retry_delay": timedelta(minutes=10)},
)
def alfa_nightly():
    @task(execution_timeout=timedelta(hours=8))
    def score(ds: str | None = None) -> None:
        command = ["alfa", "submit", JOB, "--address", HEAD, "--run-date", ds]
        code = subprocess.run(command).returncode
        if code == 2:
            raise AirflowFailException("the job is not right; the log says what to change")
        if code:
            raise AirflowException(f"alfa ended with exit code {code}; the next try resumes")

    score()


alfa_nightly()

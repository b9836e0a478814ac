"""Airflow 3: submits the night to a Ray head and follows it. The worker needs `alfa` and RAY_AUTH_TOKEN in its environment.

A retry joins the night's job where it still runs, and resumes it where it died. A job that cannot be right (exit code 2) is
not tried again.

Where the bucket is laid out by date (dataset.images: s3://factory/photos/{run_date}), set catchup=True: Airflow then runs
each night that it missed as a run of its own, one after the other, with its own retries. `alfa backfill` does the same for
those who have no scheduler, so it is not used here. Without dates in the address each of those nights would score all that
lies in the bucket now, so catchup stays off.
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

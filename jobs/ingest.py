"""`vsearch ingest` as an entry point for `ray job submit`."""

from vsearch.cli import ingest, run_job

if __name__ == "__main__":
    run_job(ingest)

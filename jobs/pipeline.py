"""`vsearch build` as an entry point for `ray job submit`: ingest, train, index."""

from vsearch.cli import build, run_job

if __name__ == "__main__":
    run_job(build)

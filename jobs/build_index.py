"""`vsearch index` as an entry point for `ray job submit`."""

from vsearch.cli import index, run_job

if __name__ == "__main__":
    run_job(index)

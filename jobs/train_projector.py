"""`vsearch train` as an entry point for `ray job submit`."""

from vsearch.cli import run_job, train

if __name__ == "__main__":
    run_job(train)

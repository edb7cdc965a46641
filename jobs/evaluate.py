"""What `ray job submit -- python jobs/evaluate.py ...` runs: `ml2o evaluate` on the cluster the job is in.

Relative paths are resolved against ML2O_HOME; give it to the job, since Ray runs it in an unpacked copy that is
deleted afterwards.
"""

from ml2o_dist.cli import evaluate

if __name__ == "__main__":
    evaluate()

"""What `ray job submit -- python jobs/meta_train.py ...` runs: `ml2o meta-train` on the cluster the job is in.

Relative paths are resolved against ML2O_HOME; give it to the job, since Ray runs it in an unpacked copy that is
deleted afterwards.
"""

from ml2o_dist.cli import meta_train

if __name__ == "__main__":
    meta_train()

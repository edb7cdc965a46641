"""What `ray job submit -- python jobs/sweep.py ...` runs: `ml2o sweep` on the cluster the job is in.

Relative paths are resolved against ML2O_HOME; give it to the job, since Ray runs it in an unpacked copy that is
deleted afterwards. The run directory must be a folder that all machines of the cluster share.
"""

from ml2o_dist.cli.sweep import sweep

if __name__ == "__main__":
    sweep()

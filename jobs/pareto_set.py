"""What `ray job submit -- python jobs/pareto_set.py ...` runs: `ml2o pareto-set train` on the cluster the job is in.

Relative paths are resolved against ML2O_HOME; give it to the job, since Ray runs it in an unpacked copy that is
deleted afterwards. The run directory must be a folder that all machines of the cluster share.
"""

from ml2o_dist.cli.pareto_set import train

if __name__ == "__main__":
    train()

"""`python -m ml2o_dist` is the console script `ml2o`."""

from ml2o_dist.cli import main

if __name__ == "__main__":
    main()

"""The command line: click, thin; every command is one call into the package."""

from ml2o_dist.cli.commands import evaluate as evaluate
from ml2o_dist.cli.commands import main as main
from ml2o_dist.cli.commands import meta_train as meta_train

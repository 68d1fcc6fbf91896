"""The report of a grid: `python -m ppo_nlu.report DIR [--output DIR]`; see `reproduce.report`."""

import sys

from ppo_nlu.reproduce.report import main
from ppo_nlu.runtime import cli

if __name__ == "__main__":
    sys.exit(cli.run(main))

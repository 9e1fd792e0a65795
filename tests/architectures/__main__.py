"""The table in docs/architectures.md, made by running the sweep.

python -m tests.architectures [NAME ...] [--write]
"""

from __future__ import annotations

import argparse

from .table import run_sweep, table, write
from .tiny import names

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="model types; all by default")
    parser.add_argument("--write", action="store_true", help="write the table into docs/architectures.md")
    arguments = parser.parse_args()
    rows = run_sweep(arguments.names or names(), show=print)
    print(write(rows) if arguments.write else table(rows))

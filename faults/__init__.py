"""The fault suite: what is done to a run, and what must be left of it.

    make faults                                   every case in full, about ten minutes; table in benchmarks/faults.md
    python -m faults kill_in_save --short         one case, in seconds (`make test` runs all of them so)

One file a case, with `def run(short: bool, seed: int) -> Result`; `cases.py` lists them. A case does its damage in
processes that it forks (`processes.py`), draws from its seed alone, and returns a `Result`: a line of the table.
"""

from faults.cases import CASES
from faults.result import Result, table

__all__ = ["CASES", "Result", "table"]

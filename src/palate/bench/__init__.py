"""The benchmark: methods x data sets x conditions x seeds, in parallel, to be stopped and resumed at any moment.

`start` draws every data set and refuses what can be refused, `run` runs the cells that are missing, and `write_pages` makes one
file of rows and the pages of what there is.
"""

from palate.bench.pages import write_pages
from palate.bench.plan import Plan
from palate.bench.protocols import Source, source
from palate.bench.running import estimated, run, start

__all__ = ["Plan", "Source", "estimated", "run", "source", "start", "write_pages"]

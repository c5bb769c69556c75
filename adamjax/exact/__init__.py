"""`exact_rows`: the dense optimizer's result on tables, at the cost of the rows that are read."""

from adamjax.exact.gradient import gradient_of, results_of
from adamjax.exact.stale import StaleTable
from adamjax.exact.state import ExactRowsState
from adamjax.exact.ticket import Ticket
from adamjax.exact.transform import exact_rows

__all__ = [
    "ExactRowsState",
    "StaleTable",
    "Ticket",
    "exact_rows",
    "gradient_of",
    "results_of",
]

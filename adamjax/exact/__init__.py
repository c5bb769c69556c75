"""The package of `exact_rows`, and what it exports."""

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

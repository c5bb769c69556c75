"""`exact_rows`: tables whose steps cost what their touched rows cost, and are exact."""

from adamjax.exact.gradient import gradient_of, results_of
from adamjax.exact.stale import StaleTable
from adamjax.exact.state import ExactRowsState, TableState
from adamjax.exact.ticket import Ticket
from adamjax.exact.transform import exact_rows

__all__ = [
    "ExactRowsState",
    "StaleTable",
    "TableState",
    "Ticket",
    "exact_rows",
    "gradient_of",
    "results_of",
]

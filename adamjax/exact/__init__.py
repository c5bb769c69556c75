"""`exact_rows`: tables whose steps cost what their touched rows cost, and are exact."""

from adamjax.exact.state import ExactRowsState, StaleTable, TableState, Ticket
from adamjax.exact.transform import exact_rows, gradient_of

__all__ = ["ExactRowsState", "StaleTable", "TableState", "Ticket", "exact_rows", "gradient_of"]

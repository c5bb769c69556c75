"""The finished cells of a run, each a line of JSON, from which the next run continues.

A cell is a training run, or a measurement of `divergence`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.train.options import UserError

# Of a cell: ("search" or "test", model, contender, rate, seed), or ("divergence", b2).
Key = tuple[Any, ...]


class Journal:
    """The finished cells in a file.

    The first line has the settings of the run: data, sizes and versions. A file with other settings
    is refused.

    Args:
      path: the file; it is created if it does not exist.
      about: the settings of the run, as types of JSON.

    Raises:
      UserError: the file has other settings.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path, self.cells = path, dict[Key, dict[str, Any]]()
        about = json.loads(json.dumps(about))
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text() if path.exists() else ""
        # The last line is incomplete if the run was interrupted while it wrote that line.
        complete, _, incomplete = text.rpartition("\n")
        if incomplete:
            path.write_text(complete + "\n" if complete else "")
        lines = [json.loads(line) for line in complete.splitlines()]
        if not lines:
            self._write({"about": about})
            return
        if lines[0] != {"about": about}:
            found = lines[0].get("about", {})
            names = ", ".join(n for n in {**about, **found} if about.get(n) != found.get(n))
            raise UserError(
                f"{path} is of another run (it differs in: {names or 'its first line'}): delete "
                "it, or name another file with --journal"
            )
        for line in lines[1:]:
            self.cells[tuple(line["cell"])] = line["result"]

    def add(self, key: Key, result: dict[str, Any]) -> None:
        """Writes a finished cell to the file."""
        self.cells[key] = result
        self._write({"cell": key, "result": result})

    def _write(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

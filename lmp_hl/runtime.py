"""The compiled stages of an `hl.pt2`: what they were built for, whether that is here, how to run.

An `hl.pt2` is an archive of AOTInductor models, one per stage, named as in `stage_names`, beside
two records: `extra/hl.pt`, the same model as TorchScript, which says everything about itself, and
`extra/lmp_hl_build.txt`, what the compiled code needs, in lines `key value`.
"""

import dataclasses
import platform
import re
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from .stages import Runtime

BUILD_RECORD: Final = "extra/lmp_hl_build.txt"
TORCHSCRIPT_RECORD: Final = "extra/hl.pt"
BUILD_FORMAT: Final = "4"

# flags of /proc/cpuinfo behind the names of the x86-64 psABI, which are also those of g++ -march
_V2 = ("cx16", "lahf_lm", "pni", "popcnt", "sse4_1", "sse4_2", "ssse3")
_V3 = (*_V2, "abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe")
_V4 = (*_V3, "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl")
CPU_LEVELS: Final = {"x86-64-v2": _V2, "x86-64-v3": _V3, "x86-64-v4": _V4}
# flags for which g++ -march=native emits instructions of its own accord
_NATIVE = re.compile(r"(avx|amx|bmi|fma|f16c|gfni|sse4_|xop).*|abm|cx16|movbe|pni|popcnt|ssse3")


def stage_names(num_layers: int) -> list[str]:
    """Names of the compiled models, in the order of evaluation."""
    layers = [name for t in range(num_layers - 1) for name in (f"layer{t}", f"layer{t}_vjp")]
    return [*layers, "final", "final_fields"]


def _cpuinfo(key: str) -> str:
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.is_file() else ""
    found = re.search(rf"^{key}\s*: *(.*)$", text, re.MULTILINE)
    return found[1] if found else ""


def cpu_flags() -> set[str]:
    """Features of this x86 CPU, as /proc/cpuinfo names them; empty elsewhere."""
    return set(_cpuinfo("flags").split())


def native_features() -> tuple[str, ...]:
    """What a compiler may use that builds for this CPU."""
    return tuple(sorted(flag for flag in cpu_flags() if _NATIVE.fullmatch(flag)))


@dataclasses.dataclass(frozen=True)
class Build:
    """What compiled code was made by and for."""

    torch: str
    device: str
    """"cpu" or "cuda"."""
    device_name: str
    cpu_features: tuple[str, ...]
    """Names of /proc/cpuinfo; those of the host if the device is a GPU."""
    cuda_capability: str = ""

    @staticmethod
    def here(device: str, cpu_isa: str) -> "Build":
        """For this torch and device, and CPUs of the level named (`native`: this CPU)."""
        features = native_features() if cpu_isa == "native" else CPU_LEVELS[cpu_isa]
        if device == "cuda":
            name = torch.cuda.get_device_name()
            capability = "{}.{}".format(*torch.cuda.get_device_capability())
            return Build(str(torch.__version__), device, name, features, capability)
        name = _cpuinfo("model name") or platform.machine()
        return Build(str(torch.__version__), device, name, features)

    def text(self) -> str:
        """As the record in the file."""
        lines = {"format": BUILD_FORMAT, **dataclasses.asdict(self)}
        lines["cpu_features"] = " ".join(self.cpu_features)
        return "".join(
            f"{key} {value}\n" for key, value in lines.items() if value or key != "cuda_capability"
        )

    @staticmethod
    def parse(text: str, path: str | Path) -> "Build":
        """Read the record; ValueError if another generation of lmp-hl wrote it."""
        lines = dict(line.partition(" ")[::2] for line in text.splitlines())
        found = lines.pop("format")
        if found != BUILD_FORMAT:
            newer = found > BUILD_FORMAT
            raise ValueError(
                f"{path}: compiled by {'a newer' if newer else 'an older'} lmp-hl than this; "
                f"{'update lmp-hl' if newer else 'export it again'}"
            )
        features = tuple(lines.pop("cpu_features").split())
        return Build(cpu_features=features, **lines)

    def missing_features(self) -> list[str]:
        """Features of the compiled code that this CPU lacks."""
        return sorted(set(self.cpu_features) - cpu_flags())

    def check(self, path: str | Path, device: str) -> None:
        """Refuse, with the command that exports again, code that is not for what is here.

        Args:
            path: of the file.
            device: "cpu", "cuda" or "cuda:N", where it is to run.

        Raises:
            ValueError: made by another torch, or for another kind of device, CPU or GPU.
        """
        kind = torch.device(device).type
        made, here, options = "", "", ""
        if _release(self.torch) != _release(torch.__version__):
            made, here = f"by torch {self.torch}", f"this is torch {torch.__version__}"
        elif self.device != kind:
            made, here = f"for {self.device} ({self.device_name})", f"device {device} was asked for"
        elif missing := self.missing_features():
            made = f"for a CPU like {self.device_name}"
            here = f"this one ({_cpuinfo('model name')}) lacks {' '.join(missing)}"
            fitting = [n for n, level in CPU_LEVELS.items() if cpu_flags().issuperset(level)]
            options = f" --cpu-isa {fitting[-1]}" if fitting else ""
        elif kind == "cuda":
            capability = "{}.{}".format(*torch.cuda.get_device_capability(device))
            if capability != self.cuda_capability:
                made = f"for a GPU like {self.device_name} (capability {self.cuda_capability})"
                here = f"this one ({torch.cuda.get_device_name(device)}) has {capability}"
        if made:
            device_option = "" if kind == "cpu" else f" --device {kind}"
            raise ValueError(
                f"{path}: compiled {made}, but {here}; export it again here: lmp-hl export "
                f"--runtime aoti{device_option}{options} model.ckpt {Path(path).name}"
            )

    def describe(self) -> str:
        """For the model's card."""
        needs = " ".join(self.cpu_features) or "no particular CPU"
        level = [name for name, flags in CPU_LEVELS.items() if flags == self.cpu_features]
        return (
            f"AOTInductor, torch {self.torch}, for {self.device} (made on {self.device_name}), "
            f"needs {level[0] if level else needs}"
        )


def _release(version: str) -> str:
    return str(version).partition("+")[0]


class CompiledStages(Runtime):
    """Runs the compiled stages of an `hl.pt2`.

    Args:
        path: of the file; its code is unpacked into TMPDIR and removed from there at the end.
        model: the TorchScript inside it, on the CPU, or what that was made from; it evaluates
            `finish`, which is not worth compiling.
        device: "cpu", "cuda" or "cuda:N".

    Raises:
        ValueError: the code cannot be unpacked or loaded.
    """

    def __init__(self, path: str | Path, model: nn.Module, device: str) -> None:
        # the class behind torch._inductor.aoti_load_package, which would load all models for each
        # name; it is also what the LAMMPS plugin uses
        loader = torch._C._aoti.AOTIModelPackageLoader  # type: ignore[attr-defined]
        index = torch.device(device).index
        self.scripted = cast(Any, model).stages
        self.fields = list(self.scripted.fields)
        try:
            self.models = {
                name: loader(str(path), name, False, 1, -1 if index is None else index)
                for name in stage_names(self.scripted.num_layers)
            }
        except RuntimeError as error:
            raise ValueError(
                f"{path}: its compiled code cannot be loaded ({str(error).splitlines()[0]:.200}); "
                f"is there room in TMPDIR, and was the file copied completely?"
            ) from None

    def _run(self, name: str, inputs: list[Tensor]) -> list[Tensor]:
        # compiled code relies on the layout it was traced with
        outputs: list[Tensor] = self.models[name].run([x.contiguous() for x in inputs])
        return outputs

    def layer(self, t: int, inputs: list[Tensor]) -> Tensor:
        """See Stages.layer."""
        return self._run(f"layer{t}", inputs)[0]

    def layer_vjp(self, t: int, inputs: list[Tensor], gradients: Tensor) -> list[Tensor]:
        """See Stages.layer_vjp."""
        return self._run(f"layer{t}_vjp", [*inputs, gradients])

    def final(self, inputs: list[Tensor], with_fields: bool) -> list[Tensor]:
        """See Stages.final."""
        return self._run("final_fields" if with_fields else "final", inputs)

    def finish(
        self, species: Tensor, energies: Tensor, carried: Tensor, sums: Tensor
    ) -> list[Tensor]:
        """See Stages.finish."""
        outputs: list[Tensor] = self.scripted.finish(
            species.cpu(), energies.cpu(), carried.cpu(), sums.cpu()
        )
        return outputs

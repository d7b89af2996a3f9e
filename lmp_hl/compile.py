"""Potential -> `hl.pt2`: each stage compiled ahead of time (AOTInductor) for one kind of device."""

import contextlib
import copy
import errno
import functools
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import keys, stages
from .ensemble import Ensemble
from .export import TOLERANCE, ExportedPotential, make_exported, replace_file, to_bytes
from .model_file import load
from .nn.angular import SymmetricSquare
from .potential import Potential
from .runtime import BUILD_RECORD, TORCHSCRIPT_RECORD, Build, CompiledStages, stage_names


def export_compiled(
    potential: Potential | Ensemble,
    elements: Sequence[str],
    card: dict[str, Any],
    path: str | Path,
    device: str = "cpu",
    cpu_isa: str = "native",
    log: Callable[[str], None] = print,
) -> Path:
    """Compile a potential, compare every stage with the network it was made from, write the file.

    Args:
        potential: trained and calibrated; or several.
        elements: chemical symbols in the order of its species indices.
        card: what the file should say about its origin.
        path: of the file to write; replaced only when everything went well.
        device: "cpu" or "cuda".
        cpu_isa: "native" or a name of runtime.CPU_LEVELS, the oldest CPU that will run it.
        log: takes a line on progress; a stage takes about half a minute.

    Returns:
        The path.

    Raises:
        ValueError: no compiler, no room, no such device; or the compiled code gives other numbers.
    """
    path = Path(path)
    need_compiler()
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device cuda was asked for, but torch finds no GPU here; export on a GPU node with a "
            "CUDA build of torch"
        )
    if cpu_isa != "native" and platform.machine() not in ("x86_64", "AMD64"):
        raise ValueError(
            f"{cpu_isa} is a kind of x86 CPU, this is {platform.machine()}; leave --cpu-isa away"
        )
    build = Build.here(device, cpu_isa)
    card = {**card, "runtime": build.describe()}
    exported = make_exported(potential, elements, card)
    scripted = to_bytes(exported)
    parts = copy.deepcopy(exported.stages).to(device)
    names = stage_names(exported.num_layers)
    with tempfile.TemporaryDirectory(prefix="lmp-hl-") as folder, _full_disk_is_bad_input():
        files = _compile_stages(parts, names, device, cpu_isa, Path(folder), log)
        content = _package(
            files, {BUILD_RECORD: build.text().encode(), TORCHSCRIPT_RECORD: scripted}
        )

    def check(temporary: Path) -> None:
        if missing := build.missing_features():
            log(f"not tested: this CPU lacks {' '.join(missing)}")
            return
        load(temporary, device)
        compiled = CompiledStages(temporary, exported, device)
        _compare(exported, parts, compiled, device)

    return replace_file(path, content, check)


def need_compiler() -> None:
    """Refuse to go on where torch finds no C++ compiler.

    Raises:
        ValueError: what to install.
    """
    found = torch._inductor.config.cpp.cxx
    names = [found] if isinstance(found, str) else [name for name in found if name]
    if not any(shutil.which(name) for name in names):
        raise ValueError(
            f"compiling needs a C++ compiler, and there is no {' or '.join(names)}; install g++ or "
            f"set CXX, or export for TorchScript (leave --runtime aoti away)"
        )


@contextlib.contextmanager
def _full_disk_is_bad_input() -> Iterator[None]:
    # a full disk arrives as OSError, or inside the output of the compiler
    try:
        yield
    except (OSError, RuntimeError) as error:
        full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if getattr(error, "errno", None) in full or os.strerror(errno.ENOSPC) in str(error):
            raise ValueError(
                f"no room to compile in {tempfile.gettempdir()}; make room or set TMPDIR to a "
                f"folder on another disk"
            ) from error
        raise


# tracing and compiling ---------------------------------------------------------------------------
def _function(parts: stages.Stages, name: str) -> Callable[..., tuple[Tensor, ...]]:
    if name.startswith("final"):
        return lambda *inputs: tuple(parts.final(list(inputs), name == "final_fields"))
    t = int(name.removeprefix("layer").removesuffix("_vjp"))
    if name.endswith("_vjp"):
        return lambda *inputs: tuple(parts.layer_vjp(t, list(inputs[:-1]), inputs[-1]))
    return lambda *inputs: (parts.layer(t, list(inputs)),)


def _example(
    parts: stages.Stages, name: str, device: str
) -> tuple[tuple[Tensor, ...], tuple[dict[int, Any], ...]]:
    """Inputs of a stage to trace it with, and which of their sizes may change at run time.

    Sizes that are equal in the example are taken for always equal, so all of them differ.
    """
    f = parts.num_features
    size = {"n": f + 1, "m": f + 2, "e": f + 3}
    dims = {key: torch.export.Dim(key, min=0) for key in size}
    radial = parts.ensemble.potentials()[0].backbone.radial
    dtype = radial.frequencies.dtype
    first = name.startswith("layer0") or parts.num_layers == 1

    def indices(*shape: str) -> tuple[Tensor, dict[int, Any]]:
        return torch.zeros([size[s] for s in shape], dtype=torch.int64), {0: dims[shape[0]]}

    edges = torch.stack([torch.arange(size["e"]) % size["n"], torch.arange(size["e"]) % size["m"]])
    vectors = torch.full((size["e"], 3), 0.3 * radial.cutoff, dtype=dtype)
    inputs = [indices("n")]
    if first:
        inputs.append(indices("m"))
    inputs += [(edges, {1: dims["e"]}), (vectors, {0: dims["e"]})]
    features = ([] if first else ["n", "m"]) + (["n"] if name.endswith("_vjp") else [])
    inputs += [(torch.ones(size[s], f, dtype=dtype), {0: dims[s]}) for s in features]
    return tuple(x.to(device) for x, _ in inputs), tuple(shape for _, shape in inputs)


def _compile_stages(
    parts: stages.Stages,
    names: Sequence[str],
    device: str,
    cpu_isa: str,
    folder: Path,
    log: Callable[[str], None],
) -> dict[str, list[str]]:
    """Files of each stage, each made by a process of its own, as many at once as there are CPUs."""
    job = folder / "stages.pt"
    torch.save((parts, device, cpu_isa), job)

    def compile_in_process(name: str) -> list[str]:
        log(f"compiling {name} (of {', '.join(names)})")
        words = [sys.executable, "-m", "lmp_hl.compile", str(job), name]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"compiling {name} failed:\n{done.stderr}")
        files: list[str] = json.loads(done.stdout.splitlines()[-1])
        return files

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return dict(zip(names, pool.map(compile_in_process, names), strict=True))


def _compile(parts: stages.Stages, name: str, device: str, cpu_isa: str, folder: Path) -> list[str]:
    """Files of the compiled stage."""
    from torch._functorch.compile_utils import fx_graph_cse
    from torch.fx.experimental.proxy_tensor import make_fx

    inputs, shapes = _example(parts, name, device)
    for module in parts.modules():
        if isinstance(module, SymmetricSquare):
            module.unroll()
    # torch.export cannot trace autograd, but it can trace the operations that autograd recorded
    function = _function(parts, name)
    traced = make_fx(function, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*inputs)
    # what gradients and uncertainty both want is computed once
    traced.graph = fx_graph_cse(traced.graph)
    program = torch.export.export(traced, inputs, dynamic_shapes=shapes)
    options = {
        "aot_inductor.package": True,
        # a folder each: stages of equal architecture would overwrite each other's code
        "aot_inductor.output_path": str(folder / name),
        # one thread, as LAMMPS ranks have: with more, every sum over neighbours needs atomics
        "cpp.threads": 1,
    }
    if cpu_isa != "native":
        options["cpp.march"] = cpu_isa
    with _vector_width(cpu_isa):
        compiled: Any = torch._inductor.aot_compile(program.module(), inputs, options=options)
    return list(compiled)


@contextlib.contextmanager
def _vector_width(cpu_isa: str) -> Iterator[None]:
    """Let Inductor vectorise for the level named, whatever this CPU can."""
    from torch._inductor import cpu_vec_isa

    if cpu_isa == "native":
        yield
        return
    found: Any = cpu_vec_isa.valid_vec_isa_list
    widest: dict[str, list[cpu_vec_isa.VecISA]] = {
        "x86-64-v3": [cpu_vec_isa.VecAVX2()],
        "x86-64-v4": [cpu_vec_isa.VecAVX512()],
    }
    cpu_vec_isa.valid_vec_isa_list = functools.cache(lambda: widest.get(cpu_isa, []))
    try:
        yield
    finally:
        cpu_vec_isa.valid_vec_isa_list = found


def _package(files: dict[str, list[str]], records: dict[str, bytes]) -> bytes:
    """The archive that torch's loader of compiled code opens, with records of ours."""
    from torch.export.pt2_archive._package import PT2ArchiveWriter, _package_aoti_files

    buffer = io.BytesIO()
    with PT2ArchiveWriter(buffer) as writer:
        _package_aoti_files(writer, dict(files))  # type: ignore[arg-type]
        for name, content in records.items():
            writer.write_bytes(name, content)
    return buffer.getvalue()


# comparing ---------------------------------------------------------------------------------------
class _Compared(stages.Runtime):
    """Runs the compiled stages beside the network's own and refuses a difference."""

    def __init__(self, eager: stages.Stages, compiled: CompiledStages, tolerance: float) -> None:
        self.eager, self.compiled, self.tolerance = eager, compiled, tolerance
        self.fields = eager.fields

    def _same(self, name: str, got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
        for k, (x, y) in enumerate(zip(got, expected, strict=True)):
            if x.shape != y.shape or x.dtype != y.dtype:
                raise ValueError(
                    f"compiled {name}: output {k} is {x.shape} {x.dtype}, not {y.shape} {y.dtype}"
                )
            if y.numel() == 0:
                continue
            error = float((x - y).abs().max() / max(1.0, float(y.abs().max())))
            if not error <= self.tolerance:
                raise ValueError(
                    f"compiled {name} differs from the network by {error:.2g} (output {k}, "
                    f"tolerance {self.tolerance:g}); use --runtime torchscript"
                )

    def layer(self, t: int, inputs: list[Tensor]) -> Tensor:
        expected = self.eager.layer(t, inputs).detach()
        self._same(f"layer{t}", [self.compiled.layer(t, inputs)], [expected])
        return expected

    def layer_vjp(self, t: int, inputs: list[Tensor], gradients: Tensor) -> list[Tensor]:
        expected = self.eager.layer_vjp(t, inputs, gradients)
        self._same(f"layer{t}_vjp", self.compiled.layer_vjp(t, inputs, gradients), expected)
        return expected

    def final(self, inputs: list[Tensor], with_fields: bool) -> list[Tensor]:
        expected = self.eager.final(inputs, with_fields)
        self._same("final", self.compiled.final(inputs, with_fields), expected)
        return expected

    def finish(
        self, species: Tensor, energies: Tensor, carried: Tensor, sums: Tensor
    ) -> list[Tensor]:
        return self.eager.finish(species, energies, carried, sums)


def _compare(
    exported: ExportedPotential, eager: stages.Stages, compiled: CompiledStages, device: str
) -> None:
    """Every stage against the network: all atoms owned, one of them owned, no atoms at all."""
    runtime = _Compared(eager, compiled, TOLERANCE[exported.dtype])
    inputs = dict(exported.selftest_inputs)
    edge_index = inputs[keys.EDGE_INDEX]
    num_layers, num_nodes = exported.num_layers, len(inputs[keys.SPECIES])
    for owned in (num_nodes, 1, 0):
        layer_nodes = torch.full((num_layers,), num_nodes if owned else 0)
        layer_nodes[-1] = owned
        graph = {**inputs, keys.LAYER_NODES: layer_nodes}
        graph[keys.LAYER_EDGES] = torch.stack([(edge_index[0] < n).sum() for n in layer_nodes])
        on_host = (keys.LAYER_NODES, keys.LAYER_EDGES)
        graph = {k: v if k in on_host else v.to(device) for k, v in graph.items()}
        for with_fields in (False, True):
            stages.evaluate(runtime, graph, with_fields)


if __name__ == "__main__":  # one process of _compile_stages
    job, name = Path(sys.argv[1]), sys.argv[2]
    parts, device, cpu_isa = torch.load(job, weights_only=False)
    print(json.dumps(_compile(parts, name, device, cpu_isa, job.parent)))

"""The same structure gives the same numbers on any number of ranks and any way to divide the box.

Every result is compared with Python at the positions that LAMMPS wrote: energy, forces, virial,
energy and virial of each atom, every uncertainty field.
"""

import functools

import numpy as np
import pytest
from lammps_network import MODELS, check, load, run, start, write

# name -> (commands before the structures, commands after each, structures);
# orthogonal boxes come first, and LAMMPS treats triclinic ones in other code
LAYOUTS = {
    "brick": (
        "",
        "",
        ["bulk", "liquid", "molecule", "isolated", "triclinic", "small_cell"],
    ),
    "balanced": ("", "balance 1.0 shift xyz 10 1.0", ["liquid", "slab", "molecule"]),
    "tiled": ("comm_style tiled", "balance 1.0 rcb", ["liquid", "slab"]),
    "slices": ("processors 1 1 *", "", ["slab", "molecule", "triclinic"]),  # ranks in vacuum
}
USUAL = [(1, "brick"), (2, "tiled"), (3, "slices")]  # the others are slow
RUNS = [
    pytest.param(ranks, layout, name, marks=[] if (ranks, layout) in USUAL else [pytest.mark.slow])
    for ranks in (1, 2, 3, 4)
    for layout, (_, _, names) in LAYOUTS.items()
    for name in names
    if ranks > 1 or layout == "brick"  # to one rank a layout means nothing
]


def out(model, ranks, layout, name):
    return f"{model}.{ranks}.{layout}.{name}"


@pytest.fixture(scope="module")
def evaluated(network_folder):
    """(model, ranks, layout) -> that model has seen the structures, in one LAMMPS process."""

    @functools.cache
    def evaluate(model, ranks, layout):
        before, after, names = LAYOUTS[layout]
        script = start(model, before)
        for name in names:
            script += load(name) + after + "\nrun 0\n" + write(out(model, ranks, layout, name))
        run(script, network_folder, ranks)

    return evaluate


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("ranks", "layout", "name"), RUNS)
def test_ranks_and_layout_change_nothing(network_folder, evaluated, ranks, layout, name, model):
    evaluated(model, ranks, layout)
    frame = check(network_folder, out(model, ranks, layout, name), model)
    if name != "isolated":
        assert np.abs(frame["fx"]).max() > 0.1 and np.abs(frame["c_s[1]"]).max() > 1000


def test_some_of_these_layouts_leave_ranks_without_atoms(network_folder, evaluated):
    for name in ("slab", "molecule"):
        evaluated(MODELS[0], 4, "slices")
        frame = check(network_folder, out(MODELS[0], 4, "slices", name), MODELS[0])
        assert len(set(frame["proc"])) < 4


# A cutoff longer than every cell vector, and three elements: box and graph are unlike the others
OTHERS = [("wide", "thin", "Si O NULL"), ("three", "three_elements", "Si O Cu")]


@pytest.fixture(scope="module")
def others(network_folder):
    script = ""
    for kind, name, elements in OTHERS:
        for preset in ("local", "mp"):
            model = f"{kind}_{preset}.pt"
            script += start(model, elements=elements) + load(name) + "run 0\n" + write(model)
    run(script, network_folder, 2)


@pytest.mark.parametrize("preset", ["local", "mp"])
@pytest.mark.parametrize("kind", [kind for kind, _, _ in OTHERS])
def test_wide_cutoff_in_a_small_cell_and_many_elements(network_folder, others, kind, preset):
    model = f"{kind}_{preset}.pt"
    frame = check(network_folder, model, model)
    assert np.abs(frame["fx"]).max() > 1e-3  # far above what is tolerated
    assert set(frame["type"]) == ({1, 2, 3} if kind == "three" else {1, 2})

"""Which form the default uncertainty has, decided without a test frame.

    python benchmarks/uncertainty_form.py --data DIR --jobs 2

The default multiplies a size per element by a growth g away from the data and by a damping h where
symmetry makes forces vanish (ForceDistribution). Other forms are fitted to the same validation
frames of the same trained networks and scored on frames near the training data (ID) and on others
(OOD), of the sets for development of uncertainty_data.py: all come from the training files of the
sets of benchmarks/uncertainty.py and are no test frames there.

The score, set down before there were any results: the Gaussian negative log-likelihood of a
force component's error at force_std, a proper score of what force_std says, the mean square of the
error; with NOISE added to the squares of force_std, below which labels are not known. A form's lead
is the mean difference to the default over data sets and seeds, and over ID and OOD alike. A form
takes the place of the default where its lead is positive beyond the interval (frames drawn with
replacement); rank, ratio and slope stand in the table to be read, and decide nothing.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from provenance import one_line, provenance
from torch import Tensor, nn
from uncertainty import unfitted
from uncertainty_data import DEVELOPMENT
from uncertainty_training import train, trained

from lmp_hl import metrics
from lmp_hl.nn.heads import invariants
from lmp_hl.training import frames as fr
from lmp_hl.training.calibrate import collect_atoms
from lmp_hl.training.train import baseline_energies
from lmp_hl.uncertainty import Atoms
from lmp_hl.uncertainty.neighbors import neighbor_mean
from lmp_hl.uncertainty.penalised import minimise
from lmp_hl.uncertainty.per_element import error_scale
from lmp_hl.uncertainty.scales import Scales

HERE = Path(__file__).resolve().parent
SEEDS: Final = (0, 1)
NOISE: Final = 0.01  # eV/Å
DEFAULT: Final = "default"

Mean = Callable[[Tensor], Tensor]  # of a value over the neighbours of every atom
Growth = Callable[[Tensor, Mean], Tensor]  # of d^2 of every atom


def _halves(square: Tensor, mean: Mean) -> Tensor:
    return (0.5 * (square + mean(square))).sqrt()


@dataclass(frozen=True)
class Form:
    """What differs from the default: the growth, the damping, a size that features decide."""

    about: str
    growth: Growth = _halves
    damped: bool = True
    read_size: bool = False


FORMS: Final[dict[str, Form]] = {
    DEFAULT: Form("size per element, g² = mean of d² of the atom and of its neighbours, damped"),
    "own": Form("g = d, of the atom alone", lambda square, mean: square.sqrt()),
    "neighbors": Form("g² = mean of neighbours' d²", lambda square, mean: mean(square).sqrt()),
    "fourth": Form(
        "g⁴ = mean of d⁴ of the atom and of its neighbours",
        lambda square, mean: _halves(square.square(), mean).sqrt(),
    ),
    "root": Form("square root of g", lambda square, mean: _halves(square, mean).sqrt()),
    "square": Form("square of g", lambda square, mean: _halves(square, mean).square()),
    "offset": Form(
        "g² + 1 for g²", lambda square, mean: (1.0 + _halves(square, mean).square()).sqrt()
    ),
    "constant": Form("no distance, g = 1", lambda square, mean: torch.ones_like(square)),
    "undamped": Form("no damping, h = 1", damped=False),
    "read": Form("size times the exponential of a linear function of the features", read_size=True),
}


@dataclass(frozen=True)
class Frozen:
    """What one trained network leaves of the frames of one data set, in float64."""

    method: Scales
    parts: Mapping[str, Atoms]  # "train", "valid", "ID", "OOD"


def frozen(dataset: str, seed: int, data: Path, out: Path) -> Frozen:
    """Collect the atoms of a trained network; its distance is fitted to the training frames."""
    config = trained((dataset, "hlgauss", seed), data, out)
    model = unfitted(config, ("scales",))
    potential = model.potential.cpu().double()
    splits = fr.load_splits(config.data, config.seed)
    baseline = baseline_energies(splits)
    sets = {"train": splits.train, "valid": splits.valid, **splits.test}
    parts = {
        name: collect_atoms(
            potential,
            fr.GraphDataset(
                frames, splits.elements, baseline, model.cutoff, model.num_layers, "float64"
            ),
        )
        for name, frames in sets.items()
    }
    (method,) = potential.uncertainty_methods()
    method.fit(parts["train"], parts["valid"])
    return Frozen(method, parts)


def read_size(held: Atoms, expected: Tensor, num_elements: int) -> Callable[[Atoms], Tensor]:
    """A size that the features decide: exp(w . x), x standardised and bounded by 3.

    w minimises the Gaussian negative log-likelihood of the errors of `held` at a_z expected exp(w .
    x), a_z of error_scale, tied to zero with 0.1 |w|^2 like the default's shape.
    """
    x = invariants(held.features)
    center, scale = x.mean(0), x.std(0).clamp(min=1e-9)
    weight = nn.Parameter(torch.zeros(x.shape[1], dtype=x.dtype))

    def factor(atoms: Atoms) -> Tensor:
        z = ((invariants(atoms.features) - center) / scale).clamp(-3.0, 3.0)
        return torch.exp((z @ weight).clamp(-3.0, 3.0))

    def loss() -> Tensor:
        size = expected * factor(held)
        std = size * error_scale(size, held.errors, held.species, num_elements)[held.species]
        variance = std.square() + NOISE**2
        return 0.5 * (torch.log(variance) + held.errors.square().mean(1) / variance).mean()

    minimise(loss, [(weight, 0.1)], max_iter=100)
    return factor


def _one(atoms: Atoms) -> Tensor:
    return torch.ones(())


@torch.no_grad()
def sizes(form: Form, network: Frozen) -> dict[str, Tensor]:
    """force_std (num_atoms,) of the atoms of "ID" and "OOD", eV/Å, fitted to those of "valid"."""
    method, parts = network.method, network.parts
    force, damping = method.force_distribution, method.force_distribution.symmetric
    held = parts["valid"]
    if not form.damped:
        force.symmetric = (1.0, 1.0)

    def growth(atoms: Atoms) -> Tensor:
        square = method.distance(invariants(atoms.features), atoms.species).square()
        return form.growth(square, lambda x: neighbor_mean(x, atoms.edge_index, atoms.edge_weights))

    expected = growth(held) * force.spread(force(held.features.tensors))
    factor = read_size(held, expected, len(force.size)) if form.read_size else _one
    force.fit(held, growth(held) * factor(held))
    found = {}
    for name in ("ID", "OOD"):
        atoms = parts[name]
        spread = force.spread(force(atoms.features.tensors))
        found[name] = force.size[atoms.species] * growth(atoms) * factor(atoms) * spread
    force.symmetric = damping
    return found


def _groups(atoms: Atoms) -> Any:
    """Sites of a molecule that all frames show in the same order, else elements."""
    per_frame = torch.bincount(atoms.frame)
    table = atoms.species.reshape(atoms.num_frames, -1) if len(set(per_frame.tolist())) == 1 else []
    if len(table) and bool((table == table[0]).all()) and len(table[0].unique()) > 1:
        return np.tile(np.arange(len(table[0])), len(table))
    return atoms.species.numpy()


def score(network: Frozen, forms: Mapping[str, Form] = FORMS) -> dict[str, Any]:
    """Of every form: what the table shows, and the score's sums over the atoms of each frame.

    Returns:
        "ID" or "OOD" -> {"num_atoms": of every frame, "forms": name -> numbers}.
    """
    found: dict[str, Any] = {
        name: {"num_atoms": torch.bincount(network.parts[name].frame).tolist(), "forms": {}}
        for name in ("ID", "OOD")
    }
    for form_name, form in forms.items():
        for name, std in sizes(form, network).items():
            atoms = network.parts[name]
            error = atoms.errors.square().mean(1)
            variance = std.square() + NOISE**2
            surprise = 0.5 * (torch.log(2 * np.pi * variance) + error / variance)
            sums = torch.zeros(atoms.num_frames, dtype=std.dtype)
            size, true = std.numpy(), error.sqrt().numpy()
            found[name]["forms"][form_name] = {
                "surprise": sums.index_add(0, atoms.frame, surprise).tolist(),
                "rank": metrics.spearman_within(size, true, _groups(atoms)),
                "size_ratio": metrics.size_ratio(size, true),
                "slope": metrics.reliability_curve(size, true).slope,
            }
    return found


def leads(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean over networks, ID and OOD, of the default's score minus a form's, nats, with intervals.

    Args:
        scores: network -> what `score` returned. Frames are drawn for each part of each data set by
            itself; the seeds of one data set share the draw.
    """
    parts: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for network, found in scores.items():
        for name, part in found.items():
            parts.setdefault((network.rsplit("/", 1)[0], name), []).append(part)
    forms = list(next(iter(next(iter(parts.values()))))["forms"])
    gains, counts = [], []
    for group in parts.values():
        tables = [np.array([part["forms"][n]["surprise"] for n in forms]) for part in group]
        mean = np.mean(tables, axis=0)
        gains.append(mean[forms.index(DEFAULT)] - mean)  # (num_forms, num_frames)
        counts.append(np.array(group[0]["num_atoms"], dtype=np.float64))

    def statistic(*weights: Any) -> Any:
        rows = zip(gains, counts, weights, strict=True)
        return np.mean([gain @ w / (count @ w) for gain, count, w in rows], axis=0)

    value, draws = metrics.bootstrap(statistic, [len(c) for c in counts], 1000)
    return {
        name: metrics.percentile_interval(float(value[k]), draws[:, k]).as_dict()
        for k, name in enumerate(forms)
    }


def table(scores: Mapping[str, Mapping[str, Any]], made: Mapping[str, Any]) -> str:
    """Markdown: a form's lead, then its numbers on every data set, mean over seeds."""
    lead = leads(scores)
    datasets = list(dict.fromkeys(network.rsplit("/", 1)[0] for network in scores))
    networks = f"{', '.join(datasets)}, seeds {' and '.join(map(str, SEEDS))}"
    lines = [
        "# The form of the default uncertainty, decided without a test frame",
        "",
        f"Networks: {networks}; ID and OOD are held-back frames of the sets' training files.",
        "Lead: mean over them of the default's negative log-likelihood of a force",
        "component's error minus the form's, nats, with the 95 % bootstrap interval over frames;",
        "above 0 a form is better than the default. The score was set down before there were",
        "results; the other tables decide nothing.",
        "",
        "| form | what it is | lead |",
        "|---|---|---|",
    ]
    for name, form in FORMS.items():
        x = lead[name]
        interval = f"{x['value']:+.3f} [{x['low']:+.3f}, {x['high']:+.3f}]"
        lines.append(f"| `{name}` | {form.about} | {'-' if name == DEFAULT else interval} |")
    titles = {
        "rank": "rank correlation with the force error within site or element",
        "size_ratio": "RMS(force_std) / RMS(error)",
        "slope": "slope of log error against log force_std",
    }
    for key, title in titles.items():
        heads = [f"{d} {part}" for d in datasets for part in ("ID", "OOD")]
        lines += ["", f"## {title[0].upper()}{title[1:]}", ""]
        lines += ["| form | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
        for name in FORMS:
            cells = [
                np.mean(
                    [
                        found[part]["forms"][name][key]
                        for network, found in scores.items()
                        if network.rsplit("/", 1)[0] == d
                    ]
                )
                for d in datasets
                for part in ("ID", "OOD")
            ]
            lines.append(f"| `{name}` | " + " | ".join(f"{c:.2f}" for c in cells) + " |")
    return "\n".join([*lines, "", one_line(dict(made)), ""])


def main() -> None:
    """Train the networks that are not there, fit and score all forms, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time (default 1)")
    parser.add_argument("--out", type=Path, default=Path("runs/uncertainty"))
    parser.add_argument("--results", type=Path, default=HERE / "results")
    args = parser.parse_args()
    out, data = args.out.resolve(), args.data.resolve()
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    runs = [(dataset, seed) for dataset in DEVELOPMENT for seed in SEEDS]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda run: train((run[0], "hlgauss", run[1]), data, out), runs))
    scores = {}
    for dataset, seed in runs:
        scores[f"{dataset}/{seed}"] = score(frozen(dataset, seed, data, out))
        print(f"{dataset}/{seed}: scored", flush=True)
    made = provenance()
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / "uncertainty_form.md"
    path.write_text(table(scores, made), encoding="utf-8")
    summary = {"leads": leads(scores), "made": made}
    for found in scores.values():
        for part in found.values():
            for numbers in part["forms"].values():
                del numbers["surprise"]  # one number for each frame
    summary["scores"] = scores
    path.with_suffix(".json").write_text(json.dumps(summary) + "\n", encoding="utf-8")
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()

#include "compute_hlgauss_atom.h"

#include "pair_hlgauss.h"

#include "atom.h"
#include "error.h"
#include "memory.h"
#include "update.h"

#include <algorithm>

using namespace LAMMPS_NS;

ComputeHLGaussAtom::ComputeHLGaussAtom(LAMMPS *lmp, int narg, char **arg) :
    Compute(lmp, narg, arg), field_names(arg + std::min(3, narg), arg + narg), nmax(0)
{
  if (field_names.empty())
    error->all(FLERR, "compute hlgauss/atom: wanted at least one field, such as entropy; "
                      "the log of pair_style lists those of the model");
  peratom_flag = 1;
  size_peratom_cols = field_names.size() == 1 ? 0 : (int) field_names.size();
  // asks for per-atom energies on the steps when the values are used, which is how the pair style
  // knows that it should evaluate the fields
  peatomflag = 1;
  timeflag = 1;
  if (!PairHLGauss::find_all(lmp).empty()) ComputeHLGaussAtom::init();
}

ComputeHLGaussAtom::~ComputeHLGaussAtom()
{
  memory->destroy(vector_atom);
  memory->destroy(array_atom);
}

PairHLGauss *ComputeHLGaussAtom::find_pair()
{
  const auto pairs = PairHLGauss::find_all(lmp);
  if (pairs.size() != 1)
    error->all(FLERR,
               "compute hlgauss/atom: wanted one pair_style 'mliap model hl.pt' or 'hlgauss "
               "model hl.pt' in use, found {}",
               pairs.size());
  return pairs[0];
}

void ComputeHLGaussAtom::init()
{
  // commands that send atoms to other ranks initialize first: what was computed is of others then
  invoked_flag = INVOKED_NONE;
  PairHLGauss *pair = find_pair();
  const auto &known = pair->fields();
  std::string names;
  for (const auto &name : known) names += " " + name;
  for (const auto &field : field_names)
    if (std::find(known.begin(), known.end(), field) == known.end())
      error->all(FLERR, "compute hlgauss/atom: {} has no field '{}'; it knows{}", pair->path(),
                 field, known.empty() ? " none" : names);
}

void ComputeHLGaussAtom::compute_peratom()
{
  invoked_peratom = update->ntimestep;
  PairHLGauss *pair = find_pair();

  if (atom->nmax > nmax || (!vector_atom && !array_atom)) {
    nmax = std::max(1, atom->nmax);
    if (size_peratom_cols == 0) {
      memory->destroy(vector_atom);
      memory->create(vector_atom, nmax, "hlgauss/atom:vector_atom");
    } else {
      memory->destroy(array_atom);
      memory->create(array_atom, nmax, size_peratom_cols, "hlgauss/atom:array_atom");
    }
  }

  for (size_t k = 0; k < field_names.size(); k++) {
    int columns = 0;
    const auto *values =
        static_cast<double *>(pair->extract_peratom(field_names[k].c_str(), columns));
    if (!values || update->eflag_atom != invoked_peratom)
      error->all(
          FLERR,
          "compute hlgauss/atom: '{}' was not evaluated on step {} for these atoms; a fix or "
          "variable that reads it must be defined before the run, so that the step is "
          "announced; after a run read it before commands that move atoms between ranks, "
          "such as write_restart, or after 'run 0'",
          field_names[k], update->ntimestep);
    for (int i = 0; i < atom->nlocal; i++) {
      const double value = atom->mask[i] & groupbit ? values[i] : 0.0;
      if (size_peratom_cols == 0)
        vector_atom[i] = value;
      else
        array_atom[i][k] = value;
    }
  }
}

double ComputeHLGaussAtom::memory_usage()
{
  return (double) nmax * std::max(1, size_peratom_cols) * sizeof(double);
}

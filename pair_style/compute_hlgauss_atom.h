// compute ID group hlgauss/atom field [field ...]: uncertainty fields of the potential, per atom.

#ifndef LMP_COMPUTE_HLGAUSS_ATOM_H
#define LMP_COMPUTE_HLGAUSS_ATOM_H

#include "compute.h"

#include <string>
#include <vector>

namespace LAMMPS_NS {

class ComputeHLGaussAtom : public Compute {
public:
  ComputeHLGaussAtom(class LAMMPS *, int, char **);
  ~ComputeHLGaussAtom() override;

  void init() override;
  void compute_peratom() override;
  double memory_usage() override;

  std::vector<std::string> field_names;    // one per column

private:
  class PairHLGauss *find_pair();

  int nmax;    // atoms the arrays have room for
};

}    // namespace LAMMPS_NS

#endif

// Per-node numbers between MPI ranks, through LAMMPS's own ghost communication.

#ifndef LMP_HLGAUSS_FEATURE_EXCHANGE_H
#define LMP_HLGAUSS_FEATURE_EXCHANGE_H

#include "model.h"

#include "comm.h"
#include "pair.h"
#include "platform.h"

#include <algorithm>
#include <vector>

namespace LAMMPS_NS {

/// LAMMPS hands a ghost on from rank to rank, also where it is no node of the graph: numbers travel
/// per atom, a slice of SLICE of them at a time, because LAMMPS's buffers scale with the largest.
class FeatureExchange : public HLGauss::Exchange {
public:
  static constexpr int SLICE = 64;

  /// Until the next call nodes are these local atoms; owned ones come first.
  void prepare(Comm *c, Pair *p, const std::vector<int> &atoms, size_t owned, size_t local)
  {
    comm = c;
    pair = p;
    atom_of_node = &atoms;
    num_owned = owned;
    num_local = local;
  }

  void forward(double *values, int width) override
  {
    const double start = platform::walltime();
    for (int begin = 0; begin < width; begin += SLICE) {
      open_slots(std::min(SLICE, width - begin));
      for (size_t node = 0; node < num_owned; node++)
        std::copy_n(values + node * width + begin, slice, slot((*atom_of_node)[node]));
      comm->forward_comm(pair, slice);
      for (size_t node = num_owned; node < atom_of_node->size(); node++)
        std::copy_n(slot((*atom_of_node)[node]), slice, values + node * width + begin);
    }
    seconds += platform::walltime() - start;
  }

  void reverse(double *values, int width) override
  {
    const double start = platform::walltime();
    for (int begin = 0; begin < width; begin += SLICE) {
      open_slots(std::min(SLICE, width - begin));
      for (size_t node = 0; node < atom_of_node->size(); node++)
        std::copy_n(values + node * width + begin, slice, slot((*atom_of_node)[node]));
      comm->reverse_comm(pair, slice);
      for (size_t node = 0; node < num_owned; node++)
        std::copy_n(slot((*atom_of_node)[node]), slice, values + node * width + begin);
    }
    seconds += platform::walltime() - start;
  }

  int pack(int n, const int *list, double *buffer)
  {
    for (int k = 0; k < n; k++) std::copy_n(slot(list[k]), slice, buffer + k * slice);
    return n * slice;
  }
  void unpack(int n, int first, const double *buffer)
  {
    std::copy_n(buffer, (size_t) n * slice, slot(first));
  }
  int pack(int n, int first, double *buffer)
  {
    std::copy_n(slot(first), (size_t) n * slice, buffer);
    return n * slice;
  }
  void add(int n, const int *list, const double *buffer)
  {
    for (int k = 0; k < n; k++)
      for (int a = 0; a < slice; a++) slot(list[k])[a] += buffer[k * slice + a];
  }

  double seconds = 0.0;    // spent here

private:
  /// Zeros of this width for every local atom.
  void open_slots(int width)
  {
    slice = width;
    slots.assign(num_local * slice, 0.0);
  }
  double *slot(int i) { return slots.data() + (size_t) i * slice; }

  Comm *comm = nullptr;
  Pair *pair = nullptr;
  const std::vector<int> *atom_of_node = nullptr;
  size_t num_owned = 0, num_local = 0;
  int slice = 0;
  std::vector<double> slots;    // (local atoms, slice)
};

}    // namespace LAMMPS_NS

#endif

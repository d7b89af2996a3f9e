// The atoms that a model evaluates or needs, as nodes and edges, made from LAMMPS's neighbor list.

#ifndef LMP_HLGAUSS_ATOM_GRAPH_H
#define LMP_HLGAUSS_ATOM_GRAPH_H

#include "model.h"

#include "pointers.h"

#include <string>
#include <vector>

namespace LAMMPS_NS {

class AtomGraph : protected Pointers {
public:
  explicit AtomGraph(LAMMPS *lmp) : Pointers(lmp) {}

  HLGauss::Graph graph;
  std::vector<int> atoms;    // local index of each node; owned atoms come first

  /// Nodes, edges and positions of this step. `elements` gives the model's element of each atom
  /// type, -1 where it sees none. With `exchange_features` every layer evaluates the owned atoms,
  /// otherwise also those ghosts that later layers need. With `on_device` edges are all pairs of
  /// the list, made anew only with it.
  void build(class NeighList *list, const std::vector<int> &elements,
             const HLGauss::ModelInfo &info, bool exchange_features, bool on_device);

  std::string name_of(int atom) const;
  /// Of the nodes, for error messages: where most troubles begin.
  std::string closest_pair() const;
  double memory_usage() const;

private:
  int element_of(int atom) const;
  int add_node(int atom);
  void add_edges(int node, double cutoff);
  void copy_positions();

  class NeighList *neighbors = nullptr;
  const std::vector<int> *element_of_type = nullptr;
  std::vector<int> node_of_atom;    // -1: not in the graph
};

}    // namespace LAMMPS_NS

#endif

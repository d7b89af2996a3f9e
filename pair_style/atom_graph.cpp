#include "atom_graph.h"

#include "atom.h"
#include "comm.h"
#include "error.h"
#include "neigh_list.h"
#include "neighbor.h"
#include "update.h"

#include <algorithm>
#include <cmath>

using namespace LAMMPS_NS;

int AtomGraph::element_of(int i) const
{
  // fix gcmc takes an atom out of group all to see the energy of the others
  return atom->mask[i] & 1 ? (*element_of_type)[atom->type[i]] : -1;
}

int AtomGraph::add_node(int i)
{
  if (node_of_atom[i] < 0) {
    node_of_atom[i] = (int) atoms.size();
    atoms.push_back(i);
    graph.species.push_back(element_of(i));
  }
  return node_of_atom[i];
}

void AtomGraph::add_edges(int node, double cutoff)
{
  const double *const *const x = atom->x;
  const double cutoffsq = cutoff * cutoff;
  const int i = atoms[node];
  const int *const of_i = neighbors->firstneigh[i];
  const int num_neighbors = neighbors->numneigh[i];
  for (int jj = 0; jj < num_neighbors; jj++) {
    const int j = of_i[jj] & NEIGHMASK;
    if (element_of(j) < 0) continue;
    const double dx = x[j][0] - x[i][0];
    const double dy = x[j][1] - x[i][1];
    const double dz = x[j][2] - x[i][2];
    if (dx * dx + dy * dy + dz * dz >= cutoffsq) continue;    // the list also holds the skin
    graph.centers.push_back(node);
    graph.neighbors.push_back(add_node(j));
  }
}

void AtomGraph::build(NeighList *list, const std::vector<int> &elements,
                      const HLGauss::ModelInfo &info, bool exchange_features, bool on_device)
{
  neighbors = list;
  element_of_type = &elements;
  // on the device edges change with LAMMPS's list, and where a swap changed what an atom is
  graph.candidates = on_device;
  graph.same_edges = on_device && neighbor->ago > 0;
  for (size_t node = 0; graph.same_edges && node < atoms.size(); node++)
    graph.same_edges = graph.species[node] == element_of(atoms[node]);

  if (!graph.same_edges) {
    graph.species.clear();
    graph.centers.clear();
    graph.neighbors.clear();
    graph.layer_nodes.assign(info.num_layers, 0);
    graph.layer_edges.assign(info.num_layers, 0);
    atoms.clear();
    node_of_atom.assign(atom->nlocal + atom->nghost, -1);
    for (int ii = 0; ii < list->inum; ii++)
      if (element_of(list->ilist[ii]) >= 0) add_node(list->ilist[ii]);

    // with extended ghosts layer t computes the atoms at most num_layers - 1 - t hops away from an
    // owned one; where features are exchanged every layer computes the owned ones
    const double cutoff = on_device ? HUGE_VAL : info.cutoff;
    const size_t num_owned = atoms.size();
    size_t centers_done = 0;
    for (int hop = 0; hop < info.num_layers; hop++) {
      const size_t num_centers = exchange_features ? num_owned : atoms.size();
      for (; centers_done < num_centers; centers_done++) add_edges((int) centers_done, cutoff);
      graph.layer_nodes[info.num_layers - 1 - hop] = (int64_t) num_centers;
      graph.layer_edges[info.num_layers - 1 - hop] = (int64_t) graph.centers.size();
    }
  }
  copy_positions();
}

void AtomGraph::copy_positions()
{
  graph.positions.resize(3 * atoms.size());
  for (size_t node = 0; node < atoms.size(); node++) {
    const double *const x = atom->x[atoms[node]];
    // no distance to such an atom is below the cutoff: it would pass for one that is alone
    if (!std::isfinite(x[0] + x[1] + x[2]))
      error->one(FLERR,
                 "pair_style mliap/hlgauss: the position of {} is not a finite number on step {}, "
                 "rank {}; check the time step and the starting structure",
                 name_of(atoms[node]), update->ntimestep, comm->me);
    std::copy_n(x, 3, &graph.positions[3 * node]);
  }
}

std::string AtomGraph::name_of(int i) const
{
  return atom->tag_enable ? fmt::format("atom {}", atom->tag[i]) : "an atom without ID";
}

std::string AtomGraph::closest_pair() const
{
  double closest = HUGE_VAL;
  size_t at = 0;
  for (size_t e = 0; e < graph.centers.size(); e++) {
    const double *const a = &graph.positions[3 * graph.centers[e]];
    const double *const b = &graph.positions[3 * graph.neighbors[e]];
    const double d = std::hypot(a[0] - b[0], a[1] - b[1], a[2] - b[2]);
    if (d < closest) closest = d, at = e;
  }
  if (closest == HUGE_VAL) return "no two atoms are near each other here";
  return fmt::format("closest are {} and {}, {:.3g} Angstrom apart",
                     name_of(atoms[graph.centers[at]]), name_of(atoms[graph.neighbors[at]]),
                     closest);
}

double AtomGraph::memory_usage() const
{
  return (double) sizeof(int64_t) *
             (graph.species.capacity() + graph.centers.capacity() + graph.neighbors.capacity()) +
         (double) sizeof(double) * graph.positions.capacity() +
         (double) sizeof(int) * (node_of_atom.capacity() + atoms.capacity());
}

// Pair style of a potential exported by lmp-hl: pair_style mliap model hl.pt, or hlgauss model
// hl.pt.

#ifndef LMP_PAIR_HLGAUSS_H
#define LMP_PAIR_HLGAUSS_H

#include "model.h"

#include "pair.h"

#include <memory>
#include <string>
#include <vector>

namespace LAMMPS_NS {

class PairHLGauss : public Pair {
public:
  explicit PairHLGauss(class LAMMPS *);
  ~PairHLGauss() override;

  void settings(int, char **) override;
  void coeff(int, char **) override;
  void init_style() override;
  double init_one(int, int) override;
  void compute(int, int) override;
  void finish() override;
  double memory_usage() override;

  /// "cutoff" (double), "model_path", "model_hash" (SHA-256) and "model_card" (char), "fields"
  /// (char, names separated by spaces), "<field>_flag" (int, set to 1 before a step to have the
  /// field), and "hlgauss_pair" (this object), all with dim = 0.
  void *extract(const char *, int &) override;

  /// Values of a field on owned atoms, or nullptr if it was not evaluated on this step.
  void *extract_peratom(const char *, int &) override;

  /// Every style of this kind in use, alone or below pair_style hybrid.
  static std::vector<PairHLGauss *> find_all(class LAMMPS *);

  const std::vector<std::string> &fields() const { return model->info().fields; }
  const std::string &path() const { return model_path; }

private:
  void allocate();
  std::string read_model_file();
  void load_model(const std::string &bytes, const std::string &device, int local_rank,
                  int local_ranks);
  void check_same_everywhere(const std::string &problem);
  void check_masses();
  void check_special_bonds();
  void extend_ghosts();
  void log_summary();
  int element_of(int i) const;

  void build_graph();
  int add_node(int);
  void add_edges(int);
  void tally(int, int);
  bool fields_wanted() const;

  std::unique_ptr<HLGauss::Model> model;
  std::string model_path, model_hash, field_names;
  size_t model_size;
  std::vector<int> type_to_element;    // -1: this style does not see the type
  bool log_pending;                    // the summary waits for the masses
  double energy_unit;                  // LAMMPS energy unit per eV

  HLGauss::Graph graph;
  HLGauss::Evaluation result;
  std::vector<int> node_of_atom;    // -1: not in the graph
  std::vector<int> atom_of_node;
  std::vector<int> edge_neighbor_atoms;    // local index of each edge's neighbour
  std::vector<int> image_of;    // owned atom of which a local atom is an image, else itself

  std::vector<int> field_flags;                     // triggers of fix pair, one per field
  std::vector<std::vector<double>> field_values;    // (nmax) per field, LAMMPS units
  bigint fields_step;                               // step the values belong to, or -1

  bigint num_evaluations, num_with_fields, num_edges_seen, num_centers_seen;
  double time_graph, time_model, time_tally;    // seconds in this run
};

}    // namespace LAMMPS_NS

#endif

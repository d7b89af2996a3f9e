// Pair style of a potential exported by lmp-hl: pair_style mliap model hl.pt, or hlgauss model
// hl.pt.

#ifndef LMP_PAIR_HLGAUSS_H
#define LMP_PAIR_HLGAUSS_H

#include "atom_graph.h"
#include "feature_exchange.h"
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
  int pack_forward_comm(int, int *, double *, int, int *) override;
  void unpack_forward_comm(int, int, double *) override;
  int pack_reverse_comm(int, int, double *) override;
  void unpack_reverse_comm(int, int *, double *) override;

  /// "cutoff" (double), "model_path", "model_hash" (SHA-256) and "model_card" (char), "fields"
  /// (char, names separated by spaces), "<field>_flag" (int, set to 1 before a step to have the
  /// field), and "hlgauss_pair" (this object), all with dim = 0.
  void *extract(const char *, int &) override;

  /// Values of a field on owned atoms, or nullptr if it was not evaluated on this step, or not for
  /// the atoms that the rank owns by now.
  void *extract_peratom(const char *, int &) override;

  /// Every style of this kind in use, alone or below pair_style hybrid.
  static std::vector<PairHLGauss *> find_all(class LAMMPS *);

  const std::vector<std::string> &fields() const { return model->info().fields; }
  const std::string &path() const { return model_path; }

private:
  void allocate();
  std::string read_model_file();
  void load_model(const std::string &bytes);
  void check_same_everywhere(const std::string &problem);
  void check_masses();
  void check_special_bonds();
  void check_heat_flux();
  void extend_ghosts();
  void log_summary();
  void evaluate();
  void check_finite(size_t);
  void tally();
  bool fields_wanted() const;

  std::unique_ptr<HLGauss::Model> model;
  std::string model_path, model_hash, field_names;
  std::string device;
  double memory_limit;       // MiB for tensors, 0 for the default
  bool exchange_features;    // per layer between ranks; else ghosts reach layers * cutoff
  bool edges_on_device;      // candidates go to the device once per neighbour list
  size_t model_size;
  std::vector<int> type_to_element;    // -1: this style does not see the type
  bool log_pending;                    // the summary waits for the masses
  double energy_unit;                  // LAMMPS energy unit per eV

  AtomGraph nodes;
  HLGauss::Evaluation result;
  FeatureExchange exchange;

  std::vector<int> field_flags;                     // triggers of fix pair, one per field
  std::vector<std::vector<double>> field_values;    // (nmax) per field, LAMMPS units
  bigint fields_step;                               // step the values belong to, or -1
  std::vector<tagint> fields_tags;                  // owned atoms the values belong to

  bigint num_evaluations, num_with_fields, num_edges_seen, num_centers_seen;
  double time_graph, time_model, time_tally;    // seconds in this run
  double peak_bytes;                            // of tensors, in this run
};

}    // namespace LAMMPS_NS

#endif

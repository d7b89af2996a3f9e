// A potential read from hl.pt, as the pair style sees it: a graph in, energies and gradients out.
// Implemented in model.cpp, the only file that knows torch, and reached through
// libhlgauss_torch.so.

#ifndef LMP_HLGAUSS_MODEL_H
#define LMP_HLGAUSS_MODEL_H

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace HLGauss {

constexpr int MODEL_FORMAT_VERSION = 1;    // newest format_version of hl.pt this code reads

struct ModelInfo {
  std::vector<std::string> elements;
  std::vector<double> masses;              // u, one per element
  double cutoff;                           // Angstrom
  int num_layers;                          // 1: strictly local; more: message passing
  std::string dtype;                       // "float32" or "float64"
  std::vector<std::string> fields;         // per-atom uncertainty fields on request
  std::vector<std::string> field_units;    // one per field
  std::string card;                        // JSON: what the model says about itself
  std::string runtime;                     // e.g. "TorchScript, torch 2.13.0"
  std::string device;                      // e.g. "cpu" or "cuda:0 (NVIDIA H200)"
  std::string warning;                     // one line about versions or a shared device, or empty
};

/// Inputs of one evaluation; keys, order of nodes and order of edges as in lmp_hl/keys.py.
struct Graph {
  std::vector<int64_t> species;                     // (num_nodes), owned atoms first
  std::vector<int64_t> centers;                     // (num_edges), node i
  std::vector<int64_t> neighbors;                   // (num_edges), node j
  std::vector<double> vectors;                      // (num_edges, 3), r_j - r_i, Angstrom
  std::vector<int64_t> layer_nodes, layer_edges;    // (num_layers)
};

struct Evaluation {
  std::vector<double> energy;                 // (num_owned), eV
  std::vector<double> gradients;              // (num_edges, 3), dE/d(vectors), eV/Angstrom
  std::vector<std::vector<double>> fields;    // one (num_owned) row per field, if asked for
};

class Model {
public:
  virtual ~Model() = default;
  virtual const ModelInfo &info() const = 0;

  /// Fills `result`; false with a one-line `error` if the model failed. Throws nothing.
  virtual bool evaluate(const Graph &graph, bool with_fields, Evaluation &result,
                        std::string &error) = 0;
};

struct LoadRequest {
  const char *bytes;     // content of the model file
  size_t size;           // number of bytes
  const char *device;    // "auto", "cpu", "cuda" or "cuda:N"
  int local_rank;        // rank among the `local_ranks` ranks of this node
  int local_ranks;
  int threads;    // CPU threads of torch for this rank
};

/// The model, self-tested on its device, or nullptr with a one-line `error`. Throws nothing.
using LoadModel = Model *(*) (const LoadRequest &request, std::string &error);
constexpr const char *LOAD_MODEL_SYMBOL = "hlgauss_load_model";
constexpr const char *TORCH_LIBRARY = "libhlgauss_torch.so";

}    // namespace HLGauss

#endif

// A potential read from hl.pt or hl.pt2, as the pair style sees it: atoms and edges in; energies,
// forces, virials and fields out. What implements it knows torch and is libhlgauss_torch.so:
// model_file.cpp, model.cpp, layers.cpp, runtime.cpp.

#ifndef LMP_HLGAUSS_MODEL_H
#define LMP_HLGAUSS_MODEL_H

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace HLGauss {

constexpr int MODEL_FORMAT_VERSION = 4;    // the format_version of hl.pt this code reads

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
  int num_members;                         // of an ensemble; 1: a single potential
  int num_features;                        // of an atom, between two layers; 0 if strictly local
  int num_sums;                            // per atom, over its edges on all ranks, for fields
  std::string device;                      // e.g. "cpu" or "cuda:0 (NVIDIA H200)"
  std::string warning;                     // one line about versions or a shared device, or empty
};

/// Inputs of one evaluation; order of nodes and edges as in lmp_hl/keys.py.
struct Graph {
  std::vector<int64_t> species;                     // (num_nodes), owned atoms first
  std::vector<double> positions;                    // (num_nodes, 3), Angstrom
  std::vector<int64_t> centers;                     // (num_edges), node i
  std::vector<int64_t> neighbors;                   // (num_edges), node j
  std::vector<int64_t> layer_nodes, layer_edges;    // (num_layers)
  bool candidates;    // edges may be longer than the cutoff: to be filtered on the device
  bool same_edges;    // candidates are those of the call before: the device still has them

  int64_t num_owned() const { return layer_nodes.back(); }
};

struct Request {
  bool exchange_features;    // all layers are evaluated for owned atoms only
  bool fields;
  bool virial;              // of the whole structure
  bool atom_virials;        // half of each edge to either end
  bool centroid_virials;    // each edge to its neighbour, for the heat flux
};

struct Evaluation {
  std::vector<double> energy;                 // (num_owned), eV
  std::vector<double> forces;                 // (num_nodes, 3), eV/Angstrom
  double virial[6];                           // eV; xx yy zz xy xz yz
  std::vector<double> atom_virials;           // (num_nodes, 6), if asked for
  std::vector<double> centroid_virials;       // (num_nodes, 9), xx yy zz xy xz yz yx zx zy
  std::vector<std::vector<double>> fields;    // one (num_owned) row per field, if asked for
  int64_t num_edges;                          // within the cutoff
  double peak_bytes;                          // most memory in use by tensors
  std::string notice;                         // one line about what was done differently, or empty
};

/// Carries per-node numbers between ranks. Every rank calls these equally often, also without
/// atoms.
class Exchange {
public:
  virtual ~Exchange() = default;
  /// `values` (num_nodes, width): rows of owned atoms are sent to the other nodes that are they.
  virtual void forward(double *values, int width) = 0;
  /// Adds the rows of the other nodes to those of the owned atoms that they are.
  virtual void reverse(double *values, int width) = 0;
};

class Model {
public:
  virtual ~Model() = default;
  virtual const ModelInfo &info() const = 0;

  /// Fills `result`; false with a one-line `error` if the model failed. Throws nothing. The
  /// exchange is used between layers if that was asked for, and for fields if they need sums.
  virtual bool evaluate(const Graph &graph, const Request &request, Exchange &exchange,
                        Evaluation &result, std::string &error) = 0;
};

struct LoadRequest {
  const char *bytes;     // content of the model file
  size_t size;           // number of bytes
  const char *device;    // "auto", "cpu", "cuda" or "cuda:N"
  int local_rank;        // rank among the `local_ranks` ranks of this node
  int local_ranks;
  int threads;      // CPU threads of torch for this rank
  double memory;    // MiB that tensors of one evaluation may take, or 0: the device's default
};

/// The model, self-tested on its device, or nullptr with a one-line `error`. Throws nothing.
using LoadModel = Model *(*) (const LoadRequest &request, std::string &error);
constexpr const char *LOAD_MODEL_SYMBOL = "hlgauss_load_model";
constexpr const char *TORCH_LIBRARY = "libhlgauss_torch.so";

}    // namespace HLGauss

#endif

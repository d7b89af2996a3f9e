// Layers of a potential forwards and backwards, a portion of the atoms at a time so that the memory
// suffices.

#ifndef LMP_HLGAUSS_LAYERS_H
#define LMP_HLGAUSS_LAYERS_H

#include "model.h"
#include "runtime.h"

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

namespace HLGauss {

constexpr double MIB = 1024.0 * 1024.0;

/// Edges between nodes, (num_edges) each, sorted by centre; layer t evaluates the first
/// layer_nodes[t] nodes with the first layer_edges[t] edges.
struct Edges {
  at::Tensor species;               // (num_nodes,)
  at::Tensor centers, neighbors;    // (num_edges,)
  at::Tensor vectors;               // (num_edges, 3), in the model's dtype
  std::vector<int64_t> layer_nodes, layer_edges;
};

struct LayerOutputs {
  at::Tensor energies, gradients;    // (num_owned, num_members), (num_edges, 3 * num_members)
  // with fields, of the last layer: values of atoms, and what its edges carry to the neighbours
  at::Tensor carried, on_edges;
};

/// Counts the bytes of all tensors that are made while it lives, on any device.
class MemoryMeter {
  struct Counter : public c10::MemoryReportingInfoBase {
    int64_t now = 0, peak = 0;
    void reportMemoryUsage(void *, int64_t bytes, size_t, size_t, c10::Device) override
    {
      now += bytes;
      peak = std::max(peak, now);
    }
    bool memoryProfilingEnabled() const override { return true; }
  };

public:
  MemoryMeter() :
      counter(std::make_shared<Counter>()), guard(c10::DebugInfoKind::PROFILER_STATE, counter)
  {
  }
  int64_t peak() const { return counter->peak; }

private:
  std::shared_ptr<Counter> counter;
  c10::DebugInfoGuard guard;
};

struct Stage;

class Layers {
public:
  /// `budget` is what tensors of one evaluation may take, in bytes; `num_shared` the numbers that
  /// an edge carries to its neighbour for fields. Keeps references to all but the numbers.
  Layers(Runtime &runtime, const ModelInfo &info, int64_t num_shared, torch::Device device,
         double budget);

  /// What an atom and an edge take of the memory, in bytes. Before this nothing is divided.
  void set_cost(double of_atom, double of_edge);

  /// Between two layers an exchange, if there is one, takes features of owned atoms to the other
  /// ranks, and gradients back.
  LayerOutputs evaluate(const Edges &edges, bool with_fields, Exchange *exchange,
                        MemoryMeter &meter);

  /// Numbers of all nodes -> their sums on the owned atoms.
  at::Tensor gathered(const at::Tensor &numbers, int64_t num_owned, Exchange &exchange) const;

  int64_t peak;          // most bytes that the meter saw, of the last evaluation
  std::string notice;    // what was done differently in the last evaluation, or ""

private:
  at::Tensor exchanged(const at::Tensor &features, int64_t num_nodes, Exchange &exchange) const;
  double cost(int64_t num_centers, int64_t num_edges) const;
  template <typename Evaluate>
  void in_portions(const Stage &stage, MemoryMeter &meter, const Evaluate &evaluate);

  Runtime &runtime;
  const ModelInfo &about;
  int64_t num_shared;
  torch::Device device;
  double budget, bytes_per_atom, bytes_per_edge;
};

}    // namespace HLGauss

#endif

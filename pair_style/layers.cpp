// Portions of centres as large as the memory allows, and the order of layers and exchanges.

#include "layers.h"

#include <tuple>

namespace HLGauss {

using Tensor = torch::Tensor;

namespace {

bool out_of_memory(const std::string &text)
{
  return text.find("out of memory") != std::string::npos ||
         text.find("can't allocate memory") != std::string::npos;
}

}    // namespace

/// Some centres of a stage, and what it reads (lmp_hl/stages.py) of them and their edges.
struct Portion {
  int64_t begin, end, first_edge, last_edge;
  Tensor nodes;    // whose features are read, undefined: all of them
  Tensors inputs;

  /// Adds gradients of the features that were read to those of all nodes.
  void add_to(const Tensor &of_nodes, const Tensor &gradients) const
  {
    if (nodes.defined())
      of_nodes.index_add_(0, nodes, gradients);
    else
      of_nodes.add_(gradients);
  }
};

/// Edges of one layer and what it needs of the nodes.
struct Stage {
  int layer;
  int64_t num_centers;
  Tensor species;               // (num_nodes,)
  Tensor centers, neighbors;    // (num_edges,), centers in ascending order
  Tensor vectors;               // (num_edges, 3)
  Tensor features;              // (num_nodes, num_features), undefined in the first layer

  int64_t num_edges() const { return centers.size(0); }

  /// The centres from `begin` to `end`, whose edges are given.
  Portion portion(int64_t begin, int64_t end, int64_t first_edge, int64_t last_edge) const
  {
    // compiled code takes what it reads for contiguous and aligned: a later part is copied
    const auto part = [](const Tensor &x, int64_t from, int64_t to) {
      const Tensor rows = x.slice(0, from, to);
      return from > 0 ? rows.clone() : rows;
    };
    const auto edges = [&](const Tensor &x) { return part(x, first_edge, last_edge); };
    Portion out = {begin, end, first_edge, last_edge, Tensor(), {part(species, begin, end)}};
    Tensor others = edges(neighbors), read = features;
    // gradients are as many as features that are read: of all nodes they would cost more than the
    // portion itself, and all portions together the square of the number of atoms
    if (layer > 0 && end - begin < num_centers && last_edge > first_edge) {
      std::tie(out.nodes, others, std::ignore) = at::_unique2(others, true, true);
      read = features.index_select(0, out.nodes);
    }
    if (layer == 0) out.inputs.push_back(species);
    out.inputs.push_back(torch::stack({edges(centers) - begin, others}));
    out.inputs.push_back(edges(vectors));
    if (layer > 0) {
      out.inputs.push_back(part(features, begin, end));
      out.inputs.push_back(read);
    }
    return out;
  }
};

Layers::Layers(Runtime &evaluates, const ModelInfo &info, int64_t shared, torch::Device where,
               double bytes) :
    peak(0),
    runtime(evaluates), about(info), num_shared(shared), device(where), budget(bytes),
    bytes_per_atom(0.0), bytes_per_edge(0.0)
{
}

void Layers::set_cost(double of_atom, double of_edge)
{
  bytes_per_atom = of_atom;
  bytes_per_edge = of_edge;
}

/// Bytes of one portion of a stage.
double Layers::cost(int64_t num_centers, int64_t num_edges) const
{
  return bytes_per_atom * (double) num_centers + bytes_per_edge * (double) num_edges;
}

/// Calls evaluate(portion) for portions of a stage's centres that fit into the memory; when one
/// does not, again with portions of half the size.
template <typename Evaluate>
void Layers::in_portions(const Stage &stage, MemoryMeter &meter, const Evaluate &evaluate)
{
  if (stage.num_centers == 0) return;
  int64_t begin = 0, first = 0;
  Tensor ends;    // (num_centers,), on the CPU: number of edges up to and with each centre
  while (begin < stage.num_centers) {
    int64_t end = stage.num_centers, stop = stage.num_edges();
    if (cost(end - begin, stop - first) > budget) {
      if (!ends.defined())
        ends = torch::searchsorted(stage.centers.contiguous(),
                                   torch::arange(1, end + 1, stage.centers.options()))
                   .cpu();
      const int64_t *upto = ends.data_ptr<int64_t>();
      for (end = begin + 1; end < stage.num_centers; end++)
        if (cost(end + 1 - begin, upto[end] - first) > budget) break;
      stop = upto[end - 1];
    }
    try {
      evaluate(stage.portion(begin, end, first, stop));
    } catch (const std::exception &e) {
      if (!out_of_memory(e.what())) throw;
      TORCH_CHECK(end - begin > 1, "out of memory on ", about.device, " for a single atom with ",
                  stop - first, " edges: use a smaller model or a device with more memory");
      budget = 0.5 * cost(end - begin, stop - first);
      notice = "out of memory on " + about.device + " with " + std::to_string(end - begin) +
               " atoms and " + std::to_string(stop - first) + " edges at once; from now on " +
               std::to_string((end - begin) / 2) + " atoms at once: to avoid this give 'memory " +
               std::to_string((int64_t) (budget / MIB)) + "' in pair_style";
      continue;
    }
    begin = end;
    first = stop;
  }
  peak = std::max(peak, meter.peak());
}

/// Features of the owned atoms -> of all nodes.
Tensor Layers::exchanged(const Tensor &features, int64_t num_nodes, Exchange &exchange) const
{
  Tensor all = torch::zeros({num_nodes, about.num_features}, torch::kFloat64);
  all.slice(0, 0, features.size(0)).copy_(features);
  exchange.forward(all.data_ptr<double>(), about.num_features);
  return all.to(device, features.scalar_type());
}

Tensor Layers::gathered(const Tensor &numbers, int64_t num_owned, Exchange &exchange) const
{
  const Tensor all = numbers.to(torch::kCPU, torch::kFloat64).contiguous();
  exchange.reverse(all.data_ptr<double>(), (int) all.size(1));
  return all.slice(0, 0, num_owned).to(device, numbers.scalar_type());
}

/// Layer by layer forwards, then the gradients layer by layer backwards.
LayerOutputs Layers::evaluate(const Edges &edges, bool with_fields, Exchange *exchange,
                              MemoryMeter &meter)
{
  notice.clear();
  peak = 0;
  const int last = about.num_layers - 1;
  std::vector<Stage> stages;
  Tensor features;
  for (int t = 0; t <= last; t++) {
    const auto of_layer = [&](const Tensor &x) { return x.slice(0, 0, edges.layer_edges[t]); };
    stages.push_back({t, edges.layer_nodes[t], edges.species, of_layer(edges.centers),
                      of_layer(edges.neighbors), of_layer(edges.vectors), features});
    if (t == last) break;
    features = torch::empty({edges.layer_nodes[t], about.num_features}, edges.vectors.options());
    in_portions(stages[t], meter, [&](const Portion &part) {
      features.slice(0, part.begin, part.end).copy_(runtime.layer(t, part.inputs).detach());
    });
    if (exchange) features = exchanged(features, edges.species.size(0), *exchange);
  }

  LayerOutputs out;
  const int64_t num_members = about.num_members;
  const auto of_atoms = edges.vectors.options().dtype(torch::kFloat64);
  out.energies = torch::zeros({edges.layer_nodes[last], num_members}, of_atoms);
  out.gradients = torch::zeros({edges.vectors.size(0), 3 * num_members}, edges.vectors.options());
  if (with_fields)
    out.on_edges = torch::empty({edges.layer_edges[last], num_shared}, edges.vectors.options());
  Tensor gradients = last > 0 ? torch::zeros_like(features) : Tensor();
  in_portions(stages[last], meter, [&](const Portion &part) {
    const Tensors found = runtime.final(part.inputs, with_fields);
    out.energies.slice(0, part.begin, part.end).copy_(found.at(0));
    out.gradients.slice(0, part.first_edge, part.last_edge).add_(found.at(1));
    if (last > 0) {
      gradients.slice(0, part.begin, part.end).add_(found.at(2));
      part.add_to(gradients, found.at(3));
    }
    if (!with_fields) return;
    const Tensor &carried = found.at(found.size() - 2);
    if (part.begin == 0)
      out.carried = torch::empty({edges.layer_nodes[last], carried.size(1)}, carried.options());
    out.carried.slice(0, part.begin, part.end).copy_(carried);
    out.on_edges.slice(0, part.first_edge, part.last_edge).copy_(found.back());
  });

  for (int t = last - 1; t >= 0; t--) {
    if (exchange) gradients = gathered(gradients, edges.layer_nodes[t], *exchange);
    Tensor before = t > 0 ? torch::zeros_like(stages[t].features) : Tensor();
    in_portions(stages[t], meter, [&](const Portion &part) {
      const Tensor wanted = gradients.slice(0, part.begin, part.end);
      const Tensors found =
          runtime.layer_vjp(t, part.inputs, part.begin > 0 ? wanted.clone() : wanted);
      out.gradients.slice(0, part.first_edge, part.last_edge).add_(found.at(0));
      if (t > 0) {
        before.slice(0, part.begin, part.end).add_(found.at(1));
        part.add_to(before, found.at(2));
      }
    });
    gradients = before;
  }
  return out;
}

}    // namespace HLGauss

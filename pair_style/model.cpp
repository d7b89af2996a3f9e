// Evaluates a potential: edges, stages layer by layer, forces and virials, all as tensors on one
// device; opens and checks its file.

#include "model.h"
#include "runtime.h"

#include <ATen/Parallel.h>
#include <torch/cuda.h>
#include <torch/script.h>
#include <torch/version.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <sstream>

namespace HLGauss {

namespace {

using Tensor = torch::Tensor;
using TensorDict = c10::Dict<std::string, Tensor>;

/// The caller's thread count is restored when an evaluation ends: it belongs to the whole process.
class ThreadGuard {
public:
  explicit ThreadGuard(int threads) : saved(at::get_num_threads())
  {
    if (threads != saved) at::set_num_threads(threads);
  }
  ~ThreadGuard()
  {
    if (at::get_num_threads() != saved) at::set_num_threads(saved);
  }
  ThreadGuard(const ThreadGuard &) = delete;
  ThreadGuard &operator=(const ThreadGuard &) = delete;

private:
  int saved;
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
  void restart() { counter->peak = counter->now; }
  int64_t now() const { return counter->now; }
  int64_t peak() const { return counter->peak; }

private:
  std::shared_ptr<Counter> counter;
  c10::DebugInfoGuard guard;
};

std::string first_sentence(const std::string &text)
{
  return text.substr(0, std::min(text.find('\n'), text.find(". ")));
}

/// The line of a TorchScript failure that names the exception; the rest is its call stack.
std::string last_line(const std::string &text)
{
  const auto end = text.find_last_not_of(" \n");
  if (end == std::string::npos) return "";
  const auto begin = text.rfind('\n', end);
  return text.substr(begin == std::string::npos ? 0 : begin + 1, end + 1 - (begin + 1));
}

template <typename T> std::vector<T> list_attribute(torch::jit::Module &module, const char *name)
{
  std::vector<T> values;
  for (const c10::IValue &value : module.attr(name).toListRef()) values.push_back(value.to<T>());
  return values;
}

Tensor view(const std::vector<int64_t> &values)
{
  return torch::from_blob(const_cast<int64_t *>(values.data()), {(int64_t) values.size()},
                          torch::kInt64);
}

constexpr double MEASURED_EDGES = 2000.0;    // enough to find bytes per edge and atom

bool out_of_memory(const std::string &text)
{
  return text.find("out of memory") != std::string::npos ||
         text.find("can't allocate memory") != std::string::npos;
}

/// Edges of one layer and what it needs of the nodes.
struct Stage {
  int layer;
  int64_t num_centers;
  Tensor species;               // (num_nodes,)
  Tensor centers, neighbors;    // (num_edges,), centers in ascending order
  Tensor vectors;               // (num_edges, 3)
  Tensor features;              // (num_nodes, num_features), undefined in the first layer

  int64_t num_edges() const { return centers.size(0); }

  /// Inputs (lmp_hl/stages.py) of the centres from `begin` to `end`, whose edges are given.
  Tensors inputs(int64_t begin, int64_t end, int64_t first_edge, int64_t last_edge) const
  {
    // compiled code takes what it reads for contiguous and aligned: a later part is copied
    const auto part = [](const Tensor &x, int64_t from, int64_t to) {
      const Tensor rows = x.slice(0, from, to);
      return from > 0 ? rows.clone() : rows;
    };
    const auto edges = [&](const Tensor &x) { return part(x, first_edge, last_edge); };
    Tensors all = {part(species, begin, end)};
    if (layer == 0) all.push_back(species);
    all.push_back(torch::stack({edges(centers) - begin, edges(neighbors)}));
    all.push_back(edges(vectors));
    if (layer > 0) {
      all.push_back(part(features, begin, end));
      all.push_back(features);
    }
    return all;
  }
};

/// The structure stored in a model file, on the device.
struct SelfTest {
  SelfTest(const TensorDict &stored, torch::Device device, torch::Dtype dtype) :
      species(stored.at("species").to(device)), centers(stored.at("edge_index")[0].to(device)),
      neighbors(stored.at("edge_index")[1].to(device)),
      vectors(stored.at("edge_vectors").to(device, dtype))
  {
  }

  Tensor species, centers, neighbors, vectors;
};

/// Tensors that go to the host in one transfer.
class Download {
public:
  void add(const Tensor &tensor, std::vector<double> &values)
  {
    parts.push_back(tensor.to(torch::kFloat64).flatten());
    targets.push_back(&values);
  }

  void fetch()
  {
    const Tensor all = torch::cat(parts).cpu();
    const double *begin = all.data_ptr<double>();
    for (size_t k = 0; k < parts.size(); k++) {
      targets[k]->assign(begin, begin + parts[k].numel());
      begin += parts[k].numel();
    }
  }

private:
  Tensors parts;
  std::vector<std::vector<double> *> targets;
};

class TorchModel : public Model {
public:
  TorchModel(const torch::jit::Module &loaded, std::unique_ptr<Runtime> evaluates,
             torch::Device where, const LoadRequest &request) :
      module(loaded),
      runtime(std::move(evaluates)), device(where), threads(request.threads),
      budget(request.memory * MIB), bytes_per_atom(0.0), bytes_per_edge(0.0), peak(0)
  {
    about.elements = list_attribute<std::string>(module, "elements");
    about.masses = list_attribute<double>(module, "masses");
    about.cutoff = module.attr("cutoff").toDouble();
    about.num_layers = (int) module.attr("num_layers").toInt();
    about.dtype = module.attr("dtype").toStringRef();
    about.card = module.attr("card").toStringRef();
    about.fields = list_attribute<std::string>(module, "fields");
    about.field_units = list_attribute<std::string>(module, "field_units");
    torch::jit::Module stages = module.attr("stages").toModule();
    about.num_members = (int) stages.attr("num_members").toInt();
    about.num_features = (int) stages.attr("num_features").toInt();
    num_shared = stages.attr("num_shared").toInt();
    about.num_sums = (about.num_members > 1 ? 3 * about.num_members : 0) + (int) num_shared;
    dtype = about.dtype == "float64" ? torch::kFloat64 : torch::kFloat32;
    // members take turns in the caches, and each portion reads and writes features of all nodes
    if (budget == 0.0)
      budget = device.is_cpu() ? MIB * runtime->portion() * about.num_members : HUGE_VAL;
    describe(request.local_rank, request.local_ranks);
  }

  const ModelInfo &info() const override { return about; }

  /// One line about what differs from the outputs stored in the file, or "".
  std::string self_test()
  {
    ThreadGuard guard(threads);
    const double tolerance = module.attr("selftest_tolerance").toDouble();
    const SelfTest test = {dict("selftest_inputs"), device, dtype};
    // the first calls of a scripted module are slow while it specializes: spend them here
    evaluate_copies(test, 1, 1, false);
    evaluate_copies(test, 1, 1, false);
    const Outputs outputs = evaluate_copies(test, 1, 1, true);
    const Tensor sums = sums_on_nodes(outputs, test.centers, test.neighbors, test.species.numel());
    const Tensors fields = finish(outputs, test.species, sums);
    for (const auto &item : dict("selftest_outputs")) {
      const std::string key = item.key();
      const auto field = std::find(about.fields.begin(), about.fields.end(), key);
      Tensor found;
      if (key == "energy")
        found = outputs.energies.mean(1);
      else if (key == "edge_gradients")
        found = of_mean(outputs.gradients);
      else if (field != about.fields.end())
        found = fields.at(field - about.fields.begin());
      else
        return "its output has no '" + key + "'";
      const Tensor want = item.value().to(torch::kCPU, torch::kFloat64);
      const Tensor got = found.to(torch::kCPU, torch::kFloat64);
      if (want.sizes() != got.sizes()) return "'" + key + "' has another shape than stored";
      if (want.numel() == 0) continue;
      const double scale = std::max(1.0, want.abs().max().item<double>());
      const double error = (want - got).abs().max().item<double>() / scale;
      if (!(error <= tolerance))    // also true for NaN
        return "'" + key + "' differs from the stored value by " + std::to_string(error) +
               " of its size (allowed: " + std::to_string(tolerance) + ")";
    }
    return "";
  }

  /// Finds out how much memory an atom and an edge take. Measured once, so that portions, and with
  /// them the last digit of a sum, are the same in every run of a model.
  void measure_memory()
  {
    ThreadGuard guard(threads);
    const SelfTest test = {dict("selftest_inputs"), device, dtype};
    const auto num_atoms = (double) test.species.numel();
    const auto num_edges = (double) test.centers.numel();
    if (num_edges == 0) return;
    const int64_t copies = 1 + (int64_t) (MEASURED_EDGES / num_edges);
    const auto bytes = [&](int64_t repeat) {
      evaluate_copies(test, copies, repeat, true);
      return (double) peak / (double) copies;
    };
    const double once = bytes(1), thrice = bytes(3);
    bytes_per_edge = std::max(1.0, (thrice - once) / (2.0 * num_edges));
    bytes_per_atom = std::max(1.0, (once - bytes_per_edge * num_edges) / num_atoms);
  }

  bool evaluate(const Graph &graph, const Request &request, Exchange &exchange, Evaluation &result,
                std::string &error) override
  {
    try {
      ThreadGuard guard(threads);
      MemoryMeter meter;
      notice.clear();
      peak = 0;
      evaluate_graph(graph, request, exchange, result, meter);
      result.peak_bytes = (double) peak;
      result.notice = notice;
      return true;
    } catch (const c10::Error &e) {
      error = last_line(e.what_without_backtrace());
    } catch (const std::exception &e) {
      error = last_line(e.what());
    } catch (...) {
      error = "unknown failure";
    }
    return false;
  }

private:
  struct Outputs {
    Tensor energies, gradients;    // (num_owned, num_members), (num_edges, 3 * num_members)
    // with fields, of the last stage: values of atoms, and what its edges carry to the neighbours
    Tensor carried, on_edges;
  };

  /// Copies of the self-test's structure side by side, every edge `repeat` times.
  Outputs evaluate_copies(const SelfTest &test, int64_t copies, int64_t repeat, bool with_fields)
  {
    const int64_t num_atoms = test.species.numel();
    const Tensor shift = torch::arange(copies, test.species.options()).unsqueeze(1) * num_atoms;
    const auto nodes = [&](const Tensor &x) {
      return (x.repeat_interleave(repeat).unsqueeze(0) + shift).flatten();
    };
    const std::vector<int64_t> layer_nodes(about.num_layers, copies * num_atoms);
    const std::vector<int64_t> layer_edges(about.num_layers,
                                           copies * repeat * test.centers.numel());
    MemoryMeter meter;
    peak = 0;
    return evaluate_layers(test.species.repeat({copies}), nodes(test.centers),
                           nodes(test.neighbors),
                           test.vectors.repeat_interleave(repeat, 0).repeat({copies, 1}),
                           layer_nodes, layer_edges, with_fields, nullptr, meter);
  }

  TensorDict dict(const char *name) const
  {
    return c10::impl::toTypedDict<std::string, Tensor>(module.attr(name).toGenericDict());
  }

  void describe(int local_rank, int local_ranks)
  {
    about.device = device.str();
    const std::string version = runtime_torch_version();
    about.runtime = runtime->name() + ", torch " + (version.empty() ? TORCH_VERSION : version);
    const std::string built = TORCH_VERSION;
    if (!version.empty() &&
        version.substr(0, version.find('+')) != built.substr(0, built.find('+')))
      about.warning = "the plugin was built against torch " + built + " and runs with torch " +
                      version + ": reinstall lmp-hl";
    const int devices = device.is_cuda() ? (int) torch::cuda::device_count() : 0;
    if (devices > 0 && local_ranks > devices && local_rank == 0)
      about.warning += (about.warning.empty() ? "" : "; ") + std::to_string(local_ranks) +
                       " ranks share " + std::to_string(devices) +
                       " GPU(s) on a node: one rank per GPU is faster";
  }

  /// Positions to edges, stages, then forces F_i += g_e, F_j -= g_e and virials -r_e g_e for each
  /// edge e from i to j with r_e = r_j - r_i and g_e = dE/dr_e.
  void evaluate_graph(const Graph &graph, const Request &request, Exchange &exchange,
                      Evaluation &result, MemoryMeter &meter)
  {
    const auto num_nodes = (int64_t) graph.species.size();
    if (!graph.same_edges || !edges_centers.defined()) {
      species = view(graph.species).to(device);
      edges_centers = view(graph.centers).to(device);
      edges_neighbors = view(graph.neighbors).to(device);
    }
    Tensor centers = edges_centers, neighbors = edges_neighbors;
    const Tensor positions = torch::from_blob(const_cast<double *>(graph.positions.data()),
                                              {num_nodes, 3}, torch::kFloat64)
                                 .to(device);
    Tensor r = positions.index_select(0, neighbors) - positions.index_select(0, centers);
    std::vector<int64_t> layer_edges = graph.layer_edges;
    if (graph.candidates) {
      const Tensor kept = torch::nonzero(r.square().sum(1) < about.cutoff * about.cutoff).flatten();
      const Tensor bounds = torch::searchsorted(kept, view(graph.layer_edges).to(device)).cpu();
      layer_edges.assign(bounds.data_ptr<int64_t>(), bounds.data_ptr<int64_t>() + bounds.numel());
      r = r.index_select(0, kept);
      centers = centers.index_select(0, kept);
      neighbors = neighbors.index_select(0, kept);
    }
    result.num_edges = layer_edges.back();
    const Outputs found =
        evaluate_layers(species, centers, neighbors, r.to(dtype), graph.layer_nodes, layer_edges,
                        request.fields, request.exchange_features ? &exchange : nullptr, meter);

    const Tensor g = of_mean(found.gradients.to(torch::kFloat64));
    const auto zeros = [&](int64_t width) { return torch::zeros({num_nodes, width}, g.options()); };
    Download down;
    down.add(found.energies.mean(1), result.energy);
    down.add(on_nodes(g, centers, neighbors, num_nodes), result.forces);
    // of one edge r and g need not be parallel, the sum is symmetric
    std::vector<double> w(9, 0.0);
    if (request.virial) down.add(-torch::matmul(r.t(), g), w);
    if (request.atom_virials || request.centroid_virials) {
      const Tensor of_edges = -(r.unsqueeze(2) * g.unsqueeze(1)).flatten(1);
      const auto order = [&](const std::vector<int64_t> &columns) {
        return of_edges.index_select(1, view(columns).to(device));
      };
      if (request.atom_virials) {
        const Tensor half = 0.25 * (order({0, 4, 8, 1, 2, 5}) + order({0, 4, 8, 3, 6, 7}));
        down.add(zeros(6).index_add_(0, centers, half).index_add_(0, neighbors, half),
                 result.atom_virials);
      }
      if (request.centroid_virials)
        down.add(zeros(9).index_add_(0, neighbors, order({0, 4, 8, 1, 2, 5, 3, 6, 7})),
                 result.centroid_virials);
    }
    Tensors fields;
    if (request.fields) {
      Tensor sums = sums_on_nodes(found, centers, neighbors, num_nodes);
      if (about.num_sums > 0) sums = gathered(sums, graph.num_owned(), exchange);
      fields = finish(found, species, sums);
    }
    result.fields.resize(fields.size());
    for (size_t k = 0; k < fields.size(); k++) down.add(fields[k], result.fields[k]);
    down.fetch();
    const double symmetric[6] = {
        w[0], w[4], w[8], 0.5 * (w[1] + w[3]), 0.5 * (w[2] + w[6]), 0.5 * (w[5] + w[7])};
    std::copy(symmetric, symmetric + 6, result.virial);
  }

  /// Layer by layer forwards, then the gradients layer by layer backwards. Between two layers an
  /// exchange takes features of owned atoms to the other ranks, and gradients back.
  Outputs evaluate_layers(const Tensor &species, const Tensor &centers, const Tensor &neighbors,
                          const Tensor &vectors, const std::vector<int64_t> &layer_nodes,
                          const std::vector<int64_t> &layer_edges, bool with_fields,
                          Exchange *exchange, MemoryMeter &meter)
  {
    const int last = about.num_layers - 1;
    std::vector<Stage> stages;
    Tensor features;
    for (int t = 0; t <= last; t++) {
      const auto edges = [&](const Tensor &x) { return x.slice(0, 0, layer_edges[t]); };
      stages.push_back(
          {t, layer_nodes[t], species, edges(centers), edges(neighbors), edges(vectors), features});
      if (t == last) break;
      features = torch::empty({layer_nodes[t], about.num_features}, vectors.options());
      in_portions(stages[t], meter,
                  [&](int64_t begin, int64_t end, int64_t, int64_t, const Tensors &inputs) {
                    features.slice(0, begin, end).copy_(runtime->layer(t, inputs).detach());
                  });
      if (exchange) features = exchanged(features, species.size(0), *exchange);
    }

    Outputs out;
    const int64_t num_members = about.num_members;
    const auto of_atoms = vectors.options().dtype(torch::kFloat64);
    out.energies = torch::zeros({layer_nodes[last], num_members}, of_atoms);
    out.gradients = torch::zeros({vectors.size(0), 3 * num_members}, vectors.options());
    if (with_fields)
      out.on_edges = torch::empty({layer_edges[last], num_shared}, vectors.options());
    Tensor gradients = last > 0 ? torch::zeros_like(features) : Tensor();
    in_portions(
        stages[last], meter,
        [&](int64_t begin, int64_t end, int64_t first, int64_t stop, const Tensors &inputs) {
          const Tensors found = runtime->final(inputs, with_fields);
          out.energies.slice(0, begin, end).copy_(found.at(0));
          out.gradients.slice(0, first, stop).add_(found.at(1));
          if (last > 0) {
            gradients.slice(0, begin, end).add_(found.at(2));
            gradients.add_(found.at(3));
          }
          if (!with_fields) return;
          const Tensor &carried = found.at(found.size() - 2);
          if (begin == 0)
            out.carried = torch::empty({layer_nodes[last], carried.size(1)}, carried.options());
          out.carried.slice(0, begin, end).copy_(carried);
          out.on_edges.slice(0, first, stop).copy_(found.back());
        });

    for (int t = last - 1; t >= 0; t--) {
      if (exchange) gradients = gathered(gradients, layer_nodes[t], *exchange);
      Tensor before = t > 0 ? torch::zeros_like(stages[t].features) : Tensor();
      in_portions(
          stages[t], meter,
          [&](int64_t begin, int64_t end, int64_t first, int64_t stop, const Tensors &inputs) {
            const Tensor part = gradients.slice(0, begin, end);
            const Tensors found = runtime->layer_vjp(t, inputs, begin > 0 ? part.clone() : part);
            out.gradients.slice(0, first, stop).add_(found.at(0));
            if (t > 0) {
              before.slice(0, begin, end).add_(found.at(1));
              before.add_(found.at(2));
            }
          });
      gradients = before;
    }
    return out;
  }

  /// Mean over the members of what stands side by side in columns, (n, 3 * num_members) -> (n, 3).
  Tensor of_mean(const Tensor &members) const
  {
    return members.reshape({members.size(0), about.num_members, 3}).mean(1);
  }

  /// Sums over edges F_i += g_e, F_j -= g_e on the nodes, float64.
  static Tensor on_nodes(const Tensor &gradients, const Tensor &centers, const Tensor &neighbors,
                         int64_t num_nodes)
  {
    const Tensor g = gradients.to(torch::kFloat64);
    return torch::zeros({num_nodes, g.size(1)}, g.options())
        .index_add_(0, centers, g)
        .index_add_(0, neighbors, -g);
  }

  /// What fields need of the edges that end at a node, (num_nodes, num_sums): the members' forces,
  /// then what edges carry to their neighbour.
  Tensor sums_on_nodes(const Outputs &outputs, const Tensor &centers, const Tensor &neighbors,
                       int64_t num_nodes) const
  {
    const Tensor carried = outputs.on_edges.to(torch::kFloat64);
    const Tensor sums = torch::zeros({num_nodes, num_shared}, carried.options())
                            .index_add_(0, neighbors.slice(0, 0, carried.size(0)), carried);
    if (about.num_members == 1) return sums;
    return torch::cat({on_nodes(outputs.gradients, centers, neighbors, num_nodes), sums}, 1);
  }

  /// Every field of the owned atoms.
  Tensors finish(const Outputs &outputs, const Tensor &species, const Tensor &sums)
  {
    const int64_t num_owned = outputs.energies.size(0);
    if (num_owned == 0) return Tensors(about.fields.size(), outputs.energies.flatten());
    return runtime->finish({species.slice(0, 0, num_owned), outputs.energies, outputs.carried,
                            sums.slice(0, 0, num_owned)});
  }

  /// Features of the owned atoms -> of all nodes.
  Tensor exchanged(const Tensor &features, int64_t num_nodes, Exchange &exchange) const
  {
    Tensor all = torch::zeros({num_nodes, about.num_features}, torch::kFloat64);
    all.slice(0, 0, features.size(0)).copy_(features);
    exchange.forward(all.data_ptr<double>(), about.num_features);
    return all.to(device, dtype);
  }

  /// Numbers of all nodes -> their sums on the owned atoms.
  Tensor gathered(const Tensor &numbers, int64_t num_owned, Exchange &exchange) const
  {
    const Tensor all = numbers.to(torch::kCPU, torch::kFloat64).contiguous();
    exchange.reverse(all.data_ptr<double>(), (int) all.size(1));
    return all.slice(0, 0, num_owned).to(device, numbers.scalar_type());
  }

  /// Bytes of one portion of a stage.
  double cost(int64_t num_centers, int64_t num_edges) const
  {
    return bytes_per_atom * (double) num_centers + bytes_per_edge * (double) num_edges;
  }

  /// Calls evaluate(begin, end, first_edge, last_edge, inputs) for portions of a stage's centres
  /// that fit into the memory; when one does not, again with portions of half the size.
  template <typename Evaluate>
  void in_portions(const Stage &stage, MemoryMeter &meter, const Evaluate &evaluate)
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
        evaluate(begin, end, first, stop, stage.inputs(begin, end, first, stop));
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

  static constexpr double MIB = 1024.0 * 1024.0;

  ModelInfo about;
  int64_t num_shared;    // numbers that an edge carries to its neighbour for fields
  torch::jit::Module module;
  std::unique_ptr<Runtime> runtime;
  torch::Device device;
  torch::Dtype dtype;
  int threads;
  double budget, bytes_per_atom, bytes_per_edge;
  Tensor species, edges_centers, edges_neighbors;    // on the device, of the last graph
  int64_t peak;
  std::string notice;
};

/// Device named by the request; an empty optional with `error` set if it does not exist here.
c10::optional<torch::Device> choose_device(const LoadRequest &request, std::string &error)
{
  const std::string wanted = request.device;
  const int count = (int) torch::cuda::device_count();
  if (wanted == "cpu" || (wanted == "auto" && count == 0)) return torch::Device(torch::kCPU);
  if (count == 0) {
    error = "device " + wanted +
            ": this torch sees no CUDA device; use 'device cpu' or install a "
            "torch built for CUDA";
    return c10::nullopt;
  }
  int index = request.local_rank % count;
  if (wanted.rfind("cuda:", 0) == 0) index = std::stoi(wanted.substr(5));
  if (index >= count) {
    error = "device " + wanted + ": torch sees " + std::to_string(count) +
            " CUDA device(s), numbered from 0";
    return c10::nullopt;
  }
  return torch::Device(torch::kCUDA, (c10::DeviceIndex) index);
}

Model *load(const LoadRequest &request, std::string &error)
{
  if (request.size < 4 || std::memcmp(request.bytes, "PK\3\4", 4) != 0) {
    error = "not a TorchScript file; wanted an hl.pt written by 'lmp-hl export'";
    return nullptr;
  }
  // a zip archive ends with its directory, which a truncated file has lost
  const std::string tail(request.bytes + request.size - std::min<size_t>(request.size, 70000),
                         std::min<size_t>(request.size, 70000));
  if (tail.find("PK\5\6") == std::string::npos) {
    error = "the file is truncated (" + std::to_string(request.size) +
            " bytes, no end record): copy or export it again";
    return nullptr;
  }
  const auto device = choose_device(request, error);
  if (!device) return nullptr;

  ThreadGuard guard(request.threads);
  const std::string bytes(request.bytes, request.size);
  std::string script;
  torch::jit::Module module;
  bool compiled = false;
  try {
    compiled = is_compiled(bytes, script);
    std::istringstream stream(compiled ? script : bytes);
    module = torch::jit::load(stream, *device);
  } catch (const c10::Error &e) {
    error = "not a TorchScript file or damaged (" + first_sentence(e.what_without_backtrace()) +
            "); wanted an hl.pt written by 'lmp-hl export'";
    return nullptr;
  }
  if (!module.hasattr("format_version") || !module.attr("format_version").isInt()) {
    error = "a TorchScript file, but without format_version; wanted one written by 'lmp-hl export'";
    return nullptr;
  }
  const int64_t version = module.attr("format_version").toInt();
  if (version != MODEL_FORMAT_VERSION) {
    error = "format version " + std::to_string(version) + ", this plugin reads version " +
            std::to_string(MODEL_FORMAT_VERSION) +
            (version > MODEL_FORMAT_VERSION ? ": update lmp-hl"
                                            : ": export the model again with 'lmp-hl export'");
    return nullptr;
  }
  for (const char *name :
       {"elements", "masses", "cutoff", "num_layers", "dtype", "fields", "field_units", "stages",
        "selftest_inputs", "selftest_outputs", "selftest_tolerance"})
    if (!module.hasattr(name)) {
      error = std::string("the file has no attribute '") + name + "': export it again";
      return nullptr;
    }
  module.eval();
  auto runtime =
      compiled ? compiled_runtime(bytes, module, *device, error) : scripted_runtime(module);
  if (!runtime) return nullptr;
  auto model = std::make_unique<TorchModel>(module, std::move(runtime), *device, request);
  const std::string difference = model->self_test();
  if (!difference.empty()) {
    error = "self-test failed on " + device->str() + ": " + difference +
            "; export the model again with this torch";
    return nullptr;
  }
  model->measure_memory();
  return model.release();
}

}    // namespace

extern "C" __attribute__((visibility("default"))) Model *
hlgauss_load_model(const LoadRequest &request, std::string &error)
{
  try {
    return load(request, error);
  } catch (const c10::Error &e) {
    error = last_line(e.what_without_backtrace());
  } catch (const std::exception &e) {
    error = last_line(e.what());
  } catch (...) {
    error = "unknown failure while loading";
  }
  return nullptr;
}

}    // namespace HLGauss

// Evaluates a potential: positions to edges, layers, then forces and virials, all as tensors on one
// device.

#include "layers.h"
#include "torch_model.h"

#include <torch/cuda.h>
#include <torch/version.h>

#include <algorithm>
#include <cmath>
#include <memory>

namespace HLGauss {

namespace {

using Tensor = torch::Tensor;
using TensorDict = c10::Dict<std::string, Tensor>;

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
      runtime(std::move(evaluates)), device(where), threads(request.threads)
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
    double budget = request.memory * MIB;
    if (budget == 0.0)
      budget = device.is_cpu() ? MIB * runtime->portion() * about.num_members : HUGE_VAL;
    layers = std::make_unique<Layers>(*runtime, about, num_shared, device, budget);
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
    const LayerOutputs outputs = evaluate_copies(test, 1, 1, true);
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
      return (double) layers->peak / (double) copies;
    };
    const double once = bytes(1), thrice = bytes(3);
    const double of_edge = std::max(1.0, (thrice - once) / (2.0 * num_edges));
    layers->set_cost(std::max(1.0, (once - of_edge * num_edges) / num_atoms), of_edge);
  }

  bool evaluate(const Graph &graph, const Request &request, Exchange &exchange, Evaluation &result,
                std::string &error) override
  {
    try {
      ThreadGuard guard(threads);
      MemoryMeter meter;
      evaluate_graph(graph, request, exchange, result, meter);
      result.peak_bytes = (double) layers->peak;
      result.notice = layers->notice;
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
  /// Copies of the self-test's structure side by side, every edge `repeat` times.
  LayerOutputs evaluate_copies(const SelfTest &test, int64_t copies, int64_t repeat,
                               bool with_fields)
  {
    const int64_t num_atoms = test.species.numel();
    const Tensor shift = torch::arange(copies, test.species.options()).unsqueeze(1) * num_atoms;
    const auto nodes = [&](const Tensor &x) {
      return (x.repeat_interleave(repeat).unsqueeze(0) + shift).flatten();
    };
    MemoryMeter meter;
    const std::vector<int64_t> layer_nodes(about.num_layers, copies * num_atoms);
    const std::vector<int64_t> layer_edges(about.num_layers,
                                           copies * repeat * test.centers.numel());
    const Edges edges = {test.species.repeat({copies}),
                         nodes(test.centers),
                         nodes(test.neighbors),
                         test.vectors.repeat_interleave(repeat, 0).repeat({copies, 1}),
                         layer_nodes,
                         layer_edges};
    return layers->evaluate(edges, with_fields, nullptr, meter);
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
    const LayerOutputs found =
        layers->evaluate({species, centers, neighbors, r.to(dtype), graph.layer_nodes, layer_edges},
                         request.fields, request.exchange_features ? &exchange : nullptr, meter);

    const Tensor g = of_mean(found.gradients.to(torch::kFloat64));
    const auto zeros = [&](int64_t width) { return torch::zeros({num_nodes, width}, g.options()); };
    Download down;
    down.add(found.energies.mean(1), result.energy);
    const Tensor forces = on_nodes(g, centers, neighbors, num_nodes);
    down.add(forces, result.forces);
    // the sum over edges of -r_e g_e is one over nodes, which are fewer, of x_i F_i; it is
    // symmetric, though of one edge r and g need not be parallel. Not a matrix product: LAMMPS
    // has a dgemm of its own that is found before that of torch and is slower
    std::vector<double> w(9, 0.0);
    if (request.virial) down.add((positions.unsqueeze(2) * forces.unsqueeze(1)).sum(0), w);
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
      if (about.num_sums > 0) sums = layers->gathered(sums, graph.num_owned(), exchange);
      fields = finish(found, species, sums);
    }
    result.fields.resize(fields.size());
    for (size_t k = 0; k < fields.size(); k++) down.add(fields[k], result.fields[k]);
    down.fetch();
    const double symmetric[6] = {
        w[0], w[4], w[8], 0.5 * (w[1] + w[3]), 0.5 * (w[2] + w[6]), 0.5 * (w[5] + w[7])};
    std::copy(symmetric, symmetric + 6, result.virial);
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
  Tensor sums_on_nodes(const LayerOutputs &outputs, const Tensor &centers, const Tensor &neighbors,
                       int64_t num_nodes) const
  {
    const Tensor carried = outputs.on_edges.to(torch::kFloat64);
    const Tensor sums = torch::zeros({num_nodes, num_shared}, carried.options())
                            .index_add_(0, neighbors.slice(0, 0, carried.size(0)), carried);
    if (about.num_members == 1) return sums;
    return torch::cat({on_nodes(outputs.gradients, centers, neighbors, num_nodes), sums}, 1);
  }

  /// Every field of the owned atoms.
  Tensors finish(const LayerOutputs &outputs, const Tensor &species, const Tensor &sums)
  {
    const int64_t num_owned = outputs.energies.size(0);
    if (num_owned == 0) return Tensors(about.fields.size(), outputs.energies.flatten());
    return runtime->finish({species.slice(0, 0, num_owned), outputs.energies, outputs.carried,
                            sums.slice(0, 0, num_owned)});
  }

  ModelInfo about;
  int64_t num_shared;    // numbers that an edge carries to its neighbour for fields
  torch::jit::Module module;
  std::unique_ptr<Runtime> runtime;
  std::unique_ptr<Layers> layers;
  torch::Device device;
  torch::Dtype dtype;
  int threads;
  Tensor species, edges_centers, edges_neighbors;    // on the device, of the last graph
};

}    // namespace

std::string last_line(const std::string &text)
{
  const auto end = text.find_last_not_of(" \n");
  if (end == std::string::npos) return "";
  const auto begin = text.rfind('\n', end);
  return text.substr(begin == std::string::npos ? 0 : begin + 1, end + 1 - (begin + 1));
}

std::unique_ptr<Model> make_model(const torch::jit::Module &module,
                                  std::unique_ptr<Runtime> runtime, torch::Device device,
                                  const LoadRequest &request, std::string &error)
{
  auto model = std::make_unique<TorchModel>(module, std::move(runtime), device, request);
  const std::string difference = model->self_test();
  if (!difference.empty()) {
    error = "self-test failed on " + device.str() + ": " + difference +
            "; export the model again with this torch";
    return nullptr;
  }
  model->measure_memory();
  return model;
}

}    // namespace HLGauss

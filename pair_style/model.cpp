// The TorchScript runtime of a potential: the only file that includes torch.

#include "model.h"

#include <ATen/Parallel.h>
#include <torch/cuda.h>
#include <torch/script.h>
#include <torch/version.h>

#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <istream>
#include <memory>
#include <streambuf>

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

class MemoryBuffer : public std::streambuf {
public:
  MemoryBuffer(const char *bytes, size_t size)
  {
    char *begin = const_cast<char *>(bytes);    // a get area is never written to
    setg(begin, begin, begin + size);
  }

protected:
  pos_type seekoff(off_type offset, std::ios_base::seekdir dir, std::ios_base::openmode) override
  {
    char *base = dir == std::ios_base::beg ? eback() : dir == std::ios_base::cur ? gptr() : egptr();
    if (base + offset < eback() || base + offset > egptr()) return pos_type(off_type(-1));
    setg(eback(), base + offset, egptr());
    return gptr() - eback();
  }
  pos_type seekpos(pos_type position, std::ios_base::openmode mode) override
  {
    return seekoff(off_type(position), std::ios_base::beg, mode);
  }
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

/// Version of the libtorch found at run time, from the version.py beside its lib folder, or "".
std::string runtime_torch_version()
{
  Dl_info info;
  void *symbol = reinterpret_cast<void *>(&at::get_num_threads);
  if (!dladdr(symbol, &info) || !info.dli_fname) return "";
  std::string folder = info.dli_fname;
  for (int level = 0; level < 2; ++level) folder = folder.substr(0, folder.rfind('/'));
  std::ifstream file(folder + "/version.py");
  const std::string key = "__version__ = '";
  for (std::string line; std::getline(file, line);)
    if (line.compare(0, key.size(), key) == 0)
      return line.substr(key.size(), line.find('\'', key.size()) - key.size());
  return "";
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

class TorchScriptModel : public Model {
public:
  TorchScriptModel(torch::jit::Module loaded, torch::Device where, int num_threads) :
      module(std::move(loaded)), device(where), threads(num_threads)
  {
    about.elements = list_attribute<std::string>(module, "elements");
    about.masses = list_attribute<double>(module, "masses");
    about.cutoff = module.attr("cutoff").toDouble();
    about.num_layers = (int) module.attr("num_layers").toInt();
    about.dtype = module.attr("dtype").toStringRef();
    about.card = module.attr("card").toStringRef();
    about.fields = list_attribute<std::string>(module, "fields");
    about.field_units = list_attribute<std::string>(module, "field_units");
    dtype = about.dtype == "float64" ? torch::kFloat64 : torch::kFloat32;
  }

  const ModelInfo &info() const override { return about; }

  void describe(const std::string &name, int local_rank, int local_ranks)
  {
    about.device = name;
    std::string version = runtime_torch_version();
    about.runtime = "TorchScript, torch " + (version.empty() ? TORCH_VERSION : version);
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

  /// One line about what differs from the outputs stored in the file, or "".
  std::string self_test()
  {
    ThreadGuard guard(threads);
    const double tolerance = module.attr("selftest_tolerance").toDouble();
    const auto stored =
        c10::impl::toTypedDict<std::string, Tensor>(module.attr("selftest_inputs").toGenericDict());
    const auto expected = c10::impl::toTypedDict<std::string, Tensor>(
        module.attr("selftest_outputs").toGenericDict());
    TensorDict inputs;
    for (const auto &item : stored) inputs.insert(item.key(), place(item.key(), item.value()));
    // the first calls of a scripted module are slow while it specializes: spend them here
    run(inputs, false);
    run(inputs, false);
    const TensorDict outputs = run(inputs, true);
    for (const auto &item : expected) {
      const std::string key = item.key();
      if (!outputs.contains(key)) return "its output has no '" + key + "'";
      const Tensor want = item.value().to(torch::kCPU, torch::kFloat64);
      const Tensor got = outputs.at(key).detach().to(torch::kCPU, torch::kFloat64);
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

  bool evaluate(const Graph &graph, bool with_fields, Evaluation &result,
                std::string &error) override
  {
    try {
      ThreadGuard guard(threads);
      const auto num_edges = (int64_t) graph.centers.size();
      const Tensor vectors = torch::from_blob(const_cast<double *>(graph.vectors.data()),
                                              {num_edges, 3}, torch::kFloat64);
      TensorDict inputs;
      inputs.insert("species", place("species", view(graph.species)));
      inputs.insert("edge_index", place("edge_index", torch::stack({view(graph.centers),
                                                                    view(graph.neighbors)})));
      inputs.insert("edge_vectors", vectors.to(device, dtype));
      inputs.insert("layer_nodes", view(graph.layer_nodes));
      inputs.insert("layer_edges", view(graph.layer_edges));

      const TensorDict outputs = run(inputs, with_fields);
      if (!copy(outputs, "energy", graph.layer_nodes.back(), result.energy, error)) return false;
      if (!copy(outputs, "edge_gradients", 3 * num_edges, result.gradients, error)) return false;
      result.fields.resize(with_fields ? about.fields.size() : 0);
      for (size_t k = 0; k < result.fields.size(); ++k)
        if (!copy(outputs, about.fields[k], graph.layer_nodes.back(), result.fields[k], error))
          return false;
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
  /// Layer sizes stay on the CPU, everything else goes to the device (keys.py).
  Tensor place(const std::string &key, const Tensor &tensor) const
  {
    return key.rfind("layer_", 0) == 0 ? tensor : tensor.to(device);
  }

  TensorDict run(const TensorDict &inputs, bool with_fields)
  {
    const c10::IValue output = module.forward({inputs, with_fields, false});
    return c10::impl::toTypedDict<std::string, Tensor>(output.toGenericDict());
  }

  static bool copy(const TensorDict &outputs, const std::string &key, int64_t size,
                   std::vector<double> &values, std::string &error)
  {
    if (!outputs.contains(key)) {
      error = "its output has no '" + key + "'";
      return false;
    }
    const Tensor tensor = outputs.at(key).detach().to(torch::kCPU, torch::kFloat64).contiguous();
    if (tensor.numel() != size) {
      error = "'" + key + "' has " + std::to_string(tensor.numel()) + " values instead of " +
              std::to_string(size);
      return false;
    }
    const double *begin = tensor.data_ptr<double>();
    values.assign(begin, begin + size);
    return true;
  }

  ModelInfo about;
  torch::jit::Module module;
  torch::Device device;
  torch::Dtype dtype;
  int threads;
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
  torch::jit::Module module;
  try {
    MemoryBuffer buffer(request.bytes, request.size);
    std::istream stream(&buffer);
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
  if (version > MODEL_FORMAT_VERSION) {
    error = "format version " + std::to_string(version) + " is newer than " +
            std::to_string(MODEL_FORMAT_VERSION) + ", the newest this plugin reads: update lmp-hl";
    return nullptr;
  }
  for (const char *name :
       {"elements", "masses", "cutoff", "num_layers", "dtype", "fields", "field_units",
        "selftest_inputs", "selftest_outputs", "selftest_tolerance"})
    if (!module.hasattr(name)) {
      error = std::string("the file has no attribute '") + name + "': export it again";
      return nullptr;
    }
  module.eval();
  auto model = std::make_unique<TorchScriptModel>(module, *device, request.threads);
  model->describe(device->str(), request.local_rank, request.local_ranks);
  const std::string difference = model->self_test();
  if (!difference.empty()) {
    error = "self-test failed on " + device->str() + ": " + difference +
            "; export the model again with this torch";
    return nullptr;
  }
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

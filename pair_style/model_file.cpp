// Opens and checks a model file, and chooses the device it is evaluated on.

#include "torch_model.h"

#include <torch/cuda.h>
#include <torch/script.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <sstream>

namespace HLGauss {

namespace {

std::string first_sentence(const std::string &text)
{
  return text.substr(0, std::min(text.find('\n'), text.find(". ")));
}

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
  return make_model(module, std::move(runtime), *device, request, error).release();
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

#include "runtime.h"

#include <ATen/Parallel.h>
#include <caffe2/serialize/inline_container.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/version.h>

#include <dlfcn.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <set>
#include <sstream>

namespace HLGauss {

namespace {

constexpr const char *SCRIPT_RECORD = "extra/hl.pt";
constexpr const char *BUILD_RECORD = "extra/lmp_hl_build.txt";

Tensors run_finish(torch::jit::Module &stages, const Tensors &inputs)
{
  return stages.run_method("finish", inputs.at(0), inputs.at(1), inputs.at(2), inputs.at(3))
      .toTensorVector();
}

class ScriptedRuntime : public Runtime {
public:
  explicit ScriptedRuntime(const torch::jit::Module &module) :
      stages(module.attr("stages").toModule())
  {
  }

  at::Tensor layer(int t, const Tensors &inputs) override
  {
    return stages.run_method("layer", (int64_t) t, list(inputs)).toTensor();
  }

  Tensors layer_vjp(int t, const Tensors &inputs, const at::Tensor &gradients) override
  {
    return stages.run_method("layer_vjp", (int64_t) t, list(inputs), gradients).toTensorVector();
  }

  Tensors final(const Tensors &inputs, bool with_fields) override
  {
    return stages.run_method("final", list(inputs), with_fields).toTensorVector();
  }

  Tensors finish(const Tensors &inputs) override { return run_finish(stages, inputs); }

  std::string name() const override { return "TorchScript"; }
  double portion() const override { return 32.0; }    // fewer atoms, and calls cost more than work

private:
  static c10::List<at::Tensor> list(const Tensors &tensors)
  {
    return c10::List<at::Tensor>(tensors);
  }

  torch::jit::Module stages;
};

/// A file that is gone when the object is: the loader of compiled stages reads no memory.
class TemporaryFile {
public:
  explicit TemporaryFile(const std::string &bytes)
  {
    const char *folder = getenv("TMPDIR");
    path = std::string(folder && *folder ? folder : "/tmp") + "/hlgauss-XXXXXX.pt2";
    const int file = mkstemps(path.data(), 4);
    TORCH_CHECK(file >= 0, "cannot create ", path, ": ", strerror(errno), "; set TMPDIR");
    size_t done = 0;
    while (done < bytes.size()) {
      const ssize_t n = write(file, bytes.data() + done, bytes.size() - done);
      if (n <= 0) break;
      done += (size_t) n;
    }
    const int reason = errno;
    close(file);
    if (done < bytes.size()) unlink(path.c_str());
    TORCH_CHECK(done == bytes.size(), "cannot write ", path, ": ", strerror(reason),
                "; make room or set TMPDIR");
  }
  ~TemporaryFile() { unlink(path.c_str()); }
  TemporaryFile(const TemporaryFile &) = delete;
  TemporaryFile &operator=(const TemporaryFile &) = delete;

  std::string path;
};

class CompiledRuntime : public Runtime {
  using Loader = torch::inductor::AOTIModelPackageLoader;

public:
  CompiledRuntime(const std::string &bytes, const torch::jit::Module &module,
                  torch::Device device) :
      stages(module.attr("stages").toModule())
  {
    const int64_t num_layers = stages.attr("num_layers").toInt();
    const TemporaryFile file(bytes);
    std::vector<std::string> names = {"final", "final_fields"};
    for (int64_t t = 0; t < num_layers - 1; t++)
      for (const char *suffix : {"", "_vjp"}) names.push_back("layer" + std::to_string(t) + suffix);
    for (const std::string &stage : names)
      loaders.emplace(stage, std::make_unique<Loader>(file.path, stage, device.is_cpu(), 1,
                                                      device.is_cpu() ? -1 : device.index()));
  }

  at::Tensor layer(int t, const Tensors &inputs) override
  {
    return loaders.at("layer" + std::to_string(t))->run(inputs).at(0);
  }

  Tensors layer_vjp(int t, const Tensors &inputs, const at::Tensor &gradients) override
  {
    Tensors all = inputs;
    all.push_back(gradients);
    return loaders.at("layer" + std::to_string(t) + "_vjp")->run(all);
  }

  Tensors final(const Tensors &inputs, bool with_fields) override
  {
    return loaders.at(with_fields ? "final_fields" : "final")->run(inputs);
  }

  // a few operations per atom: not worth compiling
  Tensors finish(const Tensors &inputs) override { return run_finish(stages, inputs); }

  std::string name() const override { return "AOTInductor"; }
  double portion() const override { return 8.0; }

private:
  torch::jit::Module stages;
  std::map<std::string, std::unique_ptr<Loader>> loaders;
};

std::string record(caffe2::serialize::PyTorchStreamReader &reader, const char *name)
{
  const auto [data, size] = reader.getRecord(name);
  return {static_cast<const char *>(data.get()), size};
}

std::set<std::string> words_of(const std::string &text)
{
  std::istringstream stream(text);
  std::set<std::string> words;
  for (std::string word; stream >> word;) words.insert(word);
  return words;
}

std::set<std::string> features_of_this_cpu()
{
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);)
    if (line.compare(0, 5, "flags") == 0) return words_of(line.substr(line.find(':') + 1));
  return {};
}

std::string without_build(const std::string &version)
{
  return version.substr(0, version.find('+'));
}

/// What keeps compiled stages from running here, with the cure, or "".
std::string misfit(const std::string &build, torch::Device device)
{
  std::map<std::string, std::string> made_for;
  std::istringstream lines(build);
  for (std::string line; std::getline(lines, line);) {
    const auto space = line.find(' ');
    if (space != std::string::npos) made_for[line.substr(0, space)] = line.substr(space + 1);
  }
  const std::string again =
      ": export it again with 'lmp-hl export --runtime aoti model.ckpt hl.pt2";
  const std::string here = device.is_cpu() ? "cpu" : "cuda";
  if (made_for["device"] != here)
    return "compiled for " + made_for["device"] + ", to be run on " + here + again + " --device " +
           here + "', or give 'device " + made_for["device"] + "'";
  const std::string version = runtime_torch_version();
  if (!version.empty() && without_build(made_for["torch"]) != without_build(version))
    return "compiled with torch " + made_for["torch"] + ", this is torch " + version + again + "'";
  const auto present = features_of_this_cpu();
  std::string missing;
  for (const std::string &feature : words_of(made_for["cpu_features"]))
    if (!present.count(feature)) missing += " " + feature;
  if (!missing.empty())
    return "compiled for a CPU with" + missing + ", which this one lacks" + again +
           " --cpu-isa x86-64-v3' (or v2), or on the oldest node";
  return "";
}

std::unique_ptr<caffe2::serialize::PyTorchStreamReader> open_archive(std::istream &stream)
{
  return std::make_unique<caffe2::serialize::PyTorchStreamReader>(&stream);
}

}    // namespace

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

std::unique_ptr<Runtime> scripted_runtime(const torch::jit::Module &module)
{
  // on a GPU kernels are fused: for any number of atoms, or each new number would compile them anew
  torch::jit::FusionStrategy any_size = {{torch::jit::FusionBehavior::DYNAMIC, 3}};
  torch::jit::setFusionStrategy(any_size);
  return std::make_unique<ScriptedRuntime>(module);
}

bool is_compiled(const std::string &bytes, std::string &script)
{
  std::istringstream stream(bytes);
  const auto reader = open_archive(stream);
  if (!reader->hasRecord(BUILD_RECORD)) return false;
  script = record(*reader, SCRIPT_RECORD);
  return true;
}

std::unique_ptr<Runtime> compiled_runtime(const std::string &bytes,
                                          const torch::jit::Module &module, torch::Device device,
                                          std::string &error)
{
  std::istringstream stream(bytes);
  error = misfit(record(*open_archive(stream), BUILD_RECORD), device);
  if (!error.empty()) return nullptr;
  return std::make_unique<CompiledRuntime>(bytes, module, device);
}

}    // namespace HLGauss

// Stages of a potential (lmp_hl/stages.py) evaluated by TorchScript or as compiled by AOTInductor.

#ifndef LMP_HLGAUSS_RUNTIME_H
#define LMP_HLGAUSS_RUNTIME_H

#include <torch/script.h>

#include <memory>
#include <string>
#include <vector>

namespace HLGauss {

using Tensors = std::vector<at::Tensor>;

class Runtime {
public:
  virtual ~Runtime() = default;
  virtual at::Tensor layer(int t, const Tensors &inputs) = 0;
  virtual Tensors layer_vjp(int t, const Tensors &inputs, const at::Tensor &gradients) = 0;
  virtual Tensors final(const Tensors &inputs, bool with_fields) = 0;
  virtual Tensors finish(const Tensors &inputs) = 0;
  virtual std::string name() const = 0;
  /// MiB of tensors at once with which a single potential is fastest on a CPU.
  virtual double portion() const = 0;
};

/// Version of the libtorch that is loaded, from the version.py beside its folder, or "".
std::string runtime_torch_version();

/// Stages of a scripted module that is on its device already.
std::unique_ptr<Runtime> scripted_runtime(const torch::jit::Module &module);

/// Whether the archive holds compiled stages; if so, `script` becomes the hl.pt inside it.
bool is_compiled(const std::string &bytes, std::string &script);

/// Compiled stages, or nullptr with a one-line `error` when they were made for another machine.
/// `module` is the hl.pt inside the archive, on the device.
std::unique_ptr<Runtime> compiled_runtime(const std::string &bytes,
                                          const torch::jit::Module &module, torch::Device device,
                                          std::string &error);

}    // namespace HLGauss

#endif

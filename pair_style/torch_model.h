// Between opening a file (model_file.cpp) and evaluating what it holds (model.cpp).

#ifndef LMP_HLGAUSS_TORCH_MODEL_H
#define LMP_HLGAUSS_TORCH_MODEL_H

#include "model.h"
#include "runtime.h"

#include <ATen/Parallel.h>

#include <memory>
#include <string>

namespace HLGauss {

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

/// The line of a TorchScript failure that names the exception; the rest is its call stack.
std::string last_line(const std::string &text);

/// A model whose self-test has passed, or nullptr with a one-line `error`. `module` has the
/// attributes of the format this plugin reads and is on the device.
std::unique_ptr<Model> make_model(const torch::jit::Module &module,
                                  std::unique_ptr<Runtime> runtime, torch::Device device,
                                  const LoadRequest &request, std::string &error);

}    // namespace HLGauss

#endif

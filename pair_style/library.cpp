#include "library.h"

#include <dlfcn.h>

namespace HLGauss {

std::string plugin_folder()
{
  Dl_info info;
  if (!dladdr(reinterpret_cast<void *>(&plugin_folder), &info) || !info.dli_fname) return "";
  const std::string path = info.dli_fname;
  const auto slash = path.rfind('/');
  return slash == std::string::npos ? "." : path.substr(0, slash);
}

void *open_beside_plugin(const char *filename, std::string &error)
{
  const std::string path = plugin_folder() + "/" + filename;
  void *library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    const char *reason = dlerror();
    error = "cannot open " + path + ": " + (reason ? reason : "unknown reason") +
            "; run 'lmp-hl doctor' or reinstall lmp-hl";
  }
  return library;
}

void *find_symbol(void *library, const char *symbol, std::string &error)
{
  void *address = dlsym(library, symbol);
  if (!address)
    error = std::string("symbol ") + symbol +
            " is missing in a library beside the plugin; the files come from different builds: "
            "reinstall lmp-hl";
  return address;
}

}    // namespace HLGauss

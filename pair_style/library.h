// Opens a shared library that lies beside the plugin, out of sight of every other library.

#ifndef LMP_HLGAUSS_LIBRARY_H
#define LMP_HLGAUSS_LIBRARY_H

#include <string>

namespace HLGauss {

/// Folder that holds hlgaussplugin.so, without a trailing slash; empty if it cannot be found.
std::string plugin_folder();

/// dlopen `filename` (e.g. "libhlgauss_h5md.so") from the plugin's folder with RTLD_NOW |
/// RTLD_LOCAL. Returns the handle, or nullptr with `error` saying which file, why, and what to do.
/// Opening twice gives the same handle; a library is never closed again.
void *open_beside_plugin(const char *filename, std::string &error);

/// Address of an extern "C" symbol, or nullptr with `error` set.
void *find_symbol(void *library, const char *symbol, std::string &error);

}    // namespace HLGauss

#endif

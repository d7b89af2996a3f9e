// SHA-256 of a block of memory, so that the log shows what `sha256sum hl.pt` prints.

#ifndef LMP_HLGAUSS_SHA256_H
#define LMP_HLGAUSS_SHA256_H

#include <cstddef>
#include <string>

namespace HLGauss {

/// 64 hexadecimal digits (FIPS 180-4).
std::string sha256(const char *bytes, size_t size);

}    // namespace HLGauss

#endif

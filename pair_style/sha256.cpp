#include "sha256.h"

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace HLGauss {

namespace {

/// First 32 bits of the fractional part of a root of the first 64 primes: the standard's constants.
struct Constants {
  uint32_t round[64], start[8];

  Constants()
  {
    int found = 0;
    for (int n = 2; found < 64; ++n) {
      bool prime = true;
      for (int d = 2; d * d <= n; ++d) prime = prime && n % d != 0;
      if (!prime) continue;
      if (found < 8) start[found] = fraction_bits(std::sqrt((long double) n));
      round[found++] = fraction_bits(std::cbrt((long double) n));
    }
  }

  static uint32_t fraction_bits(long double root)
  {
    return (uint32_t) std::floor((root - std::floor(root)) * 4294967296.0L);
  }
};

void add_block(const unsigned char *block, const Constants &constants, uint32_t state[8])
{
  uint32_t w[64];
  for (int t = 0; t < 16; ++t)
    w[t] = (uint32_t) block[4 * t] << 24 | (uint32_t) block[4 * t + 1] << 16 |
           (uint32_t) block[4 * t + 2] << 8 | (uint32_t) block[4 * t + 3];
  for (int t = 16; t < 64; ++t) {
    const uint32_t s0 = std::rotr(w[t - 15], 7) ^ std::rotr(w[t - 15], 18) ^ (w[t - 15] >> 3);
    const uint32_t s1 = std::rotr(w[t - 2], 17) ^ std::rotr(w[t - 2], 19) ^ (w[t - 2] >> 10);
    w[t] = w[t - 16] + s0 + w[t - 7] + s1;
  }
  uint32_t v[8];
  std::memcpy(v, state, sizeof(v));
  for (int t = 0; t < 64; ++t) {
    const uint32_t s1 = std::rotr(v[4], 6) ^ std::rotr(v[4], 11) ^ std::rotr(v[4], 25);
    const uint32_t choice = (v[4] & v[5]) ^ (~v[4] & v[6]);
    const uint32_t t1 = v[7] + s1 + choice + constants.round[t] + w[t];
    const uint32_t s0 = std::rotr(v[0], 2) ^ std::rotr(v[0], 13) ^ std::rotr(v[0], 22);
    const uint32_t majority = (v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]);
    std::memmove(v + 1, v, 7 * sizeof(uint32_t));
    v[4] += t1;
    v[0] = t1 + s0 + majority;
  }
  for (int k = 0; k < 8; ++k) state[k] += v[k];
}

}    // namespace

std::string sha256(const char *bytes, size_t size)
{
  static const Constants constants;
  uint32_t state[8];
  std::memcpy(state, constants.start, sizeof(state));
  const auto *data = reinterpret_cast<const unsigned char *>(bytes);
  size_t done = 0;
  for (; size - done >= 64; done += 64) add_block(data + done, constants, state);

  // the rest, a one bit, zeros, and the number of bits as a 64-bit big-endian integer
  unsigned char tail[128] = {0};
  const size_t rest = size - done;
  if (rest) std::memcpy(tail, data + done, rest);
  tail[rest] = 0x80;
  const size_t length = rest < 56 ? 64 : 128;
  for (int k = 0; k < 8; ++k)
    tail[length - 1 - k] = (unsigned char) ((uint64_t) size * 8 >> (8 * k));
  for (size_t k = 0; k < length; k += 64) add_block(tail + k, constants, state);

  std::string digits;
  for (uint32_t word : state)
    for (int shift = 28; shift >= 0; shift -= 4) digits += "0123456789abcdef"[word >> shift & 15];
  return digits;
}

}    // namespace HLGauss

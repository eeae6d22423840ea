// Checks of arguments at the border to Python: std::invalid_argument becomes a ValueError there.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace kfade {

// Throws `NAME is VALUE; it must be RULE` unless `holds`.
inline void require(bool holds, const char* name, long long value, const char* rule) {
  if (!holds) {
    throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) + "; it must be " + rule);
  }
}

// An address given as an integer; it may be null only where there is nothing to read.
template <class T>
T* address(const char* name, std::uintptr_t value, bool required = true, std::uintptr_t alignment = alignof(T)) {
  require(!required || value != 0, name, 0, "the address of a tensor");
  if (value % alignment != 0) {
    throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) + "; it must be a multiple of " +
                                std::to_string(alignment) + " bytes");
  }
  return reinterpret_cast<T*>(value);
}

}  // namespace kfade

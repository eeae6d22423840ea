// Which instruction sets were compiled and can run here.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace kfade::cpu {

// From the narrowest to the widest.
std::vector<const Kernels*> supported();

// The kernels of this name; throws std::invalid_argument if this processor or this build has none.
const Kernels& kernels(const std::string& isa);

// Whether the processor has matrix units for bfloat16, which no kernel here uses and oneDNN does.
bool has_amx();

}  // namespace kfade::cpu

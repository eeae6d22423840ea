// The kernels of `eigenvalue_correction_`.
#include "launch.h"

namespace kfade::cuda {

Facts squares_facts(Kernel kernel) { return facts<Squares>(kernel); }

void launch_squares(Kernel kernel, Type type, const Launch& launch, int blocks, void* stream) {
  start_products<Squares>(kernel, type, launch, blocks, stream);
}

}  // namespace kfade::cuda

// The kernels of `syrk_` and `accumulate_factors_`.
#include "launch.h"

namespace kfade::cuda {

Facts outer_facts(Kernel kernel) { return facts<Outer>(kernel); }

void launch_outer(Kernel kernel, Type type, const Launch& launch, int blocks, void* stream) {
  start_products<Outer>(kernel, type, launch, blocks, stream);
}

}  // namespace kfade::cuda

#include "cuda/linear_act_tile.cuh"

namespace mplug2_fast::cuda {

const char* linear_act_128x256(const LinearActArguments& given, const Launch& launch) {
    return run<128, 256, Groups::share, 1, 2>(given, launch);
}

}  // namespace mplug2_fast::cuda

#include "cuda/linear_act_tile.cuh"

namespace mplug2_fast::cuda {

const char* linear_act_192x128(const LinearActArguments& given, const Launch& launch) {
    return run<192, 128, Groups::take_turns, 1, 2>(given, launch);
}

}  // namespace mplug2_fast::cuda

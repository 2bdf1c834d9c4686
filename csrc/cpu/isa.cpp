#include "cpu/isa.h"

#include <stdexcept>

namespace mplug2_fast {

bool is_supported(Isa isa) {
    switch (isa) {
        case Isa::portable:
            return true;
#ifdef MPLUG2_X86
        case Isa::avx2:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        case Isa::avx512:
            return is_supported(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        case Isa::avx512_bf16:
            return is_supported(Isa::avx512) && __builtin_cpu_supports("avx512bf16");
#endif
        default:
            return false;
    }
}

Isa isa_named(const std::string& name) {
    for (int i = 0; i < 4; ++i) {
        if (name == kIsaNames[i]) {
            if (!is_supported(static_cast<Isa>(i))) {
                throw std::invalid_argument("this processor does not have the instruction set " + name);
            }
            return static_cast<Isa>(i);
        }
    }
    throw std::invalid_argument("there is no instruction set " + name +
                                ": choose portable, avx2, avx512 or avx512_bf16");
}

}  // namespace mplug2_fast

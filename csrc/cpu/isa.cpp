#include "cpu/isa.h"

#include <stdexcept>

namespace mplug2_fast {

namespace {

// Only features of compiled sets are named, because old compilers do not know others.
bool processor_has(Isa isa) {
    switch (isa) {
        case Isa::portable:
            return true;
#ifndef MPLUG2_WITHOUT_AVX512_BF16
        case Isa::avx512_bf16:
            return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
                   processor_has(Isa::avx512);
#endif
#ifndef MPLUG2_WITHOUT_AVX512_VNNI
        case Isa::avx512_vnni:
            return __builtin_cpu_supports("avx512vnni") && processor_has(Isa::avx512);
#endif
#ifdef MPLUG2_X86
        case Isa::avx512:
            return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && processor_has(Isa::avx2);
        case Isa::avx2:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
        default:
            return false;
    }
}

}  // namespace

bool is_compiled(Isa isa) {
    switch (isa) {
        case Isa::portable:
#ifndef MPLUG2_WITHOUT_AVX2
        case Isa::avx2:
#endif
#ifndef MPLUG2_WITHOUT_AVX512
        case Isa::avx512:
#endif
#ifndef MPLUG2_WITHOUT_AVX512_VNNI
        case Isa::avx512_vnni:
#endif
#ifndef MPLUG2_WITHOUT_AVX512_BF16
        case Isa::avx512_bf16:
#endif
            return true;
        default:
            return false;
    }
}

bool is_supported(Isa isa) {
    return is_compiled(isa) && processor_has(isa);
}

Isa isa_named(const std::string& name) {
    for (int i = 0; i < 5; ++i) {
        if (name == kIsaNames[i]) {
            const Isa isa = static_cast<Isa>(i);
            if (!is_compiled(isa)) {
                throw std::invalid_argument("mplug2_fast was built without kernels for " + name +
                                            ": `mplug2-fast info` shows why");
            }
            if (!is_supported(isa)) {
                throw std::invalid_argument("this processor does not have the instruction set " + name);
            }
            return isa;
        }
    }
    throw std::invalid_argument("there is no instruction set " + name +
                                ": choose portable, avx2, avx512, avx512_vnni or avx512_bf16");
}

}  // namespace mplug2_fast

#pragma once

#include <string>

// Kernels are compiled once for each instruction set, from one source, in a namespace of its name; which one runs is
// decided at run time, by what the processor has. CMake defines MPLUG2_ISA in the sources that hold kernels.

#if defined(__x86_64__) || defined(_M_X64)
#define MPLUG2_X86 1
#endif

namespace mplug2_fast {

// In ascending order of speed.
enum class Isa { portable, avx2, avx512, avx512_bf16 };

inline constexpr const char* kIsaNames[] = {"portable", "avx2", "avx512", "avx512_bf16"};

// Whether the kernels were compiled for it and this processor has it.
bool is_supported(Isa isa);

// The instruction set of that name; throws std::invalid_argument where there is none of that name or the processor
// lacks it.
Isa isa_named(const std::string& name);

}  // namespace mplug2_fast

// Declares `void name(const Arguments&)` for every instruction set, and `name(isa, arguments)` that calls the right
// one.
#ifdef MPLUG2_X86
#define MPLUG2_KERNEL(name, Arguments)                      \
    namespace portable {                                    \
    void name(const Arguments&);                            \
    }                                                       \
    namespace avx2 {                                        \
    void name(const Arguments&);                            \
    }                                                       \
    namespace avx512 {                                      \
    void name(const Arguments&);                            \
    }                                                       \
    namespace avx512_bf16 {                                 \
    void name(const Arguments&);                            \
    }                                                       \
    inline void name(Isa isa, const Arguments& arguments) { \
        switch (isa) {                                      \
            case Isa::avx512_bf16:                          \
                return avx512_bf16::name(arguments);        \
            case Isa::avx512:                               \
                return avx512::name(arguments);             \
            case Isa::avx2:                                 \
                return avx2::name(arguments);               \
            case Isa::portable:                             \
                return portable::name(arguments);           \
        }                                                   \
    }
#else
#define MPLUG2_KERNEL(name, Arguments)                  \
    namespace portable {                                \
    void name(const Arguments&);                        \
    }                                                   \
    inline void name(Isa, const Arguments& arguments) { \
        portable::name(arguments);                      \
    }
#endif

#pragma once

#include <string>

// Kernels are compiled from one source for each instruction set, in a namespace of its name. At run time, the processor
// decides which one is used. CMake defines MPLUG2_ISA in the sources that contain kernels.

#if defined(__x86_64__) || defined(_M_X64)
#define MPLUG2_X86 1
#endif

namespace mplug2_fast {

// In ascending order of speed. With avx512_vnni most kernels are those of avx512.
enum class Isa { portable, avx2, avx512, avx512_vnni, avx512_bf16 };

inline constexpr const char* kIsaNames[] = {"portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16"};

// Whether this module has kernels for the set.
bool is_compiled(Isa isa);

// Whether this module has kernels for the set, and this processor can run them.
bool is_supported(Isa isa);

// The instruction set of that name; throws std::invalid_argument if the name is unknown or the set not supported.
Isa isa_named(const std::string& name);

}  // namespace mplug2_fast

// MPLUG2_WITHOUT_<ISA> marks kernels that the compiler could not compile, or that are for another processor family.
#ifndef MPLUG2_X86
#define MPLUG2_WITHOUT_AVX2
#define MPLUG2_WITHOUT_AVX512
#define MPLUG2_WITHOUT_AVX512_BF16
#endif
#if defined(MPLUG2_WITHOUT_AVX512) && !defined(MPLUG2_WITHOUT_AVX512_VNNI)
#define MPLUG2_WITHOUT_AVX512_VNNI
#endif

#define MPLUG2_DECLARE(isa, name, Arguments) \
    namespace isa {                          \
    void name(const Arguments&);             \
    }
#define MPLUG2_CASE(isa, name, arguments) \
    case Isa::isa:                        \
        return isa::name(arguments);

#ifdef MPLUG2_WITHOUT_AVX2
#define MPLUG2_DECLARE_AVX2(name, Arguments)
#define MPLUG2_CASE_AVX2(name, arguments)
#else
#define MPLUG2_DECLARE_AVX2(name, Arguments) MPLUG2_DECLARE(avx2, name, Arguments)
#define MPLUG2_CASE_AVX2(name, arguments) MPLUG2_CASE(avx2, name, arguments)
#endif
#ifdef MPLUG2_WITHOUT_AVX512
#define MPLUG2_DECLARE_AVX512(name, Arguments)
#define MPLUG2_CASE_AVX512(name, arguments)
#else
#define MPLUG2_DECLARE_AVX512(name, Arguments) MPLUG2_DECLARE(avx512, name, Arguments)
#define MPLUG2_CASE_AVX512(name, arguments) MPLUG2_CASE(avx512, name, arguments)
#endif
#ifdef MPLUG2_WITHOUT_AVX512_VNNI
#define MPLUG2_DECLARE_AVX512_VNNI(name, Arguments)
#define MPLUG2_CASE_AVX512_VNNI(isa, name, arguments)
#else
#define MPLUG2_DECLARE_AVX512_VNNI(name, Arguments) MPLUG2_DECLARE(avx512_vnni, name, Arguments)
#define MPLUG2_CASE_AVX512_VNNI(isa, name, arguments) \
    case Isa::avx512_vnni:                            \
        return isa::name(arguments);
#endif
#ifdef MPLUG2_WITHOUT_AVX512_BF16
#define MPLUG2_DECLARE_AVX512_BF16(name, Arguments)
#define MPLUG2_CASE_AVX512_BF16(name, arguments)
#else
#define MPLUG2_DECLARE_AVX512_BF16(name, Arguments) MPLUG2_DECLARE(avx512_bf16, name, Arguments)
#define MPLUG2_CASE_AVX512_BF16(name, arguments) MPLUG2_CASE(avx512_bf16, name, arguments)
#endif

// Declares `void name(const Arguments&)` for every instruction set, and `name(isa, arguments)` that calls the right
// one. `vnni` is the set whose kernel avx512_vnni takes.
#define MPLUG2_KERNEL_WITH(vnni, name, Arguments)           \
    MPLUG2_DECLARE(portable, name, Arguments)               \
    MPLUG2_DECLARE_AVX2(name, Arguments)                    \
    MPLUG2_DECLARE_AVX512(name, Arguments)                  \
    MPLUG2_DECLARE_AVX512_BF16(name, Arguments)             \
    inline void name(Isa isa, const Arguments& arguments) { \
        switch (isa) {                                      \
            MPLUG2_CASE_AVX512_BF16(name, arguments)        \
            MPLUG2_CASE_AVX512_VNNI(vnni, name, arguments)  \
            MPLUG2_CASE_AVX512(name, arguments)             \
            MPLUG2_CASE_AVX2(name, arguments)               \
            default:                                        \
                return portable::name(arguments);           \
        }                                                   \
    }
#define MPLUG2_KERNEL(name, Arguments) MPLUG2_KERNEL_WITH(avx512, name, Arguments)

// For kernels that multiply bytes.
#define MPLUG2_VNNI_KERNEL(name, Arguments)     \
    MPLUG2_DECLARE_AVX512_VNNI(name, Arguments) \
    MPLUG2_KERNEL_WITH(avx512_vnni, name, Arguments)
